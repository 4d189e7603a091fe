"""Exits: the classifiers behind the blocks, for features of any layout, with the ISC link from the exit before."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from adaptive.networks.collaboration import CollaborationLink, init_as_concatenated

Layout = Literal["NCHW", "NHWC", "NLC", "NCL", "NC"]
CHANNEL_DIM: dict[Layout, int] = {"NCHW": 1, "NHWC": 3, "NLC": 2, "NCL": 1, "NC": 1}


@dataclass(frozen=True)
class Feature:
    """The tensor that an exit reads: layout, width (channels), and how many leading tokens are not patches."""

    layout: Layout
    width: int
    prefix_tokens: int = 0


def describe(shape: tuple[int, ...], model: nn.Module) -> Feature:
    """Find layout and width of a feature of a timm model.

    Feature maps of a square image are square, which settles NCHW against NHWC unless the width equals the side; then
    the channel counts that timm declares decide (feature_info, num_features), and last the model's output_fmt.

    Args:
        shape: the feature's shape, batch first, 2 to 4 dimensions.
        model: the timm model it comes from.
    """
    if len(shape) == 2:
        return Feature("NC", shape[1])
    known = _known_widths(model)
    if len(shape) == 3:
        if shape[1] in known and shape[2] not in known:
            return Feature("NCL", shape[1])
        return Feature("NLC", shape[2], _prefix_tokens(shape[1], model))
    _, a, b, c = shape
    if (a == b) != (b == c):
        layout: Layout = "NHWC" if a == b else "NCHW"
    elif (a in known) != (c in known):
        layout = "NCHW" if a in known else "NHWC"
    else:
        layout = "NHWC" if str(getattr(model, "output_fmt", "NCHW")).endswith("NHWC") else "NCHW"
    return Feature(layout, shape[CHANNEL_DIM[layout]])


def _known_widths(model: nn.Module) -> set[int]:
    info = getattr(model, "feature_info", None)
    entries = getattr(info, "info", info) or []
    found = [entry.get("num_chs") for entry in entries if isinstance(entry, dict)]
    for declared in (getattr(model, "num_features", None), getattr(model, "embed_dim", None)):
        found += declared if isinstance(declared, list | tuple) else [declared]
    return {width for width in found if isinstance(width, int)}


def _prefix_tokens(tokens: int, model: nn.Module) -> int:
    """Class and register tokens stand in front of the patches only from the layer on that adds them."""
    prefix = getattr(model, "num_prefix_tokens", 0)
    patches = getattr(getattr(model, "patch_embed", None), "num_patches", None)
    if not isinstance(prefix, int) or not 0 < prefix < tokens:
        return 0
    there = (
        tokens - prefix == patches if isinstance(patches, int) else math.isqrt(tokens - prefix) ** 2 == tokens - prefix
    )
    return prefix if there else 0


class Exit(nn.Module):
    """A classifier behind one of the blocks, with the collaboration link from the previous exit to it.

    Attributes:
        link: adds what the previous exit's prediction tells to this one's logits; None where no exit feeds this one.
    """

    link: CollaborationLink | None

    def forward(self, feature: Tensor, *others: Tensor, previous_logits: Tensor | None = None) -> Tensor:
        """The exit's feature, what else crosses the cut, and the previous logits (N, C) or None -> logits (N, C).

        Without the previous exit's logits the link is left out.
        """
        logits = self.own_logits(feature, *others)
        if self.link is not None and previous_logits is not None:
            logits = logits + self.link(previous_logits)
        return logits

    def own_logits(self, feature: Tensor, *others: Tensor) -> Tensor:
        """The exit's feature, and what else crosses the cut -> logits (N, C) without the link's part."""
        raise NotImplementedError

    def own_classifiers(self) -> list[nn.Module]:
        """The layers that give the logits, without the link."""
        raise NotImplementedError

    def classifiers(self) -> list[nn.Module]:
        """The layers that give the logits, and the link."""
        return self.own_classifiers() if self.link is None else [*self.own_classifiers(), self.link]


class EarlyExit(Exit):
    """The exit behind a block inside the backbone: pooling, LayerNorm, dropout, linear classifier; and the ISC link.

    Args:
        feature: layout and width D of what the exit reads.
        num_classes: C.
        link: whether a previous exit feeds this one.
        head_width: width of a pointwise linear layer with GELU before the pooling; 0 leaves it out.
        head_dropout: dropout before the classifier.
    """

    def __init__(
        self, feature: Feature, num_classes: int, link: bool, head_width: int = 0, head_dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.feature = feature
        width = head_width or feature.width
        self.widen = nn.Sequential(nn.Linear(feature.width, head_width), nn.GELU()) if head_width else None
        self.norm = nn.LayerNorm(width)
        self.drop = nn.Dropout(head_dropout)
        self.classifier = nn.Linear(width, num_classes)
        self.link = CollaborationLink(num_classes, width) if link else None
        init_as_concatenated(self.classifier, 2 * width if link else width)

    def own_logits(self, feature: Tensor, *others: Tensor) -> Tensor:
        """Feature in its layout -> (N, C)."""
        if self.widen is not None:
            feature = self.widen(feature.movedim(CHANNEL_DIM[self.feature.layout], -1))
            pooled = self._pool(feature, channels_last=True)
        else:
            pooled = self._pool(feature)
        return self.classifier(self.drop(self.norm(pooled)))

    def own_classifiers(self) -> list[nn.Module]:
        """The linear layer."""
        return [self.classifier]

    def _pool(self, feature: Tensor, channels_last: bool = False) -> Tensor:
        if feature.dim() == 2:
            return feature
        if self.feature.prefix_tokens:
            feature = feature[:, self.feature.prefix_tokens :]
        channel = feature.dim() - 1 if channels_last else CHANNEL_DIM[self.feature.layout]
        return feature.mean([d for d in range(1, feature.dim()) if d != channel])


class LastExit(Exit):
    """The last exit: the backbone's own end, unchanged; and the ISC link.

    Args:
        head: the part of the backbone behind the last block.
        num_classes: C.
        link_width: width of the link, 0 for none. Its projection starts at zero.
        classifier: timm's names of the backbone's classifiers.
    """

    def __init__(self, head: nn.Module, num_classes: int, link_width: int, classifier: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.head = head
        self.classifier_names = classifier
        self.link = CollaborationLink(num_classes, link_width, start_at_zero=True) if link_width else None

    def own_logits(self, *state: Tensor) -> Tensor:
        """The state behind the last block -> (N, C)."""
        return self.head(*state)

    def own_classifiers(self) -> list[nn.Module]:
        """The backbone's own classifiers."""
        named = dict(self.head.named_modules())
        return [named[name] for name in self.classifier_names if name in named]
