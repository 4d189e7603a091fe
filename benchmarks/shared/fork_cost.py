"""What Gradient Equilibrium adds to a training step, measured at the branch points alone.

Two measurements of the whole step differ by more than GE costs. So the forks run by themselves, on tensors of the real
shapes, through autograd, with the network's real exits: once forked, and once as autograd does it anyway, which adds
the two gradients. The difference is GE's cost with everything in it: Python, views, memory for the result.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adaptive.inference.acceleration.compilation import with_its_own_code
from adaptive.networks.equilibrium import branch
from adaptive.networks.network import AdaptiveNetwork
from adaptive.networks.precision import autocast
from benchmarks.shared.timing import Spread, interleaved
from benchmarks.shared.variants import StepSettings, random_batch

CALLS_ON_CUDA = 10  # per turn: a single fork is shorter than waiting for the device


@dataclass(frozen=True)
class Crossing:
    """The tensors behind one branch point; ``remaining`` exits stand at or behind it."""

    state: tuple[Tensor, ...]
    remaining: int
    exit: torch.nn.Module

    @property
    def learns(self) -> list[bool]:
        """Which tensors carry a gradient."""
        return [tensor.requires_grad for tensor in self.state]


@dataclass(frozen=True)
class ForkCost:
    """What all forks of a step cost together.

    Attributes:
        added: seconds that GE adds to a step (forward and backward), one value per repetition.
        operations: the bare tensor operations in seconds, summed over the branch points: GE's interpolation, and
            the addition in place of it, into the memory of one of the two gradients and into new memory.
        shapes: per branch point, the shapes of the tensors that are rescaled.
    """

    added: list[float]
    operations: dict[str, Spread]
    shapes: list[list[list[int]]]


def fork_cost(settings: StepSettings, network: AdaptiveNetwork, repetitions: int) -> ForkCost:
    """Measure the forks of a network with GE, repetition by repetition against plain autograd.

    Args:
        settings: device, precision, batch, and whether forks and exits are compiled.
        network: in training mode, on its device; its crossing tensors are recorded from one forward pass.
        repetitions: counted ones; an eighth as many go before them.
    """
    crossings = record_crossings(settings, network)
    scope = str(network.equilibrium)
    turns: dict[str, Callable[[], Any]] = {}
    for i, crossing in enumerate(crossings):
        gradients = _arriving(settings, crossing)
        for forked in (False, True):
            turns[f"{i} {forked}"] = _through_autograd(settings, crossing, scope if forked else None, gradients)
    calls = CALLS_ON_CUDA if settings.device == "cuda" else 1
    warmup = repetitions // 8 + 1
    seconds = interleaved(turns, repetitions, warmup, settings.device, calls)
    added = [
        sum(seconds[f"{i} True"][r] - seconds[f"{i} False"][r] for i in range(len(crossings)))
        for r in range(repetitions)
    ]
    operations = interleaved(_operations(crossings, scope), repetitions, warmup, settings.device, calls)
    rescaled = slice(1) if scope == "tap" else slice(None)
    return ForkCost(
        added,
        {name: Spread.of(values) for name, values in operations.items()},
        [[list(t.shape) for t in c.state[rescaled] if t.requires_grad] for c in crossings],
    )


def record_crossings(settings: StepSettings, network: AdaptiveNetwork) -> list[Crossing]:
    """Run the blocks once and copy what crosses every branch point."""
    crossings = []
    state: tuple[Tensor, ...] = network.start(random_batch(settings)[0])
    with _autocast(settings):
        for i in range(len(network.blocks) - 1):
            state = network.run_block(i, state)
            copies = tuple(t.detach().clone().requires_grad_(t.requires_grad) for t in state)
            crossings.append(Crossing(copies, len(network.blocks) - i, network.exits[i]))
    return crossings


def _autocast(settings: StepSettings) -> Any:
    return autocast("bf16", torch.device(settings.device)) if settings.precision == "bf16" else nullcontext()


def _arriving(settings: StepSettings, crossing: Crossing) -> list[Tensor]:
    """Gradients for the exit's logits and for everything that goes onward."""
    with torch.no_grad(), _autocast(settings):
        logits = crossing.exit(crossing.state[0])
    onward = [t for t, learns in zip(crossing.state, crossing.learns, strict=True) if learns]
    return [torch.randn_like(t) for t in (logits, *onward)]


def _through_autograd(
    settings: StepSettings, crossing: Crossing, scope: str | None, gradients: list[Tensor]
) -> Callable[[], Any]:
    """A pass forward and backward over one branch point, forked if a scope is given."""
    sources = [t for t in crossing.state if t.requires_grad]

    def forward(*state: Tensor) -> list[Tensor]:
        feature, onward = state[0], state
        if scope is not None:
            feature, onward = branch(state, crossing.remaining, scope)
        with _autocast(settings):
            logits = crossing.exit(feature)
        # Stands for the next block: its backward hands over a gradient in memory of its own, as a convolution's does.
        return [logits, *(t * 1.0 for t, learns in zip(onward, crossing.learns, strict=True) if learns)]

    if settings.compile:  # each for itself: torch.compile takes no more than eight of one definition
        named = with_its_own_code(forward, f"crossing_{crossing.remaining}_{'forked' if scope else 'plain'}")
        forward = torch.compile(named, fullgraph=True, dynamic=False)
    return lambda: torch.autograd.grad(forward(*crossing.state), sources, gradients)


def _operations(crossings: list[Crossing], scope: str) -> dict[str, Callable[[], Any]]:
    """The bare operations over all branch points, on gradients like the tensors."""
    taps = [(torch.randn_like(c.state[0]), torch.randn_like(c.state[0]), 1 / c.remaining) for c in crossings]
    others = [
        (torch.randn_like(t), 1 - 1 / c.remaining)
        for c in crossings
        for t in c.state[1:]
        if t.requires_grad and scope != "tap"
    ]

    def interpolate() -> None:
        for onward, exit_gradient, share in taps:
            torch.lerp(onward, exit_gradient, share)
        for gradient, factor in others:
            torch.mul(gradient, factor)

    def add_in_place() -> None:
        for onward, exit_gradient, _ in taps:
            onward.add_(exit_gradient, alpha=1e-6)  # over many repetitions the sum stays an ordinary number

    def add() -> None:
        for onward, exit_gradient, _ in taps:
            torch.add(onward, exit_gradient)

    return {"interpolation": interpolate, "addition in place": add_in_place, "addition into new memory": add}
