"""The typed configuration tree: one frozen class per component.

The sentence under every field is its documentation (``adaptive train --help-config`` and docs/configuration.md are made
from it). Values are checked strictly: a string where a number belongs is an error. Reading files and overrides is
`adaptive.config.loading`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, Field
from pydantic.fields import FieldInfo

from adaptive.config.base import Count, NotNegative, Positive, PositiveCount, Section, Share
from adaptive.config.run import CheckpointConfig as CheckpointConfig
from adaptive.config.run import EvaluateConfig as EvaluateConfig
from adaptive.config.run import TrackingConfig as TrackingConfig
from adaptive.config.run import TrainConfig as TrainConfig

# Weightings of the exits that have a name; adaptive.training.losses.exit_weights says what they are.
EXIT_WEIGHTS = ("equal", "linear_up", "linear_down")


class ModelConfig(Section):
    """Backbone, exits, and what connects them."""

    backbone: str
    """Name of any timm model, for example resnet18 or vit_tiny_patch16_224, or one of msdnet, ranet and their presets
    (msdnet_cifar_anytime, ...)."""
    exits: PositiveCount | Annotated[list[str], Field(min_length=1)] | None = None
    """Number of exits, placed at equal shares of compute, or names of the modules after which the early exits branch
    off; the last exit is always the backbone's own end and is not named. By default 4, or as many as an MSDNet's or
    RANet's preset has."""
    num_classes: PositiveCount | None = None
    """Number of classes; by default the dataset's."""
    equilibrium: bool | Literal["crossing", "tap"] = True
    """Gradient Equilibrium: true or crossing rescales every tensor that crosses a branching point, tap only the one
    that the exit reads (the authors' released code), false leaves plain summed gradients."""
    collaboration: bool | Literal["attached"] = True
    """Inline Subnetwork Collaboration: each exit also reads the previous exit's prediction, without gradient; attached
    lets the gradient through (only to reproduce the released code)."""
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
    """Further arguments of timm.create_model, for example {drop_path_rate: 0.1}; for msdnet and ranet their settings,
    for example {growth: 16}."""


class DataConfig(Section):
    """Where the shards lie and how images become tensors."""

    path: Annotated[str, Field(min_length=1)]
    """Folder written by `adaptive pack` (shards and index.json), or its URL: http(s)://, s3://, gs://."""
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
    cache: str | None = None
    """Folder that keeps the shards of a URL, shared by all processes of a machine; by default adaptive/shards below
    $XDG_CACHE_HOME or ~/.cache."""
    cache_gib: Positive = 100.0
    """Bound of that folder in GiB; the shards that were not used for longest make room."""
    cache_ahead: Count | None = None
    """Shards of a URL fetched ahead of their use; by default as many as shuffle_window."""
    attempts: PositiveCount = 5
    """How often reading from a URL is tried, with growing pauses, before it counts as failed."""
    timeout: Positive = 60.0
    """Seconds without a single byte from a URL after which an attempt has failed."""
    pipe: bool = False
    """Allow a path of the form "pipe:COMMAND {}": the shell runs COMMAND with a file's name for {}, and its output is
    the file. Whoever sets path then runs programs here."""
    max_bad: Count = 0
    """Distinct bad samples (missing, damaged, wrongly labelled) that a run may meet. In training the next readable
    sample takes their place, in evaluation they are left out; one more ends the run with a list of them."""
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
    """Apply weight decay to everything; false spares norms, biases and what timm names for the backbone (position
    embeddings, class tokens ...), as timm does."""
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
    """Distillation among the exits (one-for-all: the last exit teaches the earlier ones) or from another network."""

    gamma: Share = 0.0
    """Weight of the distillation term in (1 - gamma) * CE + gamma * T^2 * KL; 0 is off."""
    temperature: Positive = 1.0
    """Softmax temperature T of teacher and exits."""
    teacher: Literal["last", "next", "frozen", "ema", "model"] = "last"
    """last: the last exit in training; next: each exit's successor; frozen: the last exit as it was when the phase
    began; ema: the moving average's last exit; model: another timm model, which teaches the last exit too."""
    teacher_model: str | None = None
    """timm name of the teacher, for teacher: model."""
    teacher_weights: str | None = None
    """File of the teacher's timm weights (.safetensors or tensors-only .pth); without it timm's pretrained ones."""
    teacher_options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of timm.create_model for the teacher, for example {img_size: 32}."""
    reduction: Literal["batchmean", "mean"] = "batchmean"
    """batchmean sums KL over classes; mean also divides by their number (only to reproduce the released code)."""


class PhaseConfig(Section):
    """One stage of training, with an optimizer and a schedule of its own."""

    name: str = "train"
    """Name shown in logs and records."""
    epochs: PositiveCount | None = None
    """Length of the phase; by default train.epochs."""
    learn: Literal["all", "backbone", "exits", "early_exits", "classifiers"] = "all"
    """What learns: everything; the plain backbone (blocks and its own end); all exits with their links; the early exits
    with their links; or of all exits only the last linear layer and the link. What does not learn is frozen and in eval
    mode."""
    reset_classifiers: bool = False
    """Begin the phase with fresh last linear layers and links (as the released code's second phase does)."""
    lr: Positive | None = None
    """Peak learning rate; by default optimizer.lr."""
    equilibrium: bool | None = None
    """Switches Gradient Equilibrium off (or leaves it on) in this phase; by default as the model says."""
    collaboration: bool | None = None
    """Switches the collaboration links off (or leaves them on) in this phase; by default as the model says."""
    distillation: bool = True
    """Whether the distillation section applies in this phase."""
    exit_weights: list[NotNegative] | str | None = None
    """Loss weight of every exit, or equal, linear_up, linear_down; by default train.exit_weights."""
    last_only_epochs: NotNegative | None = None
    """Epochs at the phase's start in which the last exit learns alone; by default train.last_only_epochs."""


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
        """Return the phases, or the single implied one, each with its length."""
        phases = self.phases or [PhaseConfig()]
        return [phase.model_copy(update={"epochs": phase.epochs or self.train.epochs}) for phase in phases]


def documented_keys(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every configuration key with its field (type, default, description), depth first."""
    for name, field in section.model_fields.items():
        nested = next((t for t in types_in(field.annotation) if is_section(t)), None)
        if nested is None:
            yield prefix + name, field
        else:
            yield from documented_keys(nested, f"{prefix}{name}.")


def types_in(annotation: Any) -> Iterator[Any]:
    """Yield a type and all types nested in its arguments."""
    yield annotation
    for argument in get_args(annotation):
        yield from types_in(argument)


def is_section(annotation: Any) -> bool:
    """Tell whether a type is one of the sections."""
    return isinstance(annotation, type) and issubclass(annotation, Section)
