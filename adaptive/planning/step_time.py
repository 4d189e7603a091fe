"""A model of a training step's time: computation, and the communication that does not overlap with it.

Every rate is the caller's statement or this module's default; nothing is measured here. docs/scaling.md derives the
formulas and says what they leave out (congestion, stragglers, kernels that get slower on small batches).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from adaptive.planning.memory import PLAIN_BUCKET, ZeroSettings
from adaptive.planning.traffic import Collective

GIGA = 1e9
BACKWARD_SHARE = 2 / 3  # of a training step's computing: two matrix products for every one of the forward pass
INTRA_LATENCY = 3e-6  # seconds per hop inside a node


@dataclass(frozen=True)
class Hardware:
    """Rates of a cluster, as its user states them.

    Attributes:
        ranks_per_node: GPUs of a node.
        intra_bandwidth: GB/s that a rank sends inside its node, one direction.
        inter_bandwidth: GB/s that a node sends to the others, all its network cards together, one direction.
        latency: microseconds per hop between nodes.
        storage_bandwidth: GB/s that the shared storage gives to all nodes together.
    """

    ranks_per_node: int = 8
    intra_bandwidth: float = 200.0
    inter_bandwidth: float = 50.0
    latency: float = 10.0
    storage_bandwidth: float = 20.0


@dataclass(frozen=True)
class StepTime:
    """The modelled time of one optimizer step, in seconds.

    Attributes:
        compute: forward and backward passes of all micro batches.
        communication: all collectives.
        exposed: the part of them that does not overlap with the passes.
        data: what the storage needs to read the step's images; hidden unless it is longer than all the rest.
    """

    compute: float
    communication: float
    exposed: float
    data: float

    @property
    def total(self) -> float:
        """Seconds from one step to the next."""
        return max(self.compute + self.exposed, self.data)

    @property
    def bound(self) -> str:
        """What keeps a step from taking its computing's time alone, or "compute"."""
        if self.data > self.compute + self.exposed:
            return "data"
        return "communication" if self.exposed > 0.05 * self.compute else "compute"


def collective_seconds(collective: Collective, world: int, hardware: Hardware) -> float:
    """Return the time of a step's calls of one collective.

    Each call takes the faster of a ring, bandwidth-optimal with one hop per rank, and for an all-reduce a tree, which
    sends every byte up and down once over log2 of the nodes' hops (NCCL chooses between the two likewise).
    """
    if world == 1:
        return 0.0
    inside = min(world, hardware.ranks_per_node)
    nodes = math.ceil(world / hardware.ranks_per_node)
    bandwidth = hardware.intra_bandwidth * GIGA
    if nodes > 1:
        bandwidth = min(bandwidth, hardware.inter_bandwidth * GIGA)
    rounds = 2 if collective.kind == "all-reduce" else 1
    latency = hardware.latency * 1e-6
    hops = (nodes - 1) * latency + (world - nodes) * INTRA_LATENCY if nodes > 1 else (world - 1) * INTRA_LATENCY
    ring = collective.sent(world) / bandwidth + collective.calls * rounds * hops
    if collective.kind != "all-reduce":
        return ring
    hops = math.ceil(math.log2(nodes)) * latency + (inside - 1) * INTRA_LATENCY
    tree = 2 * collective.bytes / bandwidth + collective.calls * 2 * hops
    return min(ring, tree)


def step_time(
    collectives: Sequence[Collective],
    settings: ZeroSettings,
    parameters: int,
    compute: float,
    hardware: Hardware,
    overlap: bool = False,
    data_bytes: float = 0.0,
) -> StepTime:
    """Model one optimizer step.

    Args:
        collectives: of the step.
        settings: of DeepSpeed.
        parameters: elements that learn.
        compute: seconds of the passes of all micro batches on one rank.
        hardware: stated rates.
        overlap: whether gradients are reduced beside the backward pass (``overlap_comm``); ZeRO 3 always does it, and
            fetches weights beside the forward pass. Only full buckets can overlap: the last one never does.
        data_bytes: bytes that all nodes together read for the step.
    """
    total = exposed = 0.0
    capacity = settings.reduce_bucket if settings.stage else PLAIN_BUCKET
    for collective in collectives:
        seconds = collective_seconds(collective, settings.world, hardware)
        total += seconds
        hidden = 0.0
        if collective.purpose == "gradients" and settings.stage >= 2 and (overlap or settings.stage == 3):
            hidden = min(seconds * _before_last(parameters, capacity), compute * BACKWARD_SHARE)
        if collective.purpose == "weights" and settings.stage == 3:
            share = _before_last(parameters, settings.prefetch_bucket)
            hidden = min(seconds * share, compute * (1 - BACKWARD_SHARE))
        exposed += seconds - hidden
    return StepTime(compute, total, exposed, data_bytes / (hardware.storage_bandwidth * GIGA))


def _before_last(parameters: int, bucket: int) -> float:
    """Share of the elements that lie in buckets before the last one."""
    full = math.ceil(parameters / max(bucket, 1)) - 1
    return full * bucket / parameters if parameters else 0.0
