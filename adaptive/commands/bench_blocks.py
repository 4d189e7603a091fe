"""``adaptive bench inference RUN --blocks``: the time of a run's blocks and exits, and the distance from the ideal."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from adaptive.commands.run_options import choose_device, network_for_inference
from adaptive.foreign_text import say, shell_words

if TYPE_CHECKING:
    from adaptive.inference.measuring.profile import InferenceProfile
    from adaptive.runs import TrainedRun


def measure_blocks(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Carry out the command."""
    from adaptive.commands.bench_targets import Images, open_targets
    from adaptive.errors import PolicyError
    from adaptive.files import json_text
    from adaptive.inference.export.onnx_runner import OnnxClassifier
    from adaptive.inference.measuring.profile import profile
    from adaptive.inference.policy import EVERYBODY, Policy

    [target] = open_targets(arguments, overrides, threads=1)
    trained, policy = target.network, target.policy
    assert not isinstance(trained, OnnxClassifier)
    if policy is None and target.exits > 1:
        raise PolicyError(
            f"{trained.folder} has no policy.json; make one with: adaptive calibrate "
            f"{shell_words(trained.folder)} --budget 0.5"
        )
    device = choose_device(arguments.device)
    held = Images(max(arguments.images, *arguments.batch))
    images, _ = held.of(target)
    network = network_for_inference(trained, device)
    precision = arguments.precision or trained.config.train.precision
    ways = {way: way for way in arguments.accelerate}
    decides = policy or Policy(thresholds=[EVERYBODY])
    found = [
        profile(network, decides, images, arguments.rounds, precision, ways, batch=batch) for batch in arguments.batch
    ]
    if arguments.json:
        print(json_text({"run": str(trained.folder), "device": str(device), "profiles": [asdict(p) for p in found]}))
        return 0
    for measured in found:
        _print(measured, trained, device)
    for notice in held.notices:
        say(notice)
    return 0


def _print(measured: InferenceProfile, trained: TrainedRun, device: Any) -> None:
    from rich.table import Table

    from adaptive.reporting.tables import print_table

    title = f"{trained.folder}: batch {measured.batch} on {device}, {measured.images:,} images"
    table = Table(title=title, title_justify="left")
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
