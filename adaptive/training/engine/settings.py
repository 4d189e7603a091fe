"""The DeepSpeed configuration that a run generates; passed_through.py checks what users add to it."""

from __future__ import annotations

from typing import Any

from adaptive.config.loading import merge
from adaptive.config.sections import Config
from adaptive.networks.precision import PRECISION_DTYPES
from adaptive.training.batch import BatchSizes


def deepspeed_config(config: Config, batch: BatchSizes) -> dict[str, Any]:
    """Generate DeepSpeed's JSON from the configuration; the ``deepspeed`` section is merged over it."""
    train = config.train
    generated: dict[str, Any] = {
        "train_batch_size": batch.global_batch,
        "train_micro_batch_size_per_gpu": batch.micro_batch,
        "gradient_accumulation_steps": batch.accumulation,
        "gradient_clipping": train.clip_norm,
        "zero_optimization": {"stage": train.zero_stage},
        # Any elementwise torch optimizer is sound under ZeRO; which ones are is checked in adaptive.training.optimizer.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31 - 1,
        # Its throughput timer would let the host wait for the device twice in every micro batch.
        "timers": {"throughput": {"enabled": False}},
    }
    if train.precision != "fp32":
        name = str(PRECISION_DTYPES[train.precision]).removeprefix("torch.")
        # No "safe modules": their gradients would be reduced over the ranks in the low precision.
        generated["torch_autocast"] = {"enabled": True, "dtype": name, "lower_precision_safe_modules": []}
    return merge(generated, config.deepspeed)
