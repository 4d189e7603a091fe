"""``adaptive export RUN DEST``: write one ONNX and one torch.export file per block, and a manifest."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, cast

from adaptive.commands.run_options import add_weights, load_run, no_policy_notice, prepare_tables
from adaptive.foreign_text import say, shell_words

if TYPE_CHECKING:
    from adaptive.inference.export.export_manifest import Format, Manifest
    from adaptive.inference.policy import Policy
    from adaptive.runs import TrainedRun


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("run_folder", metavar="RUN", help="run folder that `adaptive train` wrote")
    parser.add_argument("destination", metavar="DEST", help="folder to write; must not exist, or be empty")
    parser.add_argument("--policy", metavar="FILE", help="who leaves where; by default RUN/policy.json")
    add_weights(parser)
    parser.add_argument("--formats", default="onnx,torch", help="onnx, torch, or both (default onnx,torch)")
    parser.add_argument(
        "--opset", type=int, metavar="N", help="version of ONNX's operators (default 20; onnxruntime has to know it)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Carry out the command."""
    from adaptive.errors import ExportError
    from adaptive.files import json_text
    from adaptive.inference.export.export import OPSET, check_opset, export
    from adaptive.inference.export.preprocess import Preprocess

    formats = arguments.formats.split(",")
    if set(formats) - {"onnx", "torch"}:
        raise ExportError(f"--formats {arguments.formats}: use onnx, torch or onnx,torch")
    opset = OPSET if arguments.opset is None else arguments.opset
    if arguments.opset is not None:
        if "onnx" not in formats:
            raise ExportError(f"--opset {opset} is for ONNX files; leave it out with --formats {arguments.formats}")
        check_opset(opset)  # before anything is loaded
    prepare_tables(arguments)
    trained = load_run(arguments.run_folder, arguments.checkpoint, arguments.weights)
    manifest = export(
        trained.network,
        arguments.destination,
        backbone=trained.config.model.backbone,
        classes=trained.classes,
        preprocess=Preprocess.of(trained.config.data),
        policy=_policy(trained, arguments.policy),
        formats=cast("list[Format]", formats),
        opset=opset,
    )
    if arguments.json:
        print(json_text({"folder": arguments.destination, **manifest.model_dump(mode="json")}))
    else:
        _print(manifest, arguments.destination)
    return 0


def _policy(trained: TrainedRun, path: str | None) -> Policy:
    """Read the policy that is exported; without one nobody leaves early, and the user is told."""
    from adaptive.inference.policy import EVERYBODY, NOBODY, Policy
    from adaptive.runs import load_policy

    own = trained.folder / "policy.json"
    if path is not None or own.is_file():
        return load_policy(path or str(own), trained)
    if notice := no_policy_notice(trained, "every image will go to the last exit"):
        say(f"adaptive export: {notice}", file=sys.stderr)
    return Policy(thresholds=[NOBODY] * (len(trained.network.exits) - 1) + [EVERYBODY])


def _print(manifest: Manifest, destination: str) -> None:
    from rich.table import Table

    from adaptive.inference.export.export_manifest import MANIFEST
    from adaptive.reporting.tables import human, print_table

    table = Table()
    for name in ("file", "MiB", "MACs up to its exit"):
        table.add_column(name, justify="left" if name == "file" else "right")
    costs = {
        name: human(cost)
        for block, cost in zip(manifest.blocks, manifest.costs, strict=True)
        for name in (block.onnx, block.torch)
        if name
    }
    for file in manifest.files:
        table.add_row(file.name, f"{file.bytes / 2**20:.2f}", costs.get(file.name, ""))
    table.add_row(MANIFEST, f"{(Path(destination) / MANIFEST).stat().st_size / 2**20:.2f}", "")
    print_table(table)
    say(f"{destination}: {manifest.backbone}, {len(manifest.blocks)} blocks, {len(manifest.classes)} classes")
    if manifest.blocks[0].onnx is not None:
        say(
            "Run it on images (without torch, with onnxruntime):",
            f"  adaptive predict {shell_words(destination)} IMAGE...",
            "or from Python:",
            "  from adaptive import OnnxClassifier",
            f"  classifier = OnnxClassifier({destination!r})",
            '  labels, confidences, exits = classifier.predict(classifier.open_images(["image.png"]))',
        )
