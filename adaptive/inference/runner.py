"""The dynamic runner: runs a batch block by block, and only those images further that the policy keeps in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from adaptive.errors import PolicyError
from adaptive.inference.outputs import Predictions
from adaptive.inference.policy import EVERYBODY, NOBODY, Decision, Policy
from adaptive.networks.network import AdaptiveNetwork
from adaptive.networks.precision import autocast, memory_format
from adaptive.networks.state import State


class HasNetwork(Protocol):
    """Something that holds a network, as what `adaptive.load` returns."""

    @property
    def network(self) -> AdaptiveNetwork:
        """The network."""


class Observer(Protocol):
    """Called after every part of a run, as by the profiler's clock."""

    def __call__(self, part: str, i: int, samples: int) -> None:
        """``part`` ("block", "exit", "decision" or "compaction") number i, from 0, was done for so many images."""


class Finished(NamedTuple):
    """Images of a stream that have left: their numbers in the order of arrival, from 0, and what they got."""

    positions: Tensor
    predictions: Predictions


@dataclass
class _Group:
    """Images that are still in: their state, numbers in the batch, previous logits and the policy's memory."""

    state: State
    positions: Tensor
    previous: Tensor | None = None
    memory: Tensor | None = None

    def __len__(self) -> int:
        return len(self.positions)


class DynamicClassifier:
    """Runs a network only as deep as each image needs.

    Blocks are run for the images that are still in, and not at all where none is; nothing but the decision, which
    images stay, goes to the host. Where a policy can let nobody leave, no decision is made, and with a policy that
    never fires what runs is the plain forward pass.

    Args:
        network: put into eval mode; its device, type and memory format are kept. What `adaptive.load` returns will do.
        policy: who leaves where; without one everybody goes to the end.
        precision: ``bf16`` and ``fp16`` run under autocast; a network that was converted runs in its own type.
        decide_everywhere: decide also where the policy can let nobody leave, to measure what decisions cost.

    Raises:
        PolicyError: the policy is for another number of exits.
    """

    def __init__(
        self,
        network: AdaptiveNetwork | HasNetwork,
        policy: Policy | None = None,
        precision: str = "fp32",
        decide_everywhere: bool = False,
    ) -> None:
        network = network if isinstance(network, AdaptiveNetwork) else network.network
        exits = len(network.exits)
        self.network = network.eval()
        self.policy = policy or Policy(thresholds=[NOBODY] * (exits - 1) + [EVERYBODY])
        if self.policy.exits != exits:
            raise PolicyError(f"the policy is for {self.policy.exits} exits, the network has {exits}")
        self.precision = precision
        like = next(network.parameters())
        self.device, self._dtype = like.device, like.dtype
        self._layout = memory_format(_is_channels_last(network))
        self.fires = [decide_everywhere or self.policy.can_fire(i) for i in range(exits - 1)] + [True]
        self._remembers = self.policy.needs_every_exit and any(self.fires[:-1])
        self._answers = [fires or self._remembers or network.collaboration for fires in self.fires]
        self._stages = _stages(self.fires)

    def predict(self, images: Tensor) -> Predictions:
        """Images (N, C, H, W) -> labels (N,), confidences (N,) and exits (N,) from 1 to k, on the network's device."""
        probabilities, exits = self.run(images)
        confidences, labels = probabilities.max(dim=1)
        return Predictions(labels, confidences, exits)

    @torch.inference_mode()
    def run(self, images: Tensor, observe: Observer | None = None) -> tuple[Tensor, Tensor]:
        """Images (N, C, H, W) -> probabilities (N, classes) and exits (N,) from 1 to k.

        Args:
            images: normalised as the run's transform does; an empty batch is allowed.
            observe: told what was done, part by part.
        """
        total = len(images)
        probabilities = torch.zeros(total, self.network.num_classes, device=self.device)
        exits = torch.full((total,), len(self.fires), device=self.device)
        if not total:
            return probabilities, exits
        with autocast(self.precision, self.device):
            group = self._enter(images, 0)
            for stage in range(len(self._stages)):
                decision, values, last = self._advance(group, stage, observe)
                if len(group) == total:
                    probabilities = values
                    exits.fill_(last + 1)
                else:
                    probabilities.index_copy_(0, group.positions, values)
                    exits.index_fill_(0, group.positions, last + 1)
                if stage == len(self._stages) - 1:
                    break
                stay = (~decision.leaves).nonzero().squeeze(1)  # the decision: the one thing the host waits for
                if len(stay) == 0:
                    break
                if len(stay) < len(group):
                    group = self._keep(group, stay)
                    _tell(observe, "compaction", last, len(stay))
        return probabilities, exits

    @torch.inference_mode()
    def stream(self, batches: Iterable[Tensor], batch: int = 64) -> Iterator[Finished]:
        """Run an endless queue of images with every block at a full batch.

        Images that stay wait in front of the next block until ``batch`` of them are there, and the first block is
        refilled from the queue meanwhile; only when the queue ends smaller batches run. At most 2 * batch images wait
        in front of a block, so that memory is bounded.

        Args:
            batches: images (n, C, H, W) of any n, in order of arrival.
            batch: images per block run.

        Yields:
            Images as they leave, every one once.
        """
        if batch < 1:
            raise ValueError(f"batch = {batch}: give 1 or more")
        queue = _Queue(batches, batch)
        waiting: list[list[_Group]] = [[] for _ in self._stages]
        while True:
            stage = self._choose(waiting, batch)
            images = None if stage is not None else queue.take()
            if images is not None:
                stage, group = 0, self._enter(images, queue.taken - len(images))
            else:
                stage = stage if stage is not None else next((s for s, groups in enumerate(waiting) if groups), None)
                if stage is None:
                    return
                group = self._gather(waiting[stage], batch)
            with autocast(self.precision, self.device):
                decision, values, last = self._advance(group, stage, None)
            leave = decision.leaves.nonzero().squeeze(1)
            if len(leave):
                confidences, labels = values[leave].max(dim=1)
                exits = torch.full_like(labels, last + 1)
                yield Finished(group.positions[leave], Predictions(labels, confidences, exits))
            if len(leave) < len(group):
                stay = (~decision.leaves).nonzero().squeeze(1)
                waiting[stage + 1].append(group if len(stay) == len(group) else self._keep(group, stay))

    def _enter(self, images: Tensor, first: int) -> _Group:
        images = images.to(self.device, self._dtype, non_blocking=True, memory_format=self._layout)
        return _Group(self.network.start(images), torch.arange(first, first + len(images), device=self.device))

    def _advance(self, group: _Group, stage: int, observe: Observer | None) -> tuple[Decision, Tensor, int]:
        """Run the blocks of a stage for a group, and decide at its end: decision, probabilities, number of the exit."""
        network, policy, count = self.network, self.policy, len(group)
        values = decision = None
        for i in self._stages[stage]:
            group.state = network.run_block(i, group.state, lazy=self.fires[i])
            _tell(observe, "block", i, count)
            if not self._answers[i]:
                continue
            group.previous = network.run_exit(i, group.state, group.previous)
            _tell(observe, "exit", i, count)
            if self.fires[i] or self._remembers:
                values = policy.probabilities(i, group.previous)
                decision = policy.decide(i, values, group.memory)
                group.memory = decision.memory
                _tell(observe, "decision", i, count)
        assert decision is not None
        assert values is not None
        return decision, values, self._stages[stage][-1]

    def _keep(self, group: _Group, indices: Tensor) -> _Group:
        return _Group(
            group.state.select(indices, len(group)),
            group.positions[indices],
            None if group.previous is None else group.previous[indices],
            None if group.memory is None else group.memory[indices],
        )

    def _choose(self, waiting: list[list[_Group]], batch: int) -> int | None:
        """The deepest stage with a full batch: what is nearest to its end frees memory first."""
        full = [s for s, groups in enumerate(waiting) if sum(map(len, groups)) >= batch]
        return full[-1] if full else None

    def _gather(self, groups: list[_Group], batch: int) -> _Group:
        """Take up to ``batch`` images off a waiting list."""
        taken, room = [], batch
        while groups and room:
            group = groups.pop(0)
            if len(group) > room:
                groups.insert(0, self._keep(group, torch.arange(room, len(group), device=self.device)))
                group = self._keep(group, torch.arange(room, device=self.device))
            taken.append(group)
            room -= len(group)
        if len(taken) == 1:
            return taken[0]
        return _Group(
            State.join([group.state for group in taken]),
            torch.cat([group.positions for group in taken]),
            _join([group.previous for group in taken]),
            _join([group.memory for group in taken]),
        )


