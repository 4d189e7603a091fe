"""What Gradient Equilibrium costs of a training step, eager or compiled: steps with and without it, and its forks.

    python benchmarks/equilibrium.py --backbone msdnet_cifar_anytime --exits 0 --image-size 32 --batch 64 --compile

benchmarks/README.md says how to read the result.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.console import Console
from rich.markdown import Markdown

from adaptive.errors import AdaptiveError
from adaptive.networks.network import AdaptiveNetwork
from benchmarks import train_step
from benchmarks.shared import pages
from benchmarks.shared.fork_cost import fork_cost
from benchmarks.shared.results import machine, summary
from benchmarks.shared.timing import Spread, interleaved
from benchmarks.shared.variants import VARIANTS, StepSettings, Trainee

# Without GE twice: what the two differ by is what the measurement cannot tell from nothing.
SIDES = {"without": "exits", "without again": "exits", "with": "equilibrium"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    options = parser().parse_args(arguments)
    try:
        settings = train_step.settings_from(options)
        result = run(settings, options.rounds, options.warmup, options.repetitions)
    except AdaptiveError as error:
        print(f"equilibrium: {error}", file=sys.stderr)
        return 1
    result = {"benchmark": "equilibrium", "command": pages.command(parser(), options), **result}
    text = page(result)
    mode = "_compiled" if settings.compile else ""
    written = pages.write(options.output, f"equilibrium_{settings.device}_{settings.backbone}{mode}", result, text)
    Console().print(Markdown(text))
    print("written: " + ", ".join(map(str, written)))
    return 0


def parser() -> argparse.ArgumentParser:
    """Describe the command line: that of train_step."""
    return train_step.parser("equilibrium", __doc__ or "")


def run(settings: StepSettings, rounds: int, warmup: int, repetitions: int) -> dict[str, Any]:
    """Measure (raises ModelError)."""
    variants = {variant.key: variant for variant in VARIANTS}
    trainees = {name: Trainee(settings, variants[key]) for name, key in SIDES.items()}
    start = time.perf_counter()
    for trainee in trainees.values():
        trainee()
    prepared = time.perf_counter() - start
    calls = train_step.STEPS_ON_CUDA if settings.device == "cuda" else 1
    seconds = interleaved(trainees, rounds, warmup, settings.device, calls)
    baseline = [(a + b) / 2 for a, b in zip(seconds["without"], seconds["without again"], strict=True)]
    network = trainees["with"].network
    for trainee in trainees.values():
        trainee.close()
    assert isinstance(network, AdaptiveNetwork)
    torch.compiler.reset()
    forks = fork_cost(settings, network, repetitions)
    step = Spread.of(seconds["with"])
    return {
        "settings": asdict(settings),
        "rounds": rounds,
        "repetitions": repetitions,
        "machine": machine(settings.device),
        "prepared_seconds": prepared,
        "step_ms": {name: asdict(Spread.of(values).scaled(1e3)) for name, values in seconds.items()},
        "steps_percent": _added(seconds["with"], baseline),
        "noise_percent": _added(seconds["without again"], seconds["without"]),
        "forks_ms": asdict(Spread.of(forks.added).scaled(1e3)),
        "forks_percent": asdict(Spread.of(forks.added).scaled(100 / step.median)),
        "limit_percent": train_step.LIMIT_PERCENT,
    }


def _added(seconds: Sequence[float], baseline: Sequence[float]) -> dict[str, float]:
    """By how many percent one is above the other: median and quartiles over the rounds, the median's standard error."""
    found = Spread.of([100 * (a / b - 1) for a, b in zip(seconds, baseline, strict=True)])
    # Of a normal distribution: quartiles 1.349 deviations apart, a median as sure as a mean of 0.64 times the values.
    error = 1.2533 * (found.q3 - found.q1) / 1.349 / math.sqrt(len(seconds))
    return {**asdict(found), "error": error}


def page(result: Mapping[str, Any]) -> str:
    """The page beside the JSON file."""
    rows = [
        (title, pages.spread(result[name], 2), f"{result[name]['error']:.2f}" if "error" in result[name] else "")
        for title, name in (
            ("whole steps, with GE over without", "steps_percent"),
            ("whole steps, without over without: the noise", "noise_percent"),
            ("its forks and exits alone, against plain autograd", "forks_percent"),
        )
    ]
    steps = ", ".join(f"{name} {value['median']:.1f}" for name, value in result["step_ms"].items())
    return f"""# Gradient Equilibrium's cost: {summary(result)}

`{result["command"]}`

{pages.hardware(result["machine"])}

Median (quartiles) of {result["rounds"]} rounds, each a step of every side in turn; of {result["repetitions"]} for the
forks. Milliseconds per step: {steps}. The limit is {result["limit_percent"]:g} %.

{pages.table(["percent of a step", "added", "standard error of the median"], rows)}

The first steps, which compile where that is asked for, took {result["prepared_seconds"]:.0f} s.
"""


if __name__ == "__main__":
    sys.exit(main())
