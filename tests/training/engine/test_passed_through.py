"""What users pass through to DeepSpeed: refused where it cannot be, or changes nothing; the table is checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adaptive.errors import ConfigError
from tests.helpers.device import DeviceRank
from tests.training.checks.door import checked
from tests.training.engines import SmallRun, chain_config

CPU_OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


def zero(**settings: Any) -> dict[str, Any]:
    return {"zero_optimization": settings}


# ZeRO stage, the section, and what the line must say: key, value, remedy.
REFUSED: dict[str, tuple[int, dict[str, Any], list[str]]] = {
    "offload_without_zero": (0, zero(**CPU_OFFLOAD), ["offload_optimizer = {'device': 'cpu'}", "train.zero_stage=1"]),
    "offload_param_below_3": (2, zero(offload_param={"device": "cpu"}), ["offload_param", "train.zero_stage=3"]),
    "bucket_without_zero": (0, zero(reduce_bucket_size=1000), ["reduce_bucket_size = 1000", "train.zero_stage=1"]),
    "prefetch_below_3": (2, zero(stage3_prefetch_bucket_size=9), ["stage3_prefetch_bucket_size = 9", "zero_stage=3"]),
    "prefetch_by_its_other_name": (1, zero(prefetch_bucket_size=9), ["prefetch_bucket_size = 9", "zero_stage=3"]),
    "round_robin_at_3": (3, zero(round_robin_gradients=True), ["round_robin_gradients = True", "zero_stage=1 or 2"]),
    "checkpoints_are_ours": (3, zero(load_from_fp32_weights=False), ["load_from_fp32_weights = False", "remove it"]),
    "unknown_zero_key": (
        1, zero(reduce_bucket=5), ["zero_optimization.reduce_bucket", "did you mean reduce_bucket_size"],
    ),
    "unknown_offload_key": (
        1, zero(offload_optimizer={"device": "cpu", "pin": True}), ["offload_optimizer.pin", "not permitted"],
    ),
    "offload_that_is_off": (1, zero(offload_optimizer={"pin_memory": True}), ["pin_memory", "device: cpu"]),
    "offload_to_nvme_at_2": (
        2, zero(offload_optimizer={"device": "nvme", "nvme_path": "/tmp"}), ["device = 'nvme'", "zero_stage = 3"],
    ),
    "nvme_path_without_nvme": (
        3, zero(offload_param={"device": "cpu", "nvme_path": "/tmp"}), ["offload_param.nvme_path", "remove it"],
    ),
    "nvme_without_a_path": (3, zero(offload_param={"device": "nvme"}), ["offload_param.nvme_path"]),
    "deepspeeds_own_adam": (
        3, zero(offload_optimizer={"device": "cpu", "super_offload": True}), ["super_offload = True", "remove it"],
    ),
    "replaced_key": (1, zero(cpu_offload=True), ["cpu_offload = True", "use offload_optimizer"]),
    "legacy_stage_1": (1, zero(legacy_stage1=True), ["legacy_stage1 = True", "remove it"]),
    "zenflow": (1, zero(zenflow={"topk_ratio": 0.1}), ["zenflow", "remove it"]),
    "a_word_of_hugging_face": (1, zero(reduce_bucket_size="auto"), ["reduce_bucket_size = 'auto'", "give a value"]),
    "quantised_on_a_cpu": (3, zero(zero_quantized_weights=True), ["zero_quantized_weights = True", "CPU"]),
    "secondary_partition": (3, zero(zero_hpz_partition_size=2), ["zero_hpz_partition_size = 2", "1 ranks"]),
    "norm_that_clipping_needs": (1, zero(compute_grad_norm=False), ["compute_grad_norm", "train.clip_norm = 1"]),
    "activation_checkpointing": (
        0, {"activation_checkpointing": {"cpu_checkpointing": True}},
        ["activation_checkpointing", "train.checkpointing"],
    ),
    "ours_to_set": (0, {"steps_per_print": 10}, ["deepspeed.steps_per_print is set by tracking.every_steps", "remove"]),
    "comms_logger": (0, {"comms_logger": {"enabled": True}}, ["deepspeed.comms_logger", "remove it"]),
    "dump_state": (0, {"dump_state": True}, ["deepspeed.dump_state = True", "--print-config"]),
    "optimizer_of_deepspeed": (0, {"zero_force_ds_cpu_optimizer": True}, ["zero_force_ds_cpu_optimizer = True"]),
    "no_data_type": (0, {"communication_data_type": "fp61"}, ["communication_data_type = 'fp61'", "'bf16'"]),
    "no_bool": (0, {"wall_clock_breakdown": "yes_please"}, ["wall_clock_breakdown = 'yes_please'", "valid boolean"]),
    "no_number": (0, {"gradient_predivide_factor": 0}, ["gradient_predivide_factor = 0", "greater than 0"]),
    "no_section": (0, {"flops_profiler": 3}, ["flops_profiler = 3"]),
    "unknown_key_of_a_section": (
        0, {"flops_profiler": {"enabled": True, "profile_steps": 3}}, ["flops_profiler.profile_steps"],
    ),
    "section_that_is_off": (
        0, {"flops_profiler": {"profile_step": 3}}, ["flops_profiler", "flops_profiler.enabled=true"],
    ),
    "monitor_that_is_off": (0, {"csv_monitor": {"output_path": "x"}}, ["csv_monitor", "csv_monitor.enabled=true"]),
    "aio_without_nvme": (3, {"aio": {"queue_depth": 32}}, ["deepspeed.aio", "nvme"]),
    "prescaled_at_2": (2, {"prescale_gradients": True}, ["prescale_gradients = True", "reduce_scatter=false"]),
    "predivided_at_3": (3, {"gradient_predivide_factor": 2.0}, ["gradient_predivide_factor = 2.0", "reduce_scatter"]),
    "prescaled_and_predivided": (
        0, {"prescale_gradients": True, "gradient_predivide_factor": 2.0}, ["predivide_factor = 2", "remove one"],
    ),
}  # fmt: skip
ALLOWED: list[tuple[int, dict[str, Any]]] = [
    (0, zero(offload_optimizer={"device": "none"})),  # asks for what is anyway
    (0, zero(reduce_bucket_size=500_000_000)),
    (1, zero(reduce_bucket_size=1000, round_robin_gradients=True)),
    (2, {**zero(reduce_scatter=False), "prescale_gradients": True}),
    (3, zero(stage3_prefetch_bucket_size=1000, offload_param={"device": "cpu", "pin_memory": False})),
    (0, {"communication_data_type": "bf16", "wall_clock_breakdown": True, "flops_profiler": {"enabled": True}}),
]


@pytest.mark.parametrize("case", REFUSED)
def test_what_deepspeed_would_leave_aside_is_refused(case: str, digits: Path) -> None:
    stage, section, parts = REFUSED[case]
    clip = 1.0 if case == "norm_that_clipping_needs" else 0.0
    with pytest.raises(ConfigError) as refusal:
        checked(digits, train={"zero_stage": stage, "clip_norm": clip, "device": "cpu"}, deepspeed=section)
    line = str(refusal.value)
    assert line.count("deepspeed.")
    for part in parts:
        assert part in line


@pytest.mark.parametrize(("stage", "section"), ALLOWED)
def test_what_has_an_effect_is_not(stage: int, section: dict[str, Any], digits: Path) -> None:
    checked(digits, train={"zero_stage": stage, "device": "cpu"}, deepspeed=section)


def _resolved_otherwise() -> list[str]:
    """What is said of settings that DeepSpeed changes, and of those that it takes."""
    said = []
    for section in (
        zero(stage3_allgather_sequential=True, stage3_prefetch_bucket_size=1000),
        zero(stage3_prefetch_bucket_size=1000, offload_param={"device": "cpu", "pin_memory": False}),
    ):
        try:
            SmallRun(chain_config({"zero_stage": 3}, deepspeed=section)).engine.destroy()
            said.append("")
        except ConfigError as refusal:
            said.append(str(refusal))
    return said


def test_what_one_setting_makes_of_another_is_refused(device_rank: DeviceRank) -> None:
    refused, taken = device_rank(_resolved_otherwise)
    assert "stage3_prefetch_bucket_size = 1000 is 1 in DeepSpeed" in refused
    assert taken == ""


def _keys_read() -> list[list[str]]:
    """Names of the ZeRO settings that DeepSpeed reads, stage by stage, to build an engine and to take a step."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    reads: set[str] = set()
    plain = DeepSpeedZeroConfig.__getattribute__

    def noting(self: Any, name: str) -> Any:
        reads.add(name)
        return plain(self, name)

    DeepSpeedZeroConfig.__getattribute__ = noting
    found = []
    for stage in range(4):
        reads.clear()
        running = SmallRun(chain_config({"zero_stage": stage}))
        running.step(0)
        running.engine.destroy()
        found.append(sorted(reads & set(DeepSpeedZeroConfig.model_fields)))
    return found


def test_the_table_is_what_deepspeed_reads(device_rank: DeviceRank) -> None:
    from adaptive.training.engine.passed_through import ZERO_KEYS

    for stage, read in enumerate(device_rank(_keys_read)):
        listed = {name for name, stages in ZERO_KEYS.items() if stage in stages}
        assert listed - set(read) == set(), stage
