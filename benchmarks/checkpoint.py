"""What saving takes from the training loop: while the loop waits for the disk, and with a thread that writes beside it.

    python benchmarks/checkpoint.py --backbone resnet50 --stages 0 2

The real trainer on two CPU ranks, with SGD momentum and a moving average. Each round has some quiet steps and a save of
either kind, in a new order; what a background save costs is the time of the call, plus what the steps that ran beside
the writing took more than quiet ones. benchmarks/README.md says how to read the result.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch.multiprocessing as mp

from adaptive.doctor.checks.network import free_port
from adaptive.training.trainer import Callback
from benchmarks.shared.locations import RESULTS
from benchmarks.shared.results import machine
from benchmarks.shared.timing import Spread

if TYPE_CHECKING:
    from adaptive.config.sections import Config
    from adaptive.training.trainer import Trainer

WORLD = 2
INTERVAL = 60.0  # seconds between two saves that the cost is compared with
LIMIT_PERCENT = 5.0
WARMUP = 3  # steps
KINDS = ("waits", "beside")  # the loop waits for the disk; a thread writes beside it


@dataclass(frozen=True)
class SavingSettings:
    """What is measured."""

    backbone: str = "resnet50"
    stages: tuple[int, ...] = (0, 2)
    batch: int = 16
    image_size: int = 32
    rounds: int = 5
    quiet: int = 4
    after: int = 10


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns 1 if a save beside the training costs more than the limit."""
    settings, output = parse(arguments)
    found = {str(stage): measure(settings, stage) for stage in settings.stages}
    result = {
        "benchmark": "checkpoint",
        "command": command(settings),
        "settings": asdict(settings),
        "machine": machine("cpu"),
        "interval_s": INTERVAL,
        "limit_percent": LIMIT_PERCENT,
        "stages": found,
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "checkpoint_cpu.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (output / "checkpoint_cpu.md").write_text(page(result), encoding="utf-8")
    print(page(result))
    return int(any(stage["share_percent"]["median"] > LIMIT_PERCENT for stage in found.values()))


def parse(arguments: Sequence[str] | None) -> tuple[SavingSettings, Path]:
    """Read the command line."""
    d = SavingSettings()
    p = argparse.ArgumentParser(prog="checkpoint", description=(__doc__ or "").partition("\n")[0])
    p.add_argument("--backbone", default=d.backbone, help="any timm model (%(default)s)")
    p.add_argument("--stages", type=int, nargs="+", default=list(d.stages), help="ZeRO stages (0 2)")
    p.add_argument("--batch", type=int, default=d.batch, help="images per step over both ranks (%(default)s)")
    p.add_argument("--image-size", type=int, default=d.image_size, help="side in pixels (%(default)s)")
    p.add_argument("--rounds", type=int, default=d.rounds, help="saves of each kind (%(default)s)")
    p.add_argument("--quiet", type=int, default=d.quiet, help="steps before a save (%(default)s)")
    p.add_argument("--after", type=int, default=d.after, help="steps after a save, longer than writing (%(default)s)")
    p.add_argument("--output", type=Path, default=RESULTS, help="folder of the result files (benchmarks/results)")
    given = vars(p.parse_args(arguments))
    output = given.pop("output")
    return SavingSettings(**{**given, "stages": tuple(given["stages"])}), output


def command(settings: SavingSettings) -> str:
    """Return the command line that repeats this run."""
    words = ["python", "benchmarks/checkpoint.py"]
    for name, value in asdict(settings).items():
        if value != getattr(SavingSettings(), name):
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return shlex.join(words)


def measure(settings: SavingSettings, stage: int) -> dict[str, Any]:
    """Train on two ranks at a ZeRO stage and summarise what rank 0 saw."""
    with tempfile.TemporaryDirectory() as folder:
        from adaptive.data.packing.pack import pack

        pack("builtin:digits", Path(folder) / "digits", workers=1, progress=False)
        mp.spawn(_rank, (free_port(), settings, stage, folder), nprocs=WORLD)
        seen = pickle.loads((Path(folder) / "seen").read_bytes())
    return summarise(seen)


def _rank(rank: int, port: int, settings: SavingSettings, stage: int, folder: str) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ.update(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo", DS_ACCELERATOR="cpu")
    import torch

    torch.set_num_threads(1)
    from adaptive.training.checkpoints.store import CheckpointStore
    from adaptive.training.engine.group import init_distributed
    from adaptive.training.run import Ranks, prepare
    from adaptive.training.streams import Streams
    from adaptive.training.supervision.supervisor import Supervisor
    from adaptive.training.trainer import Trainer

    prepared = prepare(_config(settings, stage, Path(folder)), Ranks(rank, rank, WORLD))
    init_distributed()
    probe = Probe(settings)
    store = CheckpointStore(Path(folder) / "run" / "checkpoints")
    Trainer(prepared, Streams.open(prepared), store, [probe], Supervisor()).run()
    if rank == 0:
        seen = probe.seen | {
            "parameters": sum(p.numel() for p in prepared.network.parameters()),
            "bytes": sum(file.stat().st_size for file in store.all()[-1].path.iterdir()),
        }
        (Path(folder) / "seen").write_bytes(pickle.dumps(seen))
    os._exit(0)  # gloo may abort in its destructors


def _config(settings: SavingSettings, stage: int, folder: Path) -> Config:
    from adaptive.config.loading import parse_config

    steps = WARMUP + settings.rounds * len(KINDS) * (settings.quiet + settings.after) + 1
    return parse_config(
        {
            "model": {"backbone": settings.backbone, "exits": 4},
            "data": {"path": str(folder / "digits"), "image_size": settings.image_size, "workers": 0},
            "optimizer": {"name": "sgd", "lr": 1e-4, "momentum": 0.9},
            "train": {
                "run_folder": str(folder / "run"),
                "epochs": 1 + steps * settings.batch // 1297,
                "max_steps": steps,
                "global_batch": settings.batch,
                "ema_decay": 0.99,
                "device": "cpu",
                "zero_stage": stage,
            },
        }
    )


class Probe(Callback):
    """Saves at fixed steps, the same on all ranks, and times what lies between."""

    def __init__(self, settings: SavingSettings) -> None:
        self.settings = settings
        self.seen: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
        order = random.Random(0)
        self.kinds = [kind for _ in range(settings.rounds) for kind in order.sample(KINDS, len(KINDS))]
        self.ended = 0.0
        self.busy = False
        self.saved = 0.0

    def on_step(self, trainer: Trainer) -> None:
        """Note the step's time, and save where it is due."""
        seconds = time.perf_counter() - self.ended
        turn, place = divmod(trainer.progress.step - WARMUP - 1, self.settings.quiet + self.settings.after)
        if trainer.progress.step > WARMUP and turn < len(self.kinds):
            self._note(trainer, turn, place, seconds)
        self.busy = trainer.saver.busy
        self.ended = time.perf_counter()

    def _note(self, trainer: Trainer, turn: int, place: int, seconds: float) -> None:
        kind = self.kinds[turn]
        if place == 0:
            trainer.saver.wait()  # nothing of the last turn reaches into this one
            self.seen[kind].append({"quiet": [], "beside": [], "save": 0.0, "written": 0.0})
        entry = self.seen[kind][-1]
        if place < self.settings.quiet:
            entry["quiet"].append(seconds)
        elif self.busy:
            entry["beside"].append(seconds)
        if self.busy and not trainer.saver.busy:
            entry["written"] = time.perf_counter() - self.saved
        if place == self.settings.quiet - 1:
            trainer.saver.config = trainer.saver.config.model_copy(update={"asynchronous": kind == "beside"})
            began = time.perf_counter()
            trainer.save()
            self.saved = time.perf_counter()
            entry["save"] = self.saved - began


def summarise(seen: Mapping[str, Any]) -> dict[str, Any]:
    """Medians and quartiles over the rounds, in seconds."""
    beside = seen["beside"]
    unfinished = sum(not entry["written"] for entry in beside)
    if unfinished:
        raise SystemExit(f"checkpoint: {unfinished} saves outlasted the steps after them; give a higher --after")
    quiet = [statistics.median(entry["quiet"]) for entry in beside]
    extra = [sum(e["beside"]) - len(e["beside"]) * q for e, q in zip(beside, quiet, strict=True)]
    total = [max(e["save"], e["save"] + x) for e, x in zip(beside, extra, strict=True)]
    slower = [statistics.mean(e["beside"]) / q for e, q in zip(beside, quiet, strict=True)]
    waits = [entry["save"] for entry in seen["waits"]]
    return {
        "parameters": seen["parameters"],
        "bytes": seen["bytes"],
        "step_s": asdict(Spread.of(quiet)),
        "waits_s": asdict(Spread.of(waits)),
        "call_s": asdict(Spread.of([entry["save"] for entry in beside])),
        "written_s": asdict(Spread.of([entry["written"] for entry in beside])),
        "slowdown": asdict(Spread.of(slower)),
        "total_s": asdict(Spread.of(total)),
        "share_percent": asdict(Spread.of(total).scaled(100 / INTERVAL)),
        "of_waiting": asdict(Spread.of_ratios(total, waits)),
    }


def page(result: Mapping[str, Any]) -> str:
    """The page beside the JSON file."""
    m, s, stages = result["machine"], result["settings"], result["stages"]
    first = next(iter(stages.values()))
    rows = {
        "the loop waits for the disk, s": ("waits_s", 2),
        "beside: the call, s": ("call_s", 2),
        "beside: until it is on disk, s": ("written_s", 2),
        "beside: steps meanwhile / quiet steps": ("slowdown", 2),
        "beside: taken from the loop in all, s": ("total_s", 2),
        "beside / waiting": ("of_waiting", 2),
        f"beside: share of {result['interval_s']:.0f} s between saves, %": ("share_percent", 1),
        "a quiet step, s": ("step_s", 3),
    }
    table = [
        "| | " + " | ".join(f"ZeRO {stage}" for stage in stages) + " |",
        "|---|" + "---:|" * len(stages),
        *(
            f"| {title} | " + " | ".join(_spread(stage[key], digits) for stage in stages.values()) + " |"
            for title, (key, digits) in rows.items()
        ),
    ]
    return f"""# Saving: {s["backbone"]}, {first["parameters"] / 1e6:.1f} M parameters, two CPU ranks

`{result["command"]}`

{m["cpu"]}, {os.cpu_count()} cores, one thread per rank; torch {m["torch"]}, timm {m["timm"]},
deepspeed {m["deepspeed"]}, Python {m["python"]}

SGD with momentum and a moving average: {first["bytes"] / 2**20:.0f} MiB per checkpoint. Median (quartiles) of
{s["rounds"]} saves of each kind, in turn. What a save beside the training takes is its call plus what the steps that
ran meanwhile took more than the quiet ones before it; the limit is {result["limit_percent"]:g} % of a minute. Times are
this machine's, with whatever else ran on it.

{chr(10).join(table)}
"""


def _spread(value: Mapping[str, float], digits: int) -> str:
    return f"{value['median']:.{digits}f} ({value['q1']:.{digits}f} - {value['q3']:.{digits}f})"


if __name__ == "__main__":
    sys.exit(main())
