"""Prefetching: a thread downloads the next shards while the current ones are read."""

from __future__ import annotations

import threading
from collections.abc import Callable

from adaptive.data.remote.transfer import Cancelled
from adaptive.data.shards.cache import ShardCache
from adaptive.data.shards.index import ShardInfo
from adaptive.errors import AdaptiveError

_JOIN_SECONDS = 2.0  # to wait for the thread when it is ended; it never keeps the process alive


class Prefetcher:
    """A thread that downloads shards into the cache in the order of their use, except those being downloaded already.

    Args:
        cache: where they go.
        shard: gives the shard at a position of that order.
        end: number of positions.
        prefetch: how many shards beyond those in use may be downloaded.

    A shard that cannot be downloaded is skipped: whoever reads it meets the error.
    """

    def __init__(self, cache: ShardCache, shard: Callable[[int], ShardInfo], end: int, prefetch: int) -> None:
        self._cache, self._shard, self._end, self._prefetch = cache, shard, end, prefetch
        self._next = self._limit = 0
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="shard-prefetch", daemon=True)
        self._thread.start()

    def advance(self, first: int, end: int) -> None:
        """Set which positions, [first, end), are being read now."""
        with self._changed:
            self._next = max(self._next, first)
            self._limit = min(self._end, end + self._prefetch)
            self._changed.notify()

    def close(self) -> None:
        """End the thread; a download that it has begun is cancelled."""
        self._stop.set()
        with self._changed:
            self._changed.notify()
        self._thread.join(_JOIN_SECONDS)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stop.is_set() or self._next < self._limit)
                if self._stop.is_set():
                    return
                position = self._next
                self._next += 1
            try:
                self._cache.fetch(self._shard(position), wait=False, cancel=self._stop)
            except (AdaptiveError, Cancelled):
                continue
