"""Page and figure of the calibration benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from adaptive.reporting.style import COLOURS, DOTS_PER_INCH, STYLE

NETWORK_COLUMNS = (
    "network",
    "exits' test top-1",
    "budgets with test >= geometric (above)",
    "test difference",
    "95 % interval",
    "val difference",
    "budgets with val below",
    "test MACs / geometric's",
)
POLICY_COLUMNS = (
    "policy",
    "budgets with test >= geometric",
    "test difference ± standard error over networks",
    "val difference",
    "test MACs / geometric's",
    "seconds for all budgets",
)


def markdown(result: Mapping[str, Any]) -> str:
    """Return the page that stands beside the JSON file."""
    m, networks, budgets = result["machine"], result["networks"], result["budgets"]
    first = next(iter(networks.values()))
    s = result["speed"]
    what = (
        f"{len(networks)} trained networks; calibrated on {first['images']['val']:,} val images, measured on "
        f"{first['images']['test']:,} test images, at {budgets} budgets evenly spaced between the first and the last "
        "exit's MACs. Differences are test top-1 in points against the geometric calibration of the same budget, mean "
        "over the budgets, with a paired bootstrap 95 % interval over test images "
        f"({result['resamples']:,} resamples)."
    )
    caution = (
        "The networks share their val and test images, so their differences are not independent. Gates are trained on "
        "one half of val and their thresholds chosen on the other."
    )
    timing = (
        f"Processor time at {s['images']:,} images, {s['exits']} exits, {s['budgets']} budgets, made-up answers, "
        f"with the geometric starts: search {s['search']:.0f} s, maximum {s['maximum']:.0f} s."
    )
    lines = [
        "# Calibration: search against geometric",
        "",
        f"`{result['command']}`",
        "",
        f"{m['cpu']}, {m['threads']} CPU threads; torch {m['torch']}, timm {m['timm']}, Python {m['python']}",
        "",
        what,
        "",
        "## Search on the confidence",
        "",
        "| " + " | ".join(NETWORK_COLUMNS) + " |",
        "|---|---|" + "---:|" * (len(NETWORK_COLUMNS) - 2),
        *(_row(name, entry, budgets) for name, entry in networks.items()),
        "",
        "## All policies, mean over networks",
        "",
        "| " + " | ".join(POLICY_COLUMNS) + " |",
        "|---|" + "---:|" * (len(POLICY_COLUMNS) - 1),
        *(_mean_row(name, networks, budgets) for name in first["against_geometric"]),
        "",
        caution,
        "",
        "![Accuracy against cost](calibration.png)",
        "",
        timing,
    ]
    return "\n".join(lines) + "\n"


def _row(name: str, entry: Mapping[str, Any], budgets: int) -> str:
    found = entry["against_geometric"]["search"]
    low, high = found["test_gain_interval"]
    exits = " / ".join(f"{value:.1f}" for value in entry["test_top1"])
    cells = (
        name,
        exits,
        f"{found['test_at_least']} of {budgets} ({found['test_above']})",
        f"{found['test_gain']:+.3f}",
        f"{low:+.3f} to {high:+.3f}",
        f"{found['val_gain']:+.3f}",
        str(found["val_below"]),
        f"{found['test_macs_ratio']:.3f}",
    )
    return "| " + " | ".join(cells) + " |"


def _mean_row(name: str, networks: Mapping[str, Any], budgets: int) -> str:
    entries = [entry["against_geometric"][name] for entry in networks.values()]
    gains = np.array([entry["test_gain"] for entry in entries])
    error = f" ± {gains.std(ddof=1) / len(gains) ** 0.5:.3f}" if len(gains) > 1 else ""
    seconds = np.mean([entry["policies"][name]["seconds"] for entry in networks.values()])

    def mean(key: str) -> float:
        return float(np.mean([entry[key] for entry in entries]))

    return (
        f"| {name} | {mean('test_at_least'):.1f} of {budgets} | {gains.mean():+.3f}{error} | {mean('val_gain'):+.3f} "
        f"| {mean('test_macs_ratio'):.3f} | {seconds:.1f} |"
    )


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw test accuracy against mean MACs, mean over networks, and the difference for every network."""
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    networks = list(result["networks"].values())
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(13.2, 4.9), dpi=DOTS_PER_INCH, layout="tight")
        FigureCanvasAgg(figure)
        curves, differences = figure.subplots(1, 2)
        for colour, name in zip(COLOURS, ("geometric", "search", "maximum"), strict=False):
            macs = np.mean([n["policies"][name]["test_macs"] for n in networks], axis=0) / 1e6
            top1 = np.mean([n["policies"][name]["test_top1"] for n in networks], axis=0)
            curves.plot(macs, top1, color=colour, marker=".", label=name)
        exits = np.mean([n["macs"] for n in networks], axis=0) / 1e6
        curves.plot(exits, np.mean([n["test_top1"] for n in networks], axis=0), "k^", label="single exits")
        curves.set(xlabel="million multiply-adds per test image", ylabel="test top-1 (%)")
        curves.set_title(f"Thresholds from val, on test (mean of {len(networks)} networks)")
        for network in networks:
            gain = np.subtract(
                network["policies"]["search"]["test_top1"], network["policies"]["geometric"]["test_top1"]
            )
            differences.plot(np.array(network["budgets"]) / 1e6, gain, color=COLOURS[1], alpha=0.25, linewidth=1)
        gains = [
            np.subtract(n["policies"]["search"]["test_top1"], n["policies"]["geometric"]["test_top1"]) for n in networks
        ]
        budget = np.mean([n["budgets"] for n in networks], axis=0) / 1e6
        differences.plot(budget, np.mean(gains, axis=0), color=COLOURS[1], linewidth=2.5, label="mean")
        differences.axhline(0, color="black", linewidth=1)
        differences.set(xlabel="budget (million multiply-adds)", ylabel="search - geometric, test top-1 (points)")
        differences.set_title("At the same budget, every network")
        curves.legend(loc="lower right")
        differences.legend(loc="lower right")
        figure.savefig(path, format="png")
