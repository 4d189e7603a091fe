"""How far a run has come, in plain numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Progress:
    """Counts of a run. A step is one global batch consumed; it is applied unless its gradient was not finite."""

    step: int = 0
    samples: int = 0
    phase: int = 0
    phase_step: int = 0
    phase_applied: int = 0
    skipped: int = 0
    skipped_in_row: int = 0
    finished: bool = False

    def advance(self, applied: bool, global_batch: int) -> None:
        """Count one step."""
        self.step += 1
        self.phase_step += 1
        self.samples += global_batch
        self.phase_applied += applied
        self.skipped += not applied
        self.skipped_in_row = 0 if applied else self.skipped_in_row + 1

    def next_phase(self) -> None:
        """Enter the next phase at its start."""
        self.phase += 1
        self.phase_step = self.phase_applied = 0

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for a checkpoint."""
        return asdict(self)
