"""What the steps of gpu_steps.py can be expected to take: FLOPs, bytes, launches, and the floor that they make.

    python benchmarks/roofline.py      # on any machine; nothing is computed, the steps are traced on fake tensors

results/roofline.json is what gpu_steps.py puts beside its measured times.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adaptive.errors import AdaptiveError
from benchmarks.gpu_run.cells import GROUPS, Group, Trial
from benchmarks.shared import pages
from benchmarks.shared.cards import CARDS, Card
from benchmarks.shared.results import machine
from benchmarks.shared.roofline import LAUNCH_SECONDS, StepCost, trace_step
from benchmarks.shared.variants import VARIANTS, StepSettings


def main(arguments: Sequence[str] | None = None) -> int:
    """Trace and write."""
    options = parser().parse_args(arguments)
    try:
        result = run(options)
    except AdaptiveError as error:
        print(f"roofline: {error}", file=sys.stderr)
        return 1
    text = page(result)
    written = pages.write(options.output, "roofline", result, text)
    print(text)
    print("written: " + ", ".join(map(str, written)))
    return 0


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    p = argparse.ArgumentParser(prog="roofline", description=(__doc__ or "").partition("\n")[0])
    p.add_argument("--only", nargs="+", metavar="GROUP", help="some groups of gpu_steps.py; by default all")
    p.add_argument("--rehearse", action="store_true", help="the tiny networks of a rehearsal")
    pages.add_output(p)
    return p


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Trace every cell (raises ConfigError)."""
    groups = pages.only(options.only, GROUPS, "group")
    cells = [_cell(group, trial, options.rehearse) for group in groups for trial in group.trials]
    return {
        "benchmark": "roofline",
        "command": pages.command(parser(), options),
        "machine": machine("cpu"),
        "launch_seconds": LAUNCH_SECONDS,
        "cells": cells,
    }


@cache
def _traced(settings: StepSettings, key: str) -> StepCost:
    return trace_step(settings, next(variant for variant in VARIANTS if variant.key == key))


def _cell(group: Group, trial: Trial, rehearsal: bool) -> dict[str, Any]:
    settings = group.settings(trial, "cpu", rehearsal)
    # Compiled or under an engine, the step has the same operations.
    plain = StepSettings(**{**vars(settings), "compile": False, "backend": "inductor", "engine": "none", "stage": 0})
    cost = _traced(plain, trial.variant.key)
    return {
        "group": group.name,
        "trial": trial.key,
        "title": f"{group.network}, {trial.title}",
        "mode": group.mode,
        "batch": settings.batch,
        "tflop": cost.flops / 1e12,
        "gigabytes": cost.bytes / 1e9,
        "operations": len(cost.operations),
        "cards": {card.name: _floors(cost, card, group.mode, settings.precision) for card in CARDS},
    }


def _floors(cost: StepCost, card: Card, mode: str, precision: str) -> dict[str, float]:
    """Floors in ms; a compiled step is bounded by its products and convolutions, an eager one also by its launches."""
    eager, fused = 1e3 * cost.eager_floor(card, precision), 1e3 * cost.fused_floor(card, precision)
    floor = fused if mode == "compiled" else max(eager, 1e3 * cost.launch_floor())
    return {"eager_ms": eager, "fused_ms": fused, "floor_ms": floor}


def page(result: Mapping[str, Any]) -> str:
    """The page beside the JSON file."""
    cards = [card.name for card in CARDS[:2]]
    columns = ["cell", "mode", "batch", "TFLOP", "GB", "operations", *(f"floor, ms, {name}" for name in cards)]
    rows = [
        (
            cell["title"], cell["mode"], str(cell["batch"]), f"{cell['tflop']:.3f}", f"{cell['gigabytes']:.1f}",
            str(cell["operations"]), *(f"{cell['cards'][name]['floor_ms']:.2f}" for name in cards),
        )
        for cell in result["cells"]
    ]  # fmt: skip
    return f"""# What a training step must take: the roofline of every cell of gpu_steps

`{result["command"]}`

{pages.hardware(result["machine"])}

Traced on fake tensors, nothing is measured: FLOPs of products and convolutions, bytes that every operation reads and
writes, and operations of one step (forward pass, losses, backward pass, SGD). The floor of an eager step is the larger
of two: the sum over its operations of the longer of FLOPs / rate and bytes / bandwidth, at the data sheets' rates
({", ".join(f"{c.name}: {c.tflops['bf16']:g} TFLOP/s bf16, {c.bandwidth / 1e12:g} TB/s" for c in CARDS[:2])}), and
{1e6 * result["launch_seconds"]:g} us for launching each (stated). Compiled: products and convolutions alone, as if all
else were fused into them. Real steps take longer: a data sheet's rate is not reached, and small operations do not fill
a card.

{pages.table(columns, rows)}
"""


if __name__ == "__main__":
    sys.exit(main())
