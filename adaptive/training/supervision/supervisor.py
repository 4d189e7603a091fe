"""What watches over a run on behalf of all ranks: stop signals, the watchdog, heartbeats, the bound on bad samples."""

from __future__ import annotations

from adaptive.errors import DataError
from adaptive.training.supervision.agreement import Agreement
from adaptive.training.supervision.own_time import OwnTime
from adaptive.training.supervision.peers import Peers
from adaptive.training.supervision.signals import StopSignals
from adaptive.training.supervision.start_clock import StartClock
from adaptive.training.supervision.watchdog import Watchdog


class StopAskedError(Exception):
    """A rank was asked to stop; raised on all ranks at the same step."""


class Supervisor:
    """Connects a run with its stop signals, its watchdog and the other ranks; one per process.

    Without signals and watchdog (in tests, say) nothing is asked and nothing watched.

    Args:
        signals: listens for requests to stop.
        watchdog: ends the process when it hangs.
        max_bad: how many bad samples all ranks together may meet (data.max_bad).
        clock: times the phases of the start.
    """

    def __init__(
        self,
        signals: StopSignals | None = None,
        watchdog: Watchdog | None = None,
        max_bad: int = 0,
        clock: StartClock | None = None,
    ) -> None:
        self.signals, self.watchdog, self.max_bad = signals, watchdog, max_bad
        self.clock = clock or StartClock()
        self.bad_of_all = 0  # samples that all ranks together could not use, as known at the last exchange
        self.peers: Peers | None = None  # with several ranks, once they have met
        self.clocks: dict[str, OwnTime] = {}  # this rank's own times, of training and of validation
        self._step, self._stage = 0, "startup"
        self._agreement: Agreement | None = None

    def meet(self) -> None:
        """Set up the exchange between the ranks (collective)."""
        self._agreement = Agreement()

    def end(self, failed: bool = False, words: str = "") -> None:
        """End the watch: no late signal, and no slow exit, turns finished work into a failure.

        Where it has ``failed`` signals are what they were: launchers end the other ranks by them. ``words`` say why,
        for the other ranks.
        """
        if self.peers is not None:
            self.peers.end(words)
        if self.signals is not None:
            (self.signals.restore if failed else self.signals.ignore)()
        if self.watchdog is not None:
            self.watchdog.end()

    def heartbeat(self, stage: str, step: int) -> None:
        """Note that the process lives, and is in ``stage`` now (startup, step or save) with ``step`` steps done."""
        self._step, self._stage = step, stage
        if self.watchdog is not None:
            self.watchdog.heartbeat(stage)

    def progress(self) -> tuple[int, str]:
        """Return the steps done and the stage, as of the last heartbeat."""
        return self._step, self._stage

    def own_times(self) -> dict[str, dict[str, float]]:
        """Return this rank's own times, as of the last step and the last batch of a validation."""
        return {kind: clock.told for kind, clock in self.clocks.items() if clock.told}

    def watch_peers(self, peers: Peers) -> None:
        """Let the other ranks know that this one lives, and notice when one of them does not."""
        self.peers = peers.start()
        if self.watchdog is not None:
            self.watchdog.account = peers.account

    def account(self) -> str:
        """Return what is known of ranks that have ended or are silent; takes some seconds."""
        return self.peers.account() if self.peers is not None else ""

    def first_step_done(self) -> None:
        """Note that from now on there is something to save before the process leaves."""
        if self.signals is not None:
            self.signals.immediate = False

    def stop_asked(self, bad_samples: int) -> bool:
        """Tell whether a rank was asked to stop; the same answer on all ranks (collective, one call late).

        ``bad_samples`` is how many samples this rank could not use so far.

        Raises:
            DataError: all ranks together met more bad samples than ``max_bad``.
        """
        assert self._agreement is not None, "the ranks have not met"
        asked = self.signals is not None and self.signals.asked
        sums = self._agreement.exchange([int(asked), bad_samples])
        if sums is None:
            return False
        self.bad_of_all = sums[1]
        if self.bad_of_all > self.max_bad:
            raise DataError(
                f"{sums[1]} samples could not be used, over data.max_bad = {self.max_bad}; the warnings above list "
                "them by shard. Find all with adaptive pack --verify, mend the data or raise data.max_bad"
            )
        return sums[0] > 0
