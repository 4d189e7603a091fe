"""What DeepSpeed does with the settings that users pass through: compared with what they asked for.

DeepSpeed reads a setting and leaves it aside where a stage, a device or another setting has no use for it, and says
nothing. Here every key is judged by DeepSpeed's own types, then by whether anything would follow from it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from adaptive.config.base import ConfigSection, Positive, PositiveCount
from adaptive.config.sections import Config
from adaptive.errors import ConfigError, nearest
from adaptive.training.batch import BatchSizes

# Settings of ZeRO by the stages at which DeepSpeed 0.19 reads them; what is missing here has no effect at any.
ZERO_KEYS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "overlap_comm"), (1, 2, 3)),
    "offload_optimizer": (1, 2, 3),
    **dict.fromkeys(("use_multi_rank_bucket_allreduce", "allgather_bucket_size", "ignore_unused_parameters"), (1, 2)),
    **dict.fromkeys(("round_robin_gradients", "parameter_alignment", "compute_grad_norm"), (1, 2)),
    **dict.fromkeys(("sub_group_size", "prefetch_bucket_size", "param_persistence_threshold"), (3,)),
    **dict.fromkeys(("model_persistence_threshold", "max_live_parameters", "max_reuse_distance"), (3,)),
    **dict.fromkeys(("module_granularity_threshold", "use_all_reduce_for_fetch_params"), (3,)),
    **dict.fromkeys(("allgather_sequential", "offload_param", "zero_hpz_partition_size"), (3,)),
    **dict.fromkeys(("zero_quantized_weights", "zero_quantized_nontrainable_weights"), (3,)),
    **dict.fromkeys(("zero_quantized_gradients", "memory_efficient_linear", "override_module_apply"), (3,)),
    **dict.fromkeys(("log_trace_cache_warnings", "enable_sanity_checks", "leaf_module"), (3,)),
}
NEEDS_GPU = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")
# Keys that DeepSpeed knows and that have no effect in this kind of training, with what to do instead.
WITHOUT_EFFECT = {
    "activation_checkpointing": "the network does not call DeepSpeed's checkpointing; use train.checkpointing",
    "comms_logger": "nothing prints what it collects; remove it",
    "dump_state": "DeepSpeed's log is silenced; see adaptive train --print-config",
    "zero_force_ds_cpu_optimizer": "the optimizer section makes the optimizer; remove it",
}
OFFLOADED_TO_NVME = ("nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "pipeline_read", "pipeline_write",
                     "fast_init")  # fmt: skip


class _FlopsProfiler(ConfigSection):
    enabled: bool = False
    recompute_fwd_factor: float = Field(0.0, ge=0)
    profile_step: PositiveCount = 1
    module_depth: int = -1
    top_modules: PositiveCount = 1
    detailed: bool = True
    output_file: str | None = None


class _Aio(ConfigSection):
    block_size: PositiveCount = 2**20
    queue_depth: PositiveCount = 8
    intra_op_parallelism: PositiveCount = 1
    single_submit: bool = False
    overlap_events: bool = True
    use_gds: bool = False


class _Monitor(ConfigSection):
    enabled: bool = False
    output_path: str = ""
    job_name: str = "DeepSpeedJobName"


class _Plain(ConfigSection):
    """The settings for whose types DeepSpeed has no check of its own."""

    communication_data_type: Literal["fp16", "bf16", "fp32"] | None = None
    prescale_gradients: bool = False
    gradient_predivide_factor: Positive = 1.0
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    disable_python_gc: bool = False
    flops_profiler: _FlopsProfiler = _FlopsProfiler()
    aio: _Aio = _Aio()
    tensorboard: _Monitor = _Monitor()
    csv_monitor: _Monitor = _Monitor()


def check_deepspeed_section(config: Config, batch: BatchSizes, device: str | None = None) -> None:
    """Refuse settings passed through to DeepSpeed that it cannot take, or that would change nothing (ConfigError).

    ``device`` is the type of the run's device, None where that is not known yet. A value that is DeepSpeed's default
    anyway asks for nothing.
    """
    section = config.deepspeed
    for key, reason in WITHOUT_EFFECT.items():
        if key in section:
            raise ConfigError(f"deepspeed.{key} = {section[key]!r} does nothing here: {reason}")
    for key, value in _leaves(section):
        if value == "auto":
            raise ConfigError(f"{key} = 'auto' is a word of Hugging Face's Trainer; give a value, or remove it")
    plain = _validated(_Plain, {k: v for k, v in section.items() if k != "zero_optimization"}, "deepspeed")
    for block in ("flops_profiler", "tensorboard", "csv_monitor"):
        _check_enabled(f"deepspeed.{block}", section.get(block), getattr(plain, block).enabled)
    if plain.tensorboard.enabled and find_spec("tensorboard") is None:
        raise ConfigError("deepspeed.tensorboard.enabled = True needs a package; run: pip install tensorboard")
    zero = _check_zero(config, batch, "cpu" if config.train.device == "cpu" else device)
    _check_scaling(plain, config, zero.reduce_scatter)
    nvme = any(block and block.device == "nvme" for block in (zero.offload_param, zero.offload_optimizer))
    if section.get("aio") and not nvme:
        raise ConfigError(
            f"deepspeed.aio = {section['aio']!r} does nothing here: it belongs to offloading to nvme; remove it"
        )


def check_in_effect(asked: Mapping[str, Any], resolved: Any) -> None:
    """Compare the ZeRO settings that were asked for with those of a built engine (raises ConfigError).

    Args:
        asked: the section zero_optimization, stage included.
        resolved: the engine's own, which one of its settings may have changed.
    """
    kind = type(resolved)
    names, wanted = {field.alias or name: name for name, field in kind.model_fields.items()}, kind(**asked)
    for key, value in asked.items():
        name = names.get(key, key)
        if (real := getattr(resolved, name)) != getattr(wanted, name):
            raise ConfigError(
                f"deepspeed.zero_optimization.{key} = {value!r} is {real!r} in DeepSpeed, which another setting of the "
                "section demands; remove one of them"
            )


def _check_zero(config: Config, batch: BatchSizes, device: str | None) -> Any:
    """Judge the ZeRO settings, and return them as DeepSpeed resolves them."""
    kind = _zero_config()
    stage, asked = config.train.zero_stage, config.deepspeed.get("zero_optimization", {})
    resolved = _validated(kind, {**asked, "stage": stage}, "deepspeed.zero_optimization")
    defaults = kind(stage=stage)
    names = {field.alias or name: name for name, field in kind.model_fields.items()}
    for key, value in asked.items():
        name, field = names.get(key, key), kind.model_fields[names.get(key, key)]
        where = f"deepspeed.zero_optimization.{key} = {value!r}"
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("deprecated"):
            raise ConfigError(f"{where}: DeepSpeed replaced this key; use {extra['new_param']}")
        if getattr(resolved, name) == getattr(defaults, name) or _is_off(getattr(resolved, name)):
            continue
        stages = ZERO_KEYS.get(name, ())
        if stage not in stages:
            useful = f"use train.zero_stage={' or '.join(map(str, stages))}, or remove it" if stages else "remove it"
            raise ConfigError(f"{where} does nothing at train.zero_stage = {stage}; {useful}")
        if name in NEEDS_GPU and device == "cpu":
            raise ConfigError(f"{where} needs DeepSpeed's kernels for GPUs, and this run is on the CPU; remove it")
    for name in ("offload_optimizer", "offload_param"):
        _check_offloading(f"deepspeed.zero_optimization.{name}", asked.get(name), getattr(resolved, name), stage)
    if batch.world % max(1, resolved.zero_hpz_partition_size):
        raise ConfigError(
            f"deepspeed.zero_optimization.zero_hpz_partition_size = {resolved.zero_hpz_partition_size} does not divide "
            f"the {batch.world} ranks; use a number that does"
        )
    if not resolved.compute_grad_norm and config.train.clip_norm:
        raise ConfigError(
            f"deepspeed.zero_optimization.compute_grad_norm = False leaves train.clip_norm = "
            f"{config.train.clip_norm:g} nothing to clip by; set one of them to true or 0"
        )
    return resolved


def _check_offloading(key: str, asked: Any, block: Any, stage: int) -> None:
    """Refuse settings of an offloading that is off, or goes elsewhere than they say."""
    if not asked or block is None:
        return
    others = {name: value for name, value in asked.items() if name != "device"}
    if block.device == "none":
        if others:
            raise ConfigError(f"{key} = {asked!r} does nothing: its device is none; give device: cpu, or remove it")
        return
    if block.device == "nvme" and stage < 3:
        raise ConfigError(f"{key}.device = 'nvme' works at train.zero_stage = 3, not {stage}; use cpu")
    if block.device == "nvme" and block.nvme_path is None:
        raise ConfigError(f"{key}.device = 'nvme' needs {key}.nvme_path, a folder on such a disk")
    for name, value in others.items():
        if name in OFFLOADED_TO_NVME and block.device != "nvme":
            raise ConfigError(f"{key}.{name} = {value!r} does nothing with device: {block.device}; remove it")
        if name in ("super_offload", "cpuadam_cores_perc", "ratio") and value != type(block).model_fields[name].default:
            raise ConfigError(
                f"{key}.{name} = {value!r} belongs to DeepSpeed's own Adam, which is not used here; remove it"
            )


def _check_scaling(plain: _Plain, config: Config, reduce_scatter: bool) -> None:
    """Refuse what would scale gradients before their reduction where DeepSpeed cannot, or does not."""
    stage = config.train.zero_stage
    for key, off in (("prescale_gradients", False), ("gradient_predivide_factor", 1.0)):
        value = getattr(plain, key)
        if value != off and stage >= 2 and reduce_scatter:
            raise ConfigError(
                f"deepspeed.{key} = {value!r} is not supported at train.zero_stage = {stage} with reduce_scatter; "
                "remove it, or set deepspeed.zero_optimization.reduce_scatter=false"
            )
    if plain.prescale_gradients and plain.gradient_predivide_factor != 1.0:
        raise ConfigError(
            f"deepspeed.gradient_predivide_factor = {plain.gradient_predivide_factor:g} does nothing with "
            "deepspeed.prescale_gradients = True; remove one of them"
        )


def _check_enabled(key: str, block: Any, enabled: bool) -> None:
    if block and not enabled:
        raise ConfigError(f"{key} = {block!r} does nothing: it is not enabled; add {key}.enabled=true, or remove it")


def _validated(kind: type[Any], values: Mapping[str, Any], where: str) -> Any:
    """Return ``values`` as a section of that kind; its faults name the key below ``where`` (raises ConfigError)."""
    fields = kind.model_fields if issubclass(kind, BaseModel) else {}
    known = {field.alias or name for name, field in fields.items()} | set(fields)
    for key in values:
        if key not in known:
            remedy = nearest(key, known, f"known: {', '.join(sorted(known))}", most=2)
            raise ConfigError(f"unknown key {where}.{key}; {remedy}")
    try:
        return kind(**values)
    except (ValidationError, AssertionError) as error:
        if isinstance(error, AssertionError):
            raise ConfigError(f"{where} = {dict(values)!r} is not allowed: {error}") from None
        first = error.errors()[0]
        key = ".".join(str(part) for part in (where, *first["loc"]))
        raise ConfigError(f"{key} = {first['input']!r} is not allowed: {first['msg'].lower()}") from None


def _zero_config() -> type[Any]:
    """Return DeepSpeed's own type of the ZeRO settings."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # of a machine without a GPU, which is no concern where a job is only planned
    try:
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    finally:
        logging.disable(before)
    return DeepSpeedZeroConfig


def _is_off(value: Any) -> bool:
    return getattr(value, "device", None) == "none"


def _leaves(tree: Mapping[str, Any], prefix: str = "deepspeed") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}.{key}")
        else:
            yield f"{prefix}.{key}", value
