"""Records of every node's load (processor, memory, network, GPUs), every few seconds, written on rank 0."""

from __future__ import annotations

import time

from adaptive.training.supervision.machine_load import MachineLoad, system_values
from adaptive.training.supervision.peers import host_name
from adaptive.training.trainer import Callback, Trainer


class SystemRecords(Callback):
    """Publishes ``system/<node>/<measure>``: of all nodes where several ranks run, as they told it last.

    Args:
        seconds: between two records, at least; a record waits for the end of a step.
        machine: this rank's own, for a run that is alone.
    """

    def __init__(self, seconds: float, machine: MachineLoad) -> None:
        self.seconds, self.machine = seconds, machine
        self._due = time.monotonic() + seconds

    def on_step(self, trainer: Trainer) -> None:
        """Publish when it is time."""
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + self.seconds
        peers = trainer.supervisor.peers
        trainer.publish(system_values(peers.machines() if peers else {host_name(): self.machine.sample()}))
