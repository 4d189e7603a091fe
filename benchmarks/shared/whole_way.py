"""The whole way of one network: built, trained a step on several ranks, saved, loaded, evaluated, run in stages."""

from __future__ import annotations

import copy
import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from adaptive import runs
from adaptive.config.loading import parse_config
from adaptive.config.sections import Config
from adaptive.errors import ModelError
from adaptive.metrics import measure_exits
from adaptive.networks.create import create_model
from adaptive.networks.network import AdaptiveNetwork
from adaptive.training.batch import batch_sizes
from adaptive.training.checkpoints.snapshot import averaged_statistics, capture, running_statistics
from adaptive.training.checkpoints.store import CheckpointStore
from adaptive.training.engine.group import all_reduce, barrier
from adaptive.training.learner import build_learner
from adaptive.training.losses.objective import ExitObjective
from adaptive.training.phases import plan_phase, set_modes
from adaptive.training.preflight import write_config
from adaptive.training.prepared_run import Setup
from benchmarks.shared.families import Family

STEPS = ("wrap", "train", "agree", "save", "load", "evaluate", "stages")
CLASSES = 10
EXITS = 4
BATCH = 4  # images per rank
LEARNING_RATE = 1e-3  # small: one step on noise must leave a random network's numbers ordinary
TOLERANCE = 1e-5  # of the largest logit


class WrongError(AssertionError):
    """A step ran and what came out is wrong."""


@dataclass(frozen=True)
class Noise:
    """Images (N, C, H, W) of noise, and labels (N,)."""

    images: Tensor
    labels: Tensor

    @classmethod
    def of(cls, network: AdaptiveNetwork, count: int, seed: int) -> Noise:
        """Draw a batch of the network's size."""
        generator = torch.Generator().manual_seed(seed)
        side = network.input_size
        images = torch.randn(count, network.channels, side, side, generator=generator)
        return cls(images, torch.randint(CLASSES, (count,), generator=generator))


def whole_way(family: Family, folder: Path, note: Callable[[str], None] = lambda step: None) -> dict[str, Any]:
    """Take a class the whole way, as one of the ranks that have met. All ranks stop at the step where one fails.

    Args:
        family: the class.
        folder: an empty folder that all ranks see.
        note: is told every step as it begins.

    Returns:
        ``passed`` (names of steps), ``failed`` and ``reason`` where a step failed, ``seconds``, and rank 0's findings.
    """
    started, walk = time.perf_counter(), _Walk(family, folder)
    record: dict[str, Any] = {"passed": [], "failed": None, "reason": None}
    for step in STEPS:
        note(step)
        reason = None
        try:
            record |= getattr(walk, step)()
        except Exception as error:  # whatever a model's code raises is what is looked for
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        reason = _first(reason)
        if reason:
            record |= {"failed": step, "reason": reason}
            break
        record["passed"].append(step)
    walk.close()
    return record | {"seconds": round(time.perf_counter() - started, 1)}


def _first(reason: str | None) -> str | None:
    """Let the ranks tell each other what went wrong; return the first (collective)."""
    reasons: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, reason)
    return next((r for r in reasons if r), None)


def build(family: Family) -> AdaptiveNetwork:
    """Build the class with four exits, or as many as it has places for (at least two)."""
    for exits in range(EXITS, 2, -1):
        try:
            return create_model(family.model, CLASSES, exits, input_size=family.size, **family.options)
        except ModelError as error:
            if "ask for at most" not in str(error):
                raise
    return create_model(family.model, CLASSES, 2, input_size=family.size, **family.options)


