"""What a configuration needs on a number of ranks, as ``adaptive plan`` shows it: steps, memory, traffic, disk."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode

from adaptive.config.sections import Config
from adaptive.data.reading.in_memory import needed_bytes
from adaptive.errors import ConfigError
from adaptive.networks.network import AdaptiveNetwork
from adaptive.planning.activations import Activations, teacher_model, trace_activations
from adaptive.planning.checked_plan import CheckedPlan
from adaptive.planning.data_plan import DataPlan, Shards, simulate_epoch
from adaptive.planning.host_memory import HostMemory, host_memory
from adaptive.planning.memory import (
    FP32,
    OptimizerBytes,
    RankMemory,
    Sizes,
    ZeroSettings,
    measure_optimizer,
    predict_memory,
)
from adaptive.planning.traffic import Collective, bytes_sent, step_traffic
from adaptive.training.batch import micro_batches
from adaptive.training.checks.trial import check_phases_learn
from adaptive.training.phases import PhasePlan, plan_phase, prepare_phase
from adaptive.training.preflight import checkpoint_bytes

GIB = 2**30
# What a GPU's process needs besides tensors: stated, not measured.
CONTEXT_BYTES = GIB * 3 // 4  # CUDA's context and libraries
FRAGMENTATION = 1.05  # what the allocator reserves over what is allocated


@dataclass(frozen=True)
class PhaseCost:
    """A training phase's length in steps, and what its memory is predicted from."""

    plan: PhasePlan
    steps: int
    sizes: Sizes
    activations: Activations
    teacher: int
    surgery: int
    optimizers: dict[int, OptimizerBytes]

    def memory(self, config: Config, settings: ZeroSettings, micro_batch: int, cuda: bool) -> RankMemory:
        """Predict a rank's memory at these settings and this micro batch."""
        optimizer = self.optimizers[settings.stage]
        return predict_memory(
            config, settings, self.sizes, self.activations, optimizer, micro_batch, cuda, self.teacher, self.surgery
        )


