"""The dynamic runner: runs a batch block by block, and only those images further that the policy keeps in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from adaptive.inference.acceleration.accelerated import (
    BATCH_SIZES,
    AcceleratedStages,
    Acceleration,
    Prepare,
    WarmUp,
    preparation,
)
from adaptive.inference.checks import (
    check_finite,
    check_images,
    check_policy,
    checksum,
    refuse_broken_answers,
    refuse_broken_images,
)
from adaptive.inference.drift.seen import Seen, Watch, kept
from adaptive.inference.observer import Observer, tell
from adaptive.inference.outputs import Predictions
from adaptive.inference.policy import EVERYBODY, NOBODY, Policy
from adaptive.inference.stages import Carried, cut_into_stages
from adaptive.networks.network import AdaptiveNetwork
from adaptive.networks.precision import autocast, memory_format
from adaptive.networks.weights.fingerprint import fingerprint

Images = Tensor | np.ndarray


class HasNetwork(Protocol):
    """Something that holds a network, as what `adaptive.load` returns."""

    @property
    def network(self) -> AdaptiveNetwork:
        """The network."""


class Finished(NamedTuple):
    """Images of a stream that have left: their numbers in the order of arrival, from 0, and what they got."""

    positions: Tensor
    predictions: Predictions


@dataclass
class _Group:
    """Images that are still in: what they carry, and their numbers in the batch.

    ``rows`` is the number of images in the tensors; those beyond the group's own are padding.
    """

    carried: Carried
    positions: Tensor
    rows: int

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
        accelerate: ``compile`` runs what lies between two decisions by torch.compile, ``cuda_graphs`` as a CUDA graph,
            ``compile_cuda_graphs`` as a CUDA graph of the compiled kernels; for images of one size, prepared when
            first needed or by `warm_up`. Weights may be changed in place, but not exchanged. Or what prepares a
            function itself, see `AcceleratedStages`.
        batch_sizes: with ``accelerate``, the numbers of images that are prepared for; groups are padded up to them.
        seen: count where images leave, and how sure the exits are of them; or counts of this policy to go on from.

    Raises:
        PolicyError: the policy is for another number of exits, or was calibrated for other weights; counts of another.
        ConfigError: ``accelerate`` or ``batch_sizes`` cannot be.
        MachineError: CUDA graphs are asked for on another device.
    """

    def __init__(
        self,
        network: AdaptiveNetwork | HasNetwork,
        policy: Policy | None = None,
        precision: str = "fp32",
        decide_everywhere: bool = False,
        accelerate: Acceleration | Prepare | None = None,
        batch_sizes: Sequence[int] = BATCH_SIZES,
        seen: Seen | bool = False,
    ) -> None:
        given, network = network, network if isinstance(network, AdaptiveNetwork) else network.network
        if policy is None:
            policy = Policy(thresholds=[NOBODY] * (len(network.exits) - 1) + [EVERYBODY])
        check_policy(policy, network.exit_names, lambda: _fingerprint(given, network))
        self.network, self.policy = network.eval(), policy
        self._watch = Watch.asked(policy, seen)
        self.precision = precision
        like = next(network.parameters())
        self.device, self._dtype = like.device, like.dtype
        self._layout = memory_format(_is_channels_last(network))
        self._stages = cut_into_stages(network, self.policy, decide_everywhere)
        self._given = given, accelerate, tuple(batch_sizes)
        self._accelerated = None
        if accelerate is not None:
            prepare = accelerate if callable(accelerate) else preparation(accelerate, self.device)
            self._accelerated = AcceleratedStages(self._stages, precision, batch_sizes, prepare)

    @torch.inference_mode()
    def warm_up(self) -> WarmUp:
        """Compile or capture every stage at every batch size now; without ``accelerate`` there is nothing to do."""
        if self._accelerated is None:
            return WarmUp(0, 0.0)
        channels, side = self.network.channels, self.network.input_size
        return self._accelerated.warm_up(
            lambda size: self._enter(self._tensor(torch.zeros(size, channels, side, side)), 0).carried.state
        )

    @property
    def prepared(self) -> int:
        """How many functions, at most one per stage and batch size, have been compiled or captured so far."""
        return self._accelerated.prepared if self._accelerated else 0

    @property
    def seen(self) -> Seen:
        """The counts of all images answered so far (raises PolicyError where they are not kept)."""
        return kept(self._watch)

    def with_policy(self, policy: Policy, decide_everywhere: bool = False) -> DynamicClassifier:
        """Return a runner of the same network, run in the same way, in which another policy decides (PolicyError)."""
        given, accelerate, sizes = self._given
        return DynamicClassifier(given, policy, self.precision, decide_everywhere, accelerate, sizes)

    def predict(self, images: Images) -> Predictions:
        """Images (N, C, H, W) -> labels (N,), confidences (N,) and exits (N,) from 1 to k, on the network's device.

        Raises:
            DataError: images of another type, shape or size, or that hold NaN or infinite values.
            ModelError: an answer is NaN or infinite.
        """
        probabilities, exits = self.run(images)
        confidences, labels = probabilities.max(dim=1)
        return Predictions(labels, confidences, exits)

    @torch.inference_mode()
    def run(self, images: Images, observe: Observer | None = None) -> tuple[Tensor, Tensor]:
        """Images (N, C, H, W) -> probabilities (N, classes) and exits (N,) from 1 to k.

        Args:
            images: floats, normalised as the run's transform does; on any device, and of any memory layout; an empty
                batch is allowed.
            observe: told what was done, part by part.

        Raises:
            DataError: images of another type, shape or size, or that hold NaN or infinite values.
            ModelError: an answer is NaN or infinite.
        """
        self._check(images)
        total = len(images)
        probabilities = torch.zeros(total, self.network.num_classes, device=self.device)
        exits = torch.full((total,), len(self.network.exits), device=self.device)
        if not total:
            return probabilities, exits
        group = self._enter(self._tensor(images), 0)
        entered = checksum(group.carried.state[0])
        for number, stage in enumerate(self._stages):
            leaves, values = self._advance(group, number, observe)
            if len(group) == total:
                probabilities = values if self._accelerated is None else values.clone()
                exits.fill_(stage.exit + 1)
            else:
                probabilities.index_copy_(0, group.positions, values)
                exits.index_fill_(0, group.positions, stage.exit + 1)
            if stage.is_last:
                tell(observe, "compaction", stage.exit, 0)
                break
            stay = (~leaves).nonzero().squeeze(1)  # the decision: the one thing the host waits for
            if 0 < len(stay) < len(group):
                group = self._keep(group, stay, padded=True)
            tell(observe, "compaction", stage.exit, len(stay))
            if len(stay) == 0:
                break
        check_finite(entered + checksum(probabilities), lambda: self._tensor(images), probabilities)
        if self._watch is not None:
            self._watch.add(exits, probabilities.amax(dim=1))
        tell(observe, "finish", stage.exit, total)
        return probabilities, exits

    @torch.inference_mode()
    def stream(self, batches: Iterable[Images], batch: int = 64) -> Iterator[Finished]:
        """Run an endless queue of images with every block at a full batch.

        Images that stay wait in front of the next block until ``batch`` of them are there, and the first block is
        refilled from the queue meanwhile; only when the queue ends smaller batches run. At most 2 * batch images wait
        in front of a block, so that memory is bounded.

        Args:
            batches: images (n, C, H, W) of any n, in order of arrival.
            batch: images per block run.

        Yields:
            Images as they leave, every one once.

        Raises:
            DataError: images of another type, shape or size, or that hold NaN or infinite values.
            ModelError: an answer is NaN or infinite.
        """
        if batch < 1:
            raise ValueError(f"batch = {batch}: give 1 or more")
        queue = _Queue((self._checked(images) for images in batches), batch)
        waiting: list[list[_Group]] = [[] for _ in self._stages]
        while True:
            stage = self._choose(waiting, batch)
            images = None if stage is not None else queue.take()
            if images is not None:
                stage, group = 0, self._enter(images, queue.taken - len(images))
                if not bool(checksum(images).isfinite()):
                    refuse_broken_images(images, queue.taken - len(images))
            else:
                stage = stage if stage is not None else next((s for s, groups in enumerate(waiting) if groups), None)
                if stage is None:
                    return
                group = self._gather(waiting[stage], batch)
            leaves, values = self._advance(group, stage, None)
            leave = leaves.nonzero().squeeze(1)
            confidences, labels = values[leave].max(dim=1)
            exits = torch.full_like(labels, self._stages[stage].exit + 1)
            finished = Finished(group.positions[leave], Predictions(labels, confidences, exits))
            if not bool(checksum(confidences).isfinite()):
                refuse_broken_answers(values[leave], finished.positions.tolist())
            if self._watch is not None and len(leave):
                self._watch.add(exits, confidences)
            if len(leave) < len(group):
                stay = (~leaves).nonzero().squeeze(1)
                lives_on = len(stay) == len(group) and self._accelerated is None  # what is accelerated is overwritten
                waiting[stage + 1].append(group if lives_on else self._keep(group, stay))
            if len(leave):
                yield finished  # last: whoever takes it may use this runner in between

    def _check(self, images: Any) -> None:
        check_images(images, self.network.channels, self.network.input_size)

    def _tensor(self, images: Images) -> Tensor:
        """Images as the network takes them: on its device, in its type and memory format."""
        if not isinstance(images, Tensor):  # torch takes no foreign byte order or negative strides, and warns of others
            images = torch.from_numpy(np.require(images, images.dtype.newbyteorder("="), ("C", "W")))
        return images.to(self.device, self._dtype, non_blocking=True, memory_format=self._layout)

    def _checked(self, images: Images) -> Tensor:
        self._check(images)
        return self._tensor(images)

    def _enter(self, images: Tensor, first: int) -> _Group:
        positions = torch.arange(first, first + len(images), device=self.device)
        return _Group(Carried(self.network.start(images)), positions, len(images))

    def _advance(self, group: _Group, number: int, observe: Observer | None) -> tuple[Tensor, Tensor]:
        """Run a stage for a group: who leaves (n,), and probabilities (n, classes)."""
        stage, count = self._stages[number], len(group)
        if self._accelerated is None:
            with autocast(self.precision, self.device):
                outcome = stage(group.carried, count, observe)
        else:
            outcome = self._accelerated(number, group.carried, group.rows, count)
            group.rows = len(outcome.leaves)
            tell(observe, "stage", stage.exit, count)
        group.carried = outcome.carried
        return outcome.leaves[:count], outcome.probabilities[:count]

    def _keep(self, group: _Group, indices: Tensor, padded: bool = False) -> _Group:
        """Some images of a group, copied; ``padded`` up to the next batch size if they are run next."""
        rows = self._accelerated.padded(indices) if padded and self._accelerated else indices
        return _Group(group.carried.select(rows, group.rows), group.positions[indices], len(rows))

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
        positions = torch.cat([group.positions for group in taken])
        return _Group(Carried.join([group.carried for group in taken]), positions, len(positions))


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


def _fingerprint(given: AdaptiveNetwork | HasNetwork, network: AdaptiveNetwork) -> str | None:
    """The network's; where its weights were converted that of the run they come from, or None if it is not known."""
    if all(tensor.dtype == torch.float32 for tensor in network.state_dict().values() if tensor.is_floating_point()):
        return fingerprint(network)
    return getattr(getattr(given, "identity", None), "fingerprint", None)


def _is_channels_last(network: nn.Module) -> bool:
    """Whether the convolution weights are in channels-last memory (one by one, a pointwise one is in both)."""
    weights = [p for p in network.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2:] != (1, 1)]
    return bool(weights) and all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
