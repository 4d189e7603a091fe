"""The sections that say how a run is run: length, batch, device, validation, checkpoints, records."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from adaptive.config.base import Count, NotNegative, Positive, PositiveCount, Section


class TrainConfig(Section):
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
    """Seconds without a sign of life from a rank (its node is down, the network cut, the process killed or stopped)
    before all others end and name it; 0 is off."""


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
    keep_every: Count = 0
    """Keep the last checkpoint of every n-th epoch for ever; 0 is off."""
    asynchronous: bool = True
    """Write checkpoints while training goes on, from a copy in rank 0's memory; false makes training wait for the
    disk."""
    max_failed: PositiveCount = 2
    """Stop after this many saves in a row that failed (no space, no right to write); before that the run warns and goes
    on. A run whose last save fails stops too."""


class TrackingConfig(Section):
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
