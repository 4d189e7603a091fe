"""A training at full size on this machine's device: images/s, model FLOPs utilisation, waiting for data, memory.

    python benchmarks/full_run.py --backbone resnet50 --exits 4 --batch 256 --precision bf16 --channels-last
    deepspeed --num_gpus 8 benchmarks/full_run.py --backbone msdnet_imagenet_step4 --data SHARDS --stage 2

The library's engine trains with exits, GE, ISC and OFA, on images that are on the device already, or on packed shards.
benchmarks/README.md says how to read the result.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.console import Console
from rich.markdown import Markdown
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from adaptive.config.sections import DataConfig
from adaptive.data.reading.stream import LoaderOptions, TrainStream
from adaptive.data.shards.index import load_index
from adaptive.distributed.ranks import Ranks, find_ranks
from adaptive.errors import AdaptiveError, ConfigError
from adaptive.networks.precision import memory_format
from adaptive.training.engine.group import init_distributed, leave, resolve_device
from benchmarks.shared import pages
from benchmarks.shared.cards import find_card
from benchmarks.shared.exposed import exposed_share
from benchmarks.shared.results import MIB, machine
from benchmarks.shared.timing import Spread
from benchmarks.shared.variants import VARIANTS, StepSettings, Trainee

WARMUP = 3
TRACED = 3  # steps


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    options = parser().parse_args(arguments)
    try:
        check(options)
        ranks = find_ranks()
        result = run(options, ranks)
    except AdaptiveError as error:
        print(f"full_run: {error}", file=sys.stderr)
        return 1
    if ranks.rank == 0:
        text = page(result)
        stem = f"full_run_{result['settings']['device']}_{options.backbone}" + ("_shards" if options.data else "")
        written = pages.write(options.output, stem, result, text)
        Console().print(Markdown(text))
        print("written: " + ", ".join(map(str, written)))
    return 0


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    p = argparse.ArgumentParser(prog="full_run", description=(__doc__ or "").partition("\n")[0])
    p.add_argument("--backbone", default="resnet50", help="any timm model or preset (%(default)s)")
    p.add_argument("--exits", type=int, default=0, help="number of exits; 0: the preset's, of a timm model 4")
    p.add_argument("--image-size", type=int, default=224, help="side in pixels (%(default)s)")
    p.add_argument("--batch", type=int, default=64, help="images per rank and step (%(default)s)")
    p.add_argument("--classes", type=int, default=1000, help="without --data (%(default)s)")
    p.add_argument("--data", type=Path, help="folder of packed shards; without it noise that is on the device already")
    p.add_argument("--workers", type=int, default=8, help="loader processes per rank, with --data (%(default)s)")
    p.add_argument("--steps", type=int, default=50, help="counted steps, at least 2 (%(default)s)")
    p.add_argument("--stage", type=int, choices=(0, 1, 2, 3), default=0, help="ZeRO stage (%(default)s)")
    p.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 is autocast (%(default)s)")
    p.add_argument("--channels-last", action="store_true", help="channels-last images and weights")
    p.add_argument("--compile", action="store_true", help="torch.compile")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU if there is one")
    pages.add_output(p)
    return p


def check(options: argparse.Namespace) -> None:
    """Refuse numbers out of range (ConfigError)."""
    for name, least in {"batch": 2, "image_size": 1, "classes": 2, "steps": 2}.items():
        if getattr(options, name) < least:
            value = getattr(options, name)
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least {least}")


def run(options: argparse.Namespace, ranks: Ranks) -> dict[str, Any]:
    """Train and measure, as one of the ranks (raises DataError, ModelError, MachineError)."""
    index = load_index(str(options.data)) if options.data else None
    device = resolve_device(options.device, ranks.local_rank)
    init_distributed()
    settings = StepSettings(
        options.backbone, options.exits, options.image_size, options.batch,
        len(index.classes) if index else options.classes, device.type, options.precision, options.channels_last,
        options.compile, "deepspeed", options.stage, ranks.world,
    )  # fmt: skip
    trainee = Trainee(settings, VARIANTS[-1])
    batches: Iterator[tuple[Tensor, Tensor]] | None = None
    if index is not None:
        batches = _shards(options, ranks, device)
    steps = [_step(trainee, batches, device) for _ in range(WARMUP + options.steps)][WARMUP:]
    seconds = [whole for whole, _ in steps]
    shares = _traced(trainee, batches, device)
    flops = 6 * trainee.macs() * options.batch  # forward, and twice as much backward; two per multiply-add
    rate = flops / Spread.of(seconds).median / 1e12
    matmul = matmul_rate(device, options.precision)
    sheet = _data_sheet(device, options.precision)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    trainee.close()
    leave()
    return {
        "benchmark": "full_run",
        "command": pages.command(parser(), options),
        "machine": machine(device.type),
        "settings": asdict(settings),
        "data": "shards" if options.data else "noise",
        "steps": options.steps,
        "images_per_second": asdict(Spread.of([options.batch * ranks.world / s for s in seconds])),
        "step_ms": asdict(Spread.of(seconds).scaled(1e3)),
        "data_wait_share": asdict(Spread.of([wait / whole for whole, wait in steps])),
        "tflops_per_rank": rate,
        "matmul_tflops": matmul,
        "of_matmul": rate / matmul,
        "data_sheet_tflops": sheet,
        "mfu": rate / sheet if sheet else None,
        "collectives_share": shares["collectives"],
        "exposed_share": shares["exposed"],
        "peak_memory_bytes": peak,
    }


def _shards(options: argparse.Namespace, ranks: Ranks, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    data = DataConfig(path=str(options.data), image_size=options.image_size, workers=options.workers)
    layout = memory_format(options.channels_last)
    stream = TrainStream(
        load_index(data.path), data, data.train_split,
        LoaderOptions(ranks.rank, ranks.world, options.workers, device, layout),
        seed=0, global_batch=options.batch * ranks.world, micro_batch=options.batch,
    )  # fmt: skip
    for batch in stream.batches(0, 10**9):
        yield batch.images, batch.labels.to(device, non_blocking=True)


def _step(
    trainee: Trainee, batches: Iterator[tuple[Tensor, Tensor]] | None, device: torch.device
) -> tuple[float, float]:
    """Train one step; returns its seconds, and those in which the host waited for a batch."""
    began = time.perf_counter()
    if batches is not None:
        trainee.images, trainee.labels = next(batches)
    waited = time.perf_counter() - began
    trainee()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began, waited if batches is not None else 0.0


def _traced(
    trainee: Trainee, batches: Iterator[tuple[Tensor, Tensor]] | None, device: torch.device
) -> dict[str, float]:
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler:
        for _ in range(TRACED):
            _step(trainee, batches, device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return exposed_share(json.loads(path.read_text(encoding="utf-8"))["traceEvents"], device.type)


def matmul_rate(device: torch.device, precision: str, rounds: int = 10) -> float:
    """TFLOP/s of the product of two large square matrices in this process: what the device gives at best."""
    side = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a = torch.randn(side, side, device=device).to(dtype)
    best = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best / 1e12


def _data_sheet(device: torch.device, precision: str) -> float | None:
    if device.type != "cuda":
        return None
    card = find_card(torch.cuda.get_device_name(device))
    return card.tflops[precision] if card else None


def page(result: Mapping[str, Any]) -> str:
    """The page beside the JSON file."""
    s, shares = result["settings"], result["data_wait_share"]
    modes = [
        s["precision"],
        *["channels-last"] * s["channels_last"],
        *["compiled"] * s["compile"],
        f"ZeRO {s['stage']}",
    ]
    sheet, memory = result["data_sheet_tflops"], result["peak_memory_bytes"]
    rows = [
        ("images/s", pages.spread(result["images_per_second"], 1)),
        ("step, ms", pages.spread(result["step_ms"], 1)),
        ("host waits for data, share of the step", pages.spread(shares, 4)),
        ("TFLOP/s per rank", f"{result['tflops_per_rank']:.3f}"),
        (f"of a matrix product's {result['matmul_tflops']:.3f} TFLOP/s here", f"{result['of_matmul']:.3f}"),
        *([(f"MFU, of the data sheet's {sheet:g} TFLOP/s", f"{result['mfu']:.3f}")] if sheet else []),
        ("collectives run, share of the time", f"{result['collectives_share']:.4f}"),
        ("exposed communication, share of the time", f"{result['exposed_share']:.4f}"),
        *([("peak memory, MiB", f"{memory / MIB:.0f}")] if memory else []),
    ]
    return f"""# Full run: {s["backbone"]}, {s["image_size"]} px, {result["data"]}, {s["device"]}

`{result["command"]}`

{pages.hardware(result["machine"])}

{s["world"]} rank(s) x {s["batch"]} images, {", ".join(modes)}; exits, GE, ISC and OFA under the library's engine.
Median (quartiles) of {result["steps"]} steps. A step's operations are six per multiply-add of the forward pass and
image.

{pages.table(["", "measured"], rows)}
"""


if __name__ == "__main__":
    sys.exit(main())
