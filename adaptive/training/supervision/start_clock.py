"""How long a run's start takes, phase by phase."""

from __future__ import annotations

import time

import psutil


class StartClock:
    """Times the phases of a start, from the beginning of the process to the end of the first step.

    Without ``process`` the clock begins now: in a process that has done other things before (tests, notebooks).
    """

    def __init__(self, process: bool = False) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic() - (time.time() - psutil.Process().create_time() if process else 0.0)
        self._told = False

    def done(self, phase: str) -> None:
        """Note the end of a phase; all time since the one before belongs to it."""
        now = time.monotonic()
        if not self._told:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def finish(self) -> str | None:
        """Note the end of the first step; returns the line for the user, and None from then on."""
        if self._told:
            return None
        self.done("first step")
        self._told = True
        parts = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self.seconds.items())
        return f"start took {sum(self.seconds.values()):.1f} s on this rank: {parts}"
