"""What a run is made of before its ranks meet, and what follows from it: phase plans, costs, numbers of steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from adaptive.config.sections import Config
from adaptive.data.reading.order import steps_per_epoch
from adaptive.data.shards.index import DatasetIndex
from adaptive.distributed.ranks import Ranks
from adaptive.networks.cost import ExitCost
from adaptive.networks.network import AdaptiveNetwork
from adaptive.networks.precision import autocast
from adaptive.training.batch import BatchSizes
from adaptive.training.losses.model_teacher import ModelTeacher, model_teacher
from adaptive.training.phases import PhasePlan, plan_phase


@dataclass(frozen=True)
class Setup:
    """Configuration, batch sizes and device: what the engine, the losses and the teacher of a phase are built from."""

    config: Config
    batch: BatchSizes
    device: torch.device

    @cached_property
    def _teachers(self) -> dict[int, ModelTeacher]:
        return {}

    def model_teacher(self, num_classes: int) -> ModelTeacher:
        """Return the timm model that teaches, on the device: built once, to be checked and for all phases.

        Raises:
            ConfigError: see `adaptive.training.losses.model_teacher.model_teacher`.
        """
        if num_classes not in self._teachers:
            config, context = self.config, autocast(self.config.train.precision, self.device)
            self._teachers[num_classes] = model_teacher(
                config.distillation, config.data, num_classes, self.device, context
            )
        return self._teachers[num_classes]


@dataclass(frozen=True)
class Prepared(Setup):
    """A run whose configuration, dataset and backbone are checked, and whose network is built.

    ``network`` is a template on the CPU: every phase trains a copy of it, so that an engine never meets a network that
    another engine has partitioned. It takes over the weights of a finished phase. ``begins_from`` is what is recorded
    of the run that it begins from, ``notes`` what the user is told of its beginning, and of settings without effect.
    """

    ranks: Ranks
    folder: Path
    index: DatasetIndex
    network: AdaptiveNetwork
    begins_from: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()

    @cached_property
    def costs(self) -> list[ExitCost]:
        """Cumulative multiply-adds and parameters of every exit."""
        return self.network.costs()

    @cached_property
    def plans(self) -> list[PhasePlan]:
        """The phases, one after another."""
        return [plan_phase(self.config, phase, len(self.network.exits)) for phase in self.config.resolved_phases()]

    @cached_property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch; its last, incomplete batch is left out."""
        return steps_per_epoch(self.index.split(self.config.data.train_split).count, self.batch.global_batch)

    @property
    def total_epochs(self) -> int:
        """Epochs of all phases together."""
        return sum(plan.epochs for plan in self.plans)

    @property
    def total_steps(self) -> int:
        """Steps of the whole run, or train.max_steps where that is less."""
        full = self.total_epochs * self.steps_per_epoch
        return min(full, self.config.train.max_steps or full)

    def phase_steps(self, phase: int) -> int:
        """Return the steps of a phase, whose number counts from 0."""
        return self.plans[phase].epochs * self.steps_per_epoch
