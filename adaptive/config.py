"""The typed configuration tree: YAML in, validated frozen objects out.

One class per component; the sentence under every field is its documentation (``adaptive train --help-config`` and
docs/configuration.md are made from it). Values are checked strictly: a string where a number belongs is an error.
"""

from __future__ import annotations

import difflib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from adaptive.errors import ConfigError

Share = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
PositiveCount = Annotated[int, Field(ge=1)]

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
}


class Section(BaseModel):
    """Base of all sections: frozen, strict, no unknown keys, documented by the strings under the fields."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class ModelConfig(Section):
    """Backbone, exits, and what connects them."""

    backbone: str
    """Name of any timm model, for example resnet18 or vit_tiny_patch16_224."""
    exits: PositiveCount | Annotated[list[str], Field(min_length=1)] = 4
    """Number of exits, placed at equal shares of compute, or names of the modules after which the early exits branch
    off; the last exit is always the backbone's own end and is not named."""
    num_classes: PositiveCount | None = None
    """Number of classes; by default the dataset's."""
    equilibrium: bool | Literal["crossing", "tap"] = True
    """Gradient Equilibrium: true or crossing rescales every tensor that crosses a branching point, tap only the one
    that the exit reads (the authors' released code), false leaves plain summed gradients."""
    collaboration: bool = True
    """Inline Subnetwork Collaboration: each exit also reads the previous exit's prediction, without gradient."""
    pretrained: bool = False
    """Start from timm's pretrained weights of this backbone (needs network access or a filled cache)."""
    weights: str | None = None
    """File of plain timm weights (.safetensors, or a .pth holding tensors only) to start the backbone from."""
    head_width: Count = 0
    """Width of a pointwise layer with GELU before an early exit's pooling; 0 leaves it out."""
    head_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before the linear layer of every early exit."""
    sync_batchnorm: bool = False
    """Compute BatchNorm statistics over all ranks (CUDA only)."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of timm.create_model, for example {drop_path_rate: 0.1}."""


class DataConfig(Section):
    """Where the shards lie and how images become tensors."""

    path: str
    """Folder written by `adaptive pack`: shards and index.json."""
    train_split: str = "train"
    """Name of the split to learn from."""
    val_split: str = "val"
    """Name of the split for model selection and calibration."""
    test_split: str = "test"
    """Name of the split that `adaptive evaluate` reports."""
    workers: Count = 2
    """Loader processes per rank; 0 decodes in the training process."""
    shuffle_window: PositiveCount = 8
    """Number of consecutive shards (in each epoch's shard order) within which samples are shuffled."""
    image_size: PositiveCount = 224
    """Side of the square input in pixels."""
    interpolation: Literal["bilinear", "bicubic", "random"] = "bicubic"
    """Resampling filter; random draws bilinear or bicubic per training image."""
    mean: Annotated[list[float], Field(min_length=3, max_length=3)] = [0.485, 0.456, 0.406]
    """Channel means subtracted from pixels scaled to 0..1."""
    std: Annotated[list[Positive], Field(min_length=3, max_length=3)] = [0.229, 0.224, 0.225]
    """Channel standard deviations the pixels are divided by."""
    crop: Literal["resize", "pad", "none"] = "resize"
    """Training crop: resize is random resized crop, pad is pad-and-crop at the image's own scale (CIFAR), none only
    resizes."""
    crop_scale: Annotated[list[Share], Field(min_length=2, max_length=2)] = [0.08, 1.0]
    """Area range of the random resized crop, as shares of the image."""
    crop_ratio: Annotated[list[Positive], Field(min_length=2, max_length=2)] = [0.75, 4 / 3]
    """Aspect ratio range of the random resized crop."""
    crop_padding: Count = 4
    """Pixels of padding on each side for crop: pad."""
    eval_crop: Annotated[float, Field(gt=0, le=1)] = 0.875
    """Share of the resized image that the test-time centre crop keeps."""
    flip: Share = 0.5
    """Probability of a horizontal flip in training."""
    color_jitter: NotNegative = 0.0
    """Strength of brightness, contrast and saturation jitter; 0 is off, and auto_augment replaces it."""
    auto_augment: str | None = None
    """timm policy string, for example rand-m9-mstd0.5-inc1 (RandAugment), augmix-m3 or original."""
    erasing: Share = 0.0
    """Probability of random erasing."""
    mixup: NotNegative = 0.0
    """Mixup alpha; 0 is off. Pairs are drawn inside a micro batch."""
    cutmix: NotNegative = 0.0
    """CutMix alpha; 0 is off. With mixup too, each batch draws one of the two."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the label's mass spread over all classes."""


