"""What is compared: a plain backbone, a plain loop with exits, and ours with one part of the method more each time."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive.config.loading import parse_config
from adaptive.distributed.ranks import find_ranks
from adaptive.networks.backbone import build_backbone
from adaptive.networks.cost import MacCounter
from adaptive.networks.create import create_model
from adaptive.networks.precision import autocast
from adaptive.training.batch import batch_sizes
from adaptive.training.engine.engine import Engine
from adaptive.training.engine.group import init_distributed
from adaptive.training.engine.settings import deepspeed_config
from adaptive.training.losses.objective import ExitObjective
from benchmarks.shared.plain_loop import PlainMultiExit, summed_loss

LEARNING_RATE = 1e-3  # small: the one batch of noise is seen often, and numbers must stay ordinary
GAMMA = 0.1  # of the published recipe; any value above 0 costs the same


@dataclass(frozen=True)
class StepSettings:
    """One training step, as the command line describes it.

    Attributes:
        backbone: name of any timm model.
        exits: number of exits, the backbone's own end included; 0 is what a preset has.
        image_size: side of the square images in pixels.
        batch: images per step.
        classes: length of the logits.
        device: cpu or cuda.
        precision: fp32, or bf16 under autocast.
        channels_last: keep images and convolution weights in channels-last memory.
        compile: compile the networks with torch.compile.
        backend: torch.compile's.
        engine: none is a plain torch loop, deepspeed the library's engine.
        stage: ZeRO stage of the engine.
        world: ranks; ``batch`` is each one's.
    """

    backbone: str = "resnet18"
    exits: int = 4
    image_size: int = 224
    batch: int = 8
    classes: int = 1000
    device: str = "cpu"
    precision: str = "fp32"
    channels_last: bool = False
    compile: bool = False
    backend: str = "inductor"
    engine: str = "none"
    stage: int = 0
    world: int = 1


@dataclass(frozen=True)
class Variant:
    """One line of the comparison.

    Attributes:
        key: its name in the JSON file.
        title: its name on the page.
        arguments: create_model's; None stands for the plain model, which answers once.
        gamma: share of distillation.
        loop: whether blocks and exits run in `benchmarks.shared.plain_loop`'s loop instead of our network's.
    """

    key: str
    title: str
    arguments: dict[str, Any] | None
    gamma: float = 0.0
    loop: bool = False


VARIANTS = (
    Variant("plain", "plain backbone", None),
    Variant("loop", "plain multi-exit loop", {"equilibrium": False, "collaboration": False}, loop=True),
    Variant("exits", "+ exits", {"equilibrium": False, "collaboration": False}),
    Variant("equilibrium", "+ GE", {"equilibrium": True, "collaboration": False}),
    Variant("collaboration", "+ ISC", {"equilibrium": True, "collaboration": True}),
    Variant("collaboration_distillation", "+ OFA", {"equilibrium": True, "collaboration": True}, GAMMA),
)


def build_network(settings: StepSettings, variant: Variant) -> nn.Module:
    """Build a variant's network on its device, in training mode; the same seed for every variant."""
    torch.manual_seed(0)
    network: nn.Module
    if variant.arguments is None:
        network = build_backbone(settings.backbone, settings.image_size, num_classes=settings.classes).model.train()
    else:
        network = create_model(
            settings.backbone, settings.classes, settings.exits or None, input_size=settings.image_size,
            **variant.arguments,
        )  # fmt: skip
        network = PlainMultiExit(network) if variant.loop else network
    network.to(settings.device)
    if settings.channels_last:
        network.to(memory_format=torch.channels_last)
    return network


def random_batch(settings: StepSettings) -> tuple[Tensor, Tensor]:
    """Return images of noise (N, 3, H, W) and labels (N,)."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(settings.batch, 3, settings.image_size, settings.image_size, generator=generator)
    labels = torch.randint(settings.classes, (settings.batch,), generator=generator)
    images = images.to(settings.device)
    if settings.channels_last:
        images = images.to(memory_format=torch.channels_last)
    return images, labels.to(settings.device)


class Trainee:
    """A network with optimizer and objective; calling it does one training step and returns the loss."""

    def __init__(self, settings: StepSettings, variant: Variant) -> None:
        self.settings, self.variant = settings, variant
        engine = settings.engine == "deepspeed"
        # DeepSpeed broadcasts weights as flat bytes: their layout is changed afterwards, as a training does it.
        self.network = build_network(replace(settings, channels_last=settings.channels_last and not engine), variant)
        self.images, self.labels = random_batch(settings)
        exits = len(self.network.exits) if variant.arguments is not None else 1  # type: ignore[arg-type]
        self.objective = ExitObjective(exits, gamma=variant.gamma)
        if settings.compile:
            self.network.compile(backend=settings.backend)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=1e-4)
        self.forward: nn.Module = self.network
        if settings.world > 1 and settings.engine == "none":
            self.forward = nn.parallel.DistributedDataParallel(self.network)
        self.engine = _engine(settings, self.network, self.optimizer) if engine else None
        if engine and settings.channels_last and settings.stage == 0:
            self.network.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def macs(self) -> int:
        """Multiply-adds of an image's forward pass, all exits and links included."""
        network = build_network(replace(self.settings, device="cpu", channels_last=False), self.variant).eval()
        with MacCounter() as counter:
            network(torch.zeros(1, 3, self.settings.image_size, self.settings.image_size))
        return counter.macs

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for parameter in self.network.parameters())

    def __call__(self) -> Tensor:
        """Forward, loss, backward, optimizer step."""
        if self.engine is not None:
            loss = self._loss(self.engine(self.images))
            self.engine.backward(loss)
            self.engine.step()
            return loss.detach()
        device = torch.device(self.settings.device)
        with autocast("bf16", device) if self.settings.precision == "bf16" else nullcontext():
            outputs = self.forward(self.images)
        loss = self._loss(outputs)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def _loss(self, outputs: Any) -> Tensor:
        if self.variant.arguments is None:
            return F.cross_entropy(outputs.float(), self.labels)
        if self.variant.loop:
            return summed_loss(outputs, self.labels)
        return self.objective(outputs, self.labels, outputs[-1] if self.variant.gamma else None).total

    def close(self) -> None:
        """Let go of what DeepSpeed holds."""
        if self.engine is not None:
            self.engine.destroy()


def _engine(settings: StepSettings, network: nn.Module, optimizer: torch.optim.Optimizer) -> Engine:
    """Put a network under the library's engine, alone in its process group."""
    if not torch.distributed.is_initialized():
        find_ranks()
        init_distributed()
    config = parse_config(
        {
            "model": {"backbone": settings.backbone},
            "data": {"path": "none"},
            "train": {
                "global_batch": settings.batch * settings.world,
                "precision": settings.precision,
                "zero_stage": settings.stage,
            },
        }
    )
    sizes = batch_sizes(config, settings.world)
    return Engine(network, optimizer, deepspeed_config(config, sizes), 1800.0)
