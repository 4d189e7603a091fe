"""The phase that a run is in: its network under the engine, learning rate schedule, task and spike guard."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from timm.scheduler.scheduler import Scheduler
from torch import Tensor

from adaptive.errors import CheckpointError
from adaptive.networks.network import AdaptiveNetwork
from adaptive.training.checkpoints.snapshot import restore
from adaptive.training.checkpoints.store import Checkpoint
from adaptive.training.engine.engine import Engine
from adaptive.training.learner import Learner, build_learner, build_task
from adaptive.training.optimizer import build_scheduler
from adaptive.training.phases import PhasePlan, set_modes
from adaptive.training.prepared_run import Prepared
from adaptive.training.run_progress import Progress
from adaptive.training.spikes import SpikeGuard
from adaptive.training.task import ClassificationTask


@dataclass
class ActivePhase:
    """All that exists while one phase trains; ``last_step`` counts over the whole run."""

    plan: PhasePlan
    learner: Learner
    scheduler: Scheduler
    task: ClassificationTask
    last_step: int
    spikes: SpikeGuard | None = None

    @classmethod
    def start(cls, prepared: Prepared, progress: Progress, checkpoint: Checkpoint | None = None) -> ActivePhase:
        """Build the phase that ``progress`` is in; with a ``checkpoint`` saved inside it, continue from there.

        Raises:
            CheckpointError: the checkpoint lacks the frozen teacher, or does not fit the phase.
        """
        config, plan, steps = prepared.config, prepared.plans[progress.phase], prepared.steps_per_epoch
        state: dict[str, Any] = {}
        tensors: dict[str, dict[str, Tensor]] = {}
        if checkpoint:
            state = checkpoint.state()
            tensors = {name: checkpoint.tensors(name) for name in ("optimizer", "ema", "teacher", "statistics")}
            if plan.gamma and config.distillation.teacher == "frozen" and not tensors["teacher"]:
                raise CheckpointError(
                    f"{checkpoint.path} holds no frozen teacher, and the network that it holds is not the one that "
                    f"phase {plan.name!r} began with; continue from a checkpoint of the phase before, or start anew in "
                    "another train.run_folder"
                )
        learner = build_learner(
            prepared, plan, copy.deepcopy(prepared.network), tensors.get("teacher"),
            reset_seed=None if checkpoint else config.train.seed + progress.phase,
            links_trained=_links_trained(prepared, progress.phase, state),
        )  # fmt: skip
        scheduler = build_scheduler(learner.engine.optimizer, config.schedule, plan.lr, plan.epochs, steps)
        if checkpoint:
            restore(learner, tensors, state)
        scheduler.step_update(progress.phase_applied)
        first_step = progress.step - progress.phase_step
        task = build_task(prepared, plan, learner, plan.weights_from(first_step, steps, config.train.seed))
        last_step = min(prepared.total_steps, first_step + prepared.phase_steps(progress.phase))
        spikes = SpikeGuard(config.train.spike_sigma) if config.train.spike_sigma else None
        if spikes and "spikes" in state:
            spikes.load_state(state["spikes"])
        set_modes(learner.network, plan)
        return cls(plan, learner, scheduler, task, last_step, spikes)

    def around_communication(self, around: Callable[[], AbstractContextManager[None]]) -> None:
        """Let ``around()`` surround every exchange with other ranks that comes before a step's last backward pass."""
        self.engine.around_gathering(around)
        if (surgery := self.task.surgery) is not None:
            reduce = surgery.all_reduce

            def surrounded(values: Tensor) -> Tensor:
                with around():
                    return reduce(values)

            surgery.all_reduce = surrounded

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


def _links_trained(prepared: Prepared, phase: int, state: Mapping[str, Any]) -> bool:
    """Whether the network was trained with its links when the phase began; ``state`` is a checkpoint's inside it."""
    if "teacher_collaboration" in state:
        return bool(state["teacher_collaboration"])
    if phase > 0:
        return prepared.plans[phase - 1].collaboration
    links = {name for name, _ in prepared.network.named_parameters() if ".link." in name}
    return bool(links) and not links & prepared.network.untrained
