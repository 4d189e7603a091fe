"""The page of training steps on a GPU: a table per mode, with what was expected beside what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.gpu_run.cells import GROUPS, WHOLE
from benchmarks.shared import pages
from benchmarks.shared.cards import find_card
from benchmarks.shared.locations import RESULTS

GIB = 2**30
EMPTY = "-"  # a cell that nothing has filled yet
NUMBERS = ("batch", "images/s", "step, ms", "/ first", "per MAC / first", "floor, ms", "MFU", "peak, GiB")
MODES = {
    "bf16": "bf16 (autocast), eager",
    "compiled": "bf16, torch.compile",
    "zero": "bf16, DeepSpeed's engine",
    "fp32": "fp32 (convolutions in TF32, PyTorch's default)",
}
ROOFLINE = RESULTS / "roofline.json"


def page(result: Mapping[str, Any]) -> str:
    """Return the page; a rehearsal's cells stay empty."""
    measured = {} if result["rehearsal"] else {(cell["group"], cell["trial"]): cell for cell in result["cells"]}
    floors = expected(result["machine"]["gpu"])
    parts = [f"## {title}\n\n{_table(mode, measured, floors)}" for mode, title in MODES.items()]
    title = "Rehearsal of the training steps on a GPU" if result["rehearsal"] else "Training steps on a GPU"
    forks = "\n".join(_fork_lines(measured)) or "Not measured."
    tables = "\n\n".join(parts)
    return f"""# {title}

`{result["command"]}`

{pages.hardware(result["machine"])}

Median (quartiles) of rounds in which all lines of a group take a step in turn; `/ first` compares with the first line
of its group within the round, `per MAC` divides by the multiply-adds of both. The floor is the roofline of
[roofline.md](../roofline.md): every operation at the data sheet's rate or bandwidth (compiled: products and
convolutions alone), or the launches. MFU: six operations per multiply-add and image, over the data sheet's rate. The
peak is the allocator's, weights and optimizer included.{_failures(result)}

{tables}

## Gradient Equilibrium at the branch points alone

{forks}
"""


def expected(gpu: str | None) -> dict[str, Mapping[str, float]]:
    """Return the floors in ms by group and trial, of the card that is here; empty where there is none."""
    card = find_card(gpu) if gpu else None
    if card is None or not ROOFLINE.exists():
        return {}
    entries = json.loads(ROOFLINE.read_text(encoding="utf-8"))["cells"]
    return {f"{entry['group']} {entry['trial']}": entry["cards"].get(card.name, {}) for entry in entries}


def _table(mode: str, measured: Mapping[tuple[str, str], Any], floors: Mapping[str, Mapping[str, float]]) -> str:
    rows = []
    for group in (group for group in GROUPS if group.mode == mode):
        first = measured.get((group.name, group.trials[0].key))
        for trial in group.trials:
            cell = measured.get((group.name, trial.key))
            floor = floors.get(f"{group.name} {trial.key}", {}).get("floor_ms")
            rows.append(_row(f"{group.network}, {trial.title}", cell, first, floor))
    return pages.table(["network, what runs", *NUMBERS], rows)


def _row(title: str, cell: Any, first: Any, floor: float | None) -> Sequence[str]:
    shown = EMPTY if floor is None else f"{floor:.2f}"
    if cell is None or cell["status"] != "measured":
        return (title, EMPTY, cell["status"] if cell else EMPTY, *[EMPTY] * 3, shown, EMPTY, EMPTY)
    over = cell["over_first"]
    return (
        title,
        str(cell["settings"]["batch"]),
        f"{cell['images_per_second']:.0f}",
        pages.spread(cell["step_ms"], 2),
        pages.spread(over, 3) if over else "1",
        f"{over['median'] * first['macs'] / cell['macs']:.3f}" if over and first else "1",
        shown,
        f"{cell['mfu']:.3f}" if cell["mfu"] else EMPTY,
        f"{cell['peak_memory_bytes'] / GIB:.2f}" if cell["peak_memory_bytes"] else EMPTY,
    )


def _fork_lines(measured: Mapping[tuple[str, str], Any]) -> list[str]:
    lines = []
    for (group, _), cell in measured.items():
        step = measured.get((group, "equilibrium"), {}).get("step_ms")
        if "forks" in cell and step:
            added = cell["forks"]["added_ms"]
            share = 100 * added["median"] / step["median"]
            lines.append(f"* {group}: adds {pages.spread(added, 4)} ms, {share:.3f} % of the step (limit: 0.5 %)")
    return lines


def _failures(result: Mapping[str, Any]) -> str:
    failed = [cell for cell in result["cells"] if cell["status"] != "measured"]
    lines = [f"* {cell['group']}, {cell['title']}: {cell['status']}: {cell['reason']}" for cell in failed]
    return "\n\nNot measured:\n\n" + "\n".join(lines) if lines else ""


def headline(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the measured cells of every network with the whole method, by group, for the summary."""
    if result["rehearsal"]:
        return {}
    measured = [cell for cell in result["cells"] if cell["status"] == "measured"]
    return {cell["group"]: cell for cell in measured if cell["trial"] == WHOLE.key}
