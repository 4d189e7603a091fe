"""``adaptive evaluate RUN``: accuracy and cost of every exit, and of policies, on a split, as tables, JSON, figures."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from adaptive.commands.run_options import (
    add_loading,
    add_overrides,
    add_weights,
    check_loading,
    left_out_words,
    load_run,
    prepare_tables,
    split_outputs,
)
from adaptive.commands.timing_options import TIMING_BATCH
from adaptive.foreign_text import say, visible

if TYPE_CHECKING:
    from pathlib import Path

    from adaptive.inference.in_sample import InSample
    from adaptive.inference.outputs import Outputs
    from adaptive.runs import TrainedRun

BUDGETS = 40
SHOWN = 8  # budgets in the printed table
ROUNDS = 6  # of measuring milliseconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    from adaptive.inference.policy_kinds import KINDS

    parser.add_argument("run_folder", metavar="RUN", help="run folder that `adaptive train` wrote")
    parser.add_argument("--split", help="split to measure; by default data.test_split of the run")
    parser.add_argument(
        "--policy-split", metavar="SPLIT", help="split to choose policies on; by default data.val_split of the run"
    )
    parser.add_argument("--kind", choices=KINDS, default="confidence", help="what policies decide on (confidence)")
    parser.add_argument(
        "--method", choices=("search", "geometric", "maximum"), default="search", help="how thresholds are chosen"
    )
    parser.add_argument("--no-timing", action="store_true", help="leave out the milliseconds per image")
    add_weights(parser)
    add_overrides(parser)
    add_loading(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(arguments: argparse.Namespace) -> int:
    """Carry out the command."""
    from adaptive.errors import ModelError, reason_of
    from adaptive.files import json_text, write_atomically
    from adaptive.jobs.code_version import check_frozen_code

    check_frozen_code()
    check_loading(arguments)
    prepare_tables(arguments)
    trained = load_run(arguments.run_folder, arguments.checkpoint, arguments.weights, arguments.overrides)
    split = arguments.split or trained.config.data.test_split
    outputs = split_outputs(trained, arguments, split, "--split" if arguments.split else "data.test_split")
    result = _result(trained, split, outputs)
    chose = _chose(trained, split, arguments)
    result |= {"in_sample": bool(chose), "chose": chose.chose}
    if not arguments.no_timing:
        result["milliseconds"] = _milliseconds(trained, arguments, split)
    try:
        result["budgeted"] = _budgeted(trained, arguments, outputs, split)
    except ModelError as error:  # what the exits do is worth knowing all the more
        say(f"adaptive evaluate: no policies were measured: {error}", file=sys.stderr)
        result["budgeted"] = None
    name = f"evaluation_{split}"
    write_atomically(trained.folder / f"{name}.json", json_text(result, indent=1))
    if arguments.json:
        print(json_text(result))
    else:
        _print_tables(result, chose)
    try:
        figures = _draw(trained, result, name, chose.headline)
    except Exception as error:  # a figure more or less: what was measured is printed and written already
        say(f"adaptive evaluate: the figures cannot be drawn: {reason_of(error)}", file=sys.stderr)
        figures = []
    if not arguments.json:
        say(f"written: {', '.join(map(str, [trained.folder / f'{name}.json', *figures]))}")
    return 0


def _result(trained: TrainedRun, split: str, outputs: Outputs) -> dict[str, Any]:
    from adaptive.inference.intervals import LEVEL, compared
    from adaptive.metrics import measure_outputs

    measurement = measure_outputs(outputs.logits, outputs.labels)
    broken = [int((~logits.isfinite().all(dim=1)).sum()) for logits in outputs.logits]
    right = [(z.argmax(1) == outputs.labels) & z.isfinite().all(1) for z in outputs.logits]  # as the meter counts
    names = [*trained.network.exit_names, "end of backbone"]
    lazy = trained.network.costs(lazy=True)
    exits = [
        {
            "exit": i + 1,
            "after": names[i],
            "macs": cost.macs,
            "macs_lazy": lazy[i].macs,
            "parameters": cost.parameters,
            "top1": measurement.top1[i],
            **compared(right[i], right[-1]),
            "top5": measurement.top5[i],
            "loss": measurement.loss[i],
            "agreement": measurement.agreement[i],
            "not_finite": broken[i],
        }
        for i, cost in enumerate(trained.network.costs())
    ]
    return {
        "run": visible(str(trained.folder)),
        "backbone": trained.config.model.backbone,
        "checkpoint": trained.checkpoint.path.name,
        "weights": "ema" if trained.averaged else "plain",
        "split": split,
        "images": measurement.samples,
        "level": LEVEL,
        "left_out": dict(outputs.left_out),
        "exits": exits,
    }


def _chose(trained: TrainedRun, split: str, arguments: argparse.Namespace) -> InSample:
    """Say what these images have chosen; a policy that is of no use here has no part in it."""
    from contextlib import suppress

    from adaptive.errors import PolicyError
    from adaptive.runs import in_sample, load_policy

    policy = None
    with suppress(PolicyError):
        policy = load_policy(str(trained.folder / "policy.json"), trained)
    return in_sample(trained, split, arguments.data, policy, arguments.checkpoint)


def _milliseconds(trained: TrainedRun, arguments: argparse.Namespace, split: str) -> dict[str, Any]:
    """Measure a model of time on this machine, at a batch of at most 64, and what it says of every exit."""
    from adaptive.inference.measuring.profile import machine_name
    from adaptive.inference.measuring.promises import Bench, probe, template
    from adaptive.inference.measuring.time_model import middle
    from adaptive.inference.measuring.time_probe import repeats
    from adaptive.runs import first_images

    network, batch = trained.network, min(arguments.batch or trained.config.evaluate.batch, TIMING_BATCH)
    exits = len(network.exits)
    bench = Bench.of(network, "torch", trained.config.train.precision, batch)
    policy = template(arguments.kind, exits)
    images = first_images(trained, split, arguments.data, batch)
    models = probe(bench, bench.runner(policy), policy, images, ROUNDS)
    conditions, model = bench.conditions, middle(models)
    return {
        "machine": machine_name(next(network.parameters()).device),
        "device": conditions.device,
        "batch": batch,
        "threads": conditions.threads,
        "precision": conditions.precision,
        "runtime": conditions.runtime,
        "exits": model.exits,
        "repeats": repeats(models, [1 / exits] * exits),
        "model": model.model_dump(),
    }


def _budgeted(
    trained: TrainedRun, arguments: argparse.Namespace, outputs: Outputs, split: str
) -> dict[str, Any] | None:
    """Measure policies on the split, chosen on held-out images for budgets from the first exit's cost to the last's.

    None where there is one exit only, or no other split to choose on.
    """
    from adaptive.data.shards.index import load_index
    from adaptive.inference.calibration.calibrate import curve
    from adaptive.inference.checks import check_answers
    from adaptive.inference.intervals import compared, mean_cost
    from adaptive.inference.outputs import simulate

    config = trained.config
    chosen_on = arguments.policy_split or config.data.val_split
    known = load_index(arguments.data or config.data.path, config.data).splits
    if len(trained.network.exits) == 1 or split == chosen_on or (not arguments.policy_split and chosen_on not in known):
        return None
    check_answers(outputs.logits)
    flag = "--policy-split" if arguments.policy_split else "data.val_split"
    held_out = split_outputs(trained, arguments, chosen_on, flag)
    costs = [float(cost.macs) for cost in trained.network.costs()]
    budgets = [costs[0] + (costs[-1] - costs[0]) * i / (BUDGETS - 1) for i in range(BUDGETS)]
    points, full = [], outputs.logits[-1].argmax(1) == outputs.labels
    policies = curve(held_out.logits, held_out.labels, costs, budgets, kind=arguments.kind, method=arguments.method)
    for budget, policy in zip(budgets, policies, strict=True):
        found = simulate(policy, outputs.probabilities(policy))
        counts = found.counts(len(costs))
        shares = [count / len(outputs.labels) for count in counts]
        points.append(
            {
                "budget": budget,
                "cost": sum(share * cost for share, cost in zip(shares, costs, strict=True)),
                "cost_interval": list(mean_cost(counts, costs)),
                "top1": found.top1(outputs.labels),
                **compared(found.labels == outputs.labels, full),
                "shares": shares,
            }
        )
    return {
        "kind": arguments.kind,
        "method": arguments.method,
        "split": chosen_on,
        "images": len(held_out.labels),
        "unit": "MACs",
        "points": points,
    }


def _draw(trained: TrainedRun, result: dict[str, Any], name: str, mark: str) -> list[Path]:
    from adaptive.reporting.run_figures import Curve, accuracy_against_cost, training_curves
    from adaptive.tracking.record import read

    label = f"{result['backbone']}, exits"
    exits = result["exits"]
    ranges = [tuple(e["top1_interval"]) for e in exits]
    curves = [Curve(label, [e["macs"] for e in exits], [e["top1"] for e in exits], "anytime", ranges)]
    if result["budgeted"]:
        points = sorted(result["budgeted"]["points"], key=lambda point: point["cost"])
        chosen_on = (
            f"chosen on other images ({result['budgeted']['images']:,} of {visible(result['budgeted']['split'])})"
        )
        ranges = [tuple(p["top1_interval"]) for p in points]
        costs, accuracies = [p["cost"] for p in points], [p["top1"] for p in points]
        curves.append(Curve(label, costs, accuracies, "budgeted", ranges, chosen_on))
    title = f"{trained.folder.name}: {result['images']:,} {result['split']} images"
    figures = [accuracy_against_cost(curves, trained.folder / f"{name}.png", title, mark)]
    log = trained.folder / "metrics.jsonl"
    if log.is_file():  # a run folder copied without its log is still a network to measure
        figures.append(training_curves(read(log), trained.folder / "training.png"))
    return figures


def _print_tables(result: dict[str, Any], chose: InSample) -> None:
    from adaptive.inference.in_sample import REMEDY
    from adaptive.reporting.tables import exit_table, human, print_table

    say(f"{result['run']}: {result['backbone']}, {result['checkpoint']} ({result['weights']} weights)")
    say(f"{result['images']:,} images of {result['split']}{left_out_words(result['left_out'])}")
    if chose:
        say(f"{chose.headline}; {REMEDY}")
    full = result["exits"][-1]["macs"]
    times = result.get("milliseconds", {}).get("exits", [None] * len(result["exits"]))
    last = len(result["exits"])
    rows = [
        {
            **entry,
            "top1_loss": None if entry["exit"] == last else (entry["top1_loss"], entry["top1_loss_interval"]),
            "module": entry["after"],
            "share": entry["macs"] / full,
            "ms": milliseconds,
        }
        for entry, milliseconds in zip(result["exits"], times, strict=True)
    ]
    print_table(exit_table(rows, chose.headline or None))
    say(f"{100 * result['level']:g} % intervals; lost: points below the last exit on the same images")
    for entry in result["exits"]:
        if entry["not_finite"]:
            count = f"{entry['not_finite']:,} of {result['images']:,}"
            print(f"exit {entry['exit']}: {count} answers are NaN or infinite, and count as wrong")
    if "milliseconds" in result:
        timing = result["milliseconds"]
        noise = f"repeats to {100 * timing['repeats']:.1f} %"
        say(f"ms per image if all leave at that exit, at batch {timing['batch']} on {timing['machine']}, which {noise}")
    if any(entry["macs_lazy"] < entry["macs"] for entry in result["exits"]):
        lazy = ", ".join(f"{human(entry['macs_lazy'])}" for entry in result["exits"])
        say(f"MACs up to each exit without what only later exits need (lazy evaluation): {lazy}")
    if result["budgeted"]:
        print_table(_budgeted_table(result, full))


def _budgeted_table(result: dict[str, Any], full: float) -> Any:
    from rich.table import Table

    from adaptive.reporting.tables import human, loss_with_range, percent_range

    budgeted = result["budgeted"]
    title = (
        f"{budgeted['kind']} policies, thresholds by {budgeted['method']}, chosen on other images than measured: on "
    )
    measured = f"{budgeted['images']:,} images of {budgeted['split']}, and measured on {result['split']}"
    table = Table(title=title + measured, title_justify="left")
    columns = ("budget", "mean MACs", "share", "top-1 %", "interval", "lost")
    for name in (*columns, *(f"exit {e['exit']}" for e in result["exits"])):
        table.add_column(name, justify="right")
    points = budgeted["points"]
    for i in range(SHOWN):
        point = points[round(i * (len(points) - 1) / (SHOWN - 1))]
        shares = [f"{100 * share:.1f} %" for share in point["shares"]]
        cost = point["cost"]
        table.add_row(
            human(point["budget"]),
            human(cost),
            f"{100 * cost / full:.1f} %",
            f"{point['top1']:.2f}",
            percent_range(point["top1_interval"]),
            loss_with_range(point["top1_loss"], point["top1_loss_interval"]),
            *shares,
        )
    return table
