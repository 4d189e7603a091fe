"""Loss spikes: a step whose loss lies far outside of the recent ones is left out."""

from __future__ import annotations

import math
import statistics
from collections import deque

WINDOW = 128  # losses that the mean and the standard deviation are of
ENOUGH = 32  # below this many no step is judged


class SpikeGuard:
    """Judges a step's loss by the mean and the standard deviation of the last applied steps' (``sigmas`` of them)."""

    def __init__(self, sigmas: float) -> None:
        self.sigmas = sigmas
        self.count = 0
        self.losses: deque[float] = deque(maxlen=WINDOW)

    def is_spike(self, loss: float) -> bool:
        """Tell whether ``loss``, the mean over all ranks, is to be left out; else remember it."""
        if not math.isfinite(loss):
            return False  # the engine skips such a step by itself
        if len(self.losses) >= ENOUGH:
            deviation = statistics.stdev(self.losses)
            if loss > statistics.fmean(self.losses) + self.sigmas * deviation:
                self.count += 1
                return True
        self.losses.append(loss)
        return False

    def state(self) -> dict[str, object]:
        """Return what a checkpoint keeps."""
        return {"losses": list(self.losses), "count": self.count}

    def load_state(self, state: dict[str, object]) -> None:
        """Restore what ``state`` returned."""
        self.losses = deque(state["losses"], maxlen=WINDOW)  # type: ignore[call-overload]
        self.count = int(state["count"])  # type: ignore[call-overload]
