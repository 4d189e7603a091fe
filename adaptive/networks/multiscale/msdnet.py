"""MSDNet: multi-scale dense networks (Huang et al., ICLR 2018, arXiv 1703.09844), registered with timm."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from timm.layers import ConvNormAct
from torch import Tensor, nn

from adaptive.errors import ModelError
from adaptive.networks.multiscale.layers import (
    CIFAR_HEAD_WIDTH,
    BottleneckUnit,
    MultiExitBackbone,
    Stem,
    check_factors,
    check_integers,
    conv,
)
from adaptive.networks.multiscale.lazy_evaluation import LazyBlock, LazyPlan, Stage


class DenseUnit(nn.Module):
    """One scale of a layer: the scale's features so far, joined by new ones.

    The finest kept scale without a finer input gets all its new features from its own scale; the others half from the
    finer scale (strided) and half from their own.

    Args:
        finer: channels of the finer scale's input, or None.
        same: channels of the scale's own input.
        out: new channels.
        finer_factor: bottleneck factor of the finer scale (None: no bottlenecks).
        same_factor: bottleneck factor of this scale.
    """

    def __init__(self, finer: int | None, same: int, out: int, finer_factor: int | None, same_factor: int | None):
        super().__init__()
        self.down = None if finer is None else BottleneckUnit(finer, out // 2, finer_factor, stride=2)
        self.same = BottleneckUnit(same, out if finer is None else out // 2, same_factor)

    def forward(self, same: Tensor, finer: Tensor | None) -> Tensor:
        """(N, C, H, W) of this scale, (N, C', 2H, 2W) of the finer one or None -> (N, C + out, H, W)."""
        parts = [same, self.same(same)] if self.down is None else [same, self.down(finer), self.same(same)]
        return torch.cat(parts, 1)


class Layer(nn.Module):
    """A layer of the network: one dense unit for each scale that is kept.

    Args:
        scales: numbers of the scales that it gives (0 is the finest of the network).
        units: what makes them.
    """

    def __init__(self, scales: list[int], units: list[DenseUnit]):
        super().__init__()
        self.scales, self.units = scales, nn.ModuleList(units)

    def reads(self, scale: int) -> list[int]:
        """Scales of the stage before that this scale is made from."""
        unit = self.units[scale - self.scales[0]]
        return [scale] if unit.down is None else [scale - 1, scale]

    def make(self, scale: int, before: dict[int, Tensor]) -> Tensor:
        """Compute one scale from the scales before."""
        return self.units[scale - self.scales[0]](before[scale], before.get(scale - 1))


class Transition(nn.Module):
    """Narrows every kept scale by a 1x1 convolution, and drops the others."""

    def __init__(self, scales: list[int], units: list[ConvNormAct]):
        super().__init__()
        self.scales, self.units = scales, nn.ModuleList(units)

    def reads(self, scale: int) -> list[int]:
        """Scales of the stage before that this scale is made from."""
        return [scale]

    def make(self, scale: int, before: dict[int, Tensor]) -> Tensor:
        """Compute one scale from the scales before."""
        return self.units[scale - self.scales[0]](before[scale])


class MSDBlock(LazyBlock):
    """Everything between two exits: the stem (first block only), layers and transitions.

    The state in front of it and behind it is one tensor per scale, coarsest first, for the coarsest is what exits read.
    """

    def __init__(self, stem: Stem | None, stages: list[Layer | Transition], scales: list[int]):
        super().__init__()
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.scales = scales  # that come in, finest first
        self.lazy = LazyPlan.of(stages)

    def forward(self, *state: Tensor) -> tuple[Tensor, ...]:
        """State in front of the block (the images, for the first one) -> state behind it."""
        scales = self._incoming(state)
        for stage in self._stages():
            scales = {scale: stage.make(scale, scales) for scale in stage.scales}
        return tuple(scales[scale] for scale in sorted(scales, reverse=True))

    def to_exit(self, *state: Tensor) -> tuple[Tensor, ...]:
        """Compute what this block's exit needs; returns its feature and what ``complete`` will need."""
        return self.lazy.to_exit(self._stages(), self._incoming(state))

    def complete(self, *partial: Tensor) -> tuple[Tensor, ...]:
        """What ``to_exit`` returned -> the state that ``forward`` gives."""
        return self.lazy.complete(self._stages(), partial)

    def _stages(self) -> list[Stage]:
        return cast("list[Stage]", list(self.stages))

    def _incoming(self, state: tuple[Tensor, ...]) -> dict[int, Tensor]:
        if self.stem is not None:
            return dict(enumerate(self.stem(state[0])))
        return dict(zip(self.scales, reversed(state), strict=True))


class MSDNet(MultiExitBackbone):
    """MSDNet's deepest path as a timm model; `adaptive.create_model` adds the other exits.

    Args:
        num_classes: of the classifier; 0 leaves the pooled feature.
        in_chans: channels of the images.
        stem: ``cifar`` or ``imagenet``.
        exits: number of blocks, each of which ends at an exit.
        base: layers of the first block.
        step: layers of each further block, or what their number grows by.
        step_mode: ``even`` (step layers each) or ``lin_grow`` (block i has step * (i - 1) + 1).
        channels: of the first layer's input at growth factor 1.
        growth: new channels per layer at growth factor 1.
        growth_factors: of the channels, per scale, finest first; their number is the number of scales.
        bottleneck: whether a 1x1 convolution precedes each 3x3 convolution.
        bottleneck_factors: its width over the unit's output, per scale; by default the growth factors.
        reduction: share of the channels that a transition keeps; 0 for no transitions.
        prune: ``max`` drops the finest scale after every ceil(layers / scales) layers, with a transition each;
            ``min`` keeps every scale that a later layer needs, with transitions after a third and two thirds.
        head_channels: width of the classifiers' convolutions; by default 128 with the CIFAR stem, their input's with
            the ImageNet stem.
        init: ``he`` for normal weights scaled by fan-out, as the paper's code in Lua; ``torch`` for PyTorch's own
            initialisation (what the released PyTorch code amounts to: its init never reaches the convolutions).

    Raises:
        ModelError: an argument out of range, named with its value.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        stem: str = "cifar",
        exits: int = 7,
        base: int = 4,
        step: int = 2,
        step_mode: str = "even",
        channels: int = 16,
        growth: int = 6,
        growth_factors: tuple[int, ...] = (1, 2, 4),
        bottleneck: bool = True,
        bottleneck_factors: tuple[int, ...] | None = None,
        reduction: float = 0.5,
        prune: str = "max",
        head_channels: int | None = None,
        init: str = "he",
    ):
        super().__init__()
        check_integers(1, exits=exits, base=base, step=step, channels=channels, growth=growth, in_chans=in_chans)
        factors = check_factors("growth_factors", growth_factors)
        inner: tuple[int | None, ...] = (None,) * len(factors)
        if bottleneck:
            inner = check_factors("bottleneck_factors", bottleneck_factors or factors, len(factors))
        if not 0 <= reduction <= 1:
            raise ModelError(f"reduction = {reduction!r}: give the share of channels that transitions keep, 0 to 1")
        if odd := [factor for factor in factors[1:] if growth * factor % 2]:
            raise ModelError(
                f"growth = {growth} with growth_factors {factors}: coarser scales get half of their new channels from "
                f"each of two sides, so {growth} * {odd[0]} must be even; change one of them"
            )
        layers = layers_per_block(exits, base, step, step_mode)
        kept = scales_per_layer(sum(layers), len(factors), prune)
        widths = [channels * factor for factor in factors]
        blocks, coarsest, done = [], [], 0
        before = list(range(len(factors)))
        for number, count in enumerate(layers):
            first = Stem(stem, in_chans, widths, [2] * (len(factors) - 1)) if number == 0 else None
            stages: list[Layer | Transition] = []
            incoming = before
            for layer in range(done + 1, done + count + 1):
                scales = list(range(len(factors) - kept[layer - 1], len(factors)))
                stages.append(_layer(before, scales, channels, growth, factors, inner))
                channels += growth
                if _has_transition(layer, sum(layers), before, scales, prune) and reduction > 0:
                    narrower = math.floor(reduction * channels)
                    check_integers(1, channels_after_transition=narrower)
                    units = [conv(channels * factors[s], narrower * factors[s], 1) for s in scales]
                    stages.append(Transition(scales, units))
                    channels = narrower
                before = scales
            done += count
            blocks.append(MSDBlock(first, stages, incoming))
            coarsest.append(channels * factors[-1])
        self.blocks = nn.ModuleList(blocks)
        default = CIFAR_HEAD_WIDTH if stem == "cifar" else None
        self._finish(coarsest, num_classes, head_channels or default, init)

    def batch_dims(self, i: int) -> tuple[tuple[int, int], ...]:
        """Where the batch is in the tensors behind block i: first in each."""
        block: Any = self.blocks[i]
        return ((0, 1),) * len(block.lazy.outgoing)


def layers_per_block(exits: int, base: int, step: int, step_mode: str) -> list[int]:
    """Number of layers of every block."""
    if step_mode not in ("even", "lin_grow"):
        raise ModelError(f"step_mode = {step_mode!r}: use 'even' or 'lin_grow'")
    return [base] + [step if step_mode == "even" else step * i + 1 for i in range(1, exits)]


def scales_per_layer(layers: int, scales: int, prune: str) -> list[int]:
    """Number of scales that every layer of the network gives, from the first."""
    if prune == "min":
        return [min(scales, layers - layer + 1) for layer in range(1, layers + 1)]
    if prune == "max":
        interval = math.ceil(layers / scales)
        return [scales - (layer - 1) // interval for layer in range(1, layers + 1)]
    raise ModelError(f"prune = {prune!r}: use 'max' or 'min'")


def _has_transition(layer: int, layers: int, before: list[int], scales: list[int], prune: str) -> bool:
    if prune == "max":
        return len(scales) < len(before)
    return layer in (math.floor(layers / 3), math.floor(2 * layers / 3))


def _layer(
    before: list[int],
    scales: list[int],
    channels: int,
    growth: int,
    factors: tuple[int, ...],
    inner: tuple[int | None, ...],
) -> Layer:
    units = []
    for scale in scales:
        finer = scale - 1 if scale - 1 in before else None
        units.append(
            DenseUnit(
                None if finer is None else channels * factors[finer],
                channels * factors[scale],
                growth * factors[scale],
                None if finer is None else inner[finer],
                inner[scale],
            )
        )
    return Layer(scales, units)
