"""``adaptive bench inference``: the time of each block and exit of a trained network on this machine."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptive.commands.run_options import (
    add_device,
    add_overrides,
    add_weights,
    choose_device,
    load_run,
    network_for_inference,
    prepare_tables,
)
from adaptive.foreign_text import say, shell_words

if TYPE_CHECKING:
    import torch

    from adaptive.inference.policy import Policy
    from adaptive.inference.profile import InferenceProfile
    from adaptive.runs import TrainedRun

KINDS = ("inference",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("kind", choices=KINDS, help="what to measure")
    parser.add_argument("run_folder", metavar="RUN", help="run folder that `adaptive train` wrote")
    parser.add_argument("--policy", metavar="FILE", help="who leaves where; by default RUN/policy.json")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64], help="batch sizes (default 1 64)")
    parser.add_argument("--rounds", type=int, default=10, help="rounds; medians over them are shown (default 10)")
    parser.add_argument("--data", metavar="FOLDER", help="packed dataset or its URL; by default the run's")
    parser.add_argument("--split", help="split the images come from; by default data.test_split of the run")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="by default the run's")
    parser.add_argument(
        "--accelerate",
        nargs="+",
        choices=("compile", "cuda_graphs", "compile_cuda_graphs"),
        default=[],
        help="measure the accelerated runner as well, against the network as accelerated (compiling takes minutes)",
    )
    add_weights(parser)
    add_overrides(parser)
    add_device(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Carry out the command."""
    from adaptive.errors import AdaptiveError
    from adaptive.files import json_text
    from adaptive.inference.profile import profile

    prepare_tables(arguments)

    for name in ("batch", "rounds"):
        values = getattr(arguments, name)
        for value in values if isinstance(values, list) else [values]:
            if value < 1:
                raise AdaptiveError(f"--{name} {value} is too small; give 1 or more")
    trained = load_run(arguments.run_folder, arguments.checkpoint, arguments.weights, arguments.overrides)
    policy = _policy(arguments, trained)
    device = choose_device(arguments.device)
    images = _images(trained, arguments.data, arguments.split, max(arguments.batch))
    network = network_for_inference(trained, device)
    precision = arguments.precision or trained.config.train.precision
    ways = {way: way for way in arguments.accelerate}
    found = [profile(network, policy, images[:batch], arguments.rounds, precision, ways) for batch in arguments.batch]
    if arguments.json:
        print(json_text({"run": str(trained.folder), "device": str(device), "profiles": [asdict(p) for p in found]}))
        return 0
    for measured in found:
        _print(measured, trained, device)
    return 0


def _policy(arguments: argparse.Namespace, trained: TrainedRun) -> Policy:
    from adaptive.errors import PolicyError
    from adaptive.inference.policy import EVERYBODY, Policy
    from adaptive.runs import load_policy

    path = Path(arguments.policy) if arguments.policy else trained.folder / "policy.json"
    if not path.is_file() and not arguments.policy:
        if len(trained.network.exits) == 1:
            return Policy(thresholds=[EVERYBODY])
        raise PolicyError(
            f"{trained.folder} has no policy.json; make one with: adaptive calibrate "
            f"{shell_words(trained.folder)} --budget 0.5"
        )
    return load_policy(str(path), trained)


def _images(trained: TrainedRun, folder: str | None, split: str | None, count: int) -> torch.Tensor:
    """Return the first images of a split, repeated if there are too few."""
    import torch

    from adaptive.data.reading.stream import EvaluationStream
    from adaptive.data.shards.index import check_split, load_index

    config = trained.config
    data = config.data.model_copy(update={"path": folder or config.data.path})
    split_name = split or data.test_split
    index = load_index(data.path, data)
    check_split(index, "--split" if split else "data.test_split", split_name)
    stream = EvaluationStream(index, data, split_name, batch=min(count, 256))
    parts: list[torch.Tensor] = []
    for batch in stream:
        parts.append(batch.images[batch.labels >= 0])
        if sum(map(len, parts)) >= count:
            break
    images = torch.cat(parts)
    return images.repeat(-(-count // len(images)), 1, 1, 1)[:count]


def _print(measured: InferenceProfile, trained: TrainedRun, device: Any) -> None:
    from rich.table import Table

    from adaptive.reporting.tables import print_table

    table = Table(title=f"{trained.folder}: batch {measured.batch} on {device}", title_justify="left")
    for name in ("block", "runs for", "block ms", "exit ms", "ms/image up to here"):
        table.add_column(name, justify="right")
    for i, part in enumerate(measured.blocks):
        table.add_row(
            str(i + 1),
            f"{measured.still_in[i]:.1%}",
            f"{part.block:.3f}",
            f"{part.exit:.3f}",
            f"{measured.milliseconds[i]:.4f}",
        )
    print_table(table)
    saving, overhead = measured.saving.median, measured.overhead.median
    say(f"full network {measured.full:.2f} ms, with the policy {measured.dynamic:.2f} ms: {saving:.3f} of it")
    say(f"ideal, each block's own time for who is still in: {measured.ideal:.2f} ms; measured: {overhead:.3f} of it")
    say(f"decisions and taking images out: {measured.decisions:.3f} ms")
    say(f"every exit asked and nobody leaving: {measured.idle_overhead.median:.3f} of the full network's time")
    for way in measured.accelerated:
        say(
            f"{way.accelerate}: {way.straight:.2f} ms to the end, with the policy {way.dynamic:.2f} ms: "
            f"{way.over_straight.median:.3f} of it, {way.over_eager.median:.3f} of the eager runner's; "
            f"{way.prepared} functions prepared in {way.seconds:.1f} s"
        )
