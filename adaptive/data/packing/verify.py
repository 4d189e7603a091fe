"""Verification of a packed dataset: its index, its shards, and every sample in them."""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import NamedTuple

from adaptive.config.sections import DataConfig
from adaptive.data.faults import CHECKSUM, CLASSES, DAMAGED, MEMBER, MISSING, TRUNCATED, BadDataError
from adaptive.data.images.damage import CheckedImage, DamagedImage, check_image
from adaptive.data.packing.folders.questions import listed
from adaptive.data.packing.foreign.class_names import class_fault
from adaptive.data.packing.foreign.tar_check import examine
from adaptive.data.packing.progress_bar import PackProgress
from adaptive.data.packing.writer import interrupts_held, prepare_worker, stop_if_asked
from adaptive.data.reading.samples import decode_sample
from adaptive.data.remote.transfer import Mismatch
from adaptive.data.remote.urls import is_remote, open_remote
from adaptive.data.shards.index import DatasetIndex, ShardInfo, load_index, location, named_twice
from adaptive.data.shards.reader import IMAGE_EXTENSIONS, LocalFiles, RawSample, ShardReader
from adaptive.errors import MachineError, one_line
from adaptive.files import file_sha256


class DatasetFault(NamedTuple):
    """A fault of a dataset: its kind, the shard, the sample's key (empty: all of the shard), and the message."""

    kind: str
    shard: str
    key: str
    message: str


@dataclass(frozen=True)
class Verification:
    """The outcome of verifying a dataset: its index, how many of its samples are fine, and the faults of others.

    ``suspect`` are samples that are fine, though a decoder made a remark on them.
    """

    index: DatasetIndex
    fine: int
    faults: list[DatasetFault]
    suspect: list[DatasetFault]

    @property
    def total(self) -> int:
        """Number of samples by the index."""
        return sum(split.count for split in self.index.splits.values())


def verify(
    folder: str,
    settings: DataConfig | None = None,
    workers: int | None = None,
    progress: bool = True,
    classes_as_named: bool = False,
) -> Verification:
    """Check a dataset in a folder or at a URL: sizes, sha256, tar structure, counts, and every image, label and class.

    Args:
        folder: path or URL.
        settings: how a URL is read; by default with the defaults of the configuration.
        workers: processes; by default one per core.
        progress: show progress on stderr.
        classes_as_named: classes without a training image are meant so.

    Raises:
        DataError: there is no index, or it is damaged.
        MachineError: a process was killed, or no space for a shard of a URL in the folder for temporary files.
    """
    settings = settings or DataConfig(path=folder)
    index = load_index(folder, settings, named_once=False)
    shards = [shard for split in index.splits.values() for shard in split.shards]
    fine = 0
    results: dict[str, _ShardResult] = {}
    count = min(workers or len(os.sched_getaffinity(0)), max(1, len(shards)))
    total = sum(shard.count for shard in shards)
    context = multiprocessing.get_context("spawn" if is_remote(folder) else None)  # store clients break in a fork
    stop = context.Event()
    with (
        PackProgress(total, 0, progress, "verifying", "verified") as shown,
        ProcessPoolExecutor(
            count, mp_context=context, initializer=prepare_worker, initargs=(stop, os.getpid())
        ) as pool,
    ):
        with interrupts_held():
            futures = {
                pool.submit(_verify_shard, folder, shard, len(index.classes), settings): shard.name for shard in shards
            }
        try:
            for future in as_completed(futures):
                result = results[futures[future]] = future.result()
                fine += result.fine
                shown.advance(result.count)
        except BrokenProcessPool:
            raise MachineError("a verifying process was killed, usually for lack of memory; use fewer --workers") from (
                None
            )
        except BaseException:  # Ctrl-C above all
            stop.set()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
    faults = [fault for shard in shards for fault in results[shard.name].faults]
    if not faults:  # a class may have its images among samples that cannot be read
        faults += _class_faults(folder, index, results, classes_as_named)
    return Verification(index, fine, faults, [fault for shard in shards for fault in results[shard.name].suspect])


@dataclass
class _ShardResult:
    """How many samples a shard has and are fine, its faults and remarks, and how many samples each label has."""

    count: int
    fine: int = 0
    faults: list[DatasetFault] = field(default_factory=list)
    suspect: list[DatasetFault] = field(default_factory=list)
    labels: Counter[int] = field(default_factory=Counter)


