"""Sums over all ranks at every step: how many were asked to stop, and how many bad samples were met.

The sum travels over gloo, on the CPU, while the next step computes; nothing waits for a GPU or for a slow peer. It is
therefore read one exchange late, by all ranks at the same one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Agreement:
    """Sums of small integers over the ranks, one exchange late (collective; the same number of values each time)."""

    def __init__(self) -> None:
        self._pending: tuple[Tensor, Any] | None = None
        self._group: Any = None
        self._alone = not dist.is_initialized() or dist.get_world_size() == 1
        if not self._alone:
            self._group = dist.new_group(backend="gloo")

    def exchange(self, values: Sequence[int]) -> list[int] | None:
        """Send this rank's ``values`` and return all ranks' sums of the exchange before; None at the first.

        Alone, the values themselves come back at once.
        """
        if self._alone:
            return list(values)
        before = self.settle()
        sums = torch.tensor(values, dtype=torch.int64)
        self._pending = sums, dist.all_reduce(sums, group=self._group, async_op=True)
        return before

    def settle(self) -> list[int] | None:
        """Wait for the exchange under way and return its sums (None when there is none)."""
        if self._pending is None:
            return None
        sums, work = self._pending
        self._pending = None
        work.wait()
        return [int(value) for value in sums]

    def now(self, values: Sequence[int]) -> list[int]:
        """Send this rank's ``values`` and return all ranks' sums of this very exchange."""
        self.settle()
        self.exchange(values)
        return list(values) if self._alone else self.settle() or []
