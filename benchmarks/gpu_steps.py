"""Step time, memory and MFU of four networks, part of the method by part, in bf16, fp32, compiled and at ZeRO 0 to 3.

    python benchmarks/gpu_steps.py --minutes 5            # the most important cells first
    python benchmarks/gpu_steps.py --minutes 5 --resume   # those that are left

The file is written after every group of cells. benchmarks/README.md says how to read the result, and
results/roofline.md what was expected.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from adaptive.errors import AdaptiveError, ConfigError
from adaptive.training.engine.group import resolve_device
from benchmarks.gpu_run.cells import GROUPS, Group
from benchmarks.gpu_run.measure import measure
from benchmarks.gpu_run.steps_page import page
from benchmarks.shared import pages
from benchmarks.shared.results import machine

STEM = "gpu_steps"
LEFT = 75  # exit code where groups are left for --resume
GROUP_SECONDS = 20.0  # what a group needs at least: fewer seconds are left to the next run


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; the exit code is 2 where a cell failed, 75 where some are left for ``--resume``."""
    options = parser().parse_args(arguments)
    try:
        result = run(options)
    except AdaptiveError as error:
        print(f"{STEM}: {error}", file=sys.stderr)
        return 1
    if any(cell["status"] != "measured" for cell in result["cells"]):
        return 2
    return LEFT if {cell["group"] for cell in result["cells"]} < {group.name for group in chosen(options)} else 0


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    p = argparse.ArgumentParser(prog=STEM, description=(__doc__ or "").partition("\n")[0])
    p.add_argument("--only", nargs="+", metavar="GROUP", help=f"some of: {', '.join(g.name for g in GROUPS)}")
    p.add_argument("--minutes", type=float, default=60.0, help="begin no group after this time (%(default)g)")
    p.add_argument("--seconds", type=float, default=15.0, help="of measuring per cell at most (%(default)g)")
    p.add_argument("--rounds", type=int, default=12, help="rounds per group at most, at least 2 (%(default)s)")
    p.add_argument("--resume", action="store_true", help="keep the cells that are measured")
    p.add_argument("--retry", action="store_true", help="with --resume: measure the groups in which a cell failed anew")
    p.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU; the tables stay empty")
    pages.add_output(p)
    return p


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure group by group (raises ConfigError, MachineError)."""
    groups = chosen(options)
    device = resolve_device("cpu" if options.rehearse else "cuda").type
    result = _begun(options, device)
    done = {cell["group"] for cell in result["cells"]}
    end = time.monotonic() + 60 * options.minutes
    for group in groups:
        if group.name in done:
            continue
        if time.monotonic() + (0 if options.rehearse else GROUP_SECONDS) > end:
            print(f"{group.name}: left for --resume", flush=True)
            continue
        began = time.monotonic()
        result["cells"] += measure(group, device, options.rehearse, options.seconds, options.rounds)
        pages.write(options.output, STEM, result, page(result))
        print(f"{group.name}: {time.monotonic() - began:.1f} s", flush=True)
        if device == "cuda":
            torch.cuda.synchronize()  # raises where a failed group left the device unusable: the file is written
            torch.cuda.empty_cache()
    pages.write(options.output, STEM, result, page(result))
    return result


def chosen(options: argparse.Namespace) -> list[Group]:
    """Return the groups that are asked for (raises ConfigError)."""
    if options.rounds < 2:
        raise ConfigError(f"--rounds {options.rounds}: must be at least 2")
    if options.seconds <= 0:
        raise ConfigError(f"--seconds {options.seconds:g}: must be above 0")
    return pages.only(options.only, GROUPS, "group")


def _begun(options: argparse.Namespace, device: str) -> dict[str, Any]:
    """Return an earlier run's result to continue, or an empty one (raises ConfigError)."""
    here = machine(device)
    result = {
        "benchmark": STEM,
        "command": pages.command(parser(), options).replace(" --resume", "").replace(" --retry", ""),
        "machine": here,
        "rehearsal": options.rehearse,
        "seconds_per_cell": options.seconds,
        "rounds": options.rounds,
        "cells": [],
    }
    file = options.output / f"{STEM}.json"
    if not options.resume or not file.exists():
        return result
    earlier: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if earlier["rehearsal"] != options.rehearse or earlier["machine"]["gpu"] != here["gpu"]:
        place = earlier["machine"]["gpu"] or "a rehearsal"
        raise ConfigError(
            f"--resume: {file} is of {place}, this is {here['gpu'] or 'a rehearsal'}; give another --output"
        )
    failed = {cell["group"] for cell in earlier["cells"] if cell["status"] != "measured"} if options.retry else set()
    return result | {"cells": [cell for cell in earlier["cells"] if cell["group"] not in failed]}


if __name__ == "__main__":
    sys.exit(main())
