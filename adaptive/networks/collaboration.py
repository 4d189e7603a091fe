"""Inline Subnetwork Collaboration (ISC): an exit also reads the previous exit's prediction (arXiv 1908.06294)."""

from __future__ import annotations

import math

from torch import Tensor, nn


class CollaborationLink(nn.Module):
    """The ISC link: logits of the previous exit -> what they add to the next exit's logits. No gradient flows back.

    The paper concatenates the link's output (Linear, BatchNorm1d, ReLU) to the next exit's feature before its linear
    classifier. A linear layer on a concatenation is the sum of two linear layers, so the link ends in a bias-free
    projection that is added to the classifier's output: the same function, and the classifier itself (of any kind,
    pretrained or not) stays as it is.

    Args:
        num_classes: C, length of the logits.
        width: width of the next exit's feature, and of the link.
        start_at_zero: initialise the projection with zeros, so that a pretrained classifier starts unchanged.

    Attributes:
        attached: let the gradient flow back through the link, as the released code does by forgetting to stop it.
    """

    attached = False

    def __init__(self, num_classes: int, width: int, start_at_zero: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(num_classes, width)
        self.norm = nn.BatchNorm1d(width)
        self.act = nn.ReLU()
        self.projection = Projection(width, num_classes, start_at_zero)

    def forward(self, previous_logits: Tensor) -> Tensor:
        """(N, C) logits of the previous exit -> (N, C), to be added to the next exit's logits."""
        previous = previous_logits if self.attached else previous_logits.detach()
        return self.projection(self.act(self.norm(self.linear(previous))))


class Projection(nn.Linear):
    """The link's last layer: that part of a linear layer on a concatenation that reads the link's output."""

    def __init__(self, width: int, num_classes: int, start_at_zero: bool) -> None:
        self.start_at_zero = start_at_zero
        super().__init__(width, num_classes, bias=False)

    def reset_parameters(self) -> None:
        """Initialise with zeros, or as torch would the layer on the concatenation."""
        if self.start_at_zero:
            nn.init.zeros_(self.weight)
        else:
            init_as_concatenated(self, 2 * self.in_features)


def init_as_concatenated(layer: nn.Linear, fan_in: int) -> None:
    """Initialise one part of a linear layer on a concatenation of ``fan_in`` inputs as torch would the whole layer."""
    bound = 1 / math.sqrt(fan_in)
    nn.init.uniform_(layer.weight, -bound, bound)
    if layer.bias is not None:
        nn.init.uniform_(layer.bias, -bound, bound)
