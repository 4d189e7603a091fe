"""A small network under the engine, fed with random images, for tests that look at single optimizer steps."""

import copy
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from adaptive.config.sections import Config
from tests.training.setups import config

CLASSES, SIDE, BATCH = 5, 32, 16
CHAIN = {"backbone": "test_vit", "exits": 3, "collaboration": False}  # LayerNorm only: no sample knows of the others


def chain_config(train: dict[str, Any], **sections: dict[str, Any]) -> Config:
    """The chain under plain SGD. The rate is a power of two, so that it rounds nothing, and large, so that the rounding
    of the weights themselves does not hide the gradient in their difference."""
    optimizer = {"name": "sgd", "lr": 1024.0, "momentum": 0.0, "weight_decay": 0.0}
    model = {**CHAIN, **sections.pop("model", {})}
    return config("unused", model=model, optimizer=optimizer, train={"global_batch": BATCH, **train}, **sections)


def chain_network(equilibrium: bool | str):
    """The same weights on every rank. The second exit mirrors the first, so that their gradients conflict."""
    network = copy.deepcopy(_chain_network())
    network.equilibrium = "crossing" if equilibrium is True else equilibrium
    return network


@cache
def _chain_network():
    from adaptive.networks.create import create_model

    torch.manual_seed(0)
    network = create_model(
        CHAIN["backbone"], num_classes=CLASSES, exits=CHAIN["exits"], equilibrium=False, collaboration=False,
        input_size=SIDE, img_size=SIDE,
    )  # fmt: skip
    with torch.no_grad():
        first, second, last = (exit_ for exit_ in network.exits)
        second.classifier.weight.copy_(-first.classifier.weight)
        last.head.head.weight.normal_(std=0.1)  # timm starts it near zero, where nothing would flow back
    return network


def multi_scale_network():
    """A small MSDNet, the same on every rank: several tensors cross each branching point."""
    from adaptive.networks.create import create_model

    torch.manual_seed(0)
    return create_model("msdnet", CLASSES, 3, base=2, step=1, channels=4, growth=2, collaboration=False)


def global_batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    images = torch.randn(BATCH, 3, SIDE, SIDE, generator=generator)
    return images, torch.randint(CLASSES, (BATCH,), generator=generator)


class SmallRun:
    """One rank of a small training run: engine, task, and the pieces of the global batch that belong here."""

    def __init__(self, tree: Config, network: Any = None):
        from adaptive.training.batch import batch_sizes
        from adaptive.training.engine.group import init_distributed, resolve_device
        from adaptive.training.learner import build_learner, build_task
        from adaptive.training.phases import plan_phase, set_modes
        from adaptive.training.prepared_run import Setup

        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        device = resolve_device(tree.train.device)
        init_distributed()
        self.batch = batch_sizes(tree, self.world)
        setup = Setup(tree, self.batch, device)
        self.network = chain_network(tree.model.equilibrium) if network is None else network
        plan = plan_phase(tree, tree.resolved_phases()[0], len(self.network.exits))
        learner = build_learner(setup, plan, self.network)
        self.engine = learner.engine
        set_modes(self.network, plan)
        self.task = build_task(setup, plan, learner, plan.weights_from(0, 1, tree.train.seed))

    def step(self, step: int, spoiled_rank: int | None = None) -> bool:
        """One optimizer step; ``spoiled_rank`` finds a NaN in one of its images."""
        for loss in self.losses(step, spoiled_rank):
            self.engine.backward(loss)
            applied = self.engine.step()
        return applied

    def applied_step(self, step: int) -> None:
        """A step that is applied; in fp16 the loss scale may first have to come down."""
        assert any(self.step(step) for _ in range(6))

    def losses(self, step: int, spoiled_rank: int | None = None):
        images, labels = global_batch(step)
        if self.rank == spoiled_rank:
            images[:, 0, 0, 0] = float("nan")
        size = self.batch.micro_batch
        for micro in range(self.batch.accumulation):
            start = (micro * self.world + self.rank) * size
            mine = slice(start, start + size)
            own_images, own_labels = images[mine].to(self.engine.device), labels[mine].to(self.engine.device)
            yield self.task.loss(own_images, own_labels, (step, self.rank, micro))

    def weights(self) -> dict[str, Tensor]:
        """Every whole weight (collective)."""
        with self.engine.gathered(list(self.network.parameters())):
            return {name: p.detach().clone() for name, p in self.network.named_parameters()}

    def gradients_applied(self, step: int = 0) -> dict[str, Tensor]:
        """What SGD made of one step, in units of the gradient: (weights before - weights after) / rate."""
        before = self.weights()
        self.applied_step(step)
        after = self.weights()
        return {name: (before[name] - after[name]) / 1024.0 for name in before}


def distance(measured: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative distance (2-norm) over the tensors, and which tensor that is."""
    assert measured.keys() == expected.keys()
    found = {}
    for name, wanted in expected.items():
        assert measured[name].shape == wanted.shape, name
        size = wanted.norm().item()
        found[name] = (measured[name] - wanted).norm().item() / size if size > 1e-12 else measured[name].norm().item()
    name = max(found, key=lambda key: found[key])
    return found[name], name
