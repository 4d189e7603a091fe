"""Speed and memory of a training step: plain backbone, plain multi-exit loop, and ours part by part, in one run.

    python benchmarks/train_step.py --backbone resnet18 --batch 8 --rounds 20

Each round does one training step of every variant, in a new order; ratios are formed within a round, so that a machine
with other work on it disturbs both sides alike. benchmarks/README.md says how to read the result.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler would report on stderr that there is no GPU

import torch
from rich.console import Console

from adaptive.errors import AdaptiveError, ConfigError, TrainingError
from adaptive.networks.network import AdaptiveNetwork
from adaptive.training.engine.group import resolve_device
from benchmarks.shared import results
from benchmarks.shared.fork_cost import ForkCost, fork_cost
from benchmarks.shared.locations import RESULTS
from benchmarks.shared.memory import peak_bytes
from benchmarks.shared.timing import Spread, interleaved, ratios
from benchmarks.shared.variants import VARIANTS, StepSettings, Trainee

LIMIT_PERCENT = 0.5  # what Gradient Equilibrium may cost of a step
LIMIT_RATIO = 1.05  # what the whole method may take: time per multiply-add over plain, memory over the plain loop
STEPS_ON_CUDA = 5  # per turn: a step there is short beside waiting for the device


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    options = parser().parse_args(arguments)
    try:
        settings = settings_from(options)
        result = run(settings, options.rounds, options.warmup, options.repetitions)
    except AdaptiveError as error:
        print(f"train_step: {error}", file=sys.stderr)
        return 1
    result = {"benchmark": "train_step", "command": command(options), **result}
    written = results.write(result, options.output)
    if options.json:
        options.json.write_text(results.to_json(result), encoding="utf-8")
        written.append(options.json)
    console = Console()
    console.print(results.terminal_table(result))
    for line in results.limit_lines(result):
        console.print(line, soft_wrap=True)
    console.print("written: " + ", ".join(map(str, written)), soft_wrap=True)
    return 0


def parser(prog: str = "train_step", description: str = __doc__ or "") -> argparse.ArgumentParser:
    """Describe the command line; another benchmark of a training step takes it as well."""
    defaults = StepSettings()
    p = argparse.ArgumentParser(prog=prog, description=description.partition("\n")[0])
    p.add_argument("--backbone", default=defaults.backbone, help="any timm model (%(default)s)")
    p.add_argument("--exits", type=int, default=defaults.exits, help="number of exits; 0: the preset's (%(default)s)")
    p.add_argument("--image-size", type=int, default=defaults.image_size, help="side in pixels (%(default)s)")
    p.add_argument("--batch", type=int, default=defaults.batch, help="images per step (%(default)s)")
    p.add_argument("--classes", type=int, default=defaults.classes, help="number of classes (%(default)s)")
    p.add_argument("--rounds", type=int, default=20, help="counted rounds, at least 2 (%(default)s)")
    p.add_argument("--warmup", type=int, default=2, help="rounds that do not count (%(default)s)")
    p.add_argument("--repetitions", type=int, default=200, help="measurements of the forks alone (%(default)s)")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU if there is one")
    p.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's number")
    p.add_argument("--precision", choices=("fp32", "bf16"), default=defaults.precision, help="bf16 is autocast")
    p.add_argument("--channels-last", action="store_true", help="channels-last images and weights")
    p.add_argument("--compile", action="store_true", help="torch.compile for every variant")
    p.add_argument("--engine", choices=("none", "deepspeed"), default=defaults.engine, help="none: a plain torch loop")
    p.add_argument("--json", type=Path, help="write the JSON to this file as well")
    p.add_argument("--output", type=Path, default=RESULTS, help="folder of the result files (benchmarks/results)")
    return p


def settings_from(options: argparse.Namespace) -> StepSettings:
    """Check the command line and settle the device (raises ConfigError, MachineError)."""
    least = {"image_size": 1, "batch": 2, "classes": 2, "rounds": 2, "warmup": 1, "repetitions": 2}
    for name, minimum in least.items():
        value = getattr(options, name)
        if value < minimum:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least {minimum}")
    if options.exits != 0 and options.exits < 2:
        raise ConfigError(f"--exits {options.exits}: must be at least 2, or 0 for what a preset has")
    if options.threads > 0:
        torch.set_num_threads(options.threads)
    device = resolve_device(options.device).type
    given = {field.name: getattr(options, field.name) for field in fields(StepSettings) if hasattr(options, field.name)}
    return StepSettings(**{**given, "device": device})


def command(options: argparse.Namespace) -> str:
    """Return the command line that repeats this run, without the names of its output files."""
    words = ["python", "benchmarks/train_step.py"]
    defaults = vars(parser().parse_args([]))
    for name, value in vars(options).items():
        if name in ("json", "output") or value == defaults[name]:
            continue
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words.append(str(value))
    return shlex.join(words)


def run(settings: StepSettings, rounds: int, warmup: int, repetitions: int) -> dict[str, Any]:
    """Measure memory, speed and the forks, one after another.

    Raises:
        ModelError: the backbone does not exist or cannot be cut so.
        TrainingError: a loss is not finite, so what was timed is not training.
    """
    # Alone on the device, before the variants live side by side.
    peaks = {v.key: peak_bytes(partial(Trainee, settings, v), settings.device) for v in VARIANTS}
    trainees = {v.key: Trainee(settings, v) for v in VARIANTS}
    calls = STEPS_ON_CUDA if settings.device == "cuda" else 1
    seconds = interleaved(trainees, rounds, warmup, settings.device, calls)
    macs = {key: trainee.macs() for key, trainee in trainees.items()}
    variants = {key: _entry(key, trainees, seconds, peaks, macs) for key in trainees}
    network = trainees["equilibrium"].network
    for trainee in trainees.values():
        trainee.close()
    del trainees
    gc.collect()
    assert isinstance(network, AdaptiveNetwork)
    forks = fork_cost(settings, network, repetitions)
    return {
        "settings": asdict(settings),
        "rounds": rounds,
        "repetitions": repetitions,
        "machine": results.machine(settings.device),
        "variants": variants,
        "ratio_limit": LIMIT_RATIO,
        **_equilibrium(forks, variants["equilibrium"]["step_ms"]["median"]),
    }


def _entry(
    key: str,
    trainees: dict[str, Trainee],
    seconds: dict[str, list[float]],
    peaks: dict[str, int],
    macs: dict[str, int],
) -> dict[str, Any]:
    """One variant's figures; ratios are None where there is nothing to compare with."""
    trainee, loss = trainees[key], float(trainees[key]())
    if not math.isfinite(loss):
        raise TrainingError(f"{trainee.variant.title}: the loss is {loss}; try another --batch or --precision")
    previous = dict(itertools.pairwise(reversed(peaks))).get(key)
    batch = trainee.settings.batch
    over: dict[str, Any] = {}
    for name, other in (("plain", "plain"), ("loop", "loop"), ("previous", previous)):
        compared = other is not None and other != key and (key != "plain")
        time = ratios(seconds, key, other) if compared and other else None
        over[f"time_over_{name}"] = asdict(time) if time else None
        over[f"memory_over_{name}"] = peaks[key] / peaks[other] if compared and other else None
        if name == "plain":
            over["time_per_mac_over_plain"] = asdict(time.scaled(macs["plain"] / macs[key])) if time else None
    return {
        "title": trainee.variant.title,
        "parameters": trainee.parameters,
        "macs": macs[key],
        "images_per_second": asdict(Spread.of([batch / s for s in seconds[key]])),
        "step_ms": asdict(Spread.of(seconds[key]).scaled(1e3)),
        "peak_memory_bytes": peaks[key],
        **over,
    }


def _equilibrium(forks: ForkCost, step_ms: float) -> dict[str, Any]:
    added = Spread.of(forks.added).scaled(1e3)
    return {
        "ge_share_percent": asdict(added.scaled(100 / step_ms)),
        "ge_limit_percent": LIMIT_PERCENT,
        "ge_added_ms": asdict(added),
        "ge_operations_ms": {name: asdict(value.scaled(1e3)) for name, value in forks.operations.items()},
        "ge_shapes": forks.shapes,
    }


if __name__ == "__main__":
    sys.exit(main())
