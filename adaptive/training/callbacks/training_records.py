"""The training record of every n-th step: losses and accuracies per exit, gradient norms per block, speed, memory."""

from __future__ import annotations

import time
from typing import Any

import psutil
import torch

from adaptive.tracking.record_keys import exit_records
from adaptive.training.trainer import Callback, Trainer

GIB = 2**30


class TrainingRecords(Callback):
    """Publishes what was counted since the last record; between records nothing waits for the device."""

    def __init__(self, every_steps: int, gradient_norms: bool):
        self.every_steps = every_steps
        self.gradient_norms = gradient_norms
        self._norms: dict[str, float] = {}
        self._steps = 0
        self._since = time.perf_counter()

    def on_start(self, trainer: Trainer) -> None:
        """Publish the network's costs, which accuracies are to be read against."""
        self._restart(trainer)
        if trainer.progress.step == 0:
            costs = {name: [getattr(cost, name) for cost in trainer.prepared.costs] for name in ("macs", "parameters")}
            trainer.publish(exit_records(costs, "model"))

    def on_gradients(self, trainer: Trainer) -> None:
        """Measure gradient norms where the coming step will be recorded."""
        if self.gradient_norms and (trainer.progress.step + 1) % self.every_steps == 0:
            self._norms = block_gradient_norms(trainer)

    def on_step(self, trainer: Trainer) -> None:
        """Publish at every n-th step."""
        self._steps += 1
        if trainer.progress.step % self.every_steps == 0:
            trainer.publish(self._values(trainer))
            self._restart(trainer)

    def on_epoch_end(self, trainer: Trainer) -> None:
        """Keep validation and saving out of the measured speed."""
        self._since += time.perf_counter() - trainer.step_ended

    def _values(self, trainer: Trainer) -> dict[str, Any]:
        values: dict[str, Any] = trainer.active.task.report()
        seconds = trainer.step_ended - self._since if self._steps else 0.0
        groups = trainer.active.optimizer.param_groups
        values |= self._norms
        values |= {
            "train/lr": max(group["lr"] for group in groups),
            "train/images_per_second": self._steps * trainer.batch.global_batch / max(seconds, 1e-9),
            "train/data_wait_share": min(1.0, trainer.data_seconds / max(seconds, 1e-9)),
            "train/memory_gib": memory_gib(trainer.device),
            "train/skipped_steps": trainer.progress.skipped,
        }
        if trainer.config.data.max_bad:
            values["train/bad_samples"] = trainer.supervisor.bad_of_all
        if trainer.active.spikes is not None:
            values["train/loss_spikes"] = trainer.active.spikes.count
        return values

    def _restart(self, trainer: Trainer) -> None:
        if trainer.started:
            trainer.active.task.reset()
        trainer.data_seconds = 0.0
        self._steps = 0
        self._norms = {}
        self._since = time.perf_counter()


def block_gradient_norms(trainer: Trainer) -> dict[str, float]:
    """Return the norm of every block's and exit's averaged gradient, as the optimizer will see it (collective)."""
    network, engine = trainer.active.network, trainer.active.engine
    norms = {}
    for kind, parts in (("block", network.blocks), ("exit", network.exits)):
        for i, part in enumerate(parts, start=1):
            gradients = [g for g in map(engine.full_gradient, part.parameters()) if g is not None]
            if gradients:
                norms[f"train/gradient_norm/{kind}_{i}"] = torch.nn.utils.get_total_norm(gradients).item()
    return norms


def memory_gib(device: torch.device) -> float:
    """Return the peak of this rank's device memory, on a CPU its resident memory, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return psutil.Process().memory_info().rss / GIB
