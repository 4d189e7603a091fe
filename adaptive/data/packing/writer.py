"""The shard writer: what a worker process of packing does for one shard."""

from __future__ import annotations

import io
import json
import os
import signal
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path

from PIL import Image
from pydantic import BaseModel, ConfigDict

from adaptive.data.images.damage import check_image
from adaptive.data.images.decode import ImageError
from adaptive.data.packing.account import FileKind, kind_of_file
from adaptive.data.packing.sources import Item, read_item
from adaptive.data.packing.splitting.twins import DIGEST_CHARACTERS, digest
from adaptive.data.shards.index import ShardInfo
from adaptive.files import file_sha256, sync_folder, write_atomically

_PARENT_POLL = 0.2  # seconds
_stop: Event | None = None


@dataclass(frozen=True)
class ShardTask:
    """The task of a worker: a tar to write into ``folder``, and a record of it into ``records``."""

    name: str
    folder: Path
    records: Path
    root: Path | None
    prefix: str
    first: int
    items: list[Item]
    classes: list[str]
    max_side: int | None
    folders: frozenset[str] = frozenset()


class ShardRecord(BaseModel):
    """The outcome of one task; it is written once its shard is complete.

    Attributes:
        info: the shard.
        converted: how many images were re-encoded, by folder and extension.
        bad: the images that were left out, with reasons.
        suspect: images that decode whole, though not without a remark of the decoder.
        digests: of the files of all images of the task, joined; zeros for the bad ones.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    info: ShardInfo
    converted: list[tuple[FileKind, int]]
    bad: list[tuple[str, str]]
    suspect: list[tuple[str, str]]
    digests: str


class Interrupted(Exception):  # noqa: N818 - a request of the parent, not an error
    """The parent asked its workers to stop."""


def prepare_worker(stop: Event, parent: int) -> None:
    """Make a pool worker stop with its parent: when ``stop`` is set, and also when the parent was killed."""
    global _stop
    _stop = stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch_parent() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_POLL)
        os._exit(1)

    threading.Thread(target=watch_parent, name="watch-parent", daemon=True).start()


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back until the block has ended: a process pool interrupted in its start could not be ended."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if pressed:
            signal.raise_signal(signal.SIGINT)


def stop_if_asked() -> None:
    """End this worker's task where the parent has asked for it (raises Interrupted)."""
    if _stop is not None and _stop.is_set():
        raise Interrupted


def write_shard(task: ShardTask) -> ShardRecord:
    """Write a shard and its record, each by a rename once it is complete (raises OSError, Interrupted)."""
    path = task.folder / task.name
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    converted: Counter[FileKind] = Counter()
    bad, suspect, digests = [], [], []
    try:
        with temporary.open("wb") as stream:
            with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for number, item in enumerate(task.items, start=task.first):
                    stop_if_asked()
                    try:
                        image = _prepare(task, item)
                    except ImageError as error:
                        bad.append((item.name, str(error)))
                        digests.append("0" * DIGEST_CHARACTERS)
                        continue
                    _add_sample(tar, f"{task.prefix}-{number:08d}", task, item, image)
                    digests.append(image.digest)
                    if image.converted:
                        converted[kind_of_file(item.name, task.folders)] += 1
                    if image.suspicion:
                        suspect.append((item.name, image.suspicion))
            stream.flush()
            os.fsync(stream.fileno())
        size, checksum = temporary.stat().st_size, file_sha256(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(task.folder)
    info = ShardInfo(name=task.name, count=len(task.items) - len(bad), bytes=size, sha256=checksum)
    record = ShardRecord(
        info=info, converted=list(converted.items()), bad=bad, suspect=suspect, digests="".join(digests)
    )
    # Not by pydantic's JSON, which has no way to write a name that is not UTF-8.
    write_atomically(task.records / f"{task.name}.json", json.dumps(record.model_dump()))
    return record


def finished_record(task: ShardTask) -> ShardRecord | None:
    """Return the record of a shard that an interrupted packing left complete, if there is one.

    A shard that lacks bad images is written anew: a file may have been unreadable for the moment only.
    """
    try:
        record = ShardRecord.model_validate(json.loads((task.records / f"{task.name}.json").read_bytes()))
        size = (task.folder / task.name).stat().st_size
    except (OSError, ValueError):
        return None
    return record if size == record.info.bytes and not record.bad else None


@dataclass(frozen=True)
class _EncodedImage:
    """An image as it is stored, whether it was re-encoded, and its file's digest and the decoder's remark on it."""

    data: bytes
    extension: str
    width: int
    height: int
    converted: bool
    digest: str
    suspicion: str


def _prepare(task: ShardTask, item: Item) -> _EncodedImage:
    data = _read(task, item)
    checked = check_image(data)
    about = (digest(data), checked.suspicion)
    jpeg = checked.format in ("JPEG", "MPO")
    extension, size = "jpg" if jpeg else "png", checked.image.size
    if task.max_side is not None and max(size) > task.max_side:
        scale = task.max_side / max(size)
        width, height = (max(1, round(side * scale)) for side in size)
        image = checked.image.resize((width, height), Image.Resampling.LANCZOS)
        return _EncodedImage(_encode(image, jpeg, quality=92), extension, width, height, True, *about)
    if not checked.plain:
        data = _encode(checked.image, jpeg, quality=95)
    return _EncodedImage(data, extension, *size, not checked.plain, *about)


def _read(task: ShardTask, item: Item) -> bytes:
    try:
        data = read_item(task.root, item)
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror}") from None
    if item.offset is not None and len(data) < item.size:
        raise ImageError(f"{item.path} ends after {len(data)} of its {item.size} bytes")
    return data


def _encode(image: Image.Image, jpeg: bool, quality: int) -> bytes:
    stream = io.BytesIO()
    if jpeg:
        image.save(stream, "jpeg", quality=quality, subsampling=0)
    else:
        image.save(stream, "png")
    return stream.getvalue()


def _add_sample(tar: tarfile.TarFile, key: str, task: ShardTask, item: Item, image: _EncodedImage) -> None:
    about = {
        "class": task.classes[item.label],
        "source": item.name,
        "width": image.width,
        "height": image.height,
    }
    members = {image.extension: image.data, "cls": str(item.label).encode(), "json": json.dumps(about).encode()}
    for extension, data in members.items():
        # A new TarInfo has owner 0 and time 0: packing twice gives the same bytes.
        info = tarfile.TarInfo(f"{key}.{extension}")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
