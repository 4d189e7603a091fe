"""How sure the numbers of a policy are, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adaptive.reporting.tables import human, loss_with_range, percent_range


def policy_lines(result: Mapping[str, Any]) -> list[str]:
    """Say how sure the numbers of a calibrated policy are, and what is promised; nothing of what is not there."""
    lines = []
    if "top1_interval" in result:
        cost = " to ".join(map(human, result["macs_interval"]))
        lost = loss_with_range(result["top1_loss"], result["top1_loss_interval"])
        lines.append(
            f"{100 * result['level']:g} % intervals: top-1 {percent_range(result['top1_interval'])} %, points below "
            f"the full network {lost}, MACs {cost}"
        )
    if result.get("promise"):
        lines.append(f"promised: {result['promise']}")
    if result.get("no_promise"):
        lines.append(f"nothing is promised: {result['no_promise']}")
    return lines
