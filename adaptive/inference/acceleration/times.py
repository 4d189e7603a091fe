"""Times of accelerated runners: with a policy, and as accelerated but straight to the end."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from adaptive.inference.acceleration.accelerated import BATCH_SIZES, Acceleration, Prepare
from adaptive.inference.measuring.timing import Spread, timed
from adaptive.inference.policy import EVERYBODY, NOBODY
from adaptive.inference.runner import DynamicClassifier


@dataclass(frozen=True)
class AcceleratedTimes:
    """What one batch takes in an accelerated runner. Times are in milliseconds per batch, medians over the rounds.

    Attributes:
        accelerate: how, see `DynamicClassifier`.
        prepared: functions that were compiled or captured for this batch size and this policy.
        seconds: that this took, the images' first run included.
        dynamic: the accelerated runner with the policy.
        straight: the equally accelerated runner without decisions: the backbone, with all exits if they collaborate.
        over_straight: dynamic / straight, formed within the rounds: what early exit brings there.
        over_eager: dynamic / that of the eager runner, formed within the rounds: what the acceleration brings.
        over_full: dynamic / the eager full network, formed within the rounds.
    """

    accelerate: str
    prepared: int
    seconds: float
    dynamic: float
    straight: float
    over_straight: Spread
    over_eager: Spread
    over_full: Spread


class AcceleratedTurns:
    """Two accelerated runners, with the policy and straight to the end, prepared for some batches of one size.

    Args:
        name: of the acceleration.
        accelerate: as the runner takes it.
        eager: the runner that is accelerated.
        batches: (N, C, H, W) each.
    """

    def __init__(
        self, name: str, accelerate: Acceleration | Prepare, eager: DynamicClassifier, batches: Sequence[Tensor]
    ) -> None:
        self._name, images = name, len(batches[0])
        sizes = [size for size in BATCH_SIZES if size < images] + [images]
        network, policy, precision = eager.network, eager.policy, eager.precision
        nobody = policy.with_thresholds([NOBODY] * (policy.exits - 1) + [EVERYBODY])
        self._dynamic = DynamicClassifier(network, policy, precision, accelerate=accelerate, batch_sizes=sizes)
        self._straight = DynamicClassifier(network, nobody, precision, accelerate=accelerate, batch_sizes=sizes)
        self._seconds = timed(lambda: [self._dynamic.run(batch) for batch in batches], eager.device) / 1000
        self._straight.run(batches[0])

    @property
    def turns(self) -> list[tuple[str, Callable[[Tensor], object]]]:
        """What is to be timed on a batch, by name."""
        return [(f"{self._name} dynamic", self._dynamic.run), (f"{self._name} straight", self._straight.run)]

    def times(self, measured: Mapping[str, Sequence[float]]) -> AcceleratedTimes:
        """Sum up milliseconds per round, under the names of the turns and of the eager runs."""
        dynamic, straight = (measured[name] for name, _ in self.turns)
        return AcceleratedTimes(
            self._name,
            self._dynamic.prepared,
            self._seconds,
            statistics.median(dynamic),
            statistics.median(straight),
            over_straight=Spread.of_ratios(dynamic, straight),
            over_eager=Spread.of_ratios(dynamic, measured["dynamic"]),
            over_full=Spread.of_ratios(dynamic, measured["full"]),
        )
