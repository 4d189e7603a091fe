"""Measures a group of cells: every variant in turn within each round, bounded in time, with the peak of its memory."""

from __future__ import annotations

import gc
import math
import time
from dataclasses import asdict
from typing import Any

import torch

from adaptive.errors import reason_of
from adaptive.networks.network import AdaptiveNetwork
from benchmarks.gpu_run.cells import FORKS, Group, Trial
from benchmarks.shared.cards import find_card
from benchmarks.shared.fork_cost import fork_cost
from benchmarks.shared.timing import Spread, interleaved, ratios
from benchmarks.shared.variants import StepSettings, Trainee

WARMUP = 2  # steps before memory is measured: the optimizer's state appears in the first
TURN_SECONDS = 0.05  # a turn lasts at least so long: a step may be short beside waiting for the device
MOST_CALLS = 20
LEAST_ROUNDS = 3
FORK_REPETITIONS = 100


class _Cell:
    """A trial, built and warmed up, with the memory that it takes by itself."""

    def __init__(self, settings: StepSettings, trial: Trial) -> None:
        self.settings, self.trial = settings, trial
        cuda = settings.device == "cuda"
        before = torch.cuda.memory_allocated() if cuda else 0
        self.trainee = Trainee(settings, trial.variant)
        for _ in range(WARMUP):
            loss = self.trainee()
        if not math.isfinite(float(loss)):
            raise ValueError(f"the loss is {float(loss)}: what would be timed is no training")
        # All that it added: weights, optimizer state, what an engine keeps, and the step's own; no earlier cell's.
        self.peak = None
        if cuda:
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.trainee()
            torch.cuda.synchronize()
            self.peak = torch.cuda.max_memory_allocated() - before
        self.macs = self.trainee.macs()

    def step_seconds(self) -> float:
        """Seconds of a step, roughly."""
        began = time.perf_counter()
        self.trainee()
        if self.settings.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began


def measure(group: Group, device: str, rehearsal: bool, seconds: float, rounds: int) -> list[dict[str, Any]]:
    """Measure a group's cells; one that fails, for want of memory say, is an entry that says so.

    Args:
        group: the cells.
        device: cpu or cuda.
        rehearsal: whether sizes are tiny, and what is measured fills no cell.
        seconds: of measuring per cell, at most.
        rounds: at most.
    """
    cells: dict[str, _Cell] = {}
    entries = []
    for trial in group.trials:
        settings = group.settings(trial, device, rehearsal)
        entry: dict[str, Any] = {"group": group.name, "network": group.network, "mode": group.mode, "trial": trial.key}
        entry |= {"title": trial.title, "settings": asdict(settings), "rehearsal": rehearsal}
        try:
            began = time.perf_counter()
            cells[trial.key] = _Cell(settings, trial)
            entry |= {"status": "measured", "build_seconds": time.perf_counter() - began}
        except Exception as error:
            kind = "out of memory" if isinstance(error, torch.OutOfMemoryError) else "failed"
            entry |= {"status": kind, "reason": reason_of(error, 300)}
        entries.append(entry)
    if cells:
        try:
            _fill(entries, cells, seconds, rounds)
            if group.name in FORKS:
                entries[0]["forks"] = _forks(cells["equilibrium"], rehearsal)
        except Exception as error:
            for entry in entries:
                entry |= {"status": "failed", "reason": reason_of(error, 300)}
    for cell in cells.values():
        cell.trainee.close()
    cells.clear()
    gc.collect()
    return entries


def _fill(entries: list[dict[str, Any]], cells: dict[str, _Cell], seconds: float, rounds: int) -> None:
    device = next(iter(cells.values())).settings.device
    shortest = min(cell.step_seconds() for cell in cells.values())
    calls = max(1, min(MOST_CALLS, math.ceil(TURN_SECONDS / shortest))) if device == "cuda" else 1
    turn = sum(cell.step_seconds() for cell in cells.values()) * calls
    affordable = int(seconds * len(cells) / turn)
    counted = max(min(LEAST_ROUNDS, rounds), min(rounds, affordable))
    turns = {key: cell.trainee for key, cell in cells.items()}
    times = interleaved(turns, counted, 1, device, calls)
    first = next(iter(cells))
    previous: str | None = None
    for entry in entries:
        key = entry["trial"]
        if key not in cells:
            continue
        step = Spread.of(times[key])
        entry |= {"rounds": counted, "calls": calls, "step_ms": asdict(step.scaled(1e3)), "macs": cells[key].macs}
        entry |= {"images_per_second": cells[key].settings.batch / step.median, "peak_memory_bytes": cells[key].peak}
        entry |= {"over_first": asdict(ratios(times, key, first)) if key != first else None}
        entry |= {"over_previous": asdict(ratios(times, key, previous)) if previous else None}
        entry |= {"mfu": _mfu(cells[key], step.median)}
        previous = key


def _mfu(cell: _Cell, seconds: float) -> float | None:
    """Model FLOPs utilisation: six operations per multiply-add and image, over the data sheet's rate."""
    card = find_card(torch.cuda.get_device_name()) if cell.settings.device == "cuda" else None
    if card is None:
        return None
    # Outside bf16 convolutions use TF32, as PyTorch does by default.
    rate = 1e12 * card.tflops["bf16" if cell.settings.precision == "bf16" else "tf32"]
    return 6 * cell.macs * cell.settings.batch / seconds / rate


def _forks(cell: _Cell, rehearsal: bool) -> dict[str, Any]:
    """What Gradient Equilibrium adds to a step, at the branch points alone."""
    network = cell.trainee.network
    assert isinstance(network, AdaptiveNetwork)
    found = fork_cost(cell.settings, network, 3 if rehearsal else FORK_REPETITIONS)
    return {"added_ms": asdict(Spread.of(found.added).scaled(1e3))}
