"""RANet: resolution adaptive networks (Yang et al., CVPR 2020, arXiv 2003.07326), registered with timm."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from torch import Tensor, nn

from adaptive.errors import ModelError
from adaptive.networks.multiscale.layers import CIFAR_HEAD_WIDTH, MultiExitBackbone, Stem, check_factors, check_integers
from adaptive.networks.multiscale.ranet_layers import DenseBlock, FusionLayer, PlainLayer


@dataclass(frozen=True)
class Layout:
    """Layout of the state behind a block: the tensors that it holds besides the exit's feature.

    Attributes:
        bases: number of stem features, for the sub-networks to come.
        low: per block of the sub-network before that is still to be read, the number of its features.
        own: per block of this sub-network so far, the number of features that the next one will read.
    """

    bases: int
    low: tuple[int, ...]
    own: tuple[int, ...]

    def unpack(self, state: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor], list[list[Tensor]], list[list[Tensor]]]:
        """Flat state -> feature, bases, low, own."""
        rest = iter(state)
        take = lambda count: list(itertools.islice(rest, count))  # noqa: E731
        return next(rest), take(self.bases), [take(n) for n in self.low], [take(n) for n in self.own]

    @property
    def size(self) -> int:
        """Number of tensors in the state."""
        return 1 + self.bases + sum(self.low) + sum(self.own)


class RABlock(nn.Module):
    """Everything between two exits: dense blocks of one sub-network, in front of them the stem in the first.

    Args:
        stem: images to one base feature per sub-network, highest resolution first; only in the first block.
        dense: the dense blocks.
        before: what comes in (None with a stem).
        new_flow: whether a sub-network begins here.
        keeps: whether a further sub-network will read this one's features.
    """

    def __init__(
        self, stem: Stem | None, dense: list[DenseBlock], before: Layout | None, new_flow: bool, keeps: bool
    ) -> None:
        super().__init__()
        self.stem = stem
        self.dense = nn.ModuleList(dense)
        self.before, self.new_flow, self.keeps = before, new_flow, keeps

    def forward(self, *state: Tensor) -> tuple[Tensor, ...]:
        """State in front of the block (the images, for the first one) -> state behind it."""
        low: list[list[Tensor]] = []
        own: list[list[Tensor]] = []
        if self.before is None:
            assert self.stem is not None
            bases = self.stem(state[0])[::-1]
            feature = bases.pop(0)
        else:
            feature, bases, low, own = self.before.unpack(state)
            if self.new_flow:
                feature, low, own = bases.pop(0), own, []
        for block in self.dense:
            feature, made = block(feature, low.pop(0) if block.fuses else None)
            if self.keeps:
                own.append(made)
        return (feature, *bases, *itertools.chain(*low), *itertools.chain(*own))

    def layout(self, bases: int) -> Layout:
        """What is behind this block, where ``bases`` base features are left."""
        low = () if self.before is None else self.before.own if self.new_flow else self.before.low
        own = () if self.before is None or self.new_flow else self.before.own
        blocks = [block for block in self.dense if isinstance(block, DenseBlock)]
        fused = sum(block.fuses for block in blocks)
        mine = tuple(len(block.layer_channels) for block in blocks) if self.keeps else ()
        return Layout(bases, low[fused:], own + mine)


class RANet(MultiExitBackbone):
    """RANet's deepest path as a timm model; `adaptive.create_model` adds the other exits.

    A sub-network per scale, from the lowest resolution up. The first has ``blocks`` dense blocks with an exit each;
    every further one ``block_step`` more, of which the first ones fuse the features of the sub-network before and the
    last ``block_step`` have the exits.

    Args:
        num_classes: of the classifier; 0 leaves the pooled feature.
        in_chans: channels of the images.
        stem: ``cifar`` or ``imagenet``.
        exits: number of exits, to check the others by; it follows from them.
        blocks: dense blocks of the first sub-network.
        block_step: further ones in each further sub-network.
        step: layers of a dense block.
        step_mode: ``even`` (step layers each) or ``lin_grow`` (step more in each further block).
        channels: of the highest resolution's base feature at growth factor 1.
        growth: new channels per layer at growth factor 1.
        scales: resolution of every sub-network, 1 the lowest.
        growth_factors: of the channels, per sub-network.
        bottleneck_factors: inner width of a unit over its output, per sub-network; by default the growth factors.
        compress: share of a fusion layer's new channels that come from the lower resolution.
        reduction: share of the channels that a transition keeps.
        head_channels: width of the classifiers' convolutions; by default 128 with the CIFAR stem, their input's with
            the ImageNet stem.
        init: ``he`` or ``torch``, as in MSDNet.

    Raises:
        ModelError: an argument out of range, named with its value.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        stem: str = "cifar",
        exits: int | None = None,
        blocks: int = 2,
        block_step: int = 2,
        step: int = 4,
        step_mode: str = "even",
        channels: int = 16,
        growth: int = 6,
        scales: tuple[int, ...] = (1, 2, 3),
        growth_factors: tuple[int, ...] = (4, 2, 1),
        bottleneck_factors: tuple[int, ...] | None = None,
        compress: float = 0.25,
        reduction: float = 0.5,
        head_channels: int | None = None,
        init: str = "he",
    ):
        super().__init__()
        check_integers(1, blocks=blocks, block_step=block_step, step=step, channels=channels, growth=growth)
        scales = check_factors("scales", scales)
        factors = check_factors("growth_factors", growth_factors, len(scales))
        inner = check_factors("bottleneck_factors", bottleneck_factors or factors, len(scales))
        _check(scales, step_mode, compress, reduction, growth * min(factors[1:], default=1))
        counts = [blocks + block_step * flow for flow in range(len(scales))]
        if exits not in (None, counts[-1]):
            raise ModelError(
                f"exits = {exits}: these blocks, block_step and scales make {counts[-1]} exits; leave exits out, or "
                "change them"
            )
        widths, strides = [channels * f for f in reversed(factors)], [1 + (b < a) for a, b in _pairs(scales[::-1])]
        grown: list[RABlock] = []
        sizes: list[int] = []
        widths_read: list[int] = []
        low: list[list[int]] = []
        layout: Layout | None = None
        for flow, count in enumerate(counts):
            plan = _FlowPlan(flow, counts, scales, growth * factors[flow], inner, compress, reduction)
            dense, low = plan.build(channels * factors[flow], _layers(counts[-1], step, step_mode), low)
            fusing = counts[flow - 1] if flow else 0
            for number in range(fusing, count):
                first = number == fusing
                parts = dense[: number + 1] if first else [dense[number]]
                stem_here = Stem(stem, in_chans, widths, strides) if flow == 0 and first else None
                block = RABlock(stem_here, parts, layout, first and flow > 0, flow < len(counts) - 1)
                layout = block.layout(len(counts) - 1 - flow)
                grown.append(block)
                widths_read.append(parts[-1].out_channels)
                sizes.append(layout.size)
        self.blocks = nn.ModuleList(grown)
        self._sizes = sizes
        default = CIFAR_HEAD_WIDTH if stem == "cifar" else None
        self._finish(widths_read, num_classes, head_channels or default, init)

    def batch_dims(self, i: int) -> tuple[tuple[int, int], ...]:
        """Where the batch is in the tensors behind block i: first in each."""
        return ((0, 1),) * self._sizes[i]


