"""``adaptive checkpoint RUN``: list and verify a run's checkpoints; export plain weights for other programs."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptive.foreign_text import say, shell_words

if TYPE_CHECKING:
    from adaptive.runs import TrainedRun
    from adaptive.training.checkpoints.inventory import InventoryEntry

EXPORTING = """\
--export writes the backbone alone, as timm names its weights: early exits and ISC links are left out. Its outputs are
those of the network's last exit with collaboration off. timm.create_model(NAME, num_classes=N, checkpoint_path=FILE)
loads it, and so does model.weights=FILE of a new run. --export-all writes everything but links that were not trained
yet, for adaptive.create_model(...).load_state_dict(...), whose arguments it prints; a new run begins from all of
another's with model.from_run=RUN."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.epilog = EXPORTING
    parser.add_argument("run_folder", metavar="RUN", help="run folder that `adaptive train` wrote")
    parser.add_argument("--quick", action="store_true", help="compare sizes only, without reading for checksums")
    exports = parser.add_mutually_exclusive_group()
    exports.add_argument("--export", metavar="FILE", help="write the backbone's weights to FILE.safetensors, for timm")
    exports.add_argument("--export-all", metavar="FILE", help="write the whole network's weights to FILE.safetensors")
    parser.add_argument("--which", metavar="WHICH", help="exported: best (default), last, or a step")
    parser.add_argument(
        "--averaged",
        action=argparse.BooleanOptionalAction,
        help="exported: the moving average's weights, or not; by default where the run kept one",
    )
    parser.add_argument("--overwrite", action="store_true", help="let an export replace FILE")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Carry out the command."""
    from adaptive.errors import AdaptiveError

    exporting = arguments.export or arguments.export_all
    listing_only, exporting_only = ("quick",), ("which", "averaged", "overwrite")
    for name in listing_only if exporting else exporting_only:
        if getattr(arguments, name) not in (None, False):
            remedy = "leave it out" if exporting else "give --export FILE or --export-all FILE too"
            raise AdaptiveError(f"--{name} says nothing about {'an export' if exporting else 'the list'}; {remedy}")
    return _export(arguments) if exporting else _list(arguments)


def _list(arguments: argparse.Namespace) -> int:
    from adaptive.errors import CheckpointError
    from adaptive.runs import run_config
    from adaptive.training.checkpoints.inventory import take_inventory
    from adaptive.training.checkpoints.store import CheckpointStore

    folder = Path(arguments.run_folder)
    config = run_config(folder)
    store = CheckpointStore(folder / "checkpoints")
    entries = take_inventory(store, config.checkpoint.keep_every, arguments.quick)
    if arguments.json:
        print(json.dumps({"run": str(folder), "checkpoints": [_as_dict(entry) for entry in entries]}))
    elif entries:
        _print(entries, [phase.name or f"{i}" for i, phase in enumerate(config.resolved_phases(), start=1)])
    if not any(entry.newest for entry in entries):
        why = f" valid checkpoint; the newest: {entries[-1].fault}" if entries else " checkpoint"
        raise CheckpointError(f"{store.folder} holds no{why}")
    return 0


def _as_dict(entry: InventoryEntry) -> dict[str, Any]:
    checkpoint = entry.checkpoint
    return {
        "path": str(checkpoint.path),
        "step": checkpoint.step,
        "epoch": checkpoint.epoch,
        "phase": checkpoint.phase,
        "score": checkpoint.score,
        "bytes": entry.bytes,
        "saved": entry.saved,
        "newest": entry.newest,
        "best": entry.best,
        "lasting": entry.lasting,
        "valid": entry.fault is None,
        "fault": entry.fault,
    }


def _print(entries: list[InventoryEntry], phases: list[str]) -> None:
    from rich.table import Table

    from adaptive.reporting.tables import print_table

    scored = any(entry.checkpoint.score is not None for entry in entries)
    title = "score: on held-out images, in-sample, for they choose the best; adaptive evaluate measures on test"
    table = Table(title=title if scored else None, title_justify="left")
    for name in ("step", "epoch", "phase", "score", "MiB", "age"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("marks")
    table.add_column("state", overflow="fold")
    for entry in entries:
        checkpoint = entry.checkpoint
        marks = {"newest": entry.newest, "best": entry.best, "for ever": entry.lasting}
        phase = phases[checkpoint.phase] if checkpoint.phase < len(phases) else str(checkpoint.phase + 1)
        table.add_row(
            str(checkpoint.step),
            "" if checkpoint.epoch is None else str(checkpoint.epoch),
            phase,
            "" if checkpoint.score is None else f"{checkpoint.score:.2f}",
            f"{entry.bytes / 2**20:.1f}",
            _age(time.time() - entry.saved),
            ", ".join(mark for mark, has in marks.items() if has),
            entry.fault or "valid",
        )
    print_table(table)


def _age(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def _export(arguments: argparse.Namespace) -> int:
    from adaptive.inference.export.plain_weights import check_destination, plain_state, whole_state, write_weights
    from adaptive.runs import load

    file = Path(arguments.export or arguments.export_all)
    check_destination(file, arguments.overwrite)
    trained = load(arguments.run_folder, arguments.which or "best", arguments.averaged)
    model = trained.config.model
    about = _about(trained)
    if arguments.export:
        tensors, given = plain_state(trained.network, model.backbone, model.options)
        about["arguments"] = {key: value for key, value in given.items() if key != "pretrained"}
    else:
        tensors = whole_state(trained.network)
        about["arguments"] = _whole_arguments(trained)
    write_weights(tensors, file, about, arguments.overwrite)
    if arguments.json:
        print(json.dumps({"file": str(file), **about}))
        return 0
    kind = "averaged weights" if trained.averaged else "weights"
    say(f"{file}: {kind} of {trained.checkpoint.path}, {len(tensors)} tensors, {file.stat().st_size / 2**20:.1f} MiB")
    if arguments.export:
        words = "".join(f", {key}={value!r}" for key, value in about["arguments"].items())
        say("Without early exits and ISC links; load it with")
        say(f"  timm.create_model({model.backbone!r}{words}, checkpoint_path={str(file)!r})")
        say(f"  adaptive train ... {shell_words(f'model.weights={file}')}")
    else:
        words = "".join(f", {key}={value!r}" for key, value in about["arguments"].items())
        say("With all exits; load it into")
        say(f"  adaptive.create_model({model.backbone!r}{words})")
    return 0


def _whole_arguments(trained: TrainedRun) -> dict[str, Any]:
    """Return the arguments of adaptive.create_model that give the network an export of everything fits into."""
    model, network = trained.config.model, trained.network
    return {
        "num_classes": network.num_classes,
        "exits": network.exit_names or 1,
        "input_size": network.input_size,
        "collaboration": model.collaboration if network.collaboration else False,
        "head_width": model.head_width,
        **model.options,
    }


def _about(trained: TrainedRun) -> dict[str, Any]:
    """Return the metadata for the file's header."""
    from adaptive.networks.weights.trained_with import as_header

    return {
        **as_header(trained.config.data, len(trained.classes)),
        "format": "pt",
        "backbone": trained.config.model.backbone,
        "exits": trained.network.exit_names,
        "classes": trained.classes,
        "step": trained.checkpoint.step,
        "averaged": trained.averaged,
    }
