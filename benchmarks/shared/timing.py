"""Timing on noisy machines: everything in turn within a round, and ratios within the round."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from adaptive.inference.measuring.timing import Spread as Spread  # the benchmarks find it here


def interleaved(
    turns: Mapping[str, Callable[[], Any]], rounds: int, warmup: int, device: str, calls: int = 1, seed: int = 0
) -> dict[str, list[float]]:
    """Time several functions in turn, in a new order in every round.

    Args:
        turns: the functions by name.
        rounds: counted rounds.
        warmup: rounds before them that do not count.
        device: cpu or cuda; on cuda the clock is read when the device has finished.
        calls: calls of a function per turn.
        seed: of the orders.

    Returns:
        Seconds per call, one value per round.
    """
    order, generator = list(turns), random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    with no_garbage_collection():
        for number in range(-warmup, rounds):
            generator.shuffle(order)
            for name in order:
                elapsed = _timed(turns[name], calls, device)
                if number >= 0:
                    seconds[name].append(elapsed / calls)
    return seconds


def _timed(function: Callable[[], Any], calls: int, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def ratios(seconds: Mapping[str, Sequence[float]], name: str, reference: str) -> Spread:
    """Time of one function over another's in the same round."""
    return Spread.of_ratios(seconds[name], seconds[reference])


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Keep Python's collector from running in the middle of a measurement."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
