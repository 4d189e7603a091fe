"""Packing: images in class folders or downloads to WebDataset shards and index.json, published once all is complete."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from adaptive.data.packing.account import Account, FileKind
from adaptive.data.packing.folders.choices import FolderChoices
from adaptive.data.packing.progress_bar import PackProgress, listing
from adaptive.data.packing.publishing import (
    LISTED,
    check_destination,
    check_place,
    machine_errors,
    publish,
    staging_folder,
    tidy,
)
from adaptive.data.packing.recognise import open_source
from adaptive.data.packing.sources import Item, Source
from adaptive.data.packing.splitting.hold_out import arrange_splits
from adaptive.data.packing.splitting.twins import twin_notes
from adaptive.data.packing.writer import (
    ShardRecord,
    ShardTask,
    finished_record,
    interrupts_held,
    prepare_worker,
    write_shard,
)
from adaptive.data.shards.index import DatasetIndex, SplitInfo, write_index
from adaptive.errors import DataError
from adaptive.files import write_atomically

SHARD_BYTES = 256 << 20
SHARD_COUNT = 10_000

_FORMAT = 2  # of the shards: another number makes an interrupted packing start anew
_SAMPLE_OVERHEAD = 4096  # bytes of tar headers, padding, label and json per sample, roughly


@dataclass(frozen=True)
class PackOptions:
    """How to pack; the fields are the arguments of `pack`."""

    shard_bytes: int = SHARD_BYTES
    shard_count: int = SHARD_COUNT
    hold_out: int | None = None
    hold_out_test: int = 0
    max_side: int | None = None
    max_bad: int = 0
    seed: int = 0
    workers: int | None = None
    overwrite: bool = False
    progress: bool = True
    test_split: str | None = None
    no_splits: bool = False
    classes_as_named: bool = False
    leave_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        lowest = {
            "shard_bytes": 1,
            "shard_count": 1,
            "hold_out": 0,
            "hold_out_test": 0,
            "max_side": 1,
            "max_bad": 0,
            "seed": 0,
            "workers": 1,
        }
        for name, low in lowest.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise DataError(f"--{name.replace('_', '-')} {value} is too small; give {low} or more")


@dataclass(frozen=True)
class PackReport:
    """The outcome of packing: the index, what became of every file, bad and suspect files with reasons, and notes."""

    index: DatasetIndex
    account: Account
    bad: list[tuple[str, str]]
    suspect: list[tuple[str, str]]
    notes: list[str]

    @property
    def converted(self) -> int:
        """Number of images that were re-encoded."""
        return self.account.total("converted")

    @property
    def ignored(self) -> int:
        """Number of files that were left out, for another reason than that they are bad."""
        return self.account.total("ignored")


def pack(
    source: str | Path,
    destination: str | Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    shard_count: int = SHARD_COUNT,
    hold_out: int | None = None,
    hold_out_test: int = 0,
    max_side: int | None = None,
    max_bad: int = 0,
    seed: int = 0,
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
    test_split: str | None = None,
    no_splits: bool = False,
    classes_as_named: bool = False,
    leave_out: tuple[str, ...] = (),
) -> DatasetIndex:
    """Pack images into ``destination`` and return the index.

    Args:
        source: Folder with train/, val/, test/ (or other usual names of splits) holding class folders, or with the
            class folders themselves, which become train; folder of an ImageNet or Tiny-ImageNet download; CIFAR's
            binary archive; or ``builtin:digits``.
        destination: Folder to create; it appears, complete, at the end.
        shard_bytes: Size at which a split is divided into more shards, in bytes.
        shard_count: Most images in one shard.
        hold_out: Number of training images to move to a split val; by default 0, for ImageNet and Tiny-ImageNet
            downloads 50,000 and 10,000 (less for parts of them).
        hold_out_test: Number of training images to move to a split test, where the source has none.
        max_side: Shrink images whose longer side exceeds this many pixels.
        max_bad: Unreadable images to leave out before giving up.
        seed: Seed of the order in shards and of what is held out.
        workers: Processes; by default one per core.
        overwrite: Replace a dataset that is at ``destination``.
        progress: Show progress on stderr.
        test_split: Split of the source that becomes test ("val", when there is no test).
        no_splits: Take all folders of the source as classes, also those that are called like splits.
        classes_as_named: Class folders that differ only in case, or hold folders with images alone, are meant so.
        leave_out: Paths below the source that are not read.

    Raises:
        DataError: source or destination cannot be used as asked, or too many images are bad; nothing is published.
        MachineError: no space, no right to write, or a worker was killed. Calling again continues.
    """
    options = PackOptions(
        shard_bytes,
        shard_count,
        hold_out,
        hold_out_test,
        max_side,
        max_bad,
        seed,
        workers,
        overwrite,
        progress,
        test_split,
        no_splits,
        classes_as_named,
        leave_out,
    )
    return pack_with_report(source, destination, options).index


def pack_with_report(source: str | Path, destination: str | Path, options: PackOptions) -> PackReport:
    """Pack as `pack` does and return what was converted, ignored and left out besides the index."""
    final = Path(destination).absolute()
    check_place(source, final)
    choices = FolderChoices.of(Path(source), options.no_splits, options.classes_as_named, options.leave_out)
    staging = final.with_name(f"{final.name}.packing")
    with staging_folder(staging) as lock:
        with machine_errors(staging):
            tidy(staging, final)
            check_destination(final, options.overwrite)
        with listing(source, options.progress):
            found = open_source(source, choices)
            arrange_splits(found, options.test_split, options.hold_out, options.hold_out_test, options.seed)
        with machine_errors(staging):
            tasks = _plan(found, staging, options)
            _keep_or_clean(staging, tasks, options)
            records = _run(tasks, options)
            report = _report(staging / "dataset", found, tasks, records, options)
            publish(lock, staging, final, options.overwrite)
    return report


def _report(
    folder: Path, source: Source, tasks: Sequence[ShardTask], records: dict[str, ShardRecord], options: PackOptions
) -> PackReport:
    """Check what was packed as a whole, write the index, and return it with the account (raises DataError)."""
    bad = sorted(entry for record in records.values() for entry in record.bad)
    suspect = sorted(entry for record in records.values() for entry in record.suspect)
    images = [item for items in source.splits.values() for item in items]
    _check_bad(bad, len(images), options.max_bad)
    _check_left(source, {name for name, _ in bad})
    converted: Counter[FileKind] = Counter()
    packed: dict[str, list[tuple[list[Item], str]]] = {}
    for task in tasks:
        converted.update(dict(records[task.name].converted))
        packed.setdefault(task.prefix, []).append((task.items, records[task.name].digests))
    notes = source.notes + twin_notes(packed, source.classes)
    account = Account.of(
        (item.name for item in images), converted, (name for name, _ in bad), source.left_out, source.folders
    )
    index = write_index(folder, source.classes, _collect(source, records))
    return PackReport(index, account, bad, suspect, notes)


def _plan(source: Source, staging: Path, options: PackOptions) -> list[ShardTask]:
    """Divide the shuffled images of every split evenly over as few shards as the limits allow."""
    tasks = []
    for split_number, (split, items) in enumerate(sorted(source.splits.items())):
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([options.seed, split_number])))
        shuffled = [items[number] for number in generator.permutation(len(items))]
        size = sum(item.size + _SAMPLE_OVERHEAD for item in items)
        shards = min(len(items), max(-(-size // options.shard_bytes), -(-len(items) // options.shard_count)))
        edges = [len(items) * shard // shards for shard in range(shards + 1)]
        for shard in range(shards):
            tasks.append(
                ShardTask(
                    name=f"{split}-{shard:05d}.tar",
                    folder=staging / "dataset",
                    records=staging / "records",
                    root=source.root,
                    prefix=split,
                    first=edges[shard],
                    items=shuffled[edges[shard] : edges[shard + 1]],
                    classes=source.classes,
                    max_side=options.max_side,
                    folders=source.folders,
                )
            )
    return tasks


def _keep_or_clean(staging: Path, tasks: Sequence[ShardTask], options: PackOptions) -> None:
    """Keep the shards that an interrupted packing with the same plan finished; remove all other leftovers."""
    digest = hashlib.sha256(json.dumps([_FORMAT, options.max_side, tasks[0].classes]).encode())
    for task in tasks:
        digest.update(json.dumps([task.name, [_identity(item) for item in task.items]]).encode())
    plan = staging / "plan"
    if not plan.is_file() or plan.read_text() != digest.hexdigest():
        plan.unlink(missing_ok=True)
        for folder in ("dataset", "records"):
            shutil.rmtree(staging / folder, ignore_errors=True)
        write_atomically(plan, digest.hexdigest())
    for folder in ("dataset", "records"):
        (staging / folder).mkdir(exist_ok=True)
        for leftover in (staging / folder).glob(".*"):
            leftover.unlink(missing_ok=True)


def _identity(item: Item) -> list[object]:
    return [item.name, item.label, item.size, item.changed]


def _run(tasks: Sequence[ShardTask], options: PackOptions) -> dict[str, ShardRecord]:
    """Write all shards that are not finished yet; return the records of all, by shard name."""
    records = {task.name: record for task in tasks if (record := finished_record(task))}
    waiting = [task for task in tasks if task.name not in records]
    stop = multiprocessing.Event()
    workers = min(options.workers or len(os.sched_getaffinity(0)), max(1, len(waiting)))
    total = sum(len(task.items) for task in tasks)
    with (
        PackProgress(total, total - sum(len(task.items) for task in waiting), options.progress) as progress,
        ProcessPoolExecutor(workers, initializer=prepare_worker, initargs=(stop, os.getpid())) as pool,
    ):
        try:
            with interrupts_held():
                futures = {pool.submit(write_shard, task): task for task in waiting}
            for future in as_completed(futures):
                records[futures[future].name] = future.result()
                progress.advance(len(futures[future].items))
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return {task.name: records[task.name] for task in tasks}


def _check_bad(bad: Sequence[tuple[str, str]], total: int, allowed: int) -> None:
    if len(bad) > allowed:
        listed = "; ".join(f"{name}: {reason}" for name, reason in bad[:LISTED])
        more = f"; and {len(bad) - LISTED} more" if len(bad) > LISTED else ""
        raise DataError(
            f"{len(bad)} of {total} images cannot be used, --max-bad allows {allowed}: {listed}{more}; "
            f"mend or remove them, or leave them out with --max-bad {len(bad)}"
        )


def _check_left(source: Source, bad: set[str]) -> None:
    """Check that every class keeps a training image once the bad ones are left out (raises DataError)."""
    if not bad:
        return
    left = {item.label for item in source.splits["train"] if item.name not in bad}
    if empty := [name for label, name in enumerate(source.classes) if label not in left]:
        raise DataError(
            f"{len(empty)} of {len(source.classes)} classes have no readable training image left: "
            f"{', '.join(empty[:LISTED])}; mend their files, or leave the folders out with --leave-out"
        )


def _collect(source: Source, records: dict[str, ShardRecord]) -> dict[str, SplitInfo]:
    splits = {}
    for split in source.splits:
        shards = [record.info for name, record in records.items() if name.rpartition("-")[0] == split]
        splits[split] = SplitInfo(shards=shards, count=sum(shard.count for shard in shards))
        if not splits[split].count:
            raise DataError(f"split {split} has no readable image left; mend its files")
    return splits
