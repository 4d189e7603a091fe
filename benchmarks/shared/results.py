"""Results of a benchmark as files and as a table for the terminal."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

MIB = 2**20
COLUMNS = (
    "variant",
    "images/s",
    "step, ms",
    "time / plain",
    "per MAC / plain",
    "time / loop",
    "time / previous",
    "peak, MiB",
    "memory / plain",
    "memory / loop",
)
WHOLE = "collaboration_distillation"  # the variant with every part of the method


def machine(device: str) -> dict[str, Any]:
    """Describe what the numbers depend on: processor, threads, GPU, versions."""
    found: dict[str, Any] = {
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "python": platform.python_version(),
    }
    for package in ("torch", "timm", "deepspeed"):
        found[package] = importlib.metadata.version(package)
    return found


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def rows(
    variants: Mapping[str, Mapping[str, Any]], spread: Callable[[Mapping[str, float] | None, int], str]
) -> list[tuple[str, ...]]:
    """One line of text per variant, in the order of COLUMNS; ``spread`` writes a median with its quartiles."""
    return [
        (
            entry["title"],
            spread(entry["images_per_second"], 1),
            spread(entry["step_ms"], 1),
            spread(entry["time_over_plain"], 3),
            spread(entry["time_per_mac_over_plain"], 3),
            spread(entry["time_over_loop"], 3),
            spread(entry["time_over_previous"], 3),
            f"{entry['peak_memory_bytes'] / MIB:.1f}",
            _number(entry["memory_over_plain"], 3),
            _number(entry["memory_over_loop"], 3),
        )
        for entry in variants.values()
    ]


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _spread(value: Mapping[str, float] | None, digits: int) -> str:
    if value is None:
        return ""
    return f"{value['median']:.{digits}f} ({value['q1']:.{digits}f} - {value['q3']:.{digits}f})"


def terminal_table(result: Mapping[str, Any]) -> Table:
    """Return the variants as a table for rich; in place of both quartiles it shows half their distance."""
    table = Table(title=summary(result), title_justify="left")
    for i, column in enumerate(COLUMNS):
        table.add_column(column, justify="right" if i else "left")
    for row in rows(result["variants"], _narrow):
        table.add_row(*row)
    return table


def _narrow(value: Mapping[str, float] | None, digits: int) -> str:
    if value is None:
        return ""
    return f"{value['median']:.{digits}f} ±{(value['q3'] - value['q1']) / 2:.{digits}f}"


def summary(result: Mapping[str, Any]) -> str:
    """What was measured, in one line."""
    s = result["settings"]
    extras = [name for name in ("channels_last", "compile") if s[name]] + ["deepspeed"] * (s["engine"] == "deepspeed")
    exits = f"{s['exits']} exits" if s["exits"] else "its own exits"
    parts = [s["backbone"], exits, f"batch {s['batch']}", f"{s['image_size']} px", s["precision"]]
    return ", ".join([*parts, *extras, s["device"]])


def equilibrium_line(result: Mapping[str, Any]) -> str:
    """GE's share of the step, in one line."""
    share = result["ge_share_percent"]
    within = "within" if share["median"] <= result["ge_limit_percent"] else "ABOVE"
    added = result["ge_added_ms"]["median"]
    limit = f"{within} the limit of {result['ge_limit_percent']:g} %"
    return f"GE's share of the step: {_spread(share, 3)} %, {limit} (adds {added:.3f} ms)"


def limit_lines(result: Mapping[str, Any]) -> list[str]:
    """What must hold, each in one line."""
    whole, limit = result["variants"][WHOLE], result["ratio_limit"]
    time, memory = whole["time_per_mac_over_plain"], whole["memory_over_loop"]
    found = (
        ("Time per multiply-add with every part, over the plain backbone's", time["median"], _spread(time, 3)),
        ("Peak memory with every part, over the plain multi-exit loop's", memory, f"{memory:.3f}"),
    )
    words = [
        f"{title}: {text}, {'within' if value <= limit else 'ABOVE'} the limit of {limit:g}"
        for title, value, text in found
    ]
    return [*words, equilibrium_line(result)]


def markdown(result: Mapping[str, Any]) -> str:
    """Return the page that stands beside the JSON file."""
    m = result["machine"]
    hardware = (
        f"{m['gpu'] or m['cpu']}, {m['threads']} CPU threads; torch {m['torch']}, timm {m['timm']}, "
        f"deepspeed {m['deepspeed']}, Python {m['python']}"
    )
    method = (
        f"Median (quartiles) of {result['rounds']} rounds, the variants in turn within each round; ratios are formed "
        "within the round. Absolute times are this machine's, with whatever else ran on it; the ratios are the result."
    )
    forks = (
        f"Measured at the branch points alone, {result['repetitions']} times, against what autograd does without "
        "GE. The bare operations there, summed over the branch points:"
    )
    lines = [
        f"# Training step: {summary(result)}",
        "",
        f"`{result['command']}`",
        "",
        hardware,
        "",
        method,
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---|" + "---:|" * (len(COLUMNS) - 1),
        *("| " + " | ".join(row) + " |" for row in rows(result["variants"], _spread)),
        "",
        *(f"* {line}" for line in limit_lines(result)),
        "",
        forks,
        "",
        "| operation | ms |",
        "|---|---:|",
        *(f"| {name} | {_spread(value, 3)} |" for name, value in result["ge_operations_ms"].items()),
        "",
        "Tensors that cross, per branch point: "
        + "; ".join(", ".join(" x ".join(map(str, s)) for s in shapes) for shapes in result["ge_shapes"])
        + ".",
    ]
    return "\n".join(lines) + "\n"


def write(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write ``train_step_<device>_<backbone>`` as .md and .json, and return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = result["settings"]
    stem = folder / f"train_step_{settings['device']}_{settings['backbone']}"
    # Not with_suffix: a timm name may hold a dot.
    pages = {Path(f"{stem}.md"): markdown(result), Path(f"{stem}.json"): to_json(result)}
    for path, text in pages.items():
        path.write_text(text, encoding="utf-8")
    return list(pages)


def to_json(result: Mapping[str, Any]) -> str:
    """Return the result as JSON text."""
    return json.dumps(result, indent=2) + "\n"
