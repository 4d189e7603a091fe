"""Verification of a packed dataset: its index, its shards, and every sample in them."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import NamedTuple

from adaptive.config.sections import DataConfig
from adaptive.data.faults import CHECKSUM, MISSING, TRUNCATED, BadDataError
from adaptive.data.images.decode import decode_image
from adaptive.data.packing.progress_bar import PackProgress
from adaptive.data.packing.writer import prepare_worker
from adaptive.data.reading.samples import decode_sample
from adaptive.data.remote.transfer import Mismatch
from adaptive.data.remote.urls import is_remote, open_remote
from adaptive.data.shards.index import DatasetIndex, ShardInfo, load_index, location
from adaptive.data.shards.reader import LocalFiles, ShardReader
from adaptive.errors import MachineError
from adaptive.files import file_sha256


class DatasetFault(NamedTuple):
    """A fault of a dataset: its kind, the shard, the sample's key (empty: all of the shard), and the message."""

    kind: str
    shard: str
    key: str
    message: str


@dataclass(frozen=True)
class Verification:
    """The outcome of verifying a dataset: its index, how many of its samples are fine, and the faults of others."""

    index: DatasetIndex
    fine: int
    faults: list[DatasetFault]

    @property
    def total(self) -> int:
        """Number of samples by the index."""
        return sum(split.count for split in self.index.splits.values())


def verify(
    folder: str, settings: DataConfig | None = None, workers: int | None = None, progress: bool = True
) -> Verification:
    """Check a dataset in a folder or at a URL: sizes, sha256, tar structure, counts, and every image and label.

    Raises:
        DataError: there is no index, or it is damaged.
        MachineError: a process was killed, or no space for a shard of a URL in the folder for temporary files.
    """
    settings = settings or DataConfig(path=folder)
    index = load_index(folder, settings)
    shards = [shard for split in index.splits.values() for shard in split.shards]
    fine, faults = 0, {}
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
        futures = {
            pool.submit(_verify_shard, folder, shard, len(index.classes), settings): shard.name for shard in shards
        }
        try:
            for future in as_completed(futures):
                good, found, size = future.result()
                faults[futures[future]] = found
                fine += good
                shown.advance(size)
        except BrokenProcessPool:
            raise MachineError("a verifying process was killed, usually for lack of memory; use fewer --workers") from (
                None
            )
        finally:
            pool.shutdown(cancel_futures=True)
    return Verification(index, fine, [fault for shard in shards for fault in faults[shard.name]])


def _verify_shard(
    folder: str, shard: ShardInfo, classes: int, settings: DataConfig
) -> tuple[int, list[DatasetFault], int]:
    """Return how many samples are fine, the faults, and the number of samples."""
    fine, faults = 0, []

    def note(error: BadDataError) -> None:
        faults.append(DatasetFault(error.kind, shard.name, error.key, str(error)))

    try:
        with _local_folder(folder, shard, settings) as here:
            shown = location(folder, shard)
            if difference := _difference(here / shard.name, shown, shard):
                note(difference)
                if difference.kind != CHECKSUM:
                    return 0, faults, shard.count
            reader = ShardReader(_NamedFiles(here, shown), [shard], capacity=1)
            for position in range(shard.count):
                try:
                    decode_sample(reader.read(0, position), classes, decode_image)
                    fine += 1
                except BadDataError as error:
                    note(error)
                    if error.whole:
                        break
            reader.close()
    except BadDataError as error:
        note(error)
    return fine, faults, shard.count


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

    name: str

    def shown(self, shard: ShardInfo) -> str:
        """Return that path or URL."""
        return self.name


def _difference(path: Path, shown: str, shard: ShardInfo) -> BadDataError | None:
    if not path.is_file():
        return BadDataError(f"shard {shown} does not exist; copy it or pack again", MISSING, whole=True)
    if (size := path.stat().st_size) != shard.bytes:
        message = f"shard {shown} has {size} bytes, the index says {shard.bytes}; copy it again or pack again"
        return BadDataError(message, TRUNCATED if size < shard.bytes else CHECKSUM, whole=True)
    if (digest := file_sha256(path)) != shard.sha256:
        message = (
            f"shard {shown}: sha256 {digest[:12]}, the index says {shard.sha256[:12]}; copy it again or pack again"
        )
        return BadDataError(message, CHECKSUM, whole=True)
    return None
