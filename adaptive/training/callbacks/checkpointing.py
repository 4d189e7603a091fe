"""Saving: every n epochs, every n steps, when validation is best, and at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptive.config import CheckpointConfig
from adaptive.training.callbacks.base import Callback

if TYPE_CHECKING:
    from adaptive.training.trainer import Trainer


class Checkpointing(Callback):
    """Decides when a checkpoint is due; `Trainer.save` writes it."""

    def __init__(self, config: CheckpointConfig):
        self.config = config
        self.saved_step = -1
        self.best: tuple[int, float] | None = None  # phase and score: a later phase starts a new comparison

    def on_start(self, trainer: Trainer) -> None:
        """Learn what the run's earlier checkpoints reached."""
        scores = [(c.phase, c.score) for c in trainer.store.all() if c.score is not None]
        self.best = max(scores) if scores else None
        self.saved_step = trainer.progress.step if trainer.resumed else -1

    def on_step(self, trainer: Trainer) -> None:
        """Save every n-th step, unless the epoch ends here and saves anyway."""
        every = self.config.every_steps
        if every and trainer.progress.step % every == 0 and not trainer.at_epoch_end:
            self._save(trainer)

    def on_epoch_end(self, trainer: Trainer) -> None:
        """Save every n-th epoch, at the end, and whenever validation was never better."""
        reached = self._reached(trainer)
        better = reached is not None and (self.best is None or reached > self.best)
        if better or trainer.at_end or trainer.epoch % self.config.every_epochs == 0:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if self.saved_step == trainer.progress.step:
            return
        self.saved_step = trainer.progress.step
        reached = self._reached(trainer)
        if reached is not None:
            self.best = max(reached, self.best or reached)
        trainer.save()
        trainer.score = None  # it speaks of this step's weights only

    @staticmethod
    def _reached(trainer: Trainer) -> tuple[int, float] | None:
        return None if trainer.score is None else (trainer.progress.phase, trainer.score)
