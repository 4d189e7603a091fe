"""Checks of a packed dataset: its index, its shards, how fast they are read, and decoded by one core."""

from __future__ import annotations

import os
import time
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event

from adaptive.config.sections import DataConfig
from adaptive.data.images.decode import decode_image
from adaptive.data.remote.urls import is_remote, open_remote
from adaptive.data.shards.index import DatasetIndex, ShardInfo, check_shards, load_index
from adaptive.data.shards.reader import LocalFiles, ShardReader
from adaptive.doctor.finding import Check, CheckSettings, Finding, ok, warning
from adaptive.errors import UsageError
from adaptive.foreign_text import shell_words, shown_location

MIB = 2**20
AT_MOST = 256 * MIB  # read of a folder's shard
SECONDS = 2.0  # of decoding
SLOW_READING, SLOW_DECODING = 20 * MIB, 20.0


def _open(settings: CheckSettings) -> tuple[str, DatasetIndex, DataConfig]:
    if not settings.data:
        raise UsageError("no dataset was named; add --data FOLDER or --data URL")
    config = DataConfig(path=settings.data, attempts=2, timeout=15.0)
    return settings.data, load_index(settings.data, config), config


def _shard(index: DatasetIndex) -> ShardInfo:
    """Return a shard of ordinary size: the last one of a split may be small."""
    return max((shard for split in index.splits.values() for shard in split.shards[:2]), key=lambda shard: shard.bytes)


def shards(settings: CheckSettings) -> Finding:
    """Check the index, and that every shard is there with its size."""
    path, index, config = _open(settings)
    for split in index.splits:
        check_shards(index, path, split, settings=config, quiet=True)
    counts = ", ".join(f"{split.count} {name}" for name, split in index.splits.items())
    number = sum(len(split.shards) for split in index.splits.values())
    return ok(f"{shown_location(path)}: {counts} images of {len(index.classes)} classes in {number} shards, all there")


def reading(settings: CheckSettings) -> Finding:
    """Check how many bytes per second of one shard are read."""
    path, index, config = _open(settings)
    shard = _shard(index)
    if is_remote(path):
        with (
            closing(open_remote(path, config)) as remote,
            TemporaryDirectory(prefix="adaptive-doctor-") as temporary,
        ):
            began = time.perf_counter()
            remote.fetch(shard.name, Path(temporary) / shard.name, shard.bytes, lambda _: None, Event())
            size = shard.bytes
    else:
        with (Path(path) / shard.name).open("rb", buffering=0) as file:
            # What a check or a run has read before lies in memory; asked for so, the kernel may let it go.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            began, size = time.perf_counter(), 0
            while size < AT_MOST and (block := file.read(MIB)):
                size += len(block)
    speed = size / max(time.perf_counter() - began, 1e-6)
    images = speed / (shard.bytes / shard.count)
    shown = f"{speed / MIB:.0f} MiB/s of {shard.name}, {images:.0f} images/s"
    if speed < SLOW_READING and images < 1000:
        nearer = (
            "adaptive train CONFIG data.cache=/a/fast/disk"
            if is_remote(path)
            else f"cp -r {shell_words(path)} /a/fast/disk"
        )
        return warning(f"only {shown}", nearer)
    return ok(shown)


def decoding(settings: CheckSettings) -> Finding:
    """Check how many images per second one core decodes."""
    path, index, config = _open(settings)
    shard = _shard(index)
    with TemporaryDirectory(prefix="adaptive-doctor-") as temporary:
        folder = Path(path)
        if is_remote(path):
            folder = Path(temporary)
            with closing(open_remote(path, config)) as remote:
                remote.fetch(shard.name, folder / shard.name, shard.bytes, lambda _: None, Event())
        reader = ShardReader(LocalFiles(folder), [shard], capacity=1)
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < SECONDS and count < shard.count:
            decode_image(reader.read(0, count).image)
            count += 1
        speed = count / (time.perf_counter() - began)
        reader.close()
    shown = f"one core decodes {speed:.0f} images/s"
    if speed < SLOW_DECODING:
        return warning(
            f"only {shown}", f"adaptive train CONFIG data.workers={max(2, len(os.sched_getaffinity(0)) - 1)}"
        )
    return ok(f"{shown}, before augmentation")


CHECKS = [
    Check("shards", "data", shards, limit=60),
    Check("reading", "data", reading, slow=True, limit=120),
    Check("decoding", "data", decoding, slow=True, limit=120),
]