@dataclass(frozen=True)
class _FlowPlan:
    """How the dense blocks of one sub-network are built."""

    flow: int
    counts: list[int]
    scales: tuple[int, ...]
    growth: int
    inner: tuple[int, ...]
    compress: float
    reduction: float

    def build(self, channels: int, layers: list[int], low: list[list[int]]) -> tuple[list[DenseBlock], list[list[int]]]:
        """Dense blocks from an input of ``channels``; ``low`` are the layer channels of the sub-network before."""
        blocks: list[DenseBlock] = []
        for number in range(1, self.counts[self.flow] + 1):
            reduction = self.reduction if self._has_transition(number) else 0.0
            below = low[number - 1] if number <= len(low) else None
            block = self._block(channels, layers[number - 1], below, self._is_strided(number), reduction)
            channels = block.out_channels
            blocks.append(block)
        return blocks, [block.layer_channels for block in blocks]

    def _block(self, channels: int, count: int, low: list[int] | None, strided: bool, reduction: float) -> DenseBlock:
        widths = [channels + i * self.growth for i in range(count + 1)]
        own = self.inner[self.flow]
        if low is None:
            plain: list[nn.Module] = [PlainLayer(width, self.growth, own) for width in widths[:-1]]
            return DenseBlock(plain, widths, None, self.compress, reduction)
        fusing: list[nn.Module] = [
            FusionLayer(
                widths[i], low[i], self.growth, own, self.inner[self.flow - 1], self.compress,
                2 if strided and i == count - 1 else 1,
            )
            for i in range(count)
        ]  # fmt: skip
        return DenseBlock(fusing, widths, low[count], self.compress, reduction)

    def _has_transition(self, number: int) -> bool:
        scale = self.scales[self.flow]
        return number in {math.floor((i + 1) * self.counts[self.flow] / scale) for i in range(scale - 1)}

    def _is_strided(self, number: int) -> bool:
        """Fusion blocks at the ends of the sub-networks before halve the resolution, one per resolution below."""
        ends = [0, *self.counts][: self.flow + 1]
        return number in ends[-(self.scales[self.flow] - 1) :]


def _layers(blocks: int, step: int, step_mode: str) -> list[int]:
    return [step if step_mode == "even" else step * (i + 1) for i in range(blocks)]


def _pairs(values: tuple[int, ...]) -> list[tuple[int, int]]:
    return list(itertools.pairwise(values))


def _check(scales: tuple[int, ...], step_mode: str, compress: float, reduction: float, growth: int) -> None:
    if any(b < a for a, b in _pairs(scales)):
        raise ModelError(f"scales = {scales}: give the lowest resolution first")
    if step_mode not in ("even", "lin_grow"):
        raise ModelError(f"step_mode = {step_mode!r}: use 'even' or 'lin_grow'")
    if not 0 < reduction <= 1:
        raise ModelError(f"reduction = {reduction!r}: give the share of channels that transitions keep, above 0")
    if not 0 < compress < 1 or (len(scales) > 1 and math.floor(growth * compress) < 1):
        raise ModelError(
            f"compress = {compress!r}: give the share of new channels (of {growth}) from the lower resolution"
        )