class OptimizerConfig(Section):
    """Any optimizer that timm can build."""

    name: str = "sgd"
    """timm optimizer name: sgd, adamw, lamb, lion, ..."""
    lr: Positive = 0.1
    """Learning rate at the schedule's peak, for the global batch as configured (no automatic scaling)."""
    weight_decay: NotNegative = 1e-4
    """Weight decay."""
    momentum: Share = 0.9
    """Momentum, for optimizers that have one."""
    nesterov: bool = False
    """Nesterov momentum, for sgd only."""
    decay_norm_and_bias: bool = True
    """Apply weight decay to one-dimensional parameters (norms and biases) as well."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor of the learning rate per backbone layer counted from the end; exits always learn at the full rate."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the optimizer, for example {betas: [0.9, 0.95], eps: 1.0e-6}."""


class ScheduleConfig(Section):
    """Learning rate over the applied steps of one phase (timm's schedulers)."""

    name: Literal["cosine", "step", "multistep", "poly", "tanh", "constant"] = "cosine"
    """Shape of the decay after the warm-up."""
    warmup_epochs: NotNegative = 0
    """Length of the linear warm-up in epochs (fractions allowed)."""
    warmup_lr: NotNegative = 1e-6
    """Learning rate at the start of the warm-up."""
    min_lr: NotNegative = 0.0
    """Lower end of cosine, poly and tanh."""
    decay_rate: Positive = 0.1
    """Factor of step and multistep, power of poly."""
    decay_epochs: Positive = 30
    """Epochs between the decays of step."""
    milestones: list[Share] = [0.5, 0.75]
    """Where multistep decays, as shares of the phase."""


class DistillationConfig(Section):
    """One-for-all distillation: the last exit teaches the earlier ones."""

    gamma: Share = 0.0
    """Weight of the distillation term in (1 - gamma) * CE + gamma * T^2 * KL; 0 is off."""
    temperature: Positive = 1.0
    """Softmax temperature T of teacher and exits."""
    teacher: Literal["last", "frozen", "ema", "model"] = "last"
    """last: the last exit in training; frozen: the last exit as it was when the phase began; ema: the moving average's
    last exit; model: another timm model."""
    teacher_model: str | None = None
    """timm name of the teacher, for teacher: model."""
    teacher_weights: str | None = None
    """File of the teacher's timm weights (.safetensors or tensors-only .pth); without it timm's pretrained ones."""
    reduction: Literal["batchmean", "mean"] = "batchmean"
    """batchmean sums KL over classes; mean also divides by their number (only to reproduce the released code)."""


class PhaseConfig(Section):
    """One stage of training, with an optimizer and a schedule of its own."""

    name: str = "train"
    """Name shown in logs and records."""
    epochs: PositiveCount
    """Length of the phase."""
    learn: Literal["all", "backbone", "exits", "early_exits"] = "all"
    """What learns: everything; the plain backbone (blocks and its own end); all exits with their links; or the early
    exits with their links. What does not learn is frozen and in eval mode."""
    lr: Positive | None = None
    """Peak learning rate; by default optimizer.lr."""
    equilibrium: bool | None = None
    """Switches Gradient Equilibrium off (or leaves it on) in this phase; by default as the model says."""
    collaboration: bool | None = None
    """Switches the collaboration links off (or leaves them on) in this phase; by default as the model says."""
    distillation: bool = True
    """Whether the distillation section applies in this phase."""
    exit_weights: list[NotNegative] | None = None
    """Loss weight of every exit; by default train.exit_weights."""


class TrainConfig(Section):
    """The run: length, batch, precision, device, folder."""

    run_folder: str | None = None
    """Folder of the run; by default runs/<name of the configuration file>."""
    resume: Literal["auto", "never", "must"] = "auto"
    """auto continues an existing run; never refuses a folder with a run in it; must refuses to start afresh."""
    epochs: PositiveCount = 90
    """Epochs of a run without phases."""
    max_steps: PositiveCount | None = None
    """Stop after this many optimizer steps (a trial run); the schedule still spans the full length."""
    seed: Count = 0
    """Seed of initialisation, sample order, augmentation and dropout."""
    global_batch: PositiveCount = 256
    """Images per optimizer step over all ranks."""
    micro_batch: PositiveCount | None = None
    """Images per rank and forward pass; by default global_batch / ranks. The rest is accumulated."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """bf16 and fp16 run convolutions and linear layers in that type under autocast; weights, norms and the optimizer
    stay in fp32."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    """DeepSpeed ZeRO stage: what is partitioned over the ranks (1 optimizer, 2 and gradients, 3 and parameters)."""
    clip_norm: NotNegative = 0.0
    """Clip the global gradient norm to this value; 0 is off."""
    exit_weights: list[NotNegative] | None = None
    """Loss weight of every exit; by default 1 each."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of an exponential moving average of weights and buffers, validated and saved beside them; 0 is off."""
    channels_last: bool = False
    """Keep images and convolution weights in channels-last memory."""
    compile: bool = False
    """Compile the network with torch.compile."""
    checkpointing: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""
    max_skipped: PositiveCount = 20
    """Stop after this many steps in a row that were skipped because a gradient or the loss was not finite."""


