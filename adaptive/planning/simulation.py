"""The modelled scaling of a run from one rank to thousands: step time, efficiency, where it drops, and remedies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from adaptive.config.sections import Config
from adaptive.errors import ConfigError
from adaptive.planning.data_plan import DataPlan, Shards, simulate_epoch
from adaptive.planning.memory import Sizes, ZeroSettings
from adaptive.planning.step_time import Hardware, StepTime, step_time
from adaptive.planning.traffic import bytes_sent, step_traffic
from adaptive.training.batch import BatchSizes, batch_sizes

REMEDIES = {
    "batch": (
        "fewer images per rank do not divide further: a larger train.global_batch with a learning rate and a warm-up "
        "to match, or fewer ranks"
    ),
    "communication": (
        "more compute per reduction: a larger train.global_batch (train.micro_batch and accumulation) with warm-up; a "
        "lower train.zero_stage where memory allows it; deepspeed.zero_optimization.overlap_comm with a smaller "
        "reduce_bucket_size (ZeRO 2); faster links between nodes"
    ),
    "data": (
        "every node reads every shard: a URL with data.cache_gib above the dataset's size reads it once per node, and "
        "shards on a disk of the node's own never ask the shared storage"
    ),
}


@dataclass(frozen=True)
class Scaling:
    """The run, dataset and hardware whose scaling is simulated.

    Attributes:
        config: of the run.
        settings: of DeepSpeed; world and accumulation are set for every number of ranks.
        sizes: of the network.
        shards: of the training split.
        images_per_second: of one rank that trains alone.
        hardware: stated rates.
        batch: of the ranks asked for, from where a growing batch grows.
        check: raises ConfigError for a batch with which a run is refused because BatchNorm gets a single image.
        cached: whether nodes keep all shards, so that after the first epoch none is read from the shared storage.
    """

    config: Config
    settings: ZeroSettings
    sizes: Sizes
    shards: Shards
    images_per_second: float
    hardware: Hardware
    batch: BatchSizes
    check: Callable[[BatchSizes], object]
    cached: bool = False


@dataclass(frozen=True)
class ScalingRow:
    """The simulated run on one number of ranks.

    Attributes:
        world: ranks.
        nodes: machines.
        global_batch: of ``data`` and ``time``: the configured one, or where no run can have that, what it grows to.
        grown: whether it is the latter.
        micro_batch: images per rank and forward pass, as a run derives them.
        accumulation: forward passes per step.
        data: the data plan (None: less than one step in the dataset).
        sent: bytes that a rank sends per step, by ZeRO stage.
        time: of a step with that batch.
        fixed: efficiency at the configured global batch (None where a run on so many ranks is refused).
        growing: efficiency where every rank keeps its images per step (None where a step exceeds the dataset).
        fixed_bound: what limits the former.
        growing_bound: what limits the latter.
    """

    world: int
    nodes: int
    global_batch: int
    grown: bool
    micro_batch: int
    accumulation: int
    data: DataPlan | None
    sent: dict[int, float]
    time: StepTime
    fixed: float | None
    growing: float | None
    fixed_bound: str
    growing_bound: str


@dataclass(frozen=True)
class Stop:
    """The smallest number of ranks whose efficiency is below a share, with the cause and the remedy."""

    batch: str
    below: float
    world: int | None
    bound: str = ""
    remedy: str = ""


def simulate(scaling: Scaling, ranks: Sequence[int]) -> list[ScalingRow]:
    """Return a row for every number of ranks."""
    return [_row(scaling, world) for world in ranks]


def find_stops(rows: Sequence[ScalingRow]) -> list[Stop]:
    """Return where efficiency falls below 80 % and 50 %, with the batch fixed and growing with the ranks."""
    stops = []
    for batch in ("fixed", "growing"):
        for below in (0.8, 0.5):
            stop = Stop(batch, below, None)
            for row in rows:
                efficiency = getattr(row, batch)
                if efficiency is None or efficiency < below:
                    bound = getattr(row, f"{batch}_bound")
                    stop = Stop(batch, below, row.world, bound, REMEDIES.get(bound, ""))
                    break
            stops.append(stop)
    return stops


def _row(scaling: Scaling, world: int) -> ScalingRow:
    asked, grown = _shared(scaling, world, scaling.config.train.global_batch), _grown(scaling, world)
    fixed = _timed(scaling, asked) if asked else None
    growing = _timed(scaling, grown) if grown.global_batch <= scaling.shards.images else None
    batch = asked or grown
    time, data = fixed or growing or _timed(scaling, grown)
    settings = replace(scaling.settings, world=world, accumulation=batch.accumulation)
    sent = {
        stage: bytes_sent(step_traffic(scaling.config, replace(settings, stage=stage), scaling.sizes), world)
        for stage in range(4)
    }
    nodes = -(-world // scaling.hardware.ranks_per_node)
    efficiency = [timed[0].compute / timed[0].total if timed else None for timed in (fixed, growing)]
    bounds = [timed[0].bound if timed else "batch" for timed in (fixed, growing)]
    return ScalingRow(
        world, nodes, batch.global_batch, not fixed, batch.micro_batch, batch.accumulation, data, sent, time,
        efficiency[0], efficiency[1], bounds[0], bounds[1],
    )  # fmt: skip


def _shared(scaling: Scaling, world: int, total: int) -> BatchSizes | None:
    """Return how a run shares a global batch out, None where it would be refused."""
    try:
        batch = batch_sizes(scaling.config, world, total)
        if batch.micro_batch == 1:
            scaling.check(batch)
    except ConfigError:
        return None
    return batch if total <= scaling.shards.images else None


def _grown(scaling: Scaling, world: int) -> BatchSizes:
    """Return the batch of which every rank has as many images as of the one that the simulation was asked for."""
    return batch_sizes(scaling.config, world, world * scaling.batch.share)


def _timed(scaling: Scaling, batch: BatchSizes) -> tuple[StepTime, DataPlan | None]:
    """Return the time of a step, and the epoch's data plan."""
    settings = replace(scaling.settings, world=batch.world, accumulation=batch.accumulation)
    data, config, hardware = None, scaling.config, scaling.hardware
    if batch.global_batch <= scaling.shards.images:
        data = simulate_epoch(
            scaling.shards, config.data, config.train.seed, batch.global_batch, batch.micro_batch, batch.world,
            hardware.ranks_per_node,
        )  # fmt: skip
    nodes = -(-batch.world // hardware.ranks_per_node)
    read = nodes * data.bytes_per_node / data.steps if data and not scaling.cached else 0.0
    zero = config.deepspeed.get("zero_optimization", {})
    time = step_time(
        step_traffic(config, settings, scaling.sizes), settings, scaling.sizes.learning,
        batch.share / scaling.images_per_second, hardware, bool(zero.get("overlap_comm")), read,
    )  # fmt: skip
    return time, data
