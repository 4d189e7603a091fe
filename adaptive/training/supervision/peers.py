"""Heartbeats between the ranks: which ones live, which lag behind, which have ended and why.

Collectives cannot tell: a rank whose node lost power, whose network was cut or that stands still only makes the others
wait. So every rank leaves a heartbeat every few seconds in the store through which the ranks met (a server in rank 0,
or in torchrun's agent), over a connection of its own. Rank 0 watches all others, the others watch rank 0 by its store.
A rank that is silent for too long is named with its node, and every process that noticed ends.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, TCPStore

from adaptive.errors import EXIT_HUNG

LOST = "lost"
PEER_ENDED = "another rank ended or cannot be reached"
SOON = 30.0  # seconds; by then a collective has failed with an error of its own, or the run has ended well
BEATS = 4  # a rank without a heartbeat for so many intervals counts as silent when a collective has failed
AGAIN = "Started again, the run goes on from its newest checkpoint"


def host_name() -> str:
    """Return this machine's name without its domain."""
    return socket.gethostname().partition(".")[0]


@dataclass
class Heartbeat:
    """The last heartbeat of a rank, and when (by this process's clock) it was seen to change."""

    content: Mapping[str, Any] = field(default_factory=dict)
    changed: float = 0.0

    @property
    def host(self) -> str:
        """The node that the rank runs on."""
        return str(self.content.get("host", "an unknown node"))

    @property
    def ended(self) -> str | None:
        """What the rank said when it ended; empty at a good end, None while it lives."""
        return self.content.get("ended")


