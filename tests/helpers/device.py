"""Tests on the device that `--device` names: what a GPU needs before they run, and a process that trains on it.

No process is forked that might have touched CUDA: a fork of such a process cannot use the GPU.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing as mp
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from tests.helpers.ranks import rank_environment, run_ranks

DEVICE_VARIABLE = "ADAPTIVE_TEST_DEVICE"  # says to tests.training.setups.config where a run trains


def prepare_cuda() -> None:
    """Make results comparable: no TF32 in any library, and workspaces with which cuBLAS is deterministic.

    Both are read when CUDA's libraries start, in this process and in those that it starts.
    """
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def device_problem() -> str:
    """Say why torch has no GPU here; empty where it has one."""
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return f"this torch ({torch.__version__}) was built without CUDA"
    return "" if torch.cuda.is_available() else f"torch {torch.__version__} finds no usable GPU on this machine"


@contextmanager
def deterministic() -> Iterator[None]:
    """Let a GPU give the same bits for the same input, as `torch.use_deterministic_algorithms` does; a CPU does anyway.

    What has no deterministic kernel warns instead of failing: whether it was used is for the test's comparison to say.
    """
    import torch

    if os.environ.get(DEVICE_VARIABLE, "cpu") == "cpu":
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def deterministically(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return ``function(*arguments)``, with the same bits at every call; for `DeviceRank`."""
    with deterministic():
        return function(*arguments)


class DeviceRank:
    """Calls functions in a process that has the environment of the only rank of a training on a device.

    On the CPU every call is a fresh fork, as in `run_ranks`. On a GPU one process, which starts CUDA, NCCL and
    DeepSpeed once, does all calls; it is replaced after one that failed, for faults on a GPU outlive the function that
    had them.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._process: Any = None
        self._connection: Connection | None = None

    def __call__(self, function: Callable[..., Any], *arguments: Any, seconds: float = 300) -> Any:
        """Return ``function(*arguments)``; the function must be importable (top level of a module)."""
        if self.kind == "cpu":
            return run_ranks(function, 1, *arguments, seconds=seconds)[0]
        if self._process is None or not self._process.is_alive():
            self._start()
        assert self._connection is not None
        self._connection.send((function, arguments, seconds))
        try:
            if not self._connection.poll(seconds):
                raise AssertionError(f"the device's process gave no answer within {seconds} s")
            failure, value = self._connection.recv()
        except EOFError:
            self._process.join(10)
            failure, value = f"the device's process ended with code {self._process.exitcode}", None
        except BaseException:
            self.close()
            raise
        if failure:
            self.close()
            raise AssertionError(failure)
        return value

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
        self._process = self._connection = None

    def _start(self) -> None:
        from adaptive.doctor.checks.network import free_port

        context = mp.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(self.kind, free_port(), theirs), daemon=True)
        self._process.start()
        theirs.close()


def _serve(kind: str, port: int, connection: Connection) -> None:
    """Do calls until the other end goes away."""
    own = {"DS_ACCELERATOR": kind, DEVICE_VARIABLE: kind, "NCCL_SOCKET_IFNAME": "lo"}
    os.environ.update(rank_environment(0, 1, port) | own)
    prepare_cuda()
    import torch

    while True:
        try:
            function, arguments, seconds = connection.recv()
        except EOFError:
            os._exit(0)
        # Before the caller loses patience, so that the log says where it stood still.
        faulthandler.dump_traceback_later(seconds - 5, exit=True)
        try:
            answer = ("", function(*arguments))
        except BaseException:
            answer = (f"on {kind}:\n{traceback.format_exc()}", None)
        faulthandler.cancel_dump_traceback_later()
        try:
            connection.send(answer)
        except Exception:  # what cannot be pickled
            connection.send((f"the answer of {function} cannot be sent:\n{traceback.format_exc()}", None))
        del answer
        gc.collect()
        torch.cuda.empty_cache()
