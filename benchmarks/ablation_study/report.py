"""The ablation's finished runs as one result: means and deviations over seeds, differences, budgets, gradients."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adaptive.config.sections import Config
from adaptive.data.reading.order import steps_per_epoch
from adaptive.errors import TrainingError
from adaptive.training.engine.group import resolve_device
from benchmarks.ablation_study.figures import accuracy, gradients
from benchmarks.ablation_study.page import markdown
from benchmarks.ablation_study.run import RESULT
from benchmarks.shared import results

Runs = Mapping[tuple[str, int], Path]
GRADIENT_KEYS = ("norms", "cosines", "with_sum", "with_equalised", "sum_norms", "equalised_norms", "weight_norms")


def collect(runs: Runs, configs: Mapping[tuple[str, int], Config], images: Mapping[str, int]) -> dict[str, Any]:
    """Read what the runs measured and sum it up.

    Args:
        runs: run folder by variant and seed; all are finished.
        configs: their configurations.
        images: number of them by split.

    Raises:
        TrainingError: two variants of a seed did not start from the same weights or saw other images.
    """
    found = {key: json.loads((place / RESULT).read_text()) for key, place in runs.items()}
    variants = list(dict.fromkeys(variant for variant, _ in runs))
    seeds = sorted({seed for _, seed in runs})
    _check_fair(found)
    by_variant = {v: [found[v, seed] for seed in seeds] for v in variants}
    budgets = budgets_between(by_variant[variants[0]][0]["macs"])
    config = next(iter(configs.values()))
    device = resolve_device(config.train.device).type
    return {
        "machine": results.machine(device),
        "settings": _settings(config, images, device),
        "images": dict(images),
        "seeds": seeds,
        "budgets": budgets,
        "variants": {
            variant: _summary(variant, variants, by_variant, budgets, configs[variant, seeds[0]])
            for variant in variants
        },
        "gradients": {variant: _gradients(entries) for variant, entries in by_variant.items()},
    }


def _check_fair(found: Mapping[tuple[str, int], Mapping[str, Any]]) -> None:
    """Every variant of a seed began with the same weights and learned from the same images in the same order."""
    for (variant, seed), entry in found.items():
        first = next(other for (_, s), other in found.items() if s == seed)
        for key in ("initial_weights", "image_order", "dataset", "step"):
            if entry[key] != first[key]:
                raise TrainingError(
                    f"the run {variant}, seed {seed}, has another {key} than the others; begin anew in another --work"
                )


def _settings(config: Config, images: Mapping[str, int], device: str) -> dict[str, Any]:
    model, train = config.model, config.train
    steps = steps_per_epoch(images[config.data.train_split], train.global_batch)
    return {
        "backbone": model.backbone,
        "exits": model.exits,
        "options": model.options,
        "image_size": config.data.image_size,
        "epochs": train.epochs,
        "steps_per_epoch": steps,
        "steps": min(train.max_steps or steps * train.epochs, steps * train.epochs),
        "global_batch": train.global_batch,
        "lr": config.optimizer.lr,
        "schedule": config.schedule.name,
        "milestones": config.schedule.milestones,
        "momentum": config.optimizer.momentum,
        "weight_decay": config.optimizer.weight_decay,
        "precision": train.precision,
        "device": device,
    }


def budgets_between(macs: Sequence[float]) -> list[float]:
    """Return the costs halfway between neighbouring exits."""
    return [(a + b) / 2 for a, b in itertools.pairwise(macs)]


def _summary(
    variant: str,
    variants: Sequence[str],
    by_variant: Mapping[str, Sequence[Mapping[str, Any]]],
    budgets: Sequence[float],
    config: Config,
) -> dict[str, Any]:
    entries = by_variant[variant]
    place = variants.index(variant)
    curves = [entry["curve"] for entry in entries]
    return {
        "gamma": config.distillation.gamma,
        "macs": entries[0]["macs"],
        "test_top1": statistics([e["test_top1"] for e in entries]),
        "val_top1": statistics([e["val_top1"] for e in entries]),
        "mean_of_exits": statistics([float(np.mean(e["test_top1"])) for e in entries]),
        "minus_first": _difference(entries, by_variant[variants[0]]) if place else None,
        "minus_previous": _difference(entries, by_variant[variants[place - 1]]) if place else None,
        "curve": {
            "q": [point["q"] for point in curves[0]],
            "test_macs": statistics([[point["test_macs"] for point in curve] for curve in curves]),
            "test_top1": statistics([[point["test_top1"] for point in curve] for curve in curves]),
        },
        "budgeted": [_at_budget(curves, budget) for budget in budgets],
        "train_seconds": [entry["train_seconds"] for entry in entries],
        "runs": [{key: entry[key] for key in ("seed", "val_top1", "test_top1")} for entry in entries],
    }


def choose(curve: Sequence[Mapping[str, Any]], budget: float) -> Mapping[str, Any]:
    """Return the point of a curve that is best on val within a cost there (the cheapest if none is)."""
    within = [point for point in curve if point["val_macs"] <= budget]
    if not within:
        return min(curve, key=lambda point: point["val_macs"])
    return max(within, key=lambda point: point["val_top1"])


def _at_budget(curves: Sequence[Sequence[Mapping[str, Any]]], budget: float) -> dict[str, Any]:
    chosen = [choose(curve, budget) for curve in curves]
    return {
        "budget": budget,
        "test_top1": statistics([point["test_top1"] for point in chosen]),
        "test_macs": statistics([point["test_macs"] for point in chosen]),
    }


def statistics(values: Sequence[Any]) -> dict[str, Any]:
    """Mean and standard deviation (n - 1) over the first axis; a single value has no deviation."""
    array = np.array(values, dtype=float)
    return {
        "mean": array.mean(axis=0).tolist(),
        "sd": array.std(axis=0, ddof=1).tolist() if len(array) > 1 else None,
    }


def _difference(entries: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Test accuracy minus another variant's, seed by seed: mean and standard error, per exit and over all exits."""
    rows = [
        np.append(np.subtract(a["test_top1"], b["test_top1"]), np.mean(a["test_top1"]) - np.mean(b["test_top1"]))
        for a, b in zip(entries, others, strict=True)
    ]
    found = statistics([row.tolist() for row in rows])
    error = None if found["sd"] is None else (np.array(found["sd"]) / np.sqrt(len(rows))).tolist()
    return {"mean": found["mean"], "se": error}


