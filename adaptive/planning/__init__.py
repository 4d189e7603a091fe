"""What a run will need, told before it starts: batch arithmetic, memory, traffic, data, time."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """Offer `check_plan` and `CheckedPlan`, which scripts that submit runs call, on first use: they import torch."""
    if name in ("check_plan", "CheckedPlan"):
        from adaptive.planning import checked_plan

        return getattr(checked_plan, name)
    raise AttributeError(f"module 'adaptive.planning' has no attribute {name!r}")
