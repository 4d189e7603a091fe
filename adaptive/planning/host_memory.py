"""The memory of the machine (not of its GPUs) that a run's processes take: a rank's, and a whole node's.

A rank's process holds its libraries and the network that every phase begins from. At its start it copies the network,
and where it continues a run it reads what the checkpoint holds of optimizer, average and teacher; on a CPU training
itself takes the rest. What is stated and not measured errs on the large side: a job that asks for too little is killed.
"""

from __future__ import annotations

from dataclasses import dataclass

from adaptive.config.sections import Config
from adaptive.planning.memory import FP32, RankMemory

MIB = 2**20
# Stated: resident memory of a process that has imported torch, timm and DeepSpeed, of one that also uses a GPU (the
# driver's and the libraries' own), and of a loader process beside what it shares with its rank.
LIBRARIES, CUDA, WORKER = 1024 * MIB, 2048 * MIB, 256 * MIB
PREFETCHED = 2  # batches that a loader process makes in advance, in shared memory


@dataclass(frozen=True)
class HostMemory:
    """Bytes of a machine's memory.

    Attributes:
        start: what a rank takes as it starts, when it continues a run.
        training: what it takes while it trains, its loader processes included.
        node: what all ranks of a node take at most, with decoded images and the copy that is saved.
    """

    start: int
    training: int
    node: int

    @property
    def rank(self) -> int:
        """What a rank takes at most."""
        return max(self.start, self.training)


def host_memory(
    config: Config, memory: RankMemory, stored: int, micro_batch: int, ranks_per_node: int, decoded: int, cuda: bool
) -> HostMemory:
    """Predict the memory of the machine.

    Args:
        config: of the run.
        memory: of a rank, of its most demanding phase.
        stored: bytes of one copy of the network.
        micro_batch: images per rank and forward pass.
        ranks_per_node: ranks that share the machine.
        decoded: bytes of the images of data.in_memory, once per node.
        cuda: whether the ranks train on GPUs.
    """
    saved = memory.host["checkpoint (first rank)"]  # weights, whole optimizer state, average, teacher
    libraries = LIBRARIES + (CUDA if cuda else 0)
    start = libraries + stored + max(saved, stored)
    batch = FP32 * 3 * config.data.image_size**2 * micro_batch
    workers = 0 if config.data.in_memory else config.data.workers * (WORKER + PREFETCHED * batch)
    training = libraries + workers + (stored if cuda else memory.peak.total)
    return HostMemory(start, training, ranks_per_node * max(start, training) + saved + decoded)
