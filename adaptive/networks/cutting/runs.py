"""The forward passes that are recorded: of an outline on the meta device, or for real.

A recording holds shapes, constants, and which operation reads what. None of that depends on weights or pixels, so an
outline, which has no numbers, gives the same recording without memory for weights and without arithmetic. Real passes
are for models whose code asks for values, and for small ones, where they are quicker.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from adaptive.networks.cutting.recording import Constant, Recording, leaves, record
from adaptive.networks.fake_copy import cheap_to_run, is_outline, is_recurrent, outline

Found = TypeVar("Found")


class NeedsNumbersError(Exception):
    """A pass of an outline failed: the model's code asks for values, or the images do not suit it."""


class Runs(ABC):
    """Records passes of a model.

    Args:
        model: is put into eval mode, and otherwise left as it is.
        size: side of the square images in pixels.
        channels: of the images.
    """

    def __init__(self, model: nn.Module, size: int, channels: int) -> None:
        self.model, self.size, self.channels = model.eval(), size, channels

    @abstractmethod
    def survey(self) -> Recording:
        """Record everything that the model does in eval mode with two images, and count its multiply-adds."""

    @abstractmethod
    def evaluating(self, batch: int, opened: set[str]) -> Recording:
        """Record a pass in eval mode; see `adaptive.networks.cutting.recording.record`."""

    @abstractmethod
    def training(self, batch: int, opened: set[str]) -> Recording:
        """Record a pass in training mode and double precision.

        Code that fixes a precision somewhere runs in its own: then at least the mode is told apart.
        """


class OutlineRuns(Runs):
    """Passes without numbers, each of a new copy: nothing that one of them leaves behind is seen by the next.

    Whatever goes wrong is a NeedsNumbersError.
    """

    def survey(self) -> Recording:
        """See `Runs.survey`."""
        return self._record(2, None)

    def evaluating(self, batch: int, opened: set[str]) -> Recording:
        """See `Runs.evaluating`."""
        return self._record(batch, opened)

    def training(self, batch: int, opened: set[str]) -> Recording:
        """See `Runs.training`."""
        try:
            return self._record(batch, opened, torch.float64, training=True)
        except NeedsNumbersError:
            return self._record(batch, opened, training=True)

    def _record(
        self, batch: int, opened: set[str] | None, dtype: torch.dtype | None = None, training: bool = False
    ) -> Recording:
        if is_recurrent(self.model):
            raise NeedsNumbersError("its recurrent layers are counted for real alone")
        model = outline(self.model, dtype).train(training)
        try:
            with torch.device("meta"):
                images = torch.empty(batch, self.channels, self.size, self.size, dtype=_dtype(model))
                recording = record(model, images, opened, count=opened is None)
        except Exception as error:  # torch's refusal to read what is not there, and whatever a model says of its images
            raise NeedsNumbersError(str(error)) from error
        for op in recording.ops if opened is not None else ():
            if any(isinstance(leaf, Constant) and leaf.tensor.is_meta for leaf in leaves((op.args, op.kwargs))):
                raise NeedsNumbersError(f"{op.owner or 'the top level'} reads a tensor that was made elsewhere")
        return recording


class RealRuns(Runs):
    """Passes of the model itself, which is on the CPU, on random images."""

    def survey(self) -> Recording:
        """See `Runs.survey`."""
        return record(self.model, self._images(2))

    def evaluating(self, batch: int, opened: set[str]) -> Recording:
        """See `Runs.evaluating`."""
        return record(self.model, self._images(batch), opened, count=False)

    def training(self, batch: int, opened: set[str]) -> Recording:
        """See `Runs.training`."""
        images = self._images(batch)
        try:
            return record(copy.deepcopy(self.model).double().train(), images.double(), opened, count=False)
        except RuntimeError:
            return record(copy.deepcopy(self.model).train(), images, opened, count=False)

    def _images(self, batch: int) -> Tensor:
        return sample_images(self.model, batch, self.size, self.channels)


def without_numbers_if_possible(task: Callable[[Runs], Found], model: nn.Module, size: int, channels: int) -> Found:
    """Do a task that records passes of a model: of an outline where that is quicker and possible, else for real.

    Raises:
        NeedsNumbersError: it is not possible, and the model itself is an outline.
    """
    if not cheap_to_run(model, size):
        try:
            return task(OutlineRuns(model, size, channels))
        except NeedsNumbersError:
            if is_outline(model):
                raise
    return task(RealRuns(model, size, channels))


def sample_images(model: nn.Module, batch: int, size: int, channels: int) -> Tensor:
    """Fixed random images, (N, C, H, W), on the CPU."""
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, channels, size, size, generator=generator).to(_dtype(model))


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
