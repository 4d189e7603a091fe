"""Calibration of early exits: search against the geometric one, on trained networks.

    python benchmarks/calibration.py RUN... --data FOLDER

Every policy is calibrated on the validation split, at forty budgets between the first and the last exit's cost, and
measured on the test split, which takes part in no choice.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor

from adaptive import runs
from adaptive.data.reading.stream import EvaluationStream
from adaptive.data.shards.index import load_index
from adaptive.errors import AdaptiveError
from adaptive.files import write_atomically
from adaptive.inference.calibration.calibrate import curve
from adaptive.inference.calibration.search import search
from adaptive.inference.calibration.thresholds import Scored
from adaptive.inference.outputs import Outputs, collect, simulate
from benchmarks.shared import results
from benchmarks.shared.calibration_page import draw, markdown
from benchmarks.shared.locations import RESULTS

BUDGETS = 40
RESAMPLES = 2000
SPEED = (50_000, 10)  # images, exits
POLICIES = (
    ("geometric", "confidence", "geometric"),
    ("search", "confidence", "search"),
    ("maximum", "confidence", "maximum"),
    ("search, margin", "margin", "search"),
    ("search, entropy", "entropy", "search"),
    ("search, patience", "patience", "search"),
    ("search, gate", "gate", "search"),
)


@dataclass(frozen=True)
class Held:
    """A network's costs per exit, and its answers to the validation and the test split."""

    costs: list[float]
    val: Outputs
    test: Outputs


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    options = parser().parse_args(arguments)
    try:
        networks = {}
        for folder in options.runs:
            networks[folder.name] = measure(load(folder, options.data))
            print(folder.name, networks[folder.name]["against_geometric"]["search"], flush=True)
    except AdaptiveError as error:
        print(f"calibration: {error}", file=sys.stderr)
        return 1
    result = {
        "command": "python benchmarks/calibration.py RUN... --data FOLDER",
        "machine": results.machine("cpu"),
        "budgets": BUDGETS,
        "resamples": RESAMPLES,
        "networks": networks,
        "speed": speed(),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    write_atomically(options.output / "calibration.json", json.dumps(result, indent=1) + "\n")
    write_atomically(options.output / "calibration.md", markdown(result))
    draw(result, options.output / "calibration.png")
    print(f"written: {options.output}/calibration.md, .json, .png")
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    p = argparse.ArgumentParser(prog="calibration", description=(__doc__ or "").partition("\n")[0])
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders that `adaptive train` wrote")
    p.add_argument("--data", help="packed dataset or its URL; by default that of each run")
    p.add_argument("--output", type=Path, default=RESULTS, help="folder of the result files (benchmarks/results)")
    return p


def load(folder: Path, data: str | None) -> Held:
    """Run a trained network's exits over both splits."""
    trained = runs.load(folder, "last")
    config = trained.config
    settings = config.data.model_copy(update={"path": data or config.data.path})
    index = load_index(settings.path, settings)

    def outputs(split: str) -> Outputs:
        stream = EvaluationStream(index, settings, split, batch=config.evaluate.batch)
        return collect(trained.network, stream, torch.device("cpu"), stream.total)

    costs = [float(cost.macs) for cost in trained.network.costs()]
    return Held(costs, outputs(config.data.val_split), outputs(config.data.test_split))


def measure(held: Held) -> dict[str, Any]:
    """Calibrate every policy on val and measure it on test."""
    budgets = np.linspace(held.costs[0], held.costs[-1], BUDGETS).tolist()
    policies: dict[str, Any] = {}
    right: dict[str, Tensor] = {}
    for name, kind, method in POLICIES:
        started = time.perf_counter()
        found = curve(held.val.logits, held.val.labels, held.costs, budgets, kind=kind, method=method)  # type: ignore[arg-type]
        seconds = time.perf_counter() - started
        probabilities = torch.stack(list(held.test.probabilities(found[0])))
        predictions = [simulate(policy, probabilities) for policy in found]
        right[name] = torch.stack([p.labels == held.test.labels for p in predictions]).double()  # (budgets, N)
        prices = torch.tensor(held.costs, dtype=torch.float64)
        policies[name] = {
            "seconds": seconds,
            "val_top1": [policy.expected_accuracy for policy in found],
            "val_macs": [policy.expected_cost for policy in found],
            "test_top1": (100 * right[name].mean(dim=1)).tolist(),
            "test_macs": [prices[p.exits - 1].mean().item() for p in predictions],
        }
    return {
        "macs": held.costs,
        "images": {"val": len(held.val.labels), "test": len(held.test.labels)},
        "test_top1": (100 * (held.test.logits.argmax(-1) == held.test.labels).double().mean(dim=1)).tolist(),
        "budgets": budgets,
        "policies": policies,
        "against_geometric": {
            name: against(right[name], right["geometric"], policies[name], policies["geometric"])
            for name in policies
            if name != "geometric"
        },
    }


def against(right: Tensor, base: Tensor, policy: dict[str, Any], geometric: dict[str, Any]) -> dict[str, Any]:
    """Compare a policy with the geometric one, budget by budget and in the mean over budgets.

    Args:
        right: (budgets, N), 1 where an image of the test split is right.
        base: the same of the geometric policy.
        policy: its record.
        geometric: that of the geometric one.
    """
    gain = 100 * (right - base)
    per_image = gain.mean(dim=0).numpy()  # the same images at all budgets: resample images, not pairs
    generator = np.random.default_rng(0)
    means = [per_image[generator.integers(0, len(per_image), len(per_image))].mean() for _ in range(RESAMPLES)]
    steps = gain.mean(dim=1)
    below = sum(a < b - 1e-9 for a, b in zip(policy["val_top1"], geometric["val_top1"], strict=True))
    cheaper = np.mean(np.array(policy["test_macs"]) / np.array(geometric["test_macs"]))
    return {
        "test_at_least": int((steps >= -1e-9).sum()),
        "test_above": int((steps > 1e-9).sum()),
        "test_gain": float(steps.mean()),
        "test_gain_interval": np.percentile(means, [2.5, 97.5]).tolist(),
        "val_gain": float(np.mean(policy["val_top1"]) - np.mean(geometric["val_top1"])),
        "val_below": int(below),
        "test_macs_ratio": float(cheaper),
    }


def speed() -> dict[str, float]:
    """Processor time of the search at many images, exits and budgets, on made-up answers."""
    images, exits = SPEED
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(exits, images, generator=generator)
    ease = (
        torch.randn(images, generator=generator) + torch.linspace(0.2, 1.2, exits).unsqueeze(1) + 0.2 * noise.cumsum(0)
    )
    correct = torch.rand(exits, images, generator=generator) < (2 * ease).sigmoid()
    scored = Scored((1.3 * ease + 0.4 * torch.randn(exits, images, generator=generator)).sigmoid(), correct)
    costs = [float(i + 1) for i in range(exits)]
    budgets = np.linspace(costs[0], costs[-1], BUDGETS).tolist()
    seconds = {}
    for name, smooth in (("search", True), ("maximum", False)):
        started = time.process_time()
        search(scored, costs, budgets, smooth=smooth)
        seconds[name] = time.process_time() - started
    return {"images": images, "exits": exits, "budgets": BUDGETS, **seconds}


if __name__ == "__main__":
    sys.exit(main())
