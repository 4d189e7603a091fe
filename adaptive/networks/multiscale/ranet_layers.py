"""The dense blocks of RANet's sub-networks (Yang et al., CVPR 2020, arXiv 2003.07326)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive.networks.multiscale.layers import BottleneckUnit, conv


class PlainLayer(nn.Module):
    """A dense layer of the first sub-network, or behind the fusions of a later one."""

    def __init__(self, channels: int, growth: int, factor: int):
        super().__init__()
        self.same = BottleneckUnit(channels, growth, factor)

    def forward(self, feature: Tensor, low: Tensor | None = None) -> Tensor:
        """(N, C, H, W) -> (N, C + growth, H, W)."""
        return torch.cat([feature, self.same(feature)], 1)


class FusionLayer(nn.Module):
    """A dense layer that also reads a feature of the sub-network before, at lower resolution.

    Args:
        channels: of the feature.
        low_channels: of the lower resolution's feature.
        growth: new channels, the share ``compress`` of them from the lower resolution.
        factor: bottleneck factor of this sub-network.
        low_factor: of the one before.
        compress: share, see growth.
        stride: 2 where the resolution is halved.
    """

    def __init__(
        self, channels: int, low_channels: int, growth: int, factor: int, low_factor: int, compress: float, stride: int
    ):
        super().__init__()
        from_low = math.floor(growth * compress)
        self.up = BottleneckUnit(low_channels, from_low, low_factor)
        self.same = BottleneckUnit(channels, growth - from_low, factor, stride)

    def forward(self, feature: Tensor, low: Tensor) -> Tensor:
        """(N, C, H, W) and the lower resolution's (N, C', h, w) -> (N, C + growth, H / stride, W / stride)."""
        new = self.same(feature)
        return torch.cat([_resized(feature, new), _resized(self.up(low), new), new], 1)


class DenseBlock(nn.Module):
    """Layers, for a fusion block one more look at the lower resolution, and maybe a transition.

    Args:
        layers: dense layers.
        widths: channels of the input and of every layer's output.
        low_channels: of the lower resolution's last feature; None for a block that does not fuse.
        compress: share of the width that is added from there.
        reduction: share of the channels that the transition keeps; 0 for none.

    Attributes:
        fuses: whether it reads the features of the sub-network before.
        out_channels: of its output.
        layer_channels: of its input and every layer's output, which the next sub-network reads.
    """

    def __init__(
        self, layers: list[nn.Module], widths: list[int], low_channels: int | None, compress: float, reduction: float
    ):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.layer_channels = widths
        self.fuses = low_channels is not None
        extra = math.floor(widths[-1] * compress) if low_channels is not None else 0
        self.last = None if low_channels is None else conv(low_channels, extra, 1)
        width = widths[-1] + extra
        self.out_channels = math.floor(reduction * width) if reduction else width
        self.transition = conv(width, self.out_channels, 1) if reduction else None

    def forward(self, feature: Tensor, low: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """Feature and, for a fusion block, the lower resolution's -> output, and the features of its layers."""
        made = [feature]
        for i, layer in enumerate(self.layers):
            made.append(layer(made[-1], low[i] if low is not None else None))
        feature = made[-1]
        if self.last is not None and low is not None:
            feature = torch.cat([feature, _resized(self.last(low[len(self.layers)]), feature)], 1)
        return (feature if self.transition is None else self.transition(feature)), made


def _resized(feature: Tensor, like: Tensor) -> Tensor:
    if feature.shape[-2:] == like.shape[-2:]:
        return feature
    return F.interpolate(feature, size=like.shape[-2:], mode="bilinear", align_corners=True)
