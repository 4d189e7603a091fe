"""The cells of the table of training steps: which network, in which mode, with which part of the method."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.shared.variants import VARIANTS, StepSettings, Variant

PLAIN, WHOLE = VARIANTS[0], VARIANTS[-1]
_BY_KEY = {variant.key: variant for variant in VARIANTS}

# The settings that people train in; batches of which an H100 is full, and MSDNet's own of its recipe.
NETWORKS = {
    "resnet50": StepSettings("resnet50", 4, 224, 256, 1000, channels_last=True),
    "msdnet_cifar": StepSettings("msdnet_cifar_anytime", 0, 32, 64, 10),
    "vit_small": StepSettings("vit_small_patch16_224", 4, 224, 256, 1000),
    "convnext_tiny": StepSettings("convnext_tiny", 4, 224, 256, 1000, channels_last=True),
}
# In their place for a rehearsal: the same families, tiny.
REHEARSED = {
    "resnet50": StepSettings("test_resnet", 2, 32, 2, 10, channels_last=True),
    "msdnet_cifar": StepSettings("msdnet_cifar_budgeted", 0, 32, 2, 10),
    "vit_small": StepSettings("test_vit", 2, 160, 2, 10),
    "convnext_tiny": StepSettings("test_convnext", 2, 64, 2, 10, channels_last=True),
}


@dataclass(frozen=True)
class Trial:
    """One cell: a variant, and how its engine differs from the group's (ZeRO stages)."""

    variant: Variant
    stage: int | None = None  # of ZeRO; None is a plain torch loop

    @property
    def key(self) -> str:
        """Its name within its group."""
        return self.variant.key if self.stage is None else f"zero_{self.stage}"

    @property
    def title(self) -> str:
        """Its name on the page."""
        whole = "everything" if self.variant is WHOLE else self.variant.title
        return whole if self.stage is None else f"everything, ZeRO {self.stage}"


@dataclass(frozen=True)
class Group:
    """Cells that are measured in turn within every round, so that their ratios hold.

    Attributes:
        network: a key of NETWORKS.
        mode: bf16, fp32, compiled (in bf16) or zero (in bf16, DeepSpeed's engine).
        trials: the cells, the first of which the others are compared with.
    """

    network: str
    mode: str
    trials: tuple[Trial, ...]

    @property
    def name(self) -> str:
        """What ``--only`` takes."""
        return f"{self.network}_{self.mode}"

    def settings(self, trial: Trial, device: str, rehearsal: bool) -> StepSettings:
        """Return what to measure."""
        base = (REHEARSED if rehearsal else NETWORKS)[self.network]
        return replace(
            base,
            device=device,
            precision="fp32" if self.mode == "fp32" else "bf16",
            compile=self.mode == "compiled",
            backend="aot_eager" if rehearsal else "inductor",  # traced as for a GPU, without minutes of a C++ compiler
            engine="none" if trial.stage is None else "deepspeed",
            stage=trial.stage or 0,
        )


def _group(network: str, mode: str, *keys: str) -> Group:
    return Group(network, mode, tuple(Trial(_BY_KEY[key]) for key in keys))


# The most important first: a machine is there for minutes.
GROUPS = (
    *(_group(network, "bf16", *_BY_KEY) for network in NETWORKS),
    *(_group(network, "compiled", PLAIN.key, WHOLE.key) for network in ("resnet50", "msdnet_cifar")),
    Group("resnet50", "zero", (Trial(WHOLE), *(Trial(WHOLE, stage) for stage in (0, 1, 2, 3)))),
    *(_group(network, "compiled", PLAIN.key, WHOLE.key) for network in ("vit_small", "convnext_tiny")),
    *(_group(network, "fp32", PLAIN.key, WHOLE.key) for network in NETWORKS),
)
# Gradient Equilibrium's own cost is measured at the branch points of these.
FORKS = ("resnet50_bf16", "msdnet_cifar_bf16")
