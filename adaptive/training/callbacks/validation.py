"""Validation of every exit after an epoch, and of the moving average where there is one."""

from __future__ import annotations

from adaptive.config.sections import EvaluateConfig
from adaptive.metrics import Measurement
from adaptive.tracking.record_keys import exit_records
from adaptive.training.trainer import Callback, Trainer


class Validation(Callback):
    """Measures the validation split; what picks the best checkpoint comes from it, never from the test set."""

    def __init__(self, config: EvaluateConfig):
        self.config = config
        self.validated_step = -1

    def on_epoch_end(self, trainer: Trainer) -> None:
        """Validate after every n-th epoch, and after the last."""
        due = trainer.epoch % self.config.every_epochs == 0 or trainer.at_end
        if not due or self.validated_step == trainer.progress.step:
            return
        self.validated_step = trainer.progress.step
        values: dict[str, float] = {}
        score = None
        for kind, measurement in trainer.validate().items():
            values |= _records(measurement, kind)
            # The moving average comes last: where there is one, it is what gets deployed.
            score = measurement.top1[-1]
            if self.config.best == "mean":
                score = sum(measurement.top1) / len(measurement.top1)
        trainer.score = score
        trainer.publish(values)


def _records(measurement: Measurement, prefix: str) -> dict[str, float]:
    values: dict[str, float] = {f"{prefix}/loss": sum(measurement.loss), f"{prefix}/images": measurement.samples}
    names = ("loss", "top1", "top5", "agreement")
    return values | exit_records({name: getattr(measurement, name) for name in names}, prefix)
