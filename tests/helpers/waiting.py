"""Waiting for what other processes and threads do: for the event itself, with a bound that only a hang reaches."""

import time
from collections.abc import Callable

PATIENCE = 240.0  # seconds: what takes one on a quiet machine may take many on a busy one


def wait_until(due: Callable[[], object], explain: Callable[[], object] = str) -> None:
    """Wait until ``due`` says so; a test that waits in vain fails with what ``explain`` returns."""
    limit = time.monotonic() + PATIENCE
    while not due():
        assert time.monotonic() < limit, f"not within {PATIENCE:.0f} s: {explain()}"
        time.sleep(0.01)