def _gradients(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means and deviations over seeds of the gradient records, moment by moment."""
    moments = []
    for records in zip(*(entry["gradients"] for entry in entries), strict=True):
        summed = {key: _without_nan(statistics([record[key] for record in records])) for key in GRADIENT_KEYS}
        moments.append({"step": records[0]["step"], "images": records[0]["images"], **summed})
    return moments


def _without_nan(value: Any) -> Any:
    """Write None where numpy has nan: JSON has no such number."""
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_nan(entry) for entry in value]
    return None if value is None or value != value else value


def write(result: Mapping[str, Any], folder: Path, stem: str) -> list[Path]:
    """Write ``<stem>`` as .json, .md, .png and ``<stem>_gradients.png``; the page takes in ``<stem>_reading.md``."""
    folder.mkdir(parents=True, exist_ok=True)
    reading = folder / f"{stem}_reading.md"
    text = reading.read_text(encoding="utf-8") if reading.is_file() else None
    figures = [folder / f"{stem}.png", folder / f"{stem}_gradients.png"]
    accuracy(result, figures[0])
    gradients(result, figures[1])
    pages = {folder / f"{stem}.md": markdown(result, stem, text), folder / f"{stem}.json": _json(result)}
    for path, content in pages.items():
        path.write_text(content, encoding="utf-8")
    return [*pages, *figures]


def _json(result: Mapping[str, Any]) -> str:
    return json.dumps(result, indent=1) + "\n"