@dataclass(frozen=True)
class Plan:
    """What a configuration will do and need on a number of ranks."""

    checked: CheckedPlan
    cuda: bool
    settings: ZeroSettings
    phases: tuple[PhaseCost, ...]
    data: DataPlan
    checkpoint: int

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run, or train.max_steps where that is less."""
        full = sum(phase.steps for phase in self.phases)
        return min(full, self.checked.config.train.max_steps or full)

    @property
    def memory(self) -> RankMemory:
        """The memory of the phase that needs the most."""
        return self._most(self.settings, self.checked.batch.micro_batch)

    @property
    def phase(self) -> PhaseCost:
        """The phase with most parameters learning, whose traffic is shown."""
        return max(self.phases, key=lambda phase: phase.sizes.learning)

    @property
    def traffic(self) -> list[Collective]:
        """The collectives of one optimizer step."""
        return step_traffic(self.checked.config, self.settings, self.phase.sizes)

    @property
    def bytes_sent(self) -> float:
        """Bytes that a rank sends per optimizer step."""
        return bytes_sent(self.traffic, self.settings.world)

    @property
    def decoded(self) -> int:
        """Bytes of decoded images that every node holds in its memory, for data.in_memory."""
        data = self.checked.config.data
        return needed_bytes(self.checked.index, data) if data.in_memory else 0

    @property
    def disk(self) -> int:
        """Bytes of all checkpoints that lie on disk at a time, at most."""
        return self.checkpoint * (self.checked.config.checkpoint.keep + 2)

    @property
    def host(self) -> HostMemory:
        """What the processes take of the machines' own memory."""
        checked, stored = self.checked, max(phase.sizes.stored for phase in self.phases)
        micro, per_node = checked.batch.micro_batch, checked.ranks_per_node
        return host_memory(checked.config, self.memory, stored, micro, per_node, self.decoded, self.cuda)

    def needed(self, memory: RankMemory) -> int:
        """Return the bytes of a device that this takes: on a GPU with its context and fragmentation."""
        peak = memory.peak.total
        return round(peak * FRAGMENTATION) + CONTEXT_BYTES if self.cuda else peak

    def by_stage(self) -> dict[int, int]:
        """Return the bytes of a device that every ZeRO stage would take."""
        micro = self.checked.batch.micro_batch
        return {stage: self.needed(self._most(replace(self.settings, stage=stage), micro)) for stage in range(4)}

    def largest_micro_batch(self, limit: int) -> int | None:
        """Return the largest micro batch that can be trained with and fits into ``limit`` bytes, or None."""
        config, batch = self.checked.config, self.checked.batch
        fitting = None
        for micro in micro_batches(config, batch.share):
            settings = replace(self.settings, accumulation=batch.share // micro)
            if self.needed(self._most(settings, micro)) <= limit:
                fitting = micro
        if fitting == 1:
            single = replace(batch, micro_batch=1, accumulation=batch.share)
            try:
                check_phases_learn(config, single, self.checked.network, [phase.plan for phase in self.phases])
            except ConfigError:
                return None
        return fitting

    def remedies(self, limit: int) -> list[str]:
        """Return what would lower the memory, with what it would come to."""
        config, batch = self.checked.config, self.checked.batch
        found = []
        micro = self.largest_micro_batch(limit)
        if micro is not None and micro < batch.micro_batch:
            found.append(f"train.micro_batch={micro}, the largest that fits")
        now = self.needed(self.memory)
        small = replace(self.settings, reduce_bucket=min(self.settings.reduce_bucket, 25_000_000))
        if (saved := now - self.needed(self._most(small, batch.micro_batch))) > GIB // 10:
            key = "deepspeed.zero_optimization.reduce_bucket_size=25000000"
            found.append(f"{key} saves {saved / GIB:.2f} GiB")
        for stage, needed in self.by_stage().items():
            if stage > self.settings.stage and needed < now:
                found.append(f"train.zero_stage={stage}: {needed / GIB:.2f} GiB")
        if not config.train.checkpointing:
            found.append("train.checkpointing=true recomputes activations")
        if config.train.precision == "fp32":
            found.append("train.precision=bf16 halves most of them")
        if self.memory.peak.name == "validation":
            found.insert(0, f"a lower evaluate.batch (now {config.evaluate.batch}): validation is the peak")
        return found

    def _most(self, settings: ZeroSettings, micro: int) -> RankMemory:
        config = self.checked.config
        every = [phase.memory(config, settings, micro, self.cuda) for phase in self.phases]
        return max(every, key=lambda memory: memory.peak.total)


def make_plan(checked: CheckedPlan, cuda: bool) -> Plan:
    """Trace, measure and count everything that a plan holds; takes seconds, and little memory."""
    config, batch = checked.config, checked.batch
    shards = Shards.of(checked.index.split(config.data.train_split))
    settings = ZeroSettings.of(config, batch.world, batch.accumulation)
    data = simulate_epoch(
        shards, config.data, config.train.seed, batch.global_batch, batch.micro_batch, batch.world,
        checked.ranks_per_node,
    )  # fmt: skip
    phases = cost_phases(config, checked.network, settings, batch.micro_batch, data.steps, cuda)
    return Plan(checked, cuda, settings, phases, data, checkpoint_bytes(checked.network, config))


def cost_phases(
    config: Config, network: AdaptiveNetwork, settings: ZeroSettings, micro_batch: int, steps_per_epoch: int, cuda: bool
) -> tuple[PhaseCost, ...]:
    """Trace every phase; phases that differ in length alone share a trace. The network is left in the last one."""
    traced: dict[Any, PhaseCost] = {}
    found = []
    for phase in config.resolved_phases():
        plan = plan_phase(config, phase, len(network.exits))
        key = (plan.learn, plan.equilibrium, plan.collaboration, plan.gamma > 0, plan.surgery)
        if key not in traced:
            prepare_phase(network, plan)
            sizes = Sizes.of(network, config.optimizer)
            traced[key] = PhaseCost(
                plan, 0, sizes, trace_activations(config, plan, network, micro_batch),
                _teacher_bytes(config, plan, network, sizes), _surgery_bytes(plan, network),
                {
                    stage: measure_optimizer(network, config.optimizer, replace(settings, stage=stage), cuda)
                    for stage in range(4)
                },
            )  # fmt: skip
        found.append(replace(traced[key], plan=plan, steps=plan.epochs * steps_per_epoch))
    return tuple(found)


def _teacher_bytes(config: Config, plan: PhasePlan, network: AdaptiveNetwork, sizes: Sizes) -> int:
    """Bytes of a teacher's own weights; the moving average is counted by itself."""
    kind = config.distillation.teacher
    if not plan.gamma or kind in ("last", "next", "ema"):
        return 0
    if kind == "frozen":
        return sizes.stored
    with FakeTensorMode():
        model = teacher_model(config, network.num_classes).network
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


def _surgery_bytes(plan: PhasePlan, network: AdaptiveNetwork) -> int:
    """Bytes of gradient surgery at most: every exit's own gradient twice (whole and flat), and the sum twice."""
    if not plan.surgery:
        return 0
    reached = 0
    total = 0
    for block, exit_ in zip(network.blocks, network.exits, strict=True):
        reached += sum(p.numel() for part in (block, exit_) for p in part.parameters())
        total += reached
    return FP32 * 2 * (total + reached)
