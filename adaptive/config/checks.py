"""Rules that tie several configuration keys together."""

from __future__ import annotations

from adaptive.config.sections import EXIT_WEIGHTS, Config, DataConfig
from adaptive.errors import ConfigError, nearest

# DeepSpeed settings that another section owns: setting them twice would let the two disagree.
OWNED_ELSEWHERE = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch and train.micro_batch",
    "gradient_clipping": "train.clip_norm",
    "optimizer": "the optimizer section",
    "scheduler": "the schedule section",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "torch_autocast": "train.precision",
    "amp": "train.precision",
    "compile": "train.compile",
    "checkpoint": "the checkpoint section",
    "wandb": "the tracking section",
    "steps_per_print": "tracking.every_steps",
    "timers": "the tracking section, which counts train/images_per_second",
    "zero_allow_untested_optimizer": "optimizer.name, whose fitness for ZeRO is checked",
}


# The rest of DeepSpeed's settings that mean something for this kind of training. It ignores what it does not know,
# so a misspelt key would go unnoticed.
PASSED_THROUGH = {
    "zero_optimization",
    "zero_force_ds_cpu_optimizer",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "activation_checkpointing",
    "aio",
    "comms_logger",
    "flops_profiler",
    "tensorboard",
    "csv_monitor",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "disable_python_gc",
}


def check_consistency(config: Config) -> None:
    """Check the rules between keys that need neither the dataset nor the network (raises ConfigError)."""
    train, data, distillation = config.train, config.data, config.distillation
    if data.crop_scale[0] > data.crop_scale[1]:
        raise ConfigError(f"data.crop_scale = {data.crop_scale}: the lower end comes first")
    if data.crop_ratio[0] > data.crop_ratio[1]:
        raise ConfigError(f"data.crop_ratio = {data.crop_ratio}: the lower end comes first")
    _check_in_memory(data)
    if data.decoder == "cuda":
        _check_gpu_decoding(config)
    if distillation.teacher == "model" and not distillation.teacher_model:
        raise ConfigError("distillation.teacher = 'model' needs distillation.teacher_model, a timm model name")
    if distillation.gamma > 0 and distillation.teacher == "ema" and not train.ema_decay:
        raise ConfigError("distillation.teacher = 'ema' needs train.ema_decay > 0, for example 0.9999")
    if config.optimizer.nesterov and config.optimizer.name != "sgd":
        raise ConfigError(f"optimizer.nesterov is for sgd only, not for {config.optimizer.name!r}")
    if train.device == "cpu" and config.model.sync_batchnorm:
        raise ConfigError("model.sync_batchnorm = true needs a GPU; set it to false with train.device = 'cpu'")
    starts = [key for key in ("pretrained", "weights", "from_run") if getattr(config.model, key)]
    if len(starts) > 1:
        raise ConfigError(f"{' and '.join(f'model.{key}' for key in starts)} exclude each other; keep one")
    for key, owner in OWNED_ELSEWHERE.items():
        if key in config.deepspeed:
            raise ConfigError(f"deepspeed.{key} is set by {owner}; remove it from the deepspeed section")
    for key in config.deepspeed:
        if key not in PASSED_THROUGH:
            remedy = nearest(key, PASSED_THROUGH, f"known: {', '.join(sorted(PASSED_THROUGH))}", most=2)
            raise ConfigError(f"unknown key deepspeed.{key}; {remedy}")
    zero = config.deepspeed.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ConfigError(f"deepspeed.zero_optimization = {zero!r} is not allowed: it holds DeepSpeed's ZeRO settings")
    if "stage" in zero:
        raise ConfigError("deepspeed.zero_optimization.stage is set by train.zero_stage; remove it")
    _check_surgery(config)
    _check_last_only(config)
    check_exit_weights(config, config.model.exits if isinstance(config.model.exits, int) else None)


def check_exit_weights(config: Config, exits: int | None) -> None:
    """Check that loss weights have a known name or are as many as exits, and are not all 0 (raises ConfigError).

    ``exits`` is None while their number is not known.
    """
    named = [("train.exit_weights", config.train.exit_weights)]
    named += [(f"phases.{i}.exit_weights", phase.exit_weights) for i, phase in enumerate(config.phases)]
    for key, weights in named:
        if isinstance(weights, str):
            if weights not in EXIT_WEIGHTS:
                remedy = f"{found} " if (found := nearest(weights, EXIT_WEIGHTS, most=1)) else ""
                known = ", ".join(EXIT_WEIGHTS)
                raise ConfigError(f"{key} = {weights!r} is no weighting; {remedy}use {known}, or a list of numbers")
            continue
        if exits is not None and weights is not None and len(weights) != exits:
            raise ConfigError(f"{key} = {weights} has {len(weights)} values for {exits} exits; give one per exit")
        if weights is not None and not any(weights):
            raise ConfigError(f"{key} = {weights}: at least one exit must have a weight above 0")


