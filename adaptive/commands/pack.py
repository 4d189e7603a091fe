"""``adaptive pack SOURCE DEST``: turn class folders or a downloaded data set into WebDataset shards with an index."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from adaptive.foreign_text import say, shell_words, shown_location

if TYPE_CHECKING:
    from adaptive.data.packing.pack import PackReport

SUSPECT_LISTED = 5
_OF_PACKING = (
    *("hold_out", "hold_out_test", "test_split", "leave_out", "no_splits", "max_side", "max_bad", "overwrite"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `adaptive pack`."""
    parser.add_argument(
        "source",
        nargs="?",
        metavar="SOURCE",
        help="folder of class folders, or of train/ val/ test/ holding them; folder with ImageNet's archives "
        "(ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar, the devkit) or Kaggle's folders; tiny-imagenet-200, "
        "unpacked; cifar-10-binary.tar.gz, cifar-100-binary.tar.gz; or builtin:digits",
    )
    parser.add_argument(
        "destination", nargs="?", metavar="DEST", help="folder to create; it appears, complete, at the end"
    )
    parser.add_argument(
        "--verify",
        metavar="DATASET",
        help="instead of packing, check a packed dataset (folder or URL): index, checksums, every image and label",
    )
    parser.add_argument(
        "--index",
        metavar="FOLDER",
        help="instead of packing, write an index.json beside WebDataset tars made by others (jpg or png, and cls)",
    )
    parser.add_argument(
        "--hold-out",
        type=int,
        metavar="N",
        help="move N training images, chosen by the seed, to a split val (0; ImageNet downloads 50000, Tiny-ImageNet "
        "10000, as their own val becomes split test)",
    )
    parser.add_argument(
        "--hold-out-test",
        type=int,
        default=0,
        metavar="M",
        help="move M other training images to a split test, which nothing is chosen on (0); for sources without one",
    )
    parser.add_argument(
        "--test-split",
        choices=("val", "test"),
        help="split of SOURCE that is measured at the end: with val, class folders in val/ become split test",
    )
    parser.add_argument(
        "--leave-out",
        action="append",
        default=[],
        metavar="PATH",
        help="folder or file below SOURCE that is not read; may be given several times",
    )
    parser.add_argument(
        "--no-splits",
        action="store_true",
        help="take all folders of SOURCE as classes, also those called like splits (train, valid, testing ...)",
    )
    parser.add_argument(
        "--classes-as-named",
        action="store_true",
        help="take the classes as they are where they look mistaken: names that differ only in case, class folders "
        "that hold folders of images alone, and with --index classes without a training image",
    )
    parser.add_argument("--max-side", type=int, metavar="PX", help="shrink images whose longer side exceeds PX pixels")
    parser.add_argument("--max-bad", type=int, default=0, metavar="N", help="leave out up to N unreadable images (0)")
    parser.add_argument(
        "--shard-bytes", type=int, default=256 << 20, metavar="B", help="size of a shard in bytes (268435456)"
    )
    parser.add_argument("--shard-count", type=int, default=10_000, metavar="N", help="most images in a shard (10000)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of order and hold-out (0)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (one per core)")
    parser.add_argument("--overwrite", action="store_true", help="replace a dataset that is at DEST")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Pack, print a summary, and return the exit code (raises DataError, MachineError)."""
    from adaptive.data.packing.pack import PackOptions, pack_with_report

    _check_alone(arguments)
    if arguments.verify is not None:
        return _verify(arguments)
    if arguments.index is not None:
        return _index(arguments)
    _check_words(arguments)
    options = PackOptions(
        shard_bytes=arguments.shard_bytes,
        shard_count=arguments.shard_count,
        hold_out=arguments.hold_out,
        hold_out_test=arguments.hold_out_test,
        max_side=arguments.max_side,
        max_bad=arguments.max_bad,
        seed=arguments.seed,
        workers=arguments.workers,
        overwrite=arguments.overwrite,
        progress=not arguments.json,
        test_split=arguments.test_split,
        no_splits=arguments.no_splits,
        classes_as_named=arguments.classes_as_named,
        leave_out=tuple(arguments.leave_out),
    )
    report = pack_with_report(arguments.source, arguments.destination, options)
    if arguments.json:
        print(json.dumps(_as_json(arguments.destination, report)))
    else:
        _print_summary(arguments.destination, report)
    return 0


def _check_alone(arguments: argparse.Namespace) -> None:
    """Refuse --verify or --index together with what says how to pack (raises DataError)."""
    from adaptive.errors import DataError

    modes = [name for name in ("verify", "index") if getattr(arguments, name) is not None]
    if len(modes) > 1:
        raise DataError("--verify and --index: give one of them")
    given = [name for name in _OF_PACKING if getattr(arguments, name) not in (None, False, [], 0)]
    if modes and given:
        raise DataError(f"--{modes[0]} packs nothing; leave out --{given[0].replace('_', '-')}")


def _check_words(arguments: argparse.Namespace) -> None:
    from adaptive.errors import UsageError

    if arguments.destination is None:
        lacking = "DEST" if arguments.source else "SOURCE and DEST"
        raise UsageError(f"{lacking} missing: adaptive pack SOURCE DEST packs images; see adaptive pack --help")


def _verify(arguments: argparse.Namespace) -> int:
    """Check a packed dataset; 1 if anything is wrong with it."""
    from adaptive.data.packing.verify import verify
    from adaptive.errors import DataError

    if arguments.source is not None:
        raise DataError(f"--verify {arguments.verify} stands alone; leave out {arguments.source}")
    if arguments.workers is not None and arguments.workers < 1:
        raise DataError(f"--workers {arguments.workers} is too small; give 1 or more")
    found = verify(
        arguments.verify,
        workers=arguments.workers,
        progress=not arguments.json,
        classes_as_named=arguments.classes_as_named,
    )
    if arguments.json:
        faults, suspect = ([fault._asdict() for fault in some] for some in (found.faults, found.suspect))
        summary = {"dataset": shown_location(arguments.verify), "fingerprint": found.index.fingerprint}
        print(json.dumps({**summary, "images": found.total, "fine": found.fine, "faults": faults, "suspect": suspect}))
        return int(bool(found.faults))
    for fault in found.faults:
        say(f"{fault.kind}: {fault.message}")
    for fault in found.suspect[:SUSPECT_LISTED]:
        say(f"suspect, but counted as fine: {fault.message}")
    if (more := len(found.suspect) - SUSPECT_LISTED) > 0:
        say(f"suspect, but counted as fine: {more:,} more, which --json lists")
    where = shown_location(arguments.verify)
    say(f"{where}: {found.fine:,} of {found.total:,} images are fine, {len(found.faults)} faults")
    return int(bool(found.faults))


def _index(arguments: argparse.Namespace) -> int:
    """Write an index for tars that others made."""
    from pathlib import Path

    from adaptive.data.packing.index_tars import index_with_report
    from adaptive.errors import DataError

    if arguments.source is not None:
        raise DataError(f"--index {arguments.index} stands alone; leave out {arguments.source}")
    report = index_with_report(Path(arguments.index), not arguments.json, arguments.classes_as_named)
    if arguments.json:
        print(json.dumps(_as_json(arguments.index, report)))
    else:
        _print_summary(arguments.index, report)
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
        "suspect": [{"file": name, "reason": reason} for name, reason in report.suspect],
        "account": report.account.as_tree(),
        "notes": report.notes,
        "fingerprint": index.fingerprint,
    }


def _print_summary(destination: str, report: PackReport) -> None:
    index = report.index
    say(f"{destination}: {len(index.classes)} classes, fingerprint {index.fingerprint[:12]}")
    for name, split in index.splits.items():
        mebibytes = split.total_bytes / 2**20
        say(f"  {name:6} {split.count:9,} images in {len(split.shards)} shards, {mebibytes:,.1f} MiB")
    for line in report.account.lines():
        say(f"  {line}")
    for note in report.notes:
        say(f"  note: {note}")
    for file, reason in report.suspect[:SUSPECT_LISTED]:
        say(f"  suspect, but packed: {file}: {reason}")
    if (more := len(report.suspect) - SUSPECT_LISTED) > 0:
        say(f"  suspect, but packed: {more:,} more, which --json lists")
    for file, reason in report.bad:
        say(f"  bad: {file}: {reason}")
    say(f"next: adaptive train CONFIG {shell_words(f'data.path={destination}')}")
