"""The moments of a run at which an observer may act."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaptive.data.reading.stream import Batch
    from adaptive.training.trainer import Trainer

Values = Mapping[str, Any]


class Callback:
    """Base of all observers. On several ranks every rank calls every method, at the same steps."""

    def on_start(self, trainer: Trainer) -> None:
        """Act before the first step; the position of a resumed run is known."""

    def on_batch(self, trainer: Trainer, batch: Batch) -> None:
        """Act on every micro batch of this rank before it is trained on."""

    def on_gradients(self, trainer: Trainer) -> None:
        """Act when the gradients of a step are complete, before the update."""

    def on_step(self, trainer: Trainer) -> None:
        """Act after every step."""

    def on_epoch_end(self, trainer: Trainer) -> None:
        """Act after the last step of an epoch, and once more at the end of a run cut short inside one."""

    def on_stop(self, trainer: Trainer) -> None:
        """Act between two steps, or in a validation, when the run was asked to stop: it ends after this."""

    def on_values(self, trainer: Trainer, values: Values) -> None:
        """Take published values: record keys such as ``train/exit_1/top1``."""

    def on_message(self, trainer: Trainer, text: str) -> None:
        """Take a line for the reader."""

    def on_end(self, trainer: Trainer, error: BaseException | None) -> None:
        """Act when the run ends, by itself or by an error."""
