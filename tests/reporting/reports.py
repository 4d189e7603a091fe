"""Made-up runs for the report's tests: seeded outputs whose exits get better with depth."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from adaptive.inference.outputs import Outputs
from adaptive.inference.policy import Policy
from adaptive.reporting.image_wall import Tile, choose, tiles
from adaptive.reporting.page import ReportFiles, write_report
from adaptive.reporting.report_data import RunFacts, RunReport, build_run


def make_outputs(exits: int, images: int, classes: int, seed: int = 0) -> Outputs:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (images,), generator=draw)
    logits = torch.randn(exits, images, classes, generator=draw)
    hardness = 6 * torch.rand(images, generator=draw)
    for i in range(exits):
        logits[i, torch.arange(images), labels] += hardness * (0.5 + i / exits)
    return Outputs(logits, labels, torch.arange(images))


def make_evaluation(exits: int) -> dict[str, Any]:
    points = [
        {"budget": 1e6 * b, "cost": 1e6 * b, "top1": 40 + 5.0 * b, "shares": np.full(exits, 1 / exits).tolist()}
        for b in (1, 2, 3)
    ]
    return {
        "budgeted": {"kind": "confidence", "method": "search", "split": "val", "unit": "MACs", "points": points},
        "milliseconds": {
            "machine": "a machine & <b>more</b>",
            "device": "cpu",
            "batch": 64,
            "exits": [0.5 * (i + 1) for i in range(exits)],
        },
    }


def make_run(
    exits: int = 3,
    images: int = 400,
    classes: int = 4,
    policy: bool = True,
    temperatures: bool = True,
    evaluation: bool | dict[str, Any] = True,
    names: list[str] | None = None,
    **changes: Any,
) -> RunReport:
    decides = None
    if policy:
        warm = [1.0 + 0.25 * i for i in range(exits)] if temperatures else []
        decides = Policy(thresholds=[*np.linspace(0.8, 0.6, exits - 1).tolist(), 0.0], temperatures=warm)
    settings: dict[str, Any] = {
        "name": "digits",
        "backbone": "resnet10t",
        "checkpoint": "step-00000010",
        "dataset": "made up",
        "split": "test",
        "classes": names or [f"class {i}" for i in range(classes)],
        "exit_names": [f"blocks.{i}" for i in range(exits)],
        "macs": [1_000_000 * (i + 1) for i in range(exits)],
        "parameters": [20_000 * (i + 1) for i in range(exits)],
        "folder": "runs/digits",
    }
    outputs = make_outputs(exits, images, len(names) if names else classes)
    facts = RunFacts(policy=decides, **{**settings, **changes})
    measured = make_evaluation(exits) if evaluation is True else evaluation or None
    return build_run(outputs, facts, measured)


def make_tiles(run: RunReport, per_exit: int = 6, size: int = 24) -> list[Tile]:
    draw = np.random.default_rng(0)
    chosen = choose(run, per_exit)
    pictures = [Image.fromarray(draw.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in chosen]
    return tiles(run, chosen, pictures)


def write(runs: list[RunReport], folder: Path, **options: Any) -> ReportFiles:
    walls = {i: make_tiles(run) for i, run in enumerate(runs) if run.policy}
    return write_report(runs, folder / "report.html", folder / "figures", walls, **options)