def _check_in_memory(data: DataConfig) -> None:
    """Refuse data.in_memory with an augmentation that is not made of whole batches."""
    if not data.in_memory:
        return
    if data.crop == "resize":
        raise ConfigError(
            "data.in_memory = true keeps images decoded at data.image_size, and data.crop = 'resize' crops them at "
            "their own size; use data.crop=pad or none, or data.in_memory=false"
        )
    further = {"auto_augment": (data.auto_augment, "null"), "color_jitter": (data.color_jitter, "0"),
               "erasing": (data.erasing, "0")}  # fmt: skip
    for key, (value, off) in further.items():
        if value:
            raise ConfigError(
                f"data.in_memory = true crops and flips whole batches, and data.{key} = {value!r} is drawn image by "
                f"image; use data.{key}={off}, or data.in_memory=false"
            )


def _check_gpu_decoding(config: Config) -> None:
    """Refuse data.decoder = cuda with what happens between decoding and the device, or needs an image decoded."""
    data = config.data
    if config.train.device == "cpu":
        raise ConfigError("data.decoder = 'cuda' needs a GPU, and train.device = 'cpu'; use data.decoder=cpu")
    if data.crop != "resize":
        raise ConfigError(f"data.decoder = 'cuda' knows data.crop = 'resize', not {data.crop!r}; use data.decoder=cpu")
    others = (("auto_augment", data.auto_augment, "null"), ("color_jitter", data.color_jitter, "0"),
              ("erasing", data.erasing, "0"))  # fmt: skip
    for key, value, off in others:
        if value:
            raise ConfigError(
                f"data.decoder = 'cuda' leaves the loader processes no pixels for data.{key} = {value!r}; "
                f"use data.{key}={off} or data.decoder=cpu"
            )
    if data.max_bad:
        raise ConfigError(
            f"data.max_bad = {data.max_bad}: with data.decoder = 'cuda' images are decoded where no other sample can "
            "take a bad one's place; use data.max_bad=0 or data.decoder=cpu"
        )


def _check_surgery(config: Config) -> None:
    train = config.train
    if train.gradient_surgery == "none":
        return
    if train.zero_stage == 3:
        raise ConfigError(
            f"train.gradient_surgery = {train.gradient_surgery!r} needs several backward passes over whole parameters, "
            "which train.zero_stage = 3 partitions after the first; use train.zero_stage=2 or less"
        )
    if train.spike_sigma:
        raise ConfigError(
            f"train.spike_sigma = {train.spike_sigma:g} judges a step before its backward pass, which "
            f"train.gradient_surgery = {train.gradient_surgery!r} has done by then; set one of them to 0 or none"
        )
    for key, enabled in (("compile", train.compile), ("checkpointing", train.checkpointing)):
        if enabled:
            raise ConfigError(
                f"train.gradient_surgery = {train.gradient_surgery!r} needs several backward passes through one "
                f"forward pass, and train.{key} = true allows one; use train.{key}=false"
            )


def _check_last_only(config: Config) -> None:
    """Refuse a warm-up of the last exit that fills its phase, or in which nothing would learn."""
    for i, phase in enumerate(config.resolved_phases()):
        own = phase.last_only_epochs is not None
        key = f"phases.{i}.last_only_epochs" if own else "train.last_only_epochs"
        epochs = phase.last_only_epochs if phase.last_only_epochs is not None else config.train.last_only_epochs
        if not epochs or (phase.learn == "backbone" and phase.exit_weights is None):
            continue
        elsewhere = f", or phases.{i}.last_only_epochs=0 for this phase" if config.phases and not own else ""
        weights = config.train.exit_weights if phase.exit_weights is None else phase.exit_weights
        if phase.epochs and epochs >= phase.epochs:
            raise ConfigError(f"{key} = {epochs} must be below the {phase.epochs} epochs of phase {phase.name!r}")
        if phase.learn == "early_exits":
            raise ConfigError(
                f"{key} = {epochs}: the last exit does not learn in phase {phase.name!r}; use 0{elsewhere}"
            )
        if isinstance(weights, list) and weights and not weights[-1]:
            raise ConfigError(f"{key} = {epochs}: the last exit's weight in {weights} is 0; use 0{elsewhere}")
