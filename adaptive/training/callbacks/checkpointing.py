"""When a run saves a checkpoint: every n epochs, every n steps, when validation is best, and at the end."""

from __future__ import annotations

from contextlib import suppress

from adaptive.config.sections import CheckpointConfig
from adaptive.errors import MachineError
from adaptive.training.trainer import Callback, Trainer


class Checkpointing(Callback):
    """Decides when a checkpoint is due, and has `Trainer.save` take it."""

    def __init__(self, config: CheckpointConfig):
        self.config = config
        self.saved: tuple[int, bool] = (-1, False)  # the step saved last, and whether its epoch's end was pending then
        self.best: tuple[int, float] | None = None  # phase and score: a later phase starts a new comparison

    def on_start(self, trainer: Trainer) -> None:
        """Learn what the run's earlier checkpoints reached; what lies beyond the step it goes on from is damaged."""
        saved = [c for c in trainer.store.all() if c.step <= trainer.progress.step]
        self.best = max(((c.phase, c.score) for c in saved if c.score is not None), default=None)
        self.saved = (trainer.progress.step, trainer.epoch_end_pending) if trainer.resumed else (-1, False)

    def on_step(self, trainer: Trainer) -> None:
        """Save every n-th step; one that ends an epoch is saved after validation. Look at the save under way."""
        trainer.saver.poll()
        if self._due_by_steps(trainer) and not trainer.at_epoch_end:
            self._save(trainer)

    def on_epoch_end(self, trainer: Trainer) -> None:
        """Save every n-th epoch, at the end, whenever validation was never better, and what fell due with this step."""
        reached = _reached(trainer)
        better = reached is not None and (self.best is None or reached > self.best)
        by_epochs = trainer.epoch % self.config.every_epochs == 0
        if better or trainer.at_end or by_epochs or self._due_by_steps(trainer):
            self._save(trainer)
        if trainer.at_end:
            trainer.finish_saving()

    def on_stop(self, trainer: Trainer) -> None:
        """Save before the run ends early (raises MachineError, on all ranks, where that fails)."""
        with suppress(MachineError):  # which the first rank alone knows; all hear of it below
            self._save(trainer, epoch_end_pending=trainer.at_epoch_end)
        trainer.finish_saving()

    def _due_by_steps(self, trainer: Trainer) -> bool:
        every = self.config.every_steps
        return bool(every) and trainer.progress.step % every == 0

    def _save(self, trainer: Trainer, epoch_end_pending: bool = False) -> None:
        if self.saved in ((trainer.progress.step, False), (trainer.progress.step, epoch_end_pending)):
            return
        self.saved = (trainer.progress.step, epoch_end_pending)
        reached = _reached(trainer)
        if reached is not None:
            self.best = max(reached, self.best or reached)
        trainer.save(epoch_end_pending)
        trainer.score = None  # it speaks of this step's weights only


def _reached(trainer: Trainer) -> tuple[int, float] | None:
    return None if trainer.score is None else (trainer.progress.phase, trainer.score)
