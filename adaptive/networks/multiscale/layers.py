"""Layers that MSDNet and RANet share: convolution units, the two stems, the classifier as an exit; their base class."""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.layers import ConvNormAct
from torch import Tensor, nn

from adaptive.errors import ModelError
from adaptive.networks.collaboration import CollaborationLink, init_as_concatenated
from adaptive.networks.exits import Exit

CIFAR_HEAD_WIDTH = 128  # of the classifiers' convolutions; with the ImageNet stem they are as wide as their input


class MultiExitBackbone(nn.Module):
    """Base of the networks that bring exits of their own: timm models whose early classifiers live outside of them.

    As a timm model it is its deepest path alone: the blocks and the last classifier (``head``). The adaptive network
    takes the same blocks, puts a classifier of the same kind behind each, and runs the state as its exits need it.

    Attributes:
        blocks: map the state at one exit to the state at the next; the exit's feature comes first in the state.
        head: the last block's classifier.
        exit_channels: channels of the feature that each exit reads.
    """

    blocks: nn.ModuleList
    head: ConvExit
    exit_channels: list[int]

    def _finish(self, channels: list[int], num_classes: int, head_channels: int | None, init: str) -> None:
        self.exit_channels, self.head_channels, self.init = channels, head_channels, init
        self.num_classes = num_classes
        self.head = self.new_exit(len(channels) - 1, num_classes)
        self.num_features = self.head_hidden_size = self.head.classifier.in_features
        if init == "he":
            self.blocks.apply(init_he)
        elif init != "torch":
            raise ModelError(f"init = {init!r}: use 'he' (the papers) or 'torch' (PyTorch's own)")

    def new_exit(self, i: int, num_classes: int, link: bool = False, dropout: float = 0.0) -> ConvExit:
        """A fresh classifier for exit i (from 0), initialised as the blocks are."""
        width = self.head_channels or self.exit_channels[i]
        exit_ = ConvExit(self.exit_channels[i], width, num_classes, link, dropout)
        if self.init == "he":
            exit_.tower.apply(init_he)
            nn.init.zeros_(exit_.classifier.bias)
        return exit_

    def batch_dims(self, i: int) -> tuple[tuple[int, int], ...]:
        """Where the batch is in the tensors behind block i: first in each."""
        raise NotImplementedError

    def forward_features(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) images -> the feature that the last classifier reads, (N, C, H', W')."""
        state: tuple[Tensor, ...] = (images,)
        for block in self.blocks:
            state = block(*state)
        return state[0]

    def forward_head(self, feature: Tensor, pre_logits: bool = False) -> Tensor:
        """The last feature -> pooled feature or logits (N, classes)."""
        pooled = self.head.pooled(feature)
        return pooled if pre_logits else self.head.classifier(self.head.drop(pooled))

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) images -> logits of the deepest classifier (N, classes)."""
        return self.forward_head(self.forward_features(images))

    def get_classifier(self) -> nn.Module:
        """The last linear layer (timm's interface)."""
        return self.head.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the last linear layer (timm's interface); 0 classes leave the pooled feature."""
        self.num_classes = num_classes
        self.head.classifier = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()  # type: ignore[assignment]

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for layer-wise learning rates (timm's interface): the blocks, and behind them the head."""
        return {"stem": r"^blocks\.0\.stem", "blocks": r"^blocks\.(\d+)"}


class ConvExit(Exit):
    """Two strided 3x3 convolutions, average pooling, linear (arXiv 1703.09844, section 4); plus a link.

    The pooling takes the whole map, which at the papers' sizes is their 2 x 2 window, so that any image size fits.

    Args:
        in_channels: of the feature.
        width: of the convolutions, the pooled feature and the link.
        num_classes: C.
        link: whether a previous exit feeds this one.
        dropout: in front of the linear layer.
    """

    def __init__(self, in_channels: int, width: int, num_classes: int, link: bool = False, dropout: float = 0.0):
        super().__init__()
        self.tower = nn.Sequential(conv(in_channels, width, 3, 2), conv(width, width, 3, 2))
        self.drop = nn.Dropout(dropout)
        self.classifier = nn.Linear(width, num_classes)
        self.link = None
        if link:
            self.add_link()

    def add_link(self, trained: bool = False) -> None:
        """Let a previous exit feed this one: the linear layer becomes one part of that on the concatenation.

        One that is trained stays as it is, and the link starts at zero, as on a timm model's own classifier.
        """
        width, classes = self.classifier.in_features, self.classifier.out_features
        self.link = CollaborationLink(classes, width, start_at_zero=trained)
        if trained:
            return
        init_as_concatenated(self.classifier, 2 * width)
        nn.init.zeros_(self.classifier.bias)

    def pooled(self, feature: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, width)."""
        return self.tower(feature).mean((2, 3))

    def own_logits(self, feature: Tensor, *others: Tensor) -> Tensor:
        """The exit's feature (N, C, H, W) -> (N, classes)."""
        return self.classifier(self.drop(self.pooled(feature)))

    def own_classifiers(self) -> list[nn.Module]:
        """The linear layer."""
        return [self.classifier]


class BottleneckUnit(nn.Sequential):
    """A 1x1 convolution to the inner width and a 3x3 convolution, with BatchNorm and ReLU each.

    Without ``factor`` it is the 3x3 convolution alone.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        factor: inner width = min(in_channels, factor * out_channels); None for no bottleneck.
        stride: of the 3x3 convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, factor: int | None, stride: int = 1):
        inner = in_channels if factor is None else min(in_channels, factor * out_channels)
        layers = [] if factor is None else [conv(in_channels, inner, 1)]
        super().__init__(*layers, conv(inner, out_channels, 3, stride))


class Stem(nn.Module):
    """Images -> one feature per scale, each made from the one before it.

    Args:
        kind: ``cifar`` (3x3 convolution) or ``imagenet`` (7x7 stride 2 and 3x3 max pooling stride 2).
        in_chans: channels of the images.
        widths: channels per scale, finest first.
        strides: of the scales after the first.
    """

    def __init__(self, kind: str, in_chans: int, widths: list[int], strides: list[int]):
        super().__init__()
        if kind == "imagenet":
            first: nn.Module = nn.Sequential(
                conv(in_chans, widths[0], 7, 2, bias=True), nn.MaxPool2d(3, stride=2, padding=1)
            )
        elif kind == "cifar":
            first = conv(in_chans, widths[0], 3)
        else:
            raise ModelError(f"stem = {kind!r}: use 'cifar' (3x3 convolution) or 'imagenet' (7x7 stride 2, pooling)")
        rest = [conv(widths[i], widths[i + 1], 3, stride) for i, stride in enumerate(strides)]
        self.scales = nn.ModuleList([first, *rest])

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N, 3, H, W) -> features (N, C_s, H_s, W_s), finest scale first."""
        features, feature = [], images
        for scale in self.scales:
            feature = scale(feature)
            features.append(feature)
        return features


def conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1, bias: bool = False) -> ConvNormAct:
    """Convolution, BatchNorm, ReLU."""
    return ConvNormAct(
        in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=bias, act_kwargs={"inplace": True}
    )


@torch.no_grad()
def init_he(module: nn.Module) -> None:
    """Normal weights of variance 2 / (kernel area * output channels), as MSDNet's and RANet's authors intend."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0, math.sqrt(2 / (math.prod(module.kernel_size) * module.out_channels)))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def check_integers(minimum: int, **values: Any) -> None:
    """Refuse what is no whole number or too small (raises ModelError naming the argument)."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise ModelError(f"{name} = {value!r}: give a whole number of at least {minimum}")


def check_factors(name: str, values: Any, length: int | None = None) -> tuple[int, ...]:
    """Return factors as a tuple of whole numbers from 1 (raises ModelError naming the argument)."""
    sound = isinstance(values, list | tuple) and values and all(type(v) is int and v >= 1 for v in values)
    if not sound or (length is not None and len(values) != length):
        many = "" if length is None else f"{length} "
        raise ModelError(f"{name} = {values!r}: give {many}whole numbers from 1, one per scale")
    return tuple(values)