class EvaluateConfig(Section):
    """Validation during training, and what counts as best."""

    every_epochs: PositiveCount = 1
    """Validate after every n-th epoch (and always after the last)."""
    batch: PositiveCount = 256
    """Images per rank and forward pass."""
    best: Literal["last", "mean"] = "last"
    """The best checkpoint has the highest validation top-1 of the last exit, or mean over the exits."""


class CheckpointConfig(Section):
    """When to save, and what to keep."""

    every_epochs: PositiveCount = 1
    """Save after every n-th epoch (and always after the last)."""
    every_steps: Count = 0
    """Save after every n-th step as well; 0 is off."""
    keep: PositiveCount = 2
    """Newest checkpoints kept; the best one is kept besides."""


class TrackingConfig(Section):
    """Records, console and W&B."""

    every_steps: PositiveCount = 50
    """Steps between two training records."""
    gradient_norms: bool = True
    """Record every block's gradient norm (gathered over ranks, at recorded steps only)."""
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Send the records to Weights & Biases too."""
    project: str = "adaptive"
    """W&B project."""
    entity: str | None = None
    """W&B user or team; by default the account's own."""
    name: str | None = None
    """W&B run name; by default the run folder's."""
    group: str | None = None
    """W&B group, to tie the runs of a study together."""
    tags: list[str] = []
    """W&B tags."""
    init_timeout: Positive = 60.0
    """Seconds to wait for W&B to start before going on without it."""


class Config(Section):
    """A complete run."""

    model: ModelConfig
    """Backbone, exits, and what connects them."""
    data: DataConfig
    """Where the shards lie and how images become tensors."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Any optimizer that timm can build."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning rate over the applied steps of one phase."""
    train: TrainConfig = TrainConfig()
    """The run: length, batch, precision, device, folder."""
    distillation: DistillationConfig = DistillationConfig()
    """One-for-all distillation."""
    phases: list[PhaseConfig] = []
    """Stages of training, one after another; without any, one phase of train.epochs in which everything learns."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Validation during training."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When to save, and what to keep."""
    tracking: TrackingConfig = TrackingConfig()
    """Records, console and W&B."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Further DeepSpeed settings, merged over the generated ones; keys that a section above owns are refused."""

    def resolved_phases(self) -> list[PhaseConfig]:
        """Return the phases, or the single implied one."""
        return list(self.phases) or [PhaseConfig(epochs=self.train.epochs)]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML configuration and apply ``section.key=value`` overrides.

    Raises:
        ConfigError: the file cannot be read, a key is unknown (with the nearest names), a value has the wrong type or
            lies outside its range, or two keys contradict each other.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"configuration file {path} does not exist{_nearest_file(path)}")
    tree = _parse_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected sections such as model: and data:, found {type(tree).__name__}")
    for override in overrides:
        _apply_override(tree, override)
    config = parse_config(tree, source=str(path))
    if config.train.run_folder is None:
        train = config.train.model_copy(update={"run_folder": str(Path("runs") / path.stem)})
        config = config.model_copy(update={"train": train})
    return config


def parse_config(tree: dict[str, Any], source: str = "configuration") -> Config:
    """Validate a plain tree, as read from YAML, and return the typed one (raises ConfigError)."""
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise ConfigError(f"{source}: {_explain(first)}{more}") from None
    _check_consistency(config)
    return config


def dump_config(config: Config) -> str:
    """Return the complete configuration as YAML, every default written out."""
    stream = io.StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.width = 110
    yaml.dump(config.model_dump(), stream)
    return stream.getvalue()


def differences(one: Config, other: Config) -> dict[str, tuple[Any, Any]]:
    """Return the dotted keys in which two configurations differ, with both values."""
    first, second = (dict(_leaves(c.model_dump())) for c in (one, other))
    return {k: (first.get(k), second.get(k)) for k in sorted({*first, *second}) if first.get(k) != second.get(k)}


