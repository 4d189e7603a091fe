"""Accelerated stages: groups of images are padded to one of a few batch sizes, for which a stage was prepared once."""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from adaptive.errors import ConfigError, ModelError, reason_of
from adaptive.inference.acceleration.compilation import Compilation
from adaptive.inference.acceleration.cuda_graphs import CudaCapture, Function, Graphs
from adaptive.inference.stages import Carried, Outcome, Stage, Structure
from adaptive.networks.precision import autocast
from adaptive.networks.state import State

Acceleration = Literal["compile", "cuda_graphs", "compile_cuda_graphs"]
ACCELERATIONS: tuple[Acceleration, ...] = get_args(Acceleration)
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_NOTHING = Structure((), partial=False, previous=False, memory=False)  # what is carried behind the last stage
Prepare = Callable[[Function, Sequence[Tensor]], Function]


class WarmUp(NamedTuple):
    """How many functions, one per stage and batch size, were prepared, and the seconds that it took."""

    prepared: int
    seconds: float


def preparation(accelerate: str, device: torch.device) -> Prepare:
    """What turns a function of tensors into a faster one.

    Raises:
        ConfigError: there is no such acceleration.
        MachineError: the device cannot do it.
    """
    if accelerate == "compile":
        return Compilation()
    if accelerate == "cuda_graphs":
        return Graphs(CudaCapture(device))
    if accelerate == "compile_cuda_graphs":
        return Graphs(CudaCapture(device), Compilation())
    raise ConfigError(f"accelerate = {accelerate!r}: use one of {', '.join(map(repr, ACCELERATIONS))}, or None")


class AcceleratedStages:
    """Runs the stages of a dynamic runner, each one prepared once for every batch size of a bounded set.

    A group of images is padded up to the next size with copies of its last image, and the copies' outputs are dropped.
    In eval mode images do not influence each other, so the padding changes nothing but which kernels are chosen. A
    group above the largest size is run in pieces. What the set holds is prepared when it is first needed, or in
    advance by `warm_up`.

    Args:
        stages: of one runner, in order.
        precision: see `autocast`.
        sizes: the batch sizes.
        prepare: turns a function into a faster one for inputs of given shapes.

    Raises:
        ConfigError: no batch sizes, or one below 1.
    """

    def __init__(self, stages: list[Stage], precision: str, sizes: Sequence[int], prepare: Prepare) -> None:
        self._stages, self._precision, self._prepare = stages, precision, prepare
        self.sizes = sorted(set(sizes))
        if not self.sizes or self.sizes[0] < 1:
            raise ConfigError(f"batch_sizes = {tuple(sizes)}: give at least one size, of 1 or more")
        self._prepared: dict[tuple[int, int], Function] = {}
        self._behind: dict[int, Structure] = {}

    @property
    def prepared(self) -> int:
        """How many functions have been prepared so far."""
        return len(self._prepared)

    def size(self, count: int) -> int:
        """The batch size that so many images run at; the largest one if they are too many for any."""
        return self.sizes[min(bisect.bisect_left(self.sizes, count), len(self.sizes) - 1)]

    def padded(self, indices: Tensor) -> Tensor:
        """Numbers of images (n,) -> (size,), the last one repeated: what `Carried.select` takes."""
        count = len(indices)
        rows = self.size(count)
        return indices if count >= rows else torch.cat([indices, indices[-1:].expand(rows - count)])

    def __call__(self, number: int, carried: Carried, rows: int, count: int) -> Outcome:
        """Run a stage.

        Args:
            number: of the stage, from 0.
            carried: what the images bring.
            rows: how many images that is of; those from ``count`` on are padding.
            count: at least 1.

        Returns:
            For as many images as the size, or ``count`` where it was run in pieces. All tensors may be overwritten by
            the next call of this stage.
        """
        size = self.size(count)
        images = torch.arange(count, device=carried.state[0].device)
        if count <= size:
            if rows != size:
                carried = carried.select(self.padded(images), rows)
            return self._run(number, carried, size)
        parts = []
        for piece in images.split(size):
            found = self._run(number, carried.select(self.padded(piece), rows), self.size(len(piece)))
            parts.append(found.copy(images[: len(piece)], self.size(len(piece))))  # the next piece overwrites it
        return Outcome(
            Carried.join([part.carried for part in parts]),
            torch.cat([part.probabilities for part in parts]),
            torch.cat([part.leaves for part in parts]),
        )

    def warm_up(self, images: Callable[[int], State]) -> WarmUp:
        """Prepare every stage for every size.

        Args:
            images: gives the state in front of the first block for so many images.
        """
        before, start = self.prepared, time.perf_counter()
        for size in reversed(self.sizes):  # the largest first: later ones fit into its memory
            carried = Carried(images(size))
            for number in range(len(self._stages)):
                found = self(number, carried, size, size)
                carried = found.carried
        bool(found.leaves.all())  # waits for the device
        return WarmUp(self.prepared - before, time.perf_counter() - start)

    def _run(self, number: int, carried: Carried, size: int) -> Outcome:
        inputs = carried.flat()
        if (number, size) not in self._prepared:
            self._prepared[number, size] = self._made(number, size, carried, inputs)
        *tensors, probabilities, leaves = self._prepared[number, size](*inputs)
        return Outcome(self._behind[number].build(tensors), probabilities, leaves)

    def _made(self, number: int, size: int, carried: Carried, inputs: Sequence[Tensor]) -> Function:
        stage = self._stages[number]
        device = inputs[0].device
        if number not in self._behind:  # one image, as it is: what comes out, and what policies compute once
            with autocast(self._precision, device, cache=False):
                found = stage(carried.select(torch.zeros(1, dtype=torch.long, device=device), size))
            self._behind[number] = _NOTHING if stage.is_last else found.carried.structure
        try:
            return self._prepare(_function(stage, carried.structure, self._precision, device), inputs)
        except RuntimeError as error:
            blocks = f"blocks {stage.blocks[0] + 1} to {stage.blocks[-1] + 1}"
            reason = reason_of(error)
            raise ModelError(
                f"accelerate: {blocks} at batch size {size} cannot be prepared ({reason}); use accelerate=None"
            ) from error


def _function(stage: Stage, structure: Structure, precision: str, device: torch.device) -> Function:
    """A stage as a function of tensors: `Carried.flat` -> that of the next stage, probabilities, who leaves."""

    def stage_of_tensors(*tensors: Tensor) -> tuple[Tensor, ...]:
        # Cached casts of weights would be memory that a graph does not own.
        with autocast(precision, device, cache=False):
            outcome = stage(structure.build(tensors))
        onward = () if stage.is_last else outcome.carried.flat()
        return (*onward, outcome.probabilities, outcome.leaves)

    return stage_of_tensors
