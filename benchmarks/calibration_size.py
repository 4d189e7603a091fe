"""Time and memory of calibration on as many images, exits and classes as ImageNet's validation has.

    python benchmarks/calibration_size.py

Logits are drawn; a fresh process calibrates 40 budgets by each method, and its resident memory is watched.
benchmarks/README.md says how to read the result.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.console import Console
from rich.markdown import Markdown

from adaptive.inference.calibration.calibrate import curve
from benchmarks.shared import pages
from benchmarks.shared.results import machine

METHODS = ("geometric", "search", "maximum")
GIB = 2**30
LIMIT_GIB = 4.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code is 1 where calibration takes more memory than it may."""
    options = parser().parse_args(arguments)
    if options.method:
        print(json.dumps(alone(options)))
        return 0
    found = {}
    for method in METHODS:
        words = [f"--{name}={getattr(options, name)}" for name in ("images", "exits", "classes", "budgets")]
        done = subprocess.run(
            [sys.executable, __file__, *words, f"--method={method}"], stdout=subprocess.PIPE, text=True, check=True
        )
        found[method] = json.loads(done.stdout.splitlines()[-1])
    result = {
        "benchmark": "calibration_size",
        "command": pages.command(parser(), options),
        "machine": machine("cpu"),
        "settings": {name: getattr(options, name) for name in ("images", "exits", "classes", "budgets")},
        "limit_gib": LIMIT_GIB,
        "methods": found,
    }
    text = page(result)
    written = pages.write(options.output, "calibration_size", result, text)
    Console().print(Markdown(text))
    print("written: " + ", ".join(map(str, written)))
    return 0 if all(entry["peak_gib"] <= LIMIT_GIB for entry in found.values()) else 1


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    p = argparse.ArgumentParser(prog="calibration_size", description=(__doc__ or "").partition("\n")[0])
    p.add_argument("--images", type=int, default=50_000, help="(%(default)s)")
    p.add_argument("--exits", type=int, default=10, help="(%(default)s)")
    p.add_argument("--classes", type=int, default=1000, help="(%(default)s)")
    p.add_argument("--budgets", type=int, default=40, help="(%(default)s)")
    p.add_argument("--method", choices=METHODS, help="calibrate in this process by one method, and print JSON")
    pages.add_output(p)
    return p


def alone(options: argparse.Namespace) -> dict[str, float]:
    """Calibrate in this process: seconds, and the peaks of its memory before and in it."""
    logits, labels = drawn(options.images, options.exits, options.classes)
    costs = [float(i + 1) for i in range(options.exits)]
    steps = (costs[-1] - costs[0]) / (options.budgets + 1)
    budgets = [costs[0] + steps * (i + 1) for i in range(options.budgets)]
    before = _peak()
    began = time.perf_counter()
    curve(logits, labels, costs, budgets, method=options.method, temperature=True)
    return {
        "seconds": time.perf_counter() - began,
        "logits_gib": logits.nbytes / GIB,
        "before_gib": before,
        "peak_gib": _peak(),
    }


def drawn(images: int, exits: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (k, N, C) of exits that are the better the later they come, and labels (N,)."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (images,), generator=generator)
    logits = torch.empty(exits, images, classes)
    easy = torch.rand(images, 1, generator=generator)
    for i, values in enumerate(logits):
        values.normal_(generator=generator)
        values.scatter_add_(1, labels.unsqueeze(1), 9 * easy * (0.5 + 0.5 * (i + 1) / exits))
    return logits, labels


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def page(result: Mapping[str, Any]) -> str:
    """The page beside the JSON file."""
    s = result["settings"]
    geometric = result["methods"]["geometric"]["seconds"]
    rows = [
        (method, f"{entry['seconds']:.1f}", f"{entry['seconds'] / geometric:.2f}", f"{entry['peak_gib']:.2f}")
        for method, entry in result["methods"].items()
    ]
    first = next(iter(result["methods"].values()))
    size = f"{s['images']:,} images, {s['exits']} exits, {s['classes']:,} classes, {s['budgets']} budgets"
    return f"""# Calibration: {size}

`{result["command"]}`

{pages.hardware(result["machine"])}

One fresh process per method: temperatures, scores and thresholds from drawn logits, which take
{first["logits_gib"]:.2f} GiB themselves; libraries and logits together {first["before_gib"]:.2f} GiB before it began.
The peak is that of the process's resident memory and must stay within {result["limit_gib"]:g} GiB.

{pages.table(["method", "s", "/ geometric", "peak, GiB"], rows)}
"""


if __name__ == "__main__":
    sys.exit(main())
