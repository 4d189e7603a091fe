"""The training step on one and two ranks at ZeRO 0 to 3, against DistributedDataParallel around a plain loop.

    python benchmarks/ranks.py --backbone resnet18 --worlds 1 2

Each round does one step of every variant on all ranks, in a new order; ratios are formed within the round.
benchmarks/README.md says how to read the result.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.multiprocessing as mp
from rich.console import Console
from rich.markdown import Markdown

from adaptive.doctor.checks.network import free_port
from adaptive.errors import AdaptiveError, ConfigError
from adaptive.training.engine.group import init_distributed, resolve_device
from benchmarks.shared import pages
from benchmarks.shared.results import machine
from benchmarks.shared.timing import Spread, interleaved, ratios
from benchmarks.shared.variants import VARIANTS, StepSettings, Trainee

LOOP = next(variant for variant in VARIANTS if variant.loop)
WHOLE = VARIANTS[-1]
STAGES = (0, 1, 2, 3)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    options = parser().parse_args(arguments)
    try:
        result = run(options)
    except AdaptiveError as error:
        print(f"ranks: {error}", file=sys.stderr)
        return 1
    text = page(result)
    written = pages.write(options.output, f"ranks_{result['device']}_{options.backbone}", result, text)
    Console().print(Markdown(text))
    print("written: " + ", ".join(map(str, written)))
    return 0


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    p = argparse.ArgumentParser(prog="ranks", description=(__doc__ or "").partition("\n")[0])
    p.add_argument("--backbone", default="resnet18", help="any timm model or preset (%(default)s)")
    p.add_argument("--exits", type=int, default=4, help="number of exits; 0: the preset's (%(default)s)")
    p.add_argument("--image-size", type=int, default=128, help="side in pixels (%(default)s)")
    p.add_argument("--batch", type=int, default=8, help="images per rank and step (%(default)s)")
    p.add_argument("--classes", type=int, default=1000, help="number of classes (%(default)s)")
    p.add_argument("--worlds", type=int, nargs="+", default=[1, 2], help="numbers of ranks (1 2)")
    p.add_argument("--rounds", type=int, default=12, help="counted rounds, at least 2 (%(default)s)")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU if there is one")
    p.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 is autocast (%(default)s)")
    pages.add_output(p)
    return p


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure (raises ConfigError, MachineError)."""
    for name, least in {"batch": 2, "image_size": 1, "classes": 2, "rounds": 2}.items():
        if getattr(options, name) < least:
            value = getattr(options, name)
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    device = resolve_device(options.device).type
    most = torch.cuda.device_count() if device == "cuda" else os.cpu_count() or 1
    if min(options.worlds) < 1 or max(options.worlds) > most:
        given = " ".join(map(str, options.worlds))
        raise ConfigError(f"--worlds {given}: this machine has room for 1 to {most} ranks on {device}")
    settings = StepSettings(
        options.backbone, options.exits, options.image_size, options.batch, options.classes, device,
        precision=options.precision,
    )  # fmt: skip
    worlds = {}
    for world in options.worlds:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(_rank, (free_port(), replace(settings, world=world), options.rounds, folder), nprocs=world)
            worlds[str(world)] = json.loads((Path(folder) / "seconds").read_text(encoding="utf-8"))
    return {
        "benchmark": "ranks",
        "command": pages.command(parser(), options),
        "machine": machine(device) | {"threads": 1 if device == "cpu" else torch.get_num_threads()},
        "device": device,
        "settings": asdict(settings),
        "rounds": options.rounds,
        "worlds": {world: _entries(seconds, options.batch * int(world)) for world, seconds in worlds.items()},
    }


def _rank(rank: int, port: int, settings: StepSettings, rounds: int, folder: str) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": settings.world, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"})
    if settings.device == "cpu":
        os.environ.update(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo", DS_ACCELERATOR="cpu")
        torch.set_num_threads(1)
    resolve_device(settings.device, rank)
    init_distributed()
    turns = {"loop": Trainee(settings, LOOP)}
    for stage in STAGES:
        turns[f"zero_{stage}"] = Trainee(replace(settings, engine="deepspeed", stage=stage), WHOLE)
    seconds = interleaved(turns, rounds, 2, settings.device)  # the same order on every rank
    if rank == 0:
        (Path(folder) / "seconds").write_text(json.dumps(seconds), encoding="utf-8")
    torch.distributed.barrier()
    os._exit(0)  # gloo may abort in its destructors


def _entries(seconds: Mapping[str, list[float]], images: int) -> dict[str, Any]:
    titles = {"loop": "plain multi-exit loop"} | {f"zero_{s}": f"exits, GE, ISC, OFA at ZeRO {s}" for s in STAGES}
    return {
        name: {
            "title": titles[name],
            "images_per_second": asdict(Spread.of([images / s for s in values])),
            "time_over_loop": asdict(ratios(seconds, name, "loop")),
        }
        for name, values in seconds.items()
    }


def page(result: Mapping[str, Any]) -> str:
    """The page beside the JSON file."""
    s = result["settings"]
    rows = [
        (
            f"{world} rank(s), {entry['title']}",
            pages.spread(entry["images_per_second"], 1),
            pages.spread(entry["time_over_loop"], 3),
        )
        for world, entries in result["worlds"].items()
        for entry in entries.values()
    ]
    return f"""# Ranks and ZeRO: {s["backbone"]}, {s["image_size"]} px, {s["precision"]}, {result["device"]}

`{result["command"]}`

{pages.hardware(result["machine"])}

{s["batch"]} images per rank and step. The plain loop (the same blocks and exits, summed cross entropies, two-step
rescaling) runs under DistributedDataParallel where there are several ranks, the others under DeepSpeed, with the check
that the gradient is finite. Median (quartiles) of {result["rounds"]} rounds, every variant once in each; ratios are
formed within the round.

{pages.table(["variant", "images/s", "time / loop"], rows)}
"""


if __name__ == "__main__":
    sys.exit(main())
