"""The slowest rank, by name and node: warned of on rank 0 when it stands out, and recorded every few seconds."""

from __future__ import annotations

import time

from adaptive.training.supervision.peers import Peers
from adaptive.training.supervision.slow_ranks import WINDOW, RankSums, SlowRanks
from adaptive.training.trainer import Callback, Trainer

KINDS = {"training": "ranks", "validation": "ranks/validation"}  # whose own times are told -> prefix of record keys


class RankTimes(Callback):
    """Compares the own times that all ranks told with their heartbeats (`SlowRanks`); for rank 0 of several.

    Args:
        world: how many ranks there are.
        record_seconds: between two records, at least; 0 records nothing. Warnings are given all the same.
        window: seconds over which ranks are compared.
    """

    def __init__(self, world: int, record_seconds: float, window: float = WINDOW) -> None:
        self.record_seconds = record_seconds
        self.compared = {
            "training": SlowRanks(world, "step", window),
            "validation": SlowRanks(world, "batch of validation", window),
        }
        self._recorded = dict.fromkeys(KINDS, float("-inf"))
        self._pause, self._next = window / 10, float("-inf")  # thousands of ranks are not read at every step

    def on_step(self, trainer: Trainer) -> None:
        """Compare when a window is over."""
        peers, now = trainer.supervisor.peers, time.monotonic()
        if peers is None or now < self._next:
            return
        self._next = now + self._pause
        for kind, compared in self.compared.items():
            if not compared.due(now) or len(told := _told(peers, kind)) < compared.world:
                continue
            window = compared.look(told, peers.machines(), now)
            if window is None:
                continue
            for line in window.lines:
                trainer.message(line)
            if self.record_seconds and (window.lines or now - self._recorded[kind] >= self.record_seconds):
                self._recorded[kind] = now
                trainer.publish(window.record(KINDS[kind]))


def _told(peers: Peers, kind: str) -> dict[int, RankSums]:
    beats = dict(peers.heartbeats)
    own = {rank: beat.content.get("own", {}).get(kind, {}) for rank, beat in beats.items()}
    return {rank: RankSums(beats[rank].host, sums) for rank, sums in own.items() if sums}
