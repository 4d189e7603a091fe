"""One phase of a run while it trains: its plan, network, engine, schedule and task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from timm.scheduler.scheduler import Scheduler

from adaptive.networks.network import AdaptiveNetwork
from adaptive.training.engine.engine import Engine
from adaptive.training.learner import Learner
from adaptive.training.phases import PhasePlan
from adaptive.training.spikes import SpikeGuard
from adaptive.training.task import ClassificationTask


@dataclass
class ActivePhase:
    """All that exists while one phase trains."""

    plan: PhasePlan
    learner: Learner
    scheduler: Scheduler
    task: ClassificationTask
    last_step: int
    spikes: SpikeGuard | None = None

    @property
    def engine(self) -> Engine:
        """The phase's engine."""
        return self.learner.engine

    @property
    def network(self) -> AdaptiveNetwork:
        """The network in training."""
        return self.learner.network

    @property
    def optimizer(self) -> Any:
        """The engine's optimizer; its param_groups carry the learning rates."""
        return self.learner.engine.optimizer