class _Queue:
    """Images in order of arrival, handed out in batches of one size (the last may be smaller)."""

    def __init__(self, batches: Iterable[Tensor], batch: int) -> None:
        self._source = iter(batches)
        self._batch = batch
        self._held: list[Tensor] = []
        self.taken = 0

    def take(self) -> Tensor | None:
        """Return the next batch, or None at the end."""
        while sum(map(len, self._held)) < self._batch:
            images = next(self._source, None)
            if images is None:
                break
            self._held.append(images)
        if not self._held:
            return None
        images = torch.cat(self._held) if len(self._held) > 1 else self._held[0]
        self._held = [images[self._batch :]] if len(images) > self._batch else []
        self.taken += min(len(images), self._batch)
        return images[: self._batch] if len(images) else None


def _stages(fires: Sequence[bool]) -> list[list[int]]:
    """Blocks between two decisions: [[0], [1, 2], ...]."""
    stages: list[list[int]] = [[]]
    for i, ends in enumerate(fires):
        stages[-1].append(i)
        if ends and i < len(fires) - 1:
            stages.append([])
    return stages


def _join(parts: Sequence[Tensor | None]) -> Tensor | None:
    tensors = [part for part in parts if part is not None]
    return torch.cat(tensors) if tensors else None


def _is_channels_last(network: nn.Module) -> bool:
    """Whether the convolution weights are in channels-last memory (one by one, a pointwise one is in both)."""
    weights = [p for p in network.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2:] != (1, 1)]
    return bool(weights) and all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)


def _tell(observe: Observer | None, part: str, i: int, samples: int) -> None:
    if observe is not None:
        observe(part, i, samples)
