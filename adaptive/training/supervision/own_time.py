"""A rank's own time: the seconds of a step that it spends by itself, before the others can make it wait.

All ranks end a step together, so the time of a step says that one is slow, and not which. What tells them apart is the
time up to the first collective operation:

* ``compute``: from a batch's arrival to its loss. Gradients are reduced in the backward pass, at the earliest, so the
  forward pass is a rank's own at ZeRO 0 to 2. At ZeRO 3 weights are gathered in it, from all ranks, and gradient
  surgery adds up the exits' gradients before the backward pass; the time of these exchanges is taken off.
  (Synchronised BatchNorm exchanges statistics in the forward pass too: there, a rank that computes slowly stands out by
  the rest of its forward pass alone.) The backward pass is slow where the forward pass is, so that part of the step
  stands for the whole.
* ``data``: waiting for the next batch.
* ``records``: writing records, and handing them to the console and W&B (rank 0).
* ``saving``: waiting for a checkpoint to be written (rank 0).

Nothing is exchanged for it: the sums travel with the heartbeats. On a GPU the forward pass is timed by CUDA events,
which are read when they are over, so that the host waits for nothing.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

PARTS = ("compute", "data", "records", "saving")
GATHERED_EVERY = 8  # steps; on a GPU two events per gathered layer are too many for every one of them


class OwnTime:
    """Sums of a rank's own time, by part, over its steps (or batches of a validation).

    Args:
        device: on which the forward pass runs.
        sampled: time one step of 8 only: on a GPU whose forward pass gathers weights layer by layer.
    """

    def __init__(self, device: torch.device, sampled: bool = False) -> None:
        self.told: dict[str, float] = {}  # replaced as a whole at every step: another thread reads it
        self._on_gpu = device.type == "cuda"
        self._every = GATHERED_EVERY if sampled and self._on_gpu else 1
        self._sums = dict.fromkeys(("steps", "seconds", *PARTS), 0.0)
        self._pending: deque[tuple[dict[str, float], list[Any]]] = deque()
        self._step = dict.fromkeys(PARTS, 0.0)
        self._spans: list[Any] = []  # of the step under way, on a GPU: first event, last event, +1 or -1
        self._computing = False
        self._number = 0
        self._since = time.perf_counter()

    def begin(self) -> None:
        """Start the clock of a step anew: what lies between the last step and now belongs to none."""
        self._since = time.perf_counter()

    def add(self, part: str, seconds: float) -> None:
        """Add to a part of the step under way."""
        self._step[part] += seconds

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a part of the step under way, by the host's clock."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - began)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Time a forward pass."""
        self._computing = self._number % self._every == 0
        try:
            with self._span(1):
                yield
        finally:
            self._computing = False

    @contextmanager
    def communicating(self) -> Iterator[None]:
        """Take the time of a collective operation off the forward pass that it is part of, if any."""
        with self._span(-1):
            yield

    @contextmanager
    def _span(self, sign: int) -> Iterator[None]:
        if not self._computing:
            yield
            return
        if not self._on_gpu:
            began = time.perf_counter()
            try:
                yield
            finally:
                self._step["compute"] += sign * (time.perf_counter() - began)
            return
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        yield
        last.record()
        self._spans.append((first, last, sign))

    def step_done(self) -> None:
        """End a step, and sum up those whose events are over."""
        now = time.perf_counter()
        if self._number % self._every == 0:
            self._pending.append(({**self._step, "steps": 1.0, "seconds": now - self._since}, self._spans))
        self._step, self._spans, self._since = dict.fromkeys(PARTS, 0.0), [], now
        self._number += 1
        while self._pending and all(last.query() for _, last, _ in self._pending[0][1]):
            step, spans = self._pending.popleft()
            step["compute"] += sum(sign * first.elapsed_time(last) / 1e3 for first, last, sign in spans)
            for name, value in step.items():
                self._sums[name] += value
        self.told = {name: round(value, 4) for name, value in self._sums.items() if value}
