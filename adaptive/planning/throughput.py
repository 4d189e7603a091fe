"""The training throughput of one rank on this machine, measured on noise, without a dataset or other ranks."""

from __future__ import annotations

import copy
import statistics
import time

import torch

from adaptive.config.sections import Config
from adaptive.networks.fake_copy import is_outline
from adaptive.networks.from_config import build_network
from adaptive.networks.network import AdaptiveNetwork
from adaptive.networks.precision import memory_format
from adaptive.training.batch import BatchSizes
from adaptive.training.engine.group import init_distributed, resolve_device
from adaptive.training.learner import build_learner, build_task
from adaptive.training.phases import plan_phase, set_modes
from adaptive.training.prepared_run import Setup

SECONDS = 5.0
WARMUP, LEAST = 2, 3  # steps


def measure_images_per_second(
    config: Config, network: AdaptiveNetwork, micro_batch: int, seconds: float = SECONDS
) -> float:
    """Train a copy of ``network`` in the run's longest phase for some seconds, and return the median step's speed.

    In place of an outline the network itself is built, with random weights. The environment has to describe a group of
    one rank. Raises MachineError without the device that the run asks for.
    """
    device = resolve_device(config.train.device)
    init_distributed()
    phase = max(config.resolved_phases(), key=lambda phase: phase.epochs or 0)
    plan = plan_phase(config, phase, len(network.exits))
    setup = Setup(config, BatchSizes(micro_batch, micro_batch, 1, 1), device)
    whole = build_network(config, network.num_classes, load=False) if is_outline(network) else copy.deepcopy(network)
    learner = build_learner(setup, plan, whole)
    set_modes(learner.network, plan)
    task = build_task(setup, plan, learner, plan.weights_from(0, 1, config.train.seed))
    layout = memory_format(config.train.channels_last)
    size = config.data.image_size
    taken: list[float] = []
    began = time.perf_counter()
    try:
        while len(taken) < WARMUP + LEAST or time.perf_counter() - began < seconds:
            images = torch.randn(micro_batch, network.channels, size, size).to(device, memory_format=layout)
            labels = torch.randint(network.num_classes, (micro_batch,)).to(device)
            _wait(device)
            start = time.perf_counter()
            learner.engine.backward(task.loss(images, labels, (len(taken), 0, 0)))
            learner.engine.step()
            _wait(device)
            taken.append(time.perf_counter() - start)
    finally:
        learner.engine.destroy()
    return micro_batch / statistics.median(taken[WARMUP:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
