"""`adaptive pack SOURCE DEST`: images in class folders become WebDataset shards and an index."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adaptive.data.pack import PackReport


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `adaptive pack`."""
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="folder of class folders, or of train/ val/ test/ holding them, or builtin:digits",
    )
    parser.add_argument("destination", metavar="DEST", help="folder to create; it appears, complete, at the end")
    parser.add_argument("--hold-out", type=int, default=0, metavar="N", help="move N training images to a split val")
    parser.add_argument("--max-side", type=int, metavar="PX", help="shrink images whose longer side exceeds PX pixels")
    parser.add_argument("--max-bad", type=int, default=0, metavar="N", help="leave out up to N unreadable images (0)")
    parser.add_argument(
        "--shard-bytes", type=int, default=256 << 20, metavar="B", help="size of a shard in bytes (268435456)"
    )
    parser.add_argument("--shard-count", type=int, default=10_000, metavar="N", help="most images in a shard (10000)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the order and of the hold-out (0)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (one per core)")
    parser.add_argument("--overwrite", action="store_true", help="replace a dataset that is at DEST")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Pack, print a summary, and return the exit code (raises DataError, MachineError)."""
    from adaptive.data.pack import PackOptions, pack_with_report

    options = PackOptions(
        shard_bytes=arguments.shard_bytes,
        shard_count=arguments.shard_count,
        hold_out=arguments.hold_out,
        max_side=arguments.max_side,
        max_bad=arguments.max_bad,
        seed=arguments.seed,
        workers=arguments.workers,
        overwrite=arguments.overwrite,
        progress=not arguments.json,
    )
    report = pack_with_report(arguments.source, arguments.destination, options)
    if arguments.json:
        print(json.dumps(_as_json(arguments.destination, report)))
    else:
        _print_summary(arguments.destination, report)
    return 0


def _as_json(destination: str, report: PackReport) -> dict[str, object]:
    index = report.index
    return {
        "destination": destination,
        "classes": index.classes,
        "splits": {
            name: {"images": split.count, "shards": len(split.shards), "bytes": split.total_bytes}
            for name, split in index.splits.items()
        },
        "converted": report.converted,
        "ignored": report.ignored,
        "bad": [{"file": name, "reason": reason} for name, reason in report.bad],
        "fingerprint": index.fingerprint,
    }


def _print_summary(destination: str, report: PackReport) -> None:
    index = report.index
    print(f"{destination}: {len(index.classes)} classes, fingerprint {index.fingerprint[:12]}")
    for name, split in index.splits.items():
        mebibytes = split.total_bytes / 2**20
        print(f"  {name:6} {split.count:9,} images in {len(split.shards)} shards, {mebibytes:,.1f} MiB")
    print(f"  {report.converted} images converted, {report.ignored} other files ignored, {len(report.bad)} bad")
    for file, reason in report.bad:
        print(f"  bad: {file}: {reason}")
    print(f"next: adaptive train CONFIG data.path={destination}")
