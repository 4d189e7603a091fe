"""The modelled scaling of a run from one rank to thousands: step time, efficiency, where it drops, and remedies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from adaptive.config.sections import Config
from adaptive.planning.data_plan import DataPlan, Shards, simulate_epoch
from adaptive.planning.memory import Sizes, ZeroSettings
from adaptive.planning.step_time import Hardware, StepTime, step_time
from adaptive.planning.traffic import bytes_sent, step_traffic

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
        micro_batch: images per rank and forward pass.
        accumulation: micro batches per step, where the batch grows with the ranks.
        cached: whether nodes keep all shards, so that after the first epoch none is read from the shared storage.
    """

    config: Config
    settings: ZeroSettings
    sizes: Sizes
    shards: Shards
    images_per_second: float
    hardware: Hardware
    micro_batch: int
    accumulation: int = 1
    cached: bool = False


@dataclass(frozen=True)
class ScalingRow:
    """The simulated run on one number of ranks.

    Attributes:
        world: ranks.
        nodes: machines.
        global_batch: of ``data`` and ``time``: the configured one, or where that does not divide, what it grows to.
        grown: whether it is the latter.
        data: the data plan (None: less than one step in the dataset).
        sent: bytes that a rank sends per step, by ZeRO stage.
        time: of a step with that batch.
        fixed: efficiency at the configured global batch (None where it does not divide).
        growing: efficiency where every rank keeps its images per step (None where a step exceeds the dataset).
        fixed_bound: what limits the former.
        growing_bound: what limits the latter.
    """

    world: int
    nodes: int
    global_batch: int
    grown: bool
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
    total = scaling.config.train.global_batch
    grown = world * scaling.micro_batch * scaling.accumulation
    divides = total % world == 0 and total <= scaling.shards.images
    fixed = _timed(scaling, world, total // world) if divides else None
    growing = _timed(scaling, world, grown // world) if grown <= scaling.shards.images else None
    shown = fixed or growing or _timed(scaling, world, grown // world)
    batch = total if fixed else grown
    settings = replace(scaling.settings, world=world, accumulation=_micros(scaling, batch // world))
    sent = {
        stage: bytes_sent(step_traffic(scaling.config, replace(settings, stage=stage), scaling.sizes), world)
        for stage in range(4)
    }
    nodes = -(-world // scaling.hardware.ranks_per_node)
    efficiency = [timed[0].compute / timed[0].total if timed else None for timed in (fixed, growing)]
    bounds = [timed[0].bound if timed else "batch" for timed in (fixed, growing)]
    return ScalingRow(
        world, nodes, batch, not fixed, shown[1], sent, shown[0], efficiency[0], efficiency[1], bounds[0], bounds[1]
    )


def _timed(scaling: Scaling, world: int, images: int) -> tuple[StepTime, DataPlan | None]:
    """Return the time of a step of ``images`` per rank, and the epoch's data plan."""
    micros = _micros(scaling, images)
    settings = replace(scaling.settings, world=world, accumulation=micros)
    data, config, hardware = None, scaling.config, scaling.hardware
    if world * images <= scaling.shards.images:
        data = simulate_epoch(
            scaling.shards, config.data, config.train.seed, world * images, images // micros, world,
            hardware.ranks_per_node,
        )  # fmt: skip
    nodes = -(-world // hardware.ranks_per_node)
    read = nodes * data.bytes_per_node / data.steps if data and not scaling.cached else 0.0
    zero = config.deepspeed.get("zero_optimization", {})
    time = step_time(
        step_traffic(config, settings, scaling.sizes), settings, scaling.sizes.learning,
        images / scaling.images_per_second, hardware, bool(zero.get("overlap_comm")), read,
    )  # fmt: skip
    return time, data


def _micros(scaling: Scaling, images: int) -> int:
    """Return the least number of equal micro batches, none above the configured one, that ``images`` divide into."""
    return next(n for n in range(1, images + 1) if images % n == 0 and images // n <= scaling.micro_batch)
