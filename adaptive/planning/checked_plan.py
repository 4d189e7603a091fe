"""The checks that a run makes at its start, made before it is submitted: without ranks, GPU or process group."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from adaptive.config.sections import Config
from adaptive.data.shards.index import DatasetIndex
from adaptive.errors import AdaptiveError
from adaptive.networks.network import AdaptiveNetwork
from adaptive.training import preflight
from adaptive.training.batch import BatchSizes, batch_sizes
from adaptive.training.checkpoints.store import CheckpointStore
from adaptive.training.phases import plan_phase
from adaptive.training.starting.first_network import first_network
from adaptive.training.starting.frozen import check_frozen
from adaptive.training.starting.settings import complete


@dataclass(frozen=True)
class CheckedPlan:
    """A configuration that passed its checks, and what they built: batch sizes, dataset index, network.

    ``notes`` tell of settings without effect.
    """

    config: Config
    nodes: int
    ranks_per_node: int
    batch: BatchSizes
    index: DatasetIndex
    network: AdaptiveNetwork
    notes: tuple[str, ...] = ()


def check_plan(config: Config, nodes: int, gpus_per_node: int) -> CheckedPlan:
    """Check a configuration for ``nodes`` x ``gpus_per_node`` ranks, with the checks that a run makes at its start.

    Batch arithmetic first, then dataset, backbone, phases, optimizer, DeepSpeed's settings, what the run folder holds,
    and disk space. Nothing is written, and pretrained weights are not fetched.

    Raises:
        AdaptiveError: one of its kinds, naming key or flag, value and remedy.
    """
    for flag, number in (("--nodes", nodes), ("--gpus-per-node", gpus_per_node)):
        if number < 1:
            raise AdaptiveError(f"{flag} {number} is too small; give 1 or more")
    config = complete(config)
    batch = batch_sizes(config, nodes * gpus_per_node)
    index = preflight.check_dataset(config)
    folder = Path(str(config.train.run_folder))
    goes_on, _ = preflight.find_resume_point(config, index, CheckpointStore(folder / "checkpoints"))
    network = first_network(config, index.classes, goes_on is not None, fetch=False).network
    preflight.check_exit_weights(config, len(network.exits))
    preflight.check_disk_space(folder, network, config)
    notes = preflight.check_training(config, batch, index, network, begun=goes_on is not None)
    if goes_on is None:
        plans = [plan_phase(config, phase, len(network.exits)) for phase in config.resolved_phases()]
        check_frozen(config, network, plans)
    return CheckedPlan(config, nodes, gpus_per_node, batch, index, network, tuple(notes))
