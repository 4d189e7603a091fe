"""The configuration's keys: one frozen, typed class per section.

The sentence under every field is its documentation (``adaptive train --help-config`` and
docs/reference/configuration.md are made from it). Values are checked strictly: a string where a number belongs is an
error. Reading files and overrides is `adaptive.config.loading`'s.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from adaptive.config.base import ConfigSection, Count, NotNegative, Positive, PositiveCount, Share

# Named weightings of the exits' losses; adaptive.training.losses.exit_weights says what they are.
EXIT_WEIGHTS = ("equal", "linear_up", "linear_down")


class ModelConfig(ConfigSection):
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
    """Gradient Equilibrium: true or crossing rescales every tensor that crosses a branch point, tap only the one
    that the exit reads (the authors' released code), false leaves plain summed gradients."""
    collaboration: bool | Literal["attached"] = True
    """Inline Subnetwork Collaboration: each exit also reads the previous exit's prediction, without gradient; attached
    lets the gradient through (only to reproduce the released code)."""
    pretrained: bool = False
    """Start from timm's pretrained weights of this backbone, with the tag of its name (resnet50.a1_in1k) or timm's
    first (needs network access or a filled cache)."""
    weights: str | None = None
    """File of weights (.safetensors, or a .pth holding tensors and plain values only) to start the backbone from: a
    timm model's, of another image size, number of channels or classes too, or what a training script wraps it in."""
    from_run: str | None = None
    """Run folder whose trained network (best checkpoint, moving average where it kept one) this run begins from, with
    all exits and links: to extend a run, for new data or a higher resolution. The architecture is that run's, and need
    not be given again. Only the first start reads it."""
    head_width: Count = 0
    """Width of a pointwise layer with GELU before an early exit's pooling; 0 leaves it out."""
    head_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before the linear layer of every early exit."""
    sync_batchnorm: bool = False
    """Compute BatchNorm statistics over all ranks (CUDA only)."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of timm.create_model, for example {drop_path_rate: 0.1}; for msdnet and ranet their settings,
    for example {growth: 16}."""


class DataConfig(ConfigSection):
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
    in_memory: bool = False
    """Decode the training and validation images once per machine and keep them in its memory, shared by its ranks; for
    small images of side image_size, crop pad or none, and no other augmentation than flips, mixup and cutmix. Batches
    are the same."""
    max_bad: Count = 0
    """Distinct bad samples (missing, damaged, wrongly labelled) that a run may meet. In training the next readable
    sample takes their place, in evaluation they are left out; one more ends the run with a list of them."""
    decoder: Literal["cpu", "cuda"] = "cpu"
    """What decodes training images: the loader processes (libjpeg-turbo), or the GPU that trains (nvJPEG), which then
    crops and flips them as well; for crop resize, and no other augmentation than flips, mixup and cutmix. The crops
    are the same, the pixels differ by rounding. Evaluation decodes on the CPU."""
    image_size: PositiveCount = 224
    """Side of the square input in pixels."""
    interpolation: Literal["bilinear", "bicubic", "random"] = "bicubic"
    """Resampling filter; random draws bilinear or bicubic per training image. With model.pretrained, weights or
    from_run the default is what the weights were trained with, as for mean, std and eval_crop."""
    mean: Annotated[list[float], Field(min_length=3, max_length=3)] = [0.485, 0.456, 0.406]
    """Channel means subtracted from pixels scaled to 0..1; with weights to begin from by default theirs."""
    std: Annotated[list[Positive], Field(min_length=3, max_length=3)] = [0.229, 0.224, 0.225]
    """Channel standard deviations the pixels are divided by; with weights to begin from by default theirs."""
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
    """Share of the resized image that the test-time centre crop keeps; with weights to begin from by default theirs."""
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


class OptimizerConfig(ConfigSection):
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


class ScheduleConfig(ConfigSection):
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


class DistillationConfig(ConfigSection):
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
    """File of the teacher's weights, as for model.weights; without it timm's pretrained ones. Its classes must be the
    dataset's. The teacher is given images of the mean, std and size that it was trained with, where they are known."""
    teacher_options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of timm.create_model for the teacher, for example {img_size: 32}, or {pretrained_cfg_overlay:
    {mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}} for weights of unknown origin."""
    reduction: Literal["batchmean", "mean"] = "batchmean"
    """batchmean sums KL over classes; mean also divides by their number (only to reproduce the released code)."""


class PhaseConfig(ConfigSection):
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


class TrainConfig(ConfigSection):
    """The run: length, batch, precision, device, folder."""

    run_folder: str | None = None
    """Folder of the run; by default runs/<path of the configuration file below configs/, or its name>."""
    resume: Literal["auto", "never", "must"] = "auto"
    """auto continues an existing run; never refuses a folder with a run in it; must refuses to start afresh."""
    accept_new_data: bool = False
    """Continue a run although data.path holds another dataset than the one it began with."""
    epochs: PositiveCount = 90
    """Epochs of a run without phases, and of every phase that does not give its own."""
    max_steps: PositiveCount | None = None
    """Stop after this many optimizer steps (a trial run); the schedule still spans the full length."""
    seed: Count = 0
    """Seed of initialisation, sample order, augmentation and dropout."""
    global_batch: PositiveCount = 256
    """Images per optimizer step over all ranks."""
    micro_batch: PositiveCount | None = None
    """Most images per rank and forward pass; by default global_batch / ranks. The largest number up to it that divides
    a rank's images per step is taken, on any number of ranks, and the rest is accumulated."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """bf16 and fp16 run convolutions and linear layers in that type under autocast; weights, norms and the optimizer
    stay in fp32."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    """DeepSpeed ZeRO stage: what is partitioned over the ranks (1 optimizer, 2 and gradients, 3 and parameters)."""
    clip_norm: NotNegative = 0.0
    """Clip the global gradient norm to this value; 0 is off."""
    exit_weights: list[NotNegative] | str | None = None
    """Loss weight of every exit, or a weighting by name: equal (1 each, the default), linear_up (rising with depth),
    linear_down (falling), both with mean 1."""
    last_only_epochs: NotNegative = 0
    """Epochs (fractions allowed) at the start of each phase in which only the last exit's loss counts."""
    exit_drop: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability that a step leaves an early exit's loss out; those that stay count 1 / (1 - exit_drop) times. The
    last exit is never left out."""
    gradient_surgery: Literal["none", "pcgrad"] = "none"
    """pcgrad projects conflicting gradients of the exits off each other; costs a backward pass per exit. Not with
    zero_stage 3, compile or checkpointing."""
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
    spike_sigma: NotNegative = 0.0
    """Leave out a step whose loss lies more than this many standard deviations above the mean of the last 128 applied
    steps; 0 is off. It is counted as skipped. Not with gradient_surgery."""
    startup_timeout: NotNegative = 1800.0
    """Seconds until the first step (of each phase) before the watchdog ends a hanging process; 0 is off."""
    step_timeout: NotNegative = 900.0
    """Seconds for a step or a batch of validation before the watchdog ends a hanging process; 0 is off."""
    save_timeout: NotNegative = 1800.0
    """Seconds for saving a checkpoint before the watchdog ends a hanging process; 0 is off."""
    peer_timeout: NotNegative = 120.0
    """Seconds without a heartbeat from a rank (its node is down, the network cut, the process killed or stopped) before
    all others end and name it; 0 is off."""


class EvaluateConfig(ConfigSection):
    """Validation during training, and what counts as best."""

    every_epochs: PositiveCount = 1
    """Validate after every n-th epoch (and always after the last)."""
    batch: PositiveCount = 256
    """Images per rank and forward pass."""
    best: Literal["last", "mean"] = "last"
    """The best checkpoint has the highest validation top-1 of the last exit, or mean over the exits."""


class CheckpointConfig(ConfigSection):
    """When to save, and what to keep."""

    every_epochs: PositiveCount = 1
    """Save after every n-th epoch (and always after the last)."""
    every_steps: Count = 0
    """Save after every n-th step as well; 0 is off."""
    keep: PositiveCount = 2
    """Newest checkpoints kept; the best one is kept besides."""
    keep_every: Count = 0
    """Keep the last checkpoint of every n-th epoch for ever; 0 is off."""
    asynchronous: bool = True
    """Write checkpoints while training goes on, from a copy in rank 0's memory; false makes training wait for the
    disk."""
    max_failed: PositiveCount = 2
    """Stop after this many saves in a row that failed (no space, no right to write); before that the run warns and goes
    on. A run whose last save fails stops too."""


class TrackingConfig(ConfigSection):
    """Records, console and W&B."""

    every_steps: PositiveCount = 50
    """Steps between two training records."""
    sample_ids: bool = False
    """Write the ids of the samples that every step consumed to samples/rank-*.jsonl in the run folder."""
    system_seconds: NotNegative = 30.0
    """Seconds between two records of every node's processor, memory, network and GPUs; 0 is off."""
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
    job_type: str = "train"
    """W&B job type, to tell kinds of runs in a group apart."""
    checkpoints: bool = False
    """Show each checkpoint in W&B as a version of the artifact <run id>-checkpoint: a reference to its folder with step
    and score; weights are never uploaded."""
    alerts: bool = True
    """Let W&B alert its user when the run ends with an error, diverges, or is asked to stop."""
    tags: list[str] = []
    """W&B tags."""
    init_timeout: Positive = 60.0
    """Seconds to wait for W&B to start before going on without it."""


class Config(ConfigSection):
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
