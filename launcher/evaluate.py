"""``adaptive evaluate RUN``: every exit on a split, as a table, JSON, and a figure of accuracy against cost."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from adaptive.inference.measure import Measurement
    from adaptive.runs import TrainedRun


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("run_folder", metavar="RUN", help="run folder that `adaptive train` wrote")
    parser.add_argument("--data", metavar="FOLDER", help="packed dataset; by default the one of the run")
    parser.add_argument("--split", help="split to measure; by default data.test_split of the run")
    parser.add_argument("--checkpoint", default="best", metavar="WHICH", help="best (default), last, or a step number")
    parser.add_argument("--weights", choices=("auto", "plain", "ema"), default="auto", help="auto: ema where kept")
    parser.add_argument("--batch", type=int, help="images per forward pass; by default evaluate.batch of the run")
    parser.add_argument("--workers", type=int, help="loader processes; by default data.workers of the run")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Carry out the command."""
    from adaptive.errors import AdaptiveError
    from adaptive.files import write_atomically
    from adaptive.runs import load

    for name in ("batch", "workers"):
        value = getattr(arguments, name)
        if value is not None and value < (name == "batch"):
            raise AdaptiveError(f"--{name} {value} is too small; give {int(name == 'batch')} or more")
    averaged = {"auto": None, "plain": False, "ema": True}[arguments.weights]
    trained = load(arguments.run_folder, arguments.checkpoint, averaged)
    split = arguments.split or trained.config.data.test_split
    measurement = _measure(trained, split, arguments)
    result = _result(trained, split, measurement)
    name = f"evaluation_{split}"
    write_atomically(trained.folder / f"{name}.json", json.dumps(result, indent=1))
    figures = _draw(trained, result, name)
    if arguments.json:
        print(json.dumps(result))
    else:
        _print_table(result)
        print(f"written: {trained.folder / name}.json, {', '.join(map(str, figures))}")
    return 0


def _measure(trained: TrainedRun, split: str, arguments: argparse.Namespace) -> Measurement:
    from adaptive.data.index import check_shards, load_index
    from adaptive.data.stream import EvaluationStream
    from adaptive.errors import DataError, MachineError
    from adaptive.inference.measure import measure_exits
    from adaptive.training.engine import autocast, resolve_device
    from adaptive.training.preflight import check_split

    config = trained.config
    folder = arguments.data or config.data.path
    index = load_index(folder)
    check_split(index, "--split" if arguments.split else "data.test_split", split)
    check_shards(index, folder, split)
    if index.classes != trained.classes:
        raise DataError(f"{folder} has other classes than {trained.folder} was trained on; give --data its dataset")
    try:
        device = resolve_device(arguments.device)
    except MachineError:
        raise MachineError(f"--device {arguments.device}: this machine has no usable GPU; use cpu or auto") from None
    network = trained.network.to(device)
    stream = EvaluationStream(
        index,
        folder,
        split,
        config.data,
        batch=arguments.batch or config.evaluate.batch,
        rank=0,
        world=1,
        workers=config.data.workers if arguments.workers is None else arguments.workers,
    )
    with autocast(config.train.precision, device):
        return measure_exits(network, stream, len(network.exits), device, stream.total)


def _result(trained: TrainedRun, split: str, measurement: Measurement) -> dict[str, Any]:
    names = [*trained.network.exit_names, "end of backbone"]
    exits = [
        {
            "exit": i + 1,
            "after": names[i],
            "macs": cost.macs,
            "parameters": cost.parameters,
            "top1": measurement.top1[i],
            "top5": measurement.top5[i],
            "loss": measurement.loss[i],
            "agreement": measurement.agreement[i],
        }
        for i, cost in enumerate(trained.network.costs())
    ]
    return {
        "run": str(trained.folder),
        "backbone": trained.config.model.backbone,
        "checkpoint": trained.checkpoint.path.name,
        "weights": "ema" if trained.averaged else "plain",
        "split": split,
        "images": measurement.samples,
        "exits": exits,
    }


def _draw(trained: TrainedRun, result: dict[str, Any], name: str) -> list[Path]:
    from adaptive.reporting.figures import Curve, accuracy_against_cost, training_curves
    from adaptive.reporting.record import read

    curve = Curve(
        label=f"{result['backbone']}, exits",
        macs=[e["macs"] for e in result["exits"]],
        top1=[e["top1"] for e in result["exits"]],
        kind="anytime",
    )
    title = f"{trained.folder.name}: {result['images']:,} {result['split']} images"
    figures = [accuracy_against_cost([curve], trained.folder / f"{name}.png", title)]
    log = trained.folder / "metrics.jsonl"
    if log.is_file():  # a run folder copied without its log is still a network to measure
        figures.append(training_curves(read(log), trained.folder / "training.png"))
    return figures


def _print_table(result: dict[str, Any]) -> None:
    from rich.console import Console

    from adaptive.reporting.tables import exit_table

    print(f"{result['run']}: {result['backbone']}, {result['checkpoint']} ({result['weights']} weights)")
    print(f"{result['images']:,} images of {result['split']}")
    full = result["exits"][-1]["macs"]
    rows = [{**entry, "module": entry["after"], "share": entry["macs"] / full} for entry in result["exits"]]
    Console().print(exit_table(rows))