class _Walk:
    """The steps, in the order of STEPS; each returns what it found out, or raises."""

    def __init__(self, family: Family, folder: Path) -> None:
        self.family, self.folder = family, folder
        self.rank = dist.get_rank()
        self.engine: Any = None

    def wrap(self) -> dict[str, Any]:
        """Build the network; create_model itself compares it with the plain model."""
        torch.manual_seed(0)
        self.template = build(self.family)
        costs = self.template.costs()
        shares = [cost.macs / costs[-1].macs for cost in costs]
        return {
            "exits": len(shares),
            "exit_names": self.template.exit_names,
            "parameters": sum(p.numel() for p in self.template.parameters()),
            "gmacs": round(costs[-1].macs / 1e9, 4),
            "shares": [round(share, 3) for share in shares],
            "deviation": round(max(abs(s - (i + 1) / len(shares)) for i, s in enumerate(shares)), 3),
            "crossing": [len(dims) for dims in self.template.batch_dims[:-1]],
        }

    def train(self) -> dict[str, Any]:
        """One optimizer step of SGD under ZeRO 2 on every rank's own images."""
        self.network = copy.deepcopy(self.template)
        self.config = self._configuration()
        phase = self.config.resolved_phases()[0]
        plan = plan_phase(self.config, phase, len(self.network.exits))
        setup = Setup(self.config, batch_sizes(self.config, dist.get_world_size()), torch.device("cpu"))
        self.learner = build_learner(setup, plan, self.network)
        self.engine = self.learner.engine
        objective = ExitObjective(len(self.network.exits), plan.exit_weights)
        set_modes(self.network, plan)
        reached: set[str] = set()
        for name, parameter in self.network.named_parameters():
            parameter.register_hook(lambda gradient, name=name: reached.add(name))
        noise = Noise.of(self.network, BATCH, self.rank)
        torch.manual_seed(self.rank)  # of dropout and stochastic depth
        total = objective(self.engine(noise.images), noise.labels).total
        self.engine.backward(total)
        loss = total.item()
        broken = self._broken_gradients()
        applied = self.engine.step()
        if not math.isfinite(loss) or broken or not applied:
            raise WrongError(f"loss {loss}, step applied: {applied}, gradients not finite: {broken[:3]}")
        unreached = [name for name, _ in self.network.named_parameters() if name not in reached]
        if unreached:
            raise WrongError(f"no gradient reaches {', '.join(unreached[:5])} ({len(unreached)} parameters)")
        return {"loss": round(loss, 3)}

    def agree(self) -> dict[str, Any]:
        """Every rank has the same weights, and they are not the ones it began with."""
        before = dict(self.template.named_parameters())
        digest = hashlib.sha256()
        unmoved = 0
        for name, parameter in self.network.named_parameters():
            digest.update(parameter.detach().contiguous().numpy().tobytes())
            unmoved += torch.equal(parameter, before[name])
        digests = [""] * dist.get_world_size()
        dist.all_gather_object(digests, digest.hexdigest())
        if len(set(digests)) > 1:
            raise WrongError("the ranks' weights differ after the step")
        if unmoved == len(before):
            raise WrongError("the step changed no weight")
        return {"unmoved": unmoved, "tensors": len(before)}

    def save(self) -> dict[str, Any]:
        """Write a run folder: configuration and checkpoint."""
        tensors, state = capture(self.learner)
        state |= {
            "exits": self.template.exit_names,
            "collaboration": True,
            "classes": [str(i) for i in range(CLASSES)],
            "dataset": "noise",
        }
        if self.rank == 0:
            write_config(self.config, self.folder)
            CheckpointStore(self.folder / "checkpoints").save(1, tensors, state, None)
        barrier()
        return {}

    def load(self) -> dict[str, Any]:
        """Load the run folder into a freshly built network (rank 0); its logits are the trained one's."""
        statistics = averaged_statistics(self.network)
        for name, buffer in running_statistics(self.network).items():
            buffer.copy_(statistics[name])
        self.network.eval()
        if self.rank:
            return {}
        torch.manual_seed(1)  # what is not saved would come out differently
        self.loaded = runs.load(self.folder, "last").network
        images = Noise.of(self.network, BATCH, 10).images
        with torch.no_grad():
            trained, loaded = self.network(images), self.loaded(images)
        if not all(z.isfinite().all() for z in trained):
            raise WrongError("logits are not finite after the step")
        difference = max(_difference(a, b) for a, b in zip(loaded, trained, strict=True))
        if difference > TOLERANCE / 10:
            raise WrongError(f"logits of the loaded network differ by {difference:.1e} of the largest")
        return {"load_difference": difference}

    def evaluate(self) -> dict[str, Any]:
        """Measure every exit on two batches of every rank, under the engine."""
        batches = [Noise.of(self.network, BATCH, 100 + 10 * self.rank + i) for i in range(2)]
        expected = 2 * BATCH * dist.get_world_size()
        exits = len(self.network.exits)
        measured = measure_exits(self.engine, batches, exits, self.engine.device, expected, all_reduce)
        if not all(map(math.isfinite, measured.loss)):
            raise WrongError(f"evaluated losses are {measured.loss}")
        return {"evaluated": measured.samples}

    def stages(self) -> dict[str, Any]:
        """Block by block, with a sample leaving at every exit: the logits of all that is left are the full run's."""
        if self.rank:
            return {}
        network = self.loaded
        count = len(network.exits) + 1
        images = Noise.of(network, count, 20).images
        worst, previous, alive = 0.0, None, torch.arange(count)
        with torch.no_grad():
            full = network(images)
            state = network.start(images)
            for i, logits in enumerate(full):
                state = network.run_block(i, state)
                previous = network.run_exit(i, state, previous)
                worst = max(worst, _difference(previous, logits[alive], logits))
                # From the front, then from the middle: whoever stays moves to another place in the batch.
                stays = torch.arange(len(alive)) != (len(alive) // 2 if i % 2 else 0)
                kept = stays.nonzero().flatten()
                state, previous, alive = state.select(kept, len(alive)), previous[kept], alive[kept]
        if not worst <= TOLERANCE:
            raise WrongError(f"logits of the stages differ by {worst:.1e} of the largest")
        return {"stage_difference": worst}

    def close(self) -> None:
        """Let go of what DeepSpeed holds."""
        if self.engine is not None:
            self.engine.destroy()

    def _configuration(self) -> Config:
        return parse_config(
            {
                "model": {
                    "backbone": self.family.model,
                    "exits": len(self.template.exits),
                    "options": dict(self.family.options),
                },
                "data": {"path": "noise", "image_size": self.template.input_size},
                "optimizer": {"lr": LEARNING_RATE, "weight_decay": 0.0},
                "train": {
                    "run_folder": str(self.folder),
                    "global_batch": BATCH * dist.get_world_size(),
                    "device": "cpu",
                    "zero_stage": 2,
                },
            }
        )

    def _broken_gradients(self) -> list[str]:
        """Names of the parameters whose gradient, averaged over the ranks, is missing or not finite (collective)."""
        gradients = ((name, self.engine.full_gradient(p)) for name, p in self.network.named_parameters())
        return [name for name, gradient in gradients if gradient is None or not gradient.isfinite().all()]


def _difference(found: Tensor, expected: Tensor, scale: Tensor | None = None) -> float:
    """Largest difference as a share of the largest logit."""
    largest = float((expected if scale is None else scale).abs().max())
    return float((found - expected).abs().max()) / max(largest, 1e-30)