def _class_faults(
    folder: str, index: DatasetIndex, results: dict[str, _ShardResult], as_named: bool
) -> Iterator[DatasetFault]:
    if twice := named_twice(index.classes):
        message = f"{folder}: the index names {len(twice)} classes twice ({listed(twice)}); pack again"
        yield DatasetFault(CLASSES, "", "", message)
    labels: dict[str, Counter[int]] = {}
    for split, info in index.splits.items():
        labels[split] = sum((results[shard.name].labels for shard in info.shards), Counter())
    if "train" in labels and not as_named and (fault := class_fault(labels, index.classes)):
        message = f"{folder}: {fault}; add images, or say with --classes-as-named that it is meant so"
        yield DatasetFault(CLASSES, "", "", message)


def _verify_shard(folder: str, shard: ShardInfo, classes: int, settings: DataConfig) -> _ShardResult:
    result = _ShardResult(shard.count)

    def note(error: BadDataError) -> None:
        result.faults.append(DatasetFault(error.kind, shard.name, error.key, str(error)))

    try:
        with _local_folder(folder, shard, settings) as here:
            shown = location(folder, shard)
            if difference := _difference(here / shard.name, shown, shard):
                note(difference)
                if difference.kind != CHECKSUM:
                    return result
            for key, sentence in _structure_faults(here / shard.name):
                where = f"shard {shown}, sample {one_line(key)}:" if key else f"shard {shown}"
                result.faults.append(DatasetFault(MEMBER, shard.name, key, f"{where} {sentence}"))
            reader = ShardReader(_NamedFiles(here, name=shown), [shard], capacity=1)
            for position in range(shard.count):
                stop_if_asked()
                try:
                    raw = reader.read(0, position)
                    checked = decode_sample(raw, classes, partial(_check, raw))
                    result.fine += 1
                    result.labels[raw.label] += 1
                    if checked.suspicion:
                        message = f"shard {raw.shard}, sample {raw.key}: {checked.suspicion}"
                        result.suspect.append(DatasetFault(DAMAGED, shard.name, raw.key, message))
                except BadDataError as error:
                    note(error)
                    if error.whole:
                        break
            reader.close()
    except BadDataError as error:
        note(error)
    return result


def _structure_faults(path: Path) -> list[tuple[str, str]]:
    """Return what packing's own shards never have: what lacks image or label the reader tells by itself."""
    contents = examine(path)
    incomplete = {key for key, parts in contents.samples if "cls" not in parts or not IMAGE_EXTENSIONS & parts.keys()}
    return [(key, sentence) for key, sentence in contents.faults if key not in incomplete]


def _check(raw: RawSample, data: bytes) -> CheckedImage:
    try:
        return check_image(data)
    except DamagedImage as error:
        message = f"shard {raw.shard}, sample {raw.key}: {error}; copy the shard again or pack again"
        raise BadDataError(message, DAMAGED, raw.key) from None


@contextmanager
def _local_folder(folder: str, shard: ShardInfo, settings: DataConfig) -> Iterator[Path]:
    """Yield a folder with the shard's file: from a URL it is downloaded to a temporary one (raises BadDataError)."""
    if not is_remote(folder):
        yield Path(folder)
        return
    with (
        closing(open_remote(folder, settings)) as remote,
        TemporaryDirectory(prefix="adaptive-verify-") as temporary,
    ):
        path = Path(temporary) / shard.name

        def check(found: Path) -> None:
            if error := _difference(found, "", shard):
                raise Mismatch(str(error))

        try:
            remote.fetch(shard.name, path, shard.bytes, check, Event())
        except BadDataError as error:
            if error.kind != CHECKSUM:
                raise
            # The store's own copy is wrong: verify the samples in it.
            remote.fetch(shard.name, path, 2 * shard.bytes + 10240, lambda _: None, Event())
        yield Path(temporary)


@dataclass(frozen=True)
class _NamedFiles(LocalFiles):
    """Shards in a folder, called in messages by the path or URL that the user gave."""

    name: str = ""

    def shown(self, shard: ShardInfo) -> str:
        """Return that path or URL."""
        return self.name


def _difference(path: Path, shown: str, shard: ShardInfo) -> BadDataError | None:
    try:
        size, digest = path.stat().st_size, file_sha256(path)
    except OSError as error:
        what = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        return BadDataError(f"shard {shown} {what}; copy it or pack again", MISSING, whole=True)
    if size != shard.bytes:
        message = f"shard {shown} has {size} bytes, the index says {shard.bytes}; copy it again or pack again"
        return BadDataError(message, TRUNCATED if size < shard.bytes else CHECKSUM, whole=True)
    if digest != shard.sha256:
        message = (
            f"shard {shown}: sha256 {digest[:12]}, the index says {shard.sha256[:12]}; copy it again or pack again"
        )
        return BadDataError(message, CHECKSUM, whole=True)
    return None
