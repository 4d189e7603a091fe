"""The ablation's result as a Markdown page."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

BUDGETED = (
    "Thresholds from the geometric calibration on val; of its forty points the one that is best on val within the "
    "budget there. Test top-1 in %, mean ± standard deviation, and in brackets the average MMACs that a test image "
    "then took."
)


def markdown(result: Mapping[str, Any], stem: str, reading: str | None) -> str:
    """Return the page; ``reading`` is what a person wrote about these numbers."""
    lines = [
        f"# Ablation: {_headline(result)}",
        "",
        f"`{result['command']}`",
        "",
        _machine(result),
        "",
        _method(result),
        "",
        "## Every exit",
        "",
        f"Test top-1 in %, mean ± standard deviation, seeds {', '.join(map(str, result['seeds']))}.",
        "",
        *_exit_table(result),
        "",
        "Differences of test top-1 in points, seed by seed: mean ± standard error.",
        "",
        *_difference_table(result),
        "",
        f"![Accuracy against cost]({stem}.png)",
        "",
        "## Budgeted",
        "",
        BUDGETED,
        "",
        *_budget_table(result),
        "",
        "## Gradients",
        "",
        _gradient_method(result),
        "",
        *_gradient_sections(result),
        f"![Gradients]({stem}_gradients.png)",
        "",
    ]
    if reading:
        lines += ["## Reading", "", reading.strip(), ""]
    return "\n".join(lines)


def _headline(result: Mapping[str, Any]) -> str:
    s = result["settings"]
    exits = len(next(iter(result["variants"].values()))["macs"])
    return f"{s['backbone']}, {exits} exits, {s['image_size']} px, {s['steps']} steps of {s['global_batch']} images"


def _machine(result: Mapping[str, Any]) -> str:
    m = result["machine"]
    return (
        f"{m['gpu'] or m['cpu']}, {m['threads']} CPU threads per run; torch {m['torch']}, timm {m['timm']}, "
        f"deepspeed {m['deepspeed']}, Python {m['python']}"
    )


def _method(result: Mapping[str, Any]) -> str:
    s, images = result["settings"], result["images"]
    options = ", ".join(f"{key} {value}" for key, value in s["options"].items())
    network = f"{s['backbone']} ({options})" if options else s["backbone"]
    counts = ", ".join(f"{images[name]:,} {name}" for name in sorted(images, reverse=True))
    minutes = [sum(entry["train_seconds"]) / len(entry["train_seconds"]) / 60 for entry in result["variants"].values()]
    return (
        f"Images: {counts}. Network: {network}. SGD, momentum {s['momentum']}, lr {s['lr']}, "
        f"{s['schedule']} schedule, weight decay {s['weight_decay']}, {s['precision']}; {s['epochs']} "
        f"epochs of {s['steps_per_epoch']} steps, {s['steps']} steps in all, the same in every variant. Within a seed "
        "all variants start from the same weights (every network is built with links, which variants without ISC "
        "switch off) and see the same images in the same order, augmented alike; digests of both were compared. "
        "Nothing is selected on the test split: the network is that of the last step, thresholds come from val. "
        f"A run trained for {min(minutes):.1f} to {max(minutes):.1f} minutes (mean per variant, beside other work)."
    )


def _exit_table(result: Mapping[str, Any]) -> list[str]:
    variants = result["variants"]
    macs = next(iter(variants.values()))["macs"]
    head = ["variant", *(f"exit {i} ({cost / 1e6:.2f} M)" for i, cost in enumerate(macs, start=1)), "mean of exits"]
    rows = []
    for name, entry in variants.items():
        exits, mean = entry["test_top1"], entry["mean_of_exits"]
        rows.append([name, *spread(exits["mean"], exits["sd"]), single(mean)])
    return table(head, rows)


def _difference_table(result: Mapping[str, Any]) -> list[str]:
    names = list(result["variants"])
    exits = len(result["variants"][names[0]]["macs"])
    rows = []
    for before, name in itertools.pairwise(names):
        entry = result["variants"][name]
        pairs = {f"{name} - {before}": entry["minus_previous"], f"{name} - {names[0]}": entry["minus_first"]}
        rows += [[title, *spread(d["mean"], d["se"], sign="+")] for title, d in pairs.items()]
    return table(["", *(f"exit {i}" for i in range(1, exits + 1)), "mean of exits"], rows)


def _budget_table(result: Mapping[str, Any]) -> list[str]:
    head = ["variant", *(f"{budget / 1e6:.2f} MMACs" for budget in result["budgets"])]
    rows = []
    for name, entry in result["variants"].items():
        cells = []
        for point in entry["budgeted"]:
            cells.append(f"{single(point['test_top1'])} ({point['test_macs']['mean'] / 1e6:.2f})")
        rows.append([name, *cells])
    return table(head, rows)


def _gradient_method(result: Mapping[str, Any]) -> str:
    first = next(iter(result["gradients"].values()))[0]
    return (
        f"Of the exits' cross entropies on {first['images']} training images (always the same, not augmented), network "
        "in training mode, mean over seeds. Norms are those of exit i's gradient in block j. The cosines on the right "
        "are between an exit's gradient in all blocks up to it and the summed or the equalised gradient there. Below "
        "stand the norms of these two gradients, and of the block's convolution weights."
    )


def _gradient_sections(result: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    shown = list(result["gradients"])[:2]
    for name in shown:
        for moment in result["gradients"][name]:
            lines += [f"{name}, step {moment['step']}:", "", *_norm_table(moment), ""]
    exits = len(result["gradients"][shown[0]][0]["sum_norms"]["mean"])
    head = ["variant", "step", *(f"block {j}" for j in range(1, exits))]
    rows = []
    for name, moments in result["gradients"].items():
        for moment in moments:
            rows.append([name, str(moment["step"]), *_pair_cells(moment["cosines"]["mean"])])
    return [*lines, "Cosine between two exits' gradients: mean over the pairs that share the block (least pair).", "",
            *table(head, rows), ""]  # fmt: skip


def _norm_table(moment: Mapping[str, Any]) -> list[str]:
    exits = len(moment["sum_norms"]["mean"])
    head = ["", *(f"block {j}" for j in range(1, exits + 1)), "cosine with sum", "with equalised"]
    rows = []
    for i, norms in enumerate(moment["norms"]["mean"]):
        cells = [f"{norm:.3f}" if j <= i else "" for j, norm in enumerate(norms)]
        cosines = [moment[key]["mean"][i] for key in ("with_sum", "with_equalised")]
        rows.append([f"exit {i + 1}", *cells, *(f"{cosine:.2f}" for cosine in cosines)])
    for title, key in (("sum", "sum_norms"), ("equalised", "equalised_norms"), ("weights", "weight_norms")):
        rows.append([title, *(f"{norm:.3f}" for norm in moment[key]["mean"]), "", ""])
    return table(head, rows)


def _pair_cells(cosines: Sequence[Sequence[Sequence[float | None]]]) -> list[str]:
    cells = []
    for block in cosines[:-1]:
        pairs = [value for i, row in enumerate(block) for value in row[:i] if value is not None]
        cells.append(f"{sum(pairs) / len(pairs):+.2f} ({min(pairs):+.2f})")
    return cells


def spread(means: Iterable[float], deviations: Iterable[float] | None, sign: str = "") -> list[str]:
    """Write means with their deviations, where there are some."""
    if deviations is None:
        return [f"{mean:{sign}.2f}" for mean in means]
    return [f"{mean:{sign}.2f} ± {deviation:.2f}" for mean, deviation in zip(means, deviations, strict=True)]


def single(found: Mapping[str, Any]) -> str:
    """Write one mean with its deviation, which is None of a single seed and 0 where all seeds agree."""
    return spread([found["mean"]], None if found["sd"] is None else [found["sd"]])[0]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return a Markdown table's lines."""
    return [
        "| " + " | ".join(head) + " |",
        "|---|" + "---:|" * (len(head) - 1),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
