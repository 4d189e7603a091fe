"""Stages of the dynamic runner: the blocks between two decisions, with their exits and the decision at their end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from adaptive.inference.observer import Observer, tell
from adaptive.inference.policy import Policy
from adaptive.networks.network import AdaptiveNetwork
from adaptive.networks.state import BatchDim, State


class Structure(NamedTuple):
    """What the tensors of a `Carried` are, so that a flat list of them can be read again.

    Attributes:
        batch_dims: where the batch is in each tensor of the state.
        partial: whether the state holds only what the exit needs, see `State`.
        previous: whether the previous exit's logits follow the state.
        memory: whether the policy's memory comes last.
    """

    batch_dims: tuple[BatchDim | None, ...]
    partial: bool
    previous: bool
    memory: bool

    def build(self, tensors: Sequence[Tensor]) -> Carried:
        """The tensors of `Carried.flat` -> what they were made from."""
        states = len(self.batch_dims)
        state = State.of(tuple(tensors[:states]), self.batch_dims, self.partial)
        previous = tensors[states] if self.previous else None
        return Carried(state, previous, tensors[states + self.previous] if self.memory else None)


@dataclass
class Carried:
    """What n images carry from one stage to the next.

    Attributes:
        state: the network's, in front of the next block.
        previous: logits (n, classes) of the exit before, where exits collaborate or were asked.
        memory: (n, m) what the policy has to know of the exits so far.
    """

    state: State
    previous: Tensor | None = None
    memory: Tensor | None = None

    def select(self, indices: Tensor, rows: int) -> Carried:
        """Copy what belongs to some images.

        Args:
            indices: (m,) numbers of the images; one may come several times.
            rows: n, the number of images here.
        """
        return Carried(
            self.state.select(indices, rows),
            None if self.previous is None else self.previous[indices],
            None if self.memory is None else self.memory[indices],
        )

    @classmethod
    def join(cls, parts: Sequence[Carried]) -> Carried:
        """Copy what several groups of images carry at the same place into one, one group after another."""
        return cls(
            State.join([part.state for part in parts]),
            _join([part.previous for part in parts]),
            _join([part.memory for part in parts]),
        )

    @property
    def structure(self) -> Structure:
        """How `flat` is to be read."""
        return Structure(self.state.batch_dims, self.state.partial, self.previous is not None, self.memory is not None)

    def flat(self) -> tuple[Tensor, ...]:
        """All tensors, in the order that `Structure.build` reads."""
        return (*self.state, *(part for part in (self.previous, self.memory) if part is not None))


class Outcome(NamedTuple):
    """What a stage brings n images: what they carry on, probabilities (n, classes), and who leaves (n,), bool."""

    carried: Carried
    probabilities: Tensor
    leaves: Tensor

    def copy(self, indices: Tensor, rows: int) -> Outcome:
        """Copy what belongs to some images, see `Carried.select`."""
        return Outcome(self.carried.select(indices, rows), self.probabilities[indices], self.leaves[indices])


class Stage:
    """Runs some blocks one after another, those exits behind them that are needed, and the decision behind the last.

    Images do not influence each other: the network is in eval mode, where BatchNorm uses its stored statistics, and
    policies score every image by itself.

    Args:
        network: in eval mode.
        policy: of that network.
        blocks: numbers, from 0, of the blocks.
        answers: per block of the network, whether its exit is computed.
        remembers: whether the policy has to see every exit.
    """

    def __init__(
        self, network: AdaptiveNetwork, policy: Policy, blocks: list[int], answers: list[bool], remembers: bool
    ) -> None:
        self.network, self.policy, self.blocks = network, policy, blocks
        self._answers, self._remembers = answers, remembers

    @property
    def exit(self) -> int:
        """Number, from 0, of the exit at which images leave."""
        return self.blocks[-1]

    @property
    def is_last(self) -> bool:
        """Whether everybody leaves here."""
        return self.exit == len(self.network.blocks) - 1

    def __call__(self, carried: Carried, count: int = 0, observe: Observer | None = None) -> Outcome:
        """Run the stage.

        Args:
            carried: what the images bring.
            count: how many they are, for the observer.
            observe: told what was done, part by part.
        """
        network, policy = self.network, self.policy
        state, previous, memory = carried.state, carried.previous, carried.memory
        values = leaves = None
        for i in self.blocks:
            state = network.run_block(i, state, lazy=i == self.exit)
            tell(observe, "block", i, count)
            if not self._answers[i]:
                continue
            previous = network.run_exit(i, state, previous)
            tell(observe, "exit", i, count)
            if i == self.exit or self._remembers:
                values = policy.probabilities(i, previous)
                decision = policy.decide(i, values, memory)
                memory, leaves = decision.memory, decision.leaves
                tell(observe, "decision", i, count)
        assert values is not None
        assert leaves is not None
        return Outcome(Carried(state, previous, memory), values, leaves)


def cut_into_stages(network: AdaptiveNetwork, policy: Policy, decide_everywhere: bool = False) -> list[Stage]:
    """The stages of a network: each ends where the policy can let somebody leave, the last one at the network's end.

    Args:
        network: in eval mode.
        policy: of that network.
        decide_everywhere: end a stage at every exit.
    """
    last = len(network.exits) - 1
    fires = [decide_everywhere or policy.can_fire(i) for i in range(last)] + [True]
    remembers = policy.needs_every_exit and any(fires[:-1])
    answers = [fire or remembers or network.collaboration for fire in fires]
    ends = [i for i, fire in enumerate(fires) if fire]
    starts = [0, *(end + 1 for end in ends[:-1])]
    return [
        Stage(network, policy, list(range(start, end + 1)), answers, remembers)
        for start, end in zip(starts, ends, strict=True)
    ]


def _join(parts: Sequence[Tensor | None]) -> Tensor | None:
    tensors = [part for part in parts if part is not None]
    return torch.cat(tensors) if tensors else None
