"""Coming shards fetched in the background while those at hand are read."""

from __future__ import annotations

import threading
from collections.abc import Callable

from adaptive.data.remote.transfer import Cancelled
from adaptive.data.shards.cache import ShardCache
from adaptive.data.shards.index import ShardInfo
from adaptive.errors import AdaptiveError

_PATIENCE = 2.0  # seconds to wait for the thread when it is ended; it never keeps the process alive


class Ahead:
    """A thread that walks the coming shards in their order and fetches those that nobody else is fetching.

    Args:
        cache: where they go.
        shard: the shard at a place of the order.
        end: number of places in the order.
        ahead: how many shards beyond those in use may be fetched.

    A shard that cannot be fetched is passed over: whoever reads it meets the error.
    """

    def __init__(self, cache: ShardCache, shard: Callable[[int], ShardInfo], end: int, ahead: int) -> None:
        self._cache, self._shard, self._end, self._ahead = cache, shard, end, ahead
        self._next = self._limit = 0
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="shards-ahead", daemon=True)
        self._thread.start()

    def advance(self, first: int, end: int) -> None:
        """Say which places of the order, [first, end), are being read now."""
        with self._changed:
            self._next = max(self._next, first)
            self._limit = min(self._end, end + self._ahead)
            self._changed.notify()

    def close(self) -> None:
        """End the thread; a download that it has begun is given up."""
        self._stop.set()
        with self._changed:
            self._changed.notify()
        self._thread.join(_PATIENCE)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stop.is_set() or self._next < self._limit)
                if self._stop.is_set():
                    return
                place = self._next
                self._next += 1
            try:
                self._cache.fetch(self._shard(place), wait=False, cancel=self._stop)
            except (AdaptiveError, Cancelled):
                continue
