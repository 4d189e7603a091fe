"""What docs/method.md says about Gradient Equilibrium and the released code, measured on a small MSDNet and digits.

Plain loops on the CPU, a minute in all: the numbers show mechanisms, not accuracies.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from adaptive import AdaptiveNetwork, create_model

SETTINGS: dict[str, Any] = {"exits": 5, "base": 2, "step": 2, "channels": 8, "growth": 6}
SEEDS = (0, 1, 2)
BATCH, WARM_UP, STEPS = 64, 60, 20


@dataclass(frozen=True)
class Measures:
    """All numbers behind the figures; lists run over blocks or exits from the input, inner lists over seeds.

    Attributes:
        summed: norm of the summed-loss gradient over the closed form (the summed gradient / number of exits behind).
        crossing: norm of GE's gradient over the closed form.
        tap: the same for the released code's scope.
        tap_error: relative distance of the released code's gradient from the closed form.
        updates: per optimizer, how far GE moves a block in the first steps, over how far the summed loss moves it.
        through_links: share of an exit's gradient that flows back through a link without a stop.
        drift: relative change of the logits of a frozen network that is left in training mode, after 0, 1, 2 ... steps.
    """

    summed: list[list[float]]
    crossing: list[list[float]]
    tap: list[list[float]]
    tap_error: list[list[float]]
    updates: dict[str, list[list[float]]]
    through_links: list[list[float]]
    drift: list[list[float]]

    def as_dict(self) -> dict[str, Any]:
        """As plain lists, for JSON."""
        return asdict(self)


def measure() -> Measures:
    """Measure everything for every seed."""
    images, labels = _digits()
    runs: list[dict[str, Any]] = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        network = create_model("msdnet", 10, **SETTINGS).train()
        _learn(network, images, labels, WARM_UP)  # away from the initial point, where all gradients look alike
        order = torch.randperm(len(images))
        batch = images[order[:BATCH]], labels[order[:BATCH]]
        runs.append(
            _equilibrium(network, *batch)
            | {"updates": {name: _updates(network, images, labels, name) for name in ("sgd", "adamw")}}
            | {"through_links": _through_links(network, *batch), "drift": _drift(network, images)}
        )

    def by_place(key: str) -> list[list[float]]:
        return [list(values) for values in zip(*(run[key] for run in runs), strict=True)]

    updates = {
        name: [list(v) for v in zip(*(run["updates"][name] for run in runs), strict=True)] for name in ("sgd", "adamw")
    }
    keys = ("summed", "crossing", "tap", "tap_error", "through_links", "drift")
    return Measures(**{key: by_place(key) for key in keys}, updates=updates)


def _digits() -> tuple[Tensor, Tensor]:
    """The scanned digits as (N, 3, 32, 32) between -1 and 1, and their labels."""
    found = load_digits()
    small = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(small, size=32, mode="bilinear", align_corners=False)
    return images.repeat(1, 3, 1, 1), torch.tensor(found.target)


def _loss(logits: list[Tensor], labels: Tensor) -> Tensor:
    return torch.stack([F.cross_entropy(z, labels) for z in logits]).sum()


def _learn(
    network: AdaptiveNetwork, images: Tensor, labels: Tensor, steps: int, optimizer: str = "sgd", seed: int = 0
) -> None:
    kinds: dict[str, Any] = {"sgd": (torch.optim.SGD, 0.05), "adamw": (torch.optim.AdamW, 1e-3)}
    kind, rate = kinds[optimizer]
    stepper = kind(network.parameters(), lr=rate)
    order = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(images), (BATCH,), generator=order)
        stepper.zero_grad()
        _loss(network(images[chosen]), labels[chosen]).backward()
        stepper.step()


def _by_block(network: AdaptiveNetwork) -> list[Tensor]:
    return [torch.cat([p.grad.flatten() for p in block.parameters() if p.grad is not None]) for block in network.blocks]


def _equilibrium(network: AdaptiveNetwork, images: Tensor, labels: Tensor) -> dict[str, list[float]]:
    gradients = {}
    scopes: tuple[Any, ...] = (False, "crossing", "tap")
    for scope in scopes:
        network.equilibrium = scope
        network.zero_grad()
        _loss(network(images), labels).backward()
        gradients[scope] = _by_block(network)
    k = len(network.blocks)
    closed = [gradient / (k - j) for j, gradient in enumerate(gradients[False])]
    norms = {
        name: [float(g.norm() / c.norm()) for g, c in zip(gradients[scope], closed, strict=True)]
        for name, scope in (("summed", False), ("crossing", "crossing"), ("tap", "tap"))
    }
    error = [float((g - c).norm() / c.norm()) for g, c in zip(gradients["tap"], closed, strict=True)]
    return norms | {"tap_error": error}


def _updates(network: AdaptiveNetwork, images: Tensor, labels: Tensor, optimizer: str) -> list[float]:
    """Distance that each block moves with GE, over that with the summed loss."""
    moved = []
    scopes: tuple[Any, ...] = (False, "crossing")
    for scope in scopes:
        learner = copy.deepcopy(network)
        learner.equilibrium = scope
        before = [_weights(block) for block in learner.blocks]
        _learn(learner, images, labels, STEPS, optimizer, seed=1)
        moved.append([float((_weights(b) - w).norm()) for b, w in zip(learner.blocks, before, strict=True)])
    return [with_ge / without for without, with_ge in zip(*moved, strict=True)]


def _weights(block: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in block.parameters()])


def _through_links(network: AdaptiveNetwork, images: Tensor, labels: Tensor) -> list[float]:
    """Norm of what later losses add to an exit's own gradient through attached links, over the norm of its own."""
    exits: list[Any] = list(network.exits)
    gradients = []
    for attached in (False, True):
        for exit_ in exits[1:]:
            exit_.link.attached = attached
        network.zero_grad()
        _loss(network(images), labels).backward()
        gradients.append([torch.cat([p.grad.flatten() for p in e.classifier.parameters()]) for e in exits])
    for exit_ in exits[1:]:
        exit_.link.attached = False
    return [float((b - a).norm() / a.norm()) for a, b in zip(*gradients, strict=True)]


@torch.no_grad()
def _drift(network: AdaptiveNetwork, images: Tensor) -> list[float]:
    """Relative change of a frozen network's logits while training-mode passes move its BatchNorm statistics."""
    frozen = copy.deepcopy(network)
    probe = images[:BATCH]
    start = torch.stack(frozen.eval()(probe))
    found = [0.0]
    for _ in range(30):
        frozen.train()(images[torch.randint(len(images), (BATCH,))])
        found.append(float((torch.stack(frozen.eval()(probe)) - start).norm() / start.norm()))
    return found
