"""Start several processes that train together over gloo, and bring back what each returned.

They are forked from a server that has imported the heavy libraries once: a rank starts in a moment instead of ten
seconds.
"""

import faulthandler
import multiprocessing as mp
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adaptive.doctor.checks.network import free_port

COMMANDS = ("train", "evaluate", "pack", "calibrate", "predict", "bench", "checkpoint", "plan", "report")
# Not the least is what DeepSpeed imports for ZeRO: its Muon compiles functions, which takes all of inductor.
PRELOADED = [
    *("torch", "torch._inductor.compile_fx", "deepspeed", "timm", "webdataset", "adaptive.training.run"),
    *("adaptive.runs", "adaptive.inference.runner", "adaptive.inference.calibration.calibrate"),
    *(f"adaptive.commands.{name}" for name in COMMANDS),
    *("adaptive.commands.main", "adaptive.planning.printing", "matplotlib.figure"),
]


def rank_environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What a launcher would tell a rank."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip


def fork_context() -> Any:
    """Processes forked from the server with the libraries; it sees the environment of the first call."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return context


def run_ranks(function: Callable[..., Any], world: int, *arguments: Any, seconds: float = 300) -> list[Any]:
    """Call ``function(*arguments)`` in ``world`` fresh processes that see the usual environment of a rank.

    ``function`` must be importable (top level of a module). Returns every rank's value; a rank's exception is raised
    here with its traceback.
    """
    port = free_port()
    context = fork_context()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_call, args=(function, rank, world, port, folder, arguments, seconds))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(seconds)
        alive = [process for process in processes if process.is_alive()]
        for process in alive:
            process.kill()
            process.join()
        results = [_read(Path(folder) / str(rank)) for rank in range(world)]
    failures = [error for error, _ in results if error]
    if failures:
        raise AssertionError("\n".join(failures))
    if alive:
        raise AssertionError(f"{len(alive)} of {world} ranks did not end within {seconds} s")
    return [value for _, value in results]


def _read(path: Path) -> tuple[str, Any]:
    return pickle.loads(path.read_bytes()) if path.exists() else ("rank ended without a result", None)


def _call(
    function: Callable[..., Any], rank: int, world: int, port: int, folder: str, arguments: tuple, seconds: float
) -> None:
    faulthandler.dump_traceback_later(seconds - 5, exit=True)
    os.environ.update(rank_environment(rank, world, port))
    import torch

    torch.set_num_threads(1)
    try:
        result = ("", function(*arguments))
    except BaseException:
        result = (f"rank {rank}:\n{traceback.format_exc()}", None)
    (Path(folder) / str(rank)).write_bytes(pickle.dumps(result))
    os._exit(0)  # gloo may abort in its destructors; the result is on disk
