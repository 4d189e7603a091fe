"""A cache of remote shards on this machine's disk: one download per shard, shared by all processes of the machine.

A shard is downloaded under a lock of its own into a temporary file beside its path, and renamed once its size and
sha256 are those of the index. The least recently used shards make room for new ones; a process that reads one while it
is removed can go on reading it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from adaptive.config.sections import DataConfig
from adaptive.data.faults import CHECKSUM, MISSING, BadDataError
from adaptive.data.remote.transfer import Cancelled, Mismatch, RemoteFolder
from adaptive.data.remote.urls import is_remote, open_remote
from adaptive.data.shards.index import INDEX_NAME, MOST_INDEX_BYTES, DatasetIndex, IndexWatch, ShardInfo, replaced_error
from adaptive.data.shards.reader import LocalFiles, ShardFiles
from adaptive.errors import ConfigError, MachineError
from adaptive.files import expanded, file_sha256, write_atomically
from adaptive.foreign_text import shown_location
from adaptive.locks import FOR_EVER, Lock

GIB = 2**30
MIB = 2**20
# Marks a folder as ours to delete from; name and first line are those of the standard by which backups skip caches.
_TAG = "CACHEDIR.TAG"
_TAG_CONTENT = "Signature: 8a477f597d28d172789f06886806bc55\n# Shards that adaptive can fetch again.\n"
_FOLDER = re.compile(r"[0-9a-f]{32}")  # the beginning of a dataset's fingerprint
_PART = re.compile(r"\.(?P<name>[A-Za-z0-9_-]+\.tar)\.(?P<size>\d+)\.\d+-\d+\.part")
_ROOM_POLL = 0.1  # seconds between two checks whether other downloads have freed room
_OPEN_ATTEMPTS = 100
_FAILURE_SECONDS = 1.0  # for which a failed download is not tried again
_part_numbers = count()


@dataclass(frozen=True)
class _CachedShard:
    """A shard in the cache: when it was last used, its size in bytes, and its file."""

    used: float
    size: int
    path: Path


def cache_folder(settings: DataConfig) -> Path:
    """Return the folder in which shards of URLs are cached (raises ConfigError: none is named, there is no home)."""
    if staged := stage_folder():
        return staged
    if settings.cache is not None:
        return Path(settings.cache)
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named) / "adaptive" / "shards"
    home = expanded("~")
    if not home.is_absolute():
        raise ConfigError("data.cache is not set, and this user has no home folder; name one: data.cache=FOLDER")
    return home / ".cache" / "adaptive" / "shards"


def stage_folder() -> Path | None:
    """Return the folder on this machine's own disk that batch scripts bring shards to, if ADAPTIVE_STAGE names one."""
    name = os.environ.get("ADAPTIVE_STAGE")
    return Path(name) if name else None


def check_cache(index: DatasetIndex, split: str, settings: DataConfig) -> int:
    """Return how many shards of a split the cache can hold.

    Raises:
        ConfigError: fewer than are read at a time.
    """
    sizes = sorted((shard.bytes for shard in index.split(split).shards), reverse=True)
    needed = min(settings.shuffle_window, len(sizes))
    bound = int(settings.cache_gib * GIB)
    if sum(sizes[:needed]) > bound:
        held = next(n for n in range(len(sizes) + 1) if sum(sizes[: n + 1]) > bound)
        raise ConfigError(
            f"data.cache_gib = {settings.cache_gib:g} holds {held} shards of split {split} (up to "
            f"{sizes[0] / MIB:.1f} MiB each), data.shuffle_window = {settings.shuffle_window} reads {needed} at "
            f"a time; set data.cache_gib to {sum(sizes[:needed]) / GIB * 1.01:.3g} or more, or lower the window"
        )
    return bound // max(sizes[0], 1) if sizes else 0