def documented_keys(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every configuration key with its field (type, default, description), depth first."""
    for name, field in section.model_fields.items():
        nested = next((t for t in _types_in(field.annotation) if _is_section(t)), None)
        if nested is None:
            yield prefix + name, field
        else:
            yield from documented_keys(nested, f"{prefix}{name}.")


def _types_in(annotation: Any) -> Iterator[Any]:
    yield annotation
    for argument in get_args(annotation):
        yield from _types_in(argument)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {' '.join(str(error).split())[:300]}") from None


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: expected section.key=value, for example train.epochs=10")
    *parents, last = key.split(".")
    node: Any = tree
    for name in parents:
        node = _child(node, name, key)
    value = _parse_yaml(text, f"override {override!r}") if text else ""
    if isinstance(node, list):
        node[_position(node, last, key)] = value
    else:
        node[last] = value


def _child(node: Any, name: str, key: str) -> Any:
    if isinstance(node, list):
        return node[_position(node, name, key)]
    if node.get(name) is None:
        node[name] = {}
    child = node[name]
    if not isinstance(child, dict | list):
        raise ConfigError(f"override {key}: {name} is a value ({child!r}), not a section")
    return child


def _position(node: list[Any], name: str, key: str) -> int:
    if not name.isdigit() or int(name) >= len(node):
        raise ConfigError(f"override {key}: {name!r} is no position in a list of {len(node)}; use 0..{len(node) - 1}")
    return int(name)


def _explain(error: ErrorDetails) -> str:
    location = [str(part) for part in error["loc"]]
    if error["type"] == "extra_forbidden":
        known = sorted(_keys_at(location[:-1]))
        close = difflib.get_close_matches(location[-1], known, n=3) or [
            key for key, _ in documented_keys() if key.split(".")[-1] == location[-1]
        ]
        remedy = f"did you mean {' or '.join(close)}?" if close else f"known here: {', '.join(known)}"
        return f"unknown key {'.'.join(location)}; {remedy}"
    key = ".".join(part for part in location if part.replace("_", "").isalnum() and not part.startswith("function"))
    if error["type"] == "missing":
        return f"{key} is missing; add it to the file or give {key}=..."
    value = error["input"]
    message = error["msg"][0].lower() + error["msg"][1:]
    return f"{key} = {value!r} is not allowed: {message}"


def _keys_at(location: list[str]) -> set[str]:
    section: type[BaseModel] = Config
    for part in location:
        if part.isdigit() or part not in section.model_fields:
            continue
        nested = next((t for t in _types_in(section.model_fields[part].annotation) if _is_section(t)), None)
        section = nested or section
    return set(section.model_fields)


def _nearest_file(path: Path) -> str:
    folder = path.parent
    names = [p.name for p in folder.glob("*.yaml")] if folder.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.4)
    return f"; did you mean {' or '.join(str(folder / n) for n in close)}?" if close else ""


def _check_consistency(config: Config) -> None:
    """Cross-field rules that need neither the dataset nor the network (raises ConfigError)."""
    train, data, distillation = config.train, config.data, config.distillation
    if data.crop_scale[0] > data.crop_scale[1]:
        raise ConfigError(f"data.crop_scale = {data.crop_scale}: the lower end comes first")
    if data.crop_ratio[0] > data.crop_ratio[1]:
        raise ConfigError(f"data.crop_ratio = {data.crop_ratio}: the lower end comes first")
    if train.micro_batch and train.global_batch % train.micro_batch:
        raise ConfigError(
            f"train.global_batch = {train.global_batch} is not divisible by train.micro_batch = {train.micro_batch}"
        )
    if distillation.teacher == "model" and not distillation.teacher_model:
        raise ConfigError("distillation.teacher = 'model' needs distillation.teacher_model, a timm model name")
    if distillation.gamma > 0 and distillation.teacher == "ema" and not train.ema_decay:
        raise ConfigError("distillation.teacher = 'ema' needs train.ema_decay > 0, for example 0.9999")
    if config.optimizer.nesterov and config.optimizer.name != "sgd":
        raise ConfigError(f"optimizer.nesterov is for sgd only, not for {config.optimizer.name!r}")
    if train.device == "cpu" and config.model.sync_batchnorm:
        raise ConfigError("model.sync_batchnorm = true needs a GPU; set it to false with train.device = 'cpu'")
    if config.model.pretrained and config.model.weights:
        raise ConfigError("model.pretrained and model.weights exclude each other; keep one")
    for key, owner in OWNED_ELSEWHERE.items():
        if key in config.deepspeed:
            raise ConfigError(f"deepspeed.{key} is set by {owner}; remove it from the deepspeed section")
    if "stage" in config.deepspeed.get("zero_optimization", {}):
        raise ConfigError("deepspeed.zero_optimization.stage is set by train.zero_stage; remove it")
    if isinstance(config.model.exits, int):
        _check_exit_weights(config, config.model.exits)


def _check_exit_weights(config: Config, exits: int) -> None:
    named = [("train.exit_weights", config.train.exit_weights)]
    named += [(f"phases.{i}.exit_weights", phase.exit_weights) for i, phase in enumerate(config.phases)]
    for key, weights in named:
        if weights is not None and len(weights) != exits:
            raise ConfigError(f"{key} = {weights} has {len(weights)} values for {exits} exits")
        if weights is not None and not any(weights):
            raise ConfigError(f"{key} = {weights}: at least one exit must have a weight above 0")
