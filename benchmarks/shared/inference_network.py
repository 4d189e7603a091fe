"""A trained network at another image size: its weights, and a few steps there to get used to it."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from adaptive import create_model, load
from adaptive.config.sections import Config
from adaptive.data.reading.stream import EvaluationStream, LoaderOptions, TrainStream
from adaptive.data.shards.index import load_index
from adaptive.inference.outputs import Outputs, collect
from adaptive.networks.network import AdaptiveNetwork
from adaptive.runs import TrainedRun


def network_at(run_folder: Path, size: int, steps: int, batch: int) -> tuple[TrainedRun, AdaptiveNetwork, Config]:
    """Load a run's network for images of ``size`` pixels; trained ``steps`` steps there if it was made for others.

    The result is kept beside the run, as ``network_<size>.safetensors``.
    """
    trained = load(run_folder)
    config = trained.config
    if size == trained.network.input_size:
        return trained, trained.network, config
    config = config.model_copy(update={"data": config.data.model_copy(update={"image_size": size, "workers": 0})})
    network = create_model(
        config.model.backbone,
        num_classes=len(trained.classes),
        exits=trained.network.exit_names,
        equilibrium=config.model.equilibrium,
        collaboration=config.model.collaboration,
        input_size=size,
        **config.model.options,
    )
    network.load_state_dict(trained.network.state_dict())
    network = network.to(memory_format=torch.channels_last)
    kept = run_folder / f"network_{size}.safetensors"
    if not kept.is_file():
        _adapt(network, config, steps, batch)
        save_file({k: v.contiguous() for k, v in network.state_dict().items()}, kept)
    network.load_state_dict(load_file(kept))
    return trained, network.eval(), config


def _adapt(network: AdaptiveNetwork, config: Config, steps: int, batch: int) -> None:
    index = load_index(config.data.path, config.data)
    loader, split = LoaderOptions(workers=1), config.data.train_split
    stream = TrainStream(index, config.data, split, loader, seed=0, global_batch=batch, micro_batch=batch)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.005, momentum=0.9, weight_decay=5e-4)
    network.train()
    for step, data in enumerate(stream.batches(0, steps), start=1):
        logits = network(data.images.contiguous(memory_format=torch.channels_last))
        loss = torch.stack([F.cross_entropy(z, data.labels) for z in logits]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        right = [int(100 * (z.argmax(1) == data.labels).float().mean()) for z in logits]
        print(f"{config.data.image_size} px, step {step}/{steps}: loss {loss.item():.3f}, top1 {right}", flush=True)


def split_outputs(network: AdaptiveNetwork, config: Config, split: str, images: int) -> tuple[Outputs, Tensor]:
    """What every exit answers to the first ``images`` images of a split, and the first 64 of these."""
    index = load_index(config.data.path, config.data)
    loader = LoaderOptions(layout=torch.channels_last)
    stream = EvaluationStream(index, config.data, split, loader, batch=64)
    batches = list(islice(iter(stream), -(-images // 64)))
    real = sum(int((batch.labels >= 0).sum()) for batch in batches)
    device = next(network.parameters()).device
    return collect(network, batches, device, real), batches[0].images