class Peers:
    """Leaves this rank's heartbeats in one thread, and watches over the other ranks in another one.

    Args:
        rank: of this process.
        world: how many ranks there are.
        limit: seconds of silence after which a rank is given up and this process ends; 0 never ends it.
        progress: returns the steps done and the stage that this rank is in.
        machine: measures this rank's machine, for whoever asks rank 0 (``machines``).
        interval: seconds between two heartbeats; by default 2, and more where there are very many ranks.
        own: returns this rank's own times, from which rank 0 learns who is slow (`slow_ranks`).
    """

    def __init__(
        self,
        rank: int,
        world: int,
        limit: float,
        progress: Callable[[], tuple[int, str]],
        machine: Callable[[], Mapping[str, float]] = dict,
        interval: float | None = None,
        own: Callable[[], Mapping[str, Mapping[str, float]]] = dict,
    ) -> None:
        self.rank, self.world, self.limit = rank, world, limit
        self.progress, self.machine, self.own = progress, machine, own
        self.interval = interval or max(2.0, world / 500)
        self.heartbeats: dict[int, Heartbeat] = {}
        self._answered = time.monotonic()  # when the store last answered
        self._ask_for_all = rank == 0
        self._ended: str | None = None
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._threads = [
            threading.Thread(target=run, name=name, daemon=True)
            for name, run in (("heartbeat", self._beat), ("peers", self._watch))
        ]

    def start(self) -> Peers:
        """Begin; the process group must have been formed, at MASTER_ADDR and MASTER_PORT."""
        for thread in self._threads:
            thread.start()
        return self

    def end(self, words: str = "") -> None:
        """Say that this rank ends: by itself, or because of an error, whose text the others will quote."""
        if self._ended is None:
            self._ended = words
            self._stop.set()
            self._wake.set()
            self._threads[0].join(2 * self.interval)

    def machines(self) -> dict[str, dict[str, float]]:
        """Return what was last measured on every node, by its name (rank 0 knows)."""
        found: dict[str, dict[str, float]] = {}
        for beat in self.heartbeats.values():
            found.setdefault(beat.host, {}).update(beat.content.get("machine", {}))
        return found

    def account(self) -> str:
        """Return who has ended, is silent or is behind, as far as a few seconds of listening tell; may be empty."""
        self._ask_for_all = True
        self._wake.set()
        until = time.monotonic() + BEATS * self.interval
        while time.monotonic() < until and not (words := self._words_of_the_ended()):
            time.sleep(0.05)
        if words or (words := self._words_of_the_ended()):
            return words
        now, patience = time.monotonic(), (BEATS - 1) * self.interval
        if now - self._answered > patience:
            return f"{self._named(0)} cannot be reached from {host_name()}"
        silent = [rank for rank in sorted(self.heartbeats) if now - self.heartbeats[rank].changed > patience]
        if silent:
            return self._silence(silent[0], len(silent))
        steps = {rank: int(beat.content.get("step", 0)) for rank, beat in self.heartbeats.items()}
        last = min(steps, key=steps.__getitem__, default=self.rank)
        if steps and steps[last] < max(steps.values()):
            stage = self.heartbeats[last].content.get("stage")
            return f"{self._named(last)} is behind: at step {steps[last]} of {max(steps.values())}, in stage {stage!r}"
        return ""

    def _words_of_the_ended(self) -> str:
        ended = [
            (rank, beat.ended) for rank, beat in sorted(self.heartbeats.items()) if beat.ended and rank != self.rank
        ]
        ended.sort(key=lambda told: told[1].startswith(PEER_ENDED))  # the cause before those that suffered from it
        return f"{self._named(ended[0][0])} ended: {ended[0][1]}" if ended else ""

    def _named(self, rank: int) -> str:
        beat = self.heartbeats.get(rank)
        return f"rank {rank} on {beat.host}" if beat else f"rank {rank}"

    def _silence(self, rank: int, count: int) -> str:
        beat = self.heartbeats[rank]
        seconds = time.monotonic() - beat.changed
        others = f" (and from {count - 1} more ranks)" if count > 1 else ""
        return (
            f"nothing was heard from {self._named(rank)} for {seconds:.0f} s{others}; it was at step "
            f"{beat.content.get('step', 0)}"
        )

    # The thread that talks to the store. It may hang there for as long as it likes: the other one watches the clock.

    def _beat(self) -> None:
        try:
            address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            patience = timedelta(seconds=max(self.limit, 30.0))
            store = PrefixStore("peers", TCPStore(*address, timeout=patience, wait_for_workers=False))
            count, arrived = 0, False
            while True:
                count, ended = count + 1, self._ended
                self._tell(store, count, ended)
                if ended is not None:
                    return
                arrived = arrived or all(store.check([str(rank)]) for rank in range(self.world))
                self._read(store, arrived)
                self._wake.wait(self.interval)
                self._wake.clear()
        except Exception:  # a store that is gone raises a kind of its own for every way to go
            # Its server ended, which a network that was cut does not show: no need to wait for so long.
            self._answered = min(self._answered, time.monotonic() - self.limit + SOON)

    def _tell(self, store: PrefixStore, count: int, ended: str | None) -> None:
        step, stage = self.progress()
        heartbeat: dict[str, Any] = {"n": count, "host": host_name(), "step": step, "stage": stage, "ended": ended}
        if measured := self.machine():
            heartbeat["machine"] = dict(measured)
        if own := self.own():
            heartbeat["own"] = own
        store.set(str(self.rank), json.dumps(heartbeat))

    def _read(self, store: PrefixStore, arrived: bool) -> None:
        wanted = range(self.world) if self._ask_for_all else (0,)
        present = [rank for rank in wanted if arrived or store.check([str(rank)])]
        for rank, told in zip(present, store.multi_get([str(rank) for rank in present]), strict=True):
            content = json.loads(told)
            before = self.heartbeats.get(rank)
            if before is None or before.content["n"] != content["n"]:
                self.heartbeats[rank] = Heartbeat(content, time.monotonic())
        if store.check([LOST]):
            self._leave(store.get(LOST).decode())
        self._answered = time.monotonic()
        silent = self._silent(time.monotonic() - self.limit)
        if self.rank == 0 and silent:
            words = self._silence(silent[0], len(silent))
            store.set(LOST, words)
            self._stop.wait(2 * self.interval)  # the store ends with this process, and the others are to read it
            self._leave(words)

    # The thread that watches the clock.

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._stop.wait(min(self.interval / 2, 1.0)):
            now = time.monotonic()
            stood_still = now - before - 2 * self.interval
            if stood_still > 0:  # this process was stopped, perhaps all were: nobody's silence counts
                self._answered += stood_still
                for beat in self.heartbeats.values():
                    beat.changed += stood_still
            before = now
            if self.limit and now - self._answered > self.limit:
                self._leave(f"{self._named(0)} cannot be reached from {host_name()} for {now - self._answered:.0f} s")

    def _silent(self, since: float) -> list[int]:
        if not self.limit:
            return []
        return [rank for rank, beat in sorted(self.heartbeats.items()) if beat.changed < since and beat.ended is None]

    def _leave(self, words: str) -> None:
        if self._stop.is_set():
            return
        print(
            f"adaptive train: error: rank {self.rank} on {host_name()}: {words} (train.peer_timeout = {self.limit:g}): "
            f"its node or the network is down, or the process was killed. This process ends. {AGAIN}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_HUNG)
