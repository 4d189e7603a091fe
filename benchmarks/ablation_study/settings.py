"""What the ablation trains: sizes, data sets, and variants by name, as configurations of the real training."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adaptive.errors import ConfigError

DEFAULT_VARIANTS = ("sum", "ge", "ge+isc", "ge+isc+ofa")

# A variant is parts joined by +; each part changes these keys of the configuration.
PARTS: dict[str, dict[str, dict[str, Any]]] = {
    "sum": {},
    "ge": {"model": {"equilibrium": True}},
    "ge_tap": {"model": {"equilibrium": "tap"}},
    "isc": {"phase": {"collaboration": True}},
    "ofa": {"distillation": {"teacher": "last"}},
    "next": {"distillation": {"teacher": "next"}},
    "teacher": {"distillation": {"teacher": "model"}},
    "linear_up": {"train": {"exit_weights": "linear_up"}},
    "linear_down": {"train": {"exit_weights": "linear_down"}},
    "last_only": {"train": {"last_only_epochs": 0.2}},  # share of the epochs, see `tree`
    "exit_drop": {"train": {"exit_drop": 0.3}},
    "pcgrad": {"train": {"gradient_surgery": "pcgrad"}},
}


@dataclass(frozen=True)
class Size:
    """A network, its data, and how long it learns.

    Attributes:
        model: keys of the model section.
        images: of train, val and test that are drawn from the source; None takes all, with val held out of train.
        shrink: the images' side is the data set's divided by this.
        epochs: length.
        workers: loader processes.
        channels_last: memory layout.
        gradient_batch: training images that the gradient record is made on.
    """

    model: dict[str, Any]
    images: tuple[int, int, int] | None
    shrink: int
    epochs: int
    workers: int
    channels_last: bool
    gradient_batch: int


@dataclass(frozen=True)
class DataSet:
    """Side of its images in pixels, how many of them are held out where all are used, and its channels' statistics."""

    side: int
    hold_out: int
    statistics: dict[str, list[float]] = field(default_factory=dict)


SIZES = {
    "small": Size(
        model={
            "backbone": "msdnet",
            "exits": 4,
            "options": {
                "base": 1,
                "step": 1,
                "channels": 8,
                "growth": 8,
                "bottleneck": False,
                "head_channels": 32,
            },
        },
        images=(10_000, 2_000, 5_000),
        shrink=2,
        epochs=4,
        workers=0,
        channels_last=True,
        gradient_batch=256,
    ),
    "gpu": Size(
        model={"backbone": "msdnet_cifar_anytime"},
        images=None,
        shrink=1,
        epochs=60,
        workers=6,
        channels_last=False,
        gradient_batch=512,
    ),
}
DATA_SETS = {
    "cifar10": DataSet(32, 5_000, {"mean": [0.4914, 0.4822, 0.4465], "std": [0.2470, 0.2435, 0.2616]}),
    "tiny-imagenet-50": DataSet(64, 2_500),
}


@dataclass(frozen=True)
class Experiment:
    """All that the runs of one ablation share; what is None is the size's or the data set's own."""

    size: str
    data: str
    epochs: int
    steps: int | None = None
    gamma: float = 0.1
    temperature: float = 1.0
    teacher: dict[str, Any] = field(default_factory=dict)

    @property
    def stem(self) -> str:
        """Name of the result files."""
        return f"ablation_{self.size}" + ("" if self.data == "cifar10" else f"_{self.data}")


def parts_of(variant: str) -> list[str]:
    """Split a variant's name into its parts (ConfigError: an unknown part, or two that exclude each other)."""
    parts = variant.split("+")
    taken: dict[tuple[str, str], str] = {}
    for part in parts:
        if part not in PARTS:
            close = difflib.get_close_matches(part, PARTS, n=1)
            remedy = f"did you mean {close[0]}? " if close else ""
            raise ConfigError(f"--variants {variant}: {part!r} is no part; {remedy}known: {', '.join(PARTS)}")
        for place in ((section, key) for section, keys in PARTS[part].items() for key in keys):
            if place in taken:
                raise ConfigError(f"--variants {variant}: {taken[place]} and {part} exclude each other; keep one")
            taken[place] = part
    if "sum" in parts and {"ge", "ge_tap"} & set(parts):
        raise ConfigError(f"--variants {variant}: sum means plain summed gradients; leave out sum or ge")
    return parts


def tree(experiment: Experiment, variant: str, seed: int, packed: str | Path, run_folder: Path) -> dict[str, Any]:
    """Return the configuration of one run, as a plain tree.

    Every variant builds the network with links and switches them off in its only phase where it has none: the same
    random numbers then make the same initial weights in all variants of a seed.
    """
    size, data = SIZES[experiment.size], DATA_SETS[experiment.data]
    changes: dict[str, dict[str, Any]] = {"phase": {"collaboration": False}, "model": {"equilibrium": False}}
    for part in parts_of(variant):
        for section, keys in PARTS[part].items():
            changes[section] = changes.get(section, {}) | keys
    train = dict(changes.get("train", {}))
    if "last_only_epochs" in train:
        train["last_only_epochs"] *= experiment.epochs
    distillation = dict(changes.get("distillation", {}))
    if distillation:
        distillation |= {"gamma": experiment.gamma, "temperature": experiment.temperature}
        if distillation["teacher"] == "model":
            distillation |= experiment.teacher
    return {
        "model": {**size.model, "collaboration": True, **changes["model"]},
        "data": {
            "path": str(packed),
            "image_size": data.side // size.shrink,
            "crop": "pad",
            "crop_padding": data.side // size.shrink // 8,
            "eval_crop": 1.0,
            "interpolation": "bilinear",
            "workers": size.workers,
            **data.statistics,
        },
        "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4},
        "schedule": {"name": "multistep", "milestones": [0.5, 0.75]},
        "train": {
            "run_folder": str(run_folder),
            "epochs": experiment.epochs,
            "max_steps": experiment.steps,
            "global_batch": 64,
            "seed": seed,
            "channels_last": size.channels_last,
            **train,
        },
        "distillation": distillation,
        "phases": [{"name": "train", **changes["phase"]}],
        # Nothing is chosen by validation but thresholds: the network is that of the last step.
        "evaluate": {"every_epochs": experiment.epochs, "batch": 500},
        "checkpoint": {"every_epochs": max(1, experiment.epochs // 10), "keep": 20},
        "tracking": {"every_steps": 50},
    }