class ShardCache:
    """The shards of one dataset at a URL, downloaded to this machine's disk when they are first opened.

    ``downloads`` counts those that this object has downloaded.
    """

    def __init__(self, remote: RemoteFolder, fingerprint: str, root: Path, bound: int) -> None:
        self.remote = remote
        self.root = root
        self.fingerprint = fingerprint
        self.folder = root / fingerprint[:32]
        self.bound = bound
        self.downloads = 0
        self._failed: dict[str, tuple[float, BadDataError]] = {}
        self._watched: dict[Path, Lock] = {}  # of other processes' downloads: a lock notices silence, if asked again

    def shown(self, shard: ShardInfo) -> str:
        """Return a shard's URL for messages."""
        return self.remote.shown(shard.name)

    def close(self) -> None:
        """Close this process's connections to the store."""
        self.remote.close()

    def open(self, shard: ShardInfo) -> int:
        """Return a descriptor of a shard's file, downloaded first if needed (raises as `fetch` does)."""
        for _ in range(_OPEN_ATTEMPTS):
            path = self.fetch(shard)
            with suppress(FileNotFoundError):  # another process made room before it was opened
                return os.open(path, os.O_RDONLY)
        raise MachineError(
            f"data.cache = {str(self.root)!r} is too small for all that is read from it at a time: {shard.name} was "
            f"removed again and again; raise data.cache_gib, or lower data.shuffle_window"
        )

    def fetch(self, shard: ShardInfo, wait: bool = True, cancel: threading.Event | None = None) -> Path:
        """Download a shard unless it is cached, and return its path; without ``wait`` not if another process does so.

        Raises:
            BadDataError: the shard cannot be downloaded; see `RemoteFolder.fetch`.
            MachineError: no space, or no right to write.
            Cancelled: ``cancel`` was set.
        """
        path = self.folder / shard.name
        began = time.monotonic()
        try:
            self._prepare()
            if not self._use(path, shard.bytes):
                with _locked(_lock_of(path), wait) as held:
                    if held and not self._use(path, shard.bytes):
                        self._raise_known(shard, began)
                        self._download(path, shard, cancel or threading.Event())
        except BadDataError as error:
            self._failed[shard.name] = (time.monotonic(), error)
            raise
        except OSError as error:
            raise MachineError(
                f"data.cache = {str(self.root)!r} cannot be used: {error.strerror or error}; check its permissions, or "
                "give another folder"
            ) from None
        return path

    def _check_not_replaced(self) -> None:
        """Tell a dataset that is another one by now from a shard that is damaged (raises DataError)."""
        with suppress(BadDataError, ValueError, KeyError, TypeError):
            now = json.loads(self.remote.read(INDEX_NAME, MOST_INDEX_BYTES))["fingerprint"]
            if now != self.fingerprint:
                raise replaced_error(shown_location(self.remote.location), self.fingerprint, now)

    def holds(self, shard: ShardInfo) -> bool:
        """Say whether a shard is in the cache, complete."""
        with suppress(OSError):  # another process may remove it
            return (self.folder / shard.name).stat().st_size == shard.bytes
        return False

    def _raise_known(self, shard: ShardInfo, began: float) -> None:
        """Raise the error of another thread of this process, which made all attempts while this one waited."""
        when, error = self._failed.get(shard.name, (0.0, None))
        if error and when > began - _FAILURE_SECONDS:
            raise BadDataError(str(error), error.kind, whole=True)

    def _prepare(self) -> None:
        tag = self.folder / _TAG
        if not tag.exists():
            (self.folder / "locks").mkdir(parents=True, exist_ok=True)
            write_atomically(tag, _TAG_CONTENT)

    def _use(self, path: Path, size: int) -> bool:
        """Say whether a shard is in the cache, and mark it as used now."""
        try:
            if path.stat().st_size == size:
                os.utime(path)
                return True
        except FileNotFoundError:
            pass
        return False

    def _download(self, path: Path, shard: ShardInfo, cancel: threading.Event) -> None:
        for leftover in self.folder.glob(f".{shard.name}.*.part"):  # of killed processes: this one holds the lock
            leftover.unlink(missing_ok=True)
        part = self.folder / f".{shard.name}.{shard.bytes}.{os.getpid()}-{next(_part_numbers)}.part"
        self._make_room(part, shard, cancel)

        def check(found: Path) -> None:
            if (size := found.stat().st_size) != shard.bytes:
                raise Mismatch(f"{size} bytes, the index says {shard.bytes}")
            if (digest := file_sha256(found)) != shard.sha256:
                raise Mismatch(f"sha256 {digest[:12]}, the index says {shard.sha256[:12]}")
            with found.open("rb") as file:
                os.fsync(file.fileno())

        try:
            self.remote.fetch(shard.name, part, shard.bytes, check, cancel)
            part.replace(path)
            self.downloads += 1
        except BadDataError as error:
            if error.kind in (CHECKSUM, MISSING):
                self._check_not_replaced()
            raise
        finally:
            part.unlink(missing_ok=True)

    def _make_room(self, part: Path, shard: ShardInfo, cancel: threading.Event) -> None:
        """Remove the least recently used shards until the new one fits, and reserve its size by creating ``part``."""
        while True:
            with _locked(self.root / ".room.lock"):
                kept, reserved, missing = self._survey()
                free = shutil.disk_usage(self.root).free - missing
                total = sum(one.size for one in kept) + reserved
                for one in sorted(kept, key=lambda one: one.used):
                    if total + shard.bytes <= self.bound and shard.bytes <= free:
                        break
                    one.path.unlink(missing_ok=True)
                    total -= one.size
                    free += one.size
                if shard.bytes <= free and (total + shard.bytes <= self.bound or not reserved):
                    part.touch()
                    return
                if not reserved:
                    raise MachineError(
                        f"no space left in data.cache = {str(self.root)!r}: {shard.name} has {shard.bytes / MIB:.1f} "
                        f"MiB, {free / MIB:.1f} MiB are free; free some, or give another folder"
                    )
            if cancel.wait(_ROOM_POLL):  # other downloads have reserved the room; once complete they can be removed
                raise Cancelled

    def _survey(self) -> tuple[list[_CachedShard], int, int]:
        """Return the cached shards of all datasets, the bytes that downloads reserve, and those still to be written."""
        kept: list[_CachedShard] = []
        reserved = missing = 0
        for folder in self.root.iterdir():
            if not _FOLDER.fullmatch(folder.name) or not (folder / _TAG).is_file():
                continue
            for path in folder.iterdir():
                with suppress(FileNotFoundError):
                    if path.suffix == ".tar":
                        found = path.stat()
                        kept.append(_CachedShard(found.st_mtime, found.st_size, path))
                    elif match := _PART.fullmatch(path.name):
                        if self._abandoned(path, match["name"]):
                            continue
                        reserved += int(match["size"])
                        missing += max(0, int(match["size"]) - path.stat().st_size)
        return kept, reserved, missing

    def _abandoned(self, part: Path, shard: str) -> bool:
        """Remove a partial download whose lock nobody holds, for its process was killed; says whether it was one."""
        path = _lock_of(part.with_name(shard))
        lock = self._watched.setdefault(path, Lock(path))
        if not lock.attempt():
            return False
        try:
            part.unlink(missing_ok=True)
        finally:
            lock.release()
            del self._watched[path]
        return True


def _lock_of(path: Path) -> Path:
    return path.parent / "locks" / f"{path.name}.lock"


@contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a lock; yields whether it was acquired."""
    lock = Lock(path)
    held = bool(lock.acquire(FOR_EVER)) if wait else lock.attempt()
    try:
        yield held
    finally:
        lock.release()


def shard_files(folder: str | Path, index: DatasetIndex, settings: DataConfig | None = None) -> ShardFiles:
    """Return the shards of a dataset: a folder's directly, a URL's through the cache.

    With ADAPTIVE_STAGE a folder's, too, are cached, in that folder, bounded by its disk. Raises as `open_remote` does.
    """
    remote = isinstance(folder, str) and is_remote(folder)
    staged = stage_folder()
    if not remote and staged is None:
        return LocalFiles(Path(folder), IndexWatch(Path(folder), index.fingerprint))
    location = str(folder) if remote else f"file://{Path(folder).resolve()}"
    settings = settings or DataConfig(path=location)
    bound = int(settings.cache_gib * GIB)
    if staged is not None:
        bound = shutil.disk_usage(next(path for path in (staged, *staged.absolute().parents) if path.exists())).total
    return ShardCache(open_remote(location, settings), index.fingerprint, cache_folder(settings), bound)
