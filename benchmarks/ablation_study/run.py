"""One run of the ablation, in a process of its own: train a configuration, then measure it and its gradients.

    python benchmarks/ablation_study/run.py CONFIG.yaml GRADIENT_BATCH

benchmarks/ablation.py starts it. It writes ablation.json into the run folder when all is done; a run that was
interrupted continues.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from torch import Tensor

from adaptive import runs
from adaptive.config.loading import load_config
from adaptive.config.sections import Config
from adaptive.data.reading.order import epoch_order
from adaptive.data.reading.stream import EvaluationStream
from adaptive.data.shards.index import DatasetIndex, load_index
from adaptive.distributed.ranks import find_ranks
from adaptive.errors import AdaptiveError
from adaptive.files import write_atomically
from adaptive.inference.calibration.geometric import sweep
from adaptive.inference.calibration.thresholds import Scored, apply_thresholds
from adaptive.networks.network import AdaptiveNetwork
from adaptive.training.checkpoints.store import CheckpointStore
from adaptive.training.engine.group import leave
from adaptive.training.run import limit_threads, prepare, train
from benchmarks.shared.gradient_conflict import conflict

RESULT = "ablation.json"
MOMENTS = (0.1, 0.5, 1.0)  # shares of the steps at which gradients are looked at


def main() -> int:
    """Train and measure the configuration named on the command line; returns the exit code."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    config = load_config(sys.argv[1])
    try:
        prepared = prepare(config, find_ranks())
        limit_threads()
        initial = digest(prepared.network.state_dict())
        started = time.perf_counter()
        folder = train(prepared)
        seconds = time.perf_counter() - started
        leave()
        result = {
            "seed": config.train.seed,
            "train_seconds": seconds,
            "initial_weights": initial,
            "image_order": order_digest(config, prepared.index),
            "dataset": prepared.index.fingerprint,
            **measure(folder, prepared.device),
            "gradients": gradients(folder, prepared.device, int(sys.argv[2])),
        }
    except AdaptiveError as error:
        print(f"ablation_run: {error}", file=sys.stderr)
        return 1
    write_atomically(folder / RESULT, json.dumps(result, indent=1))
    return 0


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of names and values."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def order_digest(config: Config, index: DatasetIndex) -> str:
    """Return a hash of the ids of all training images in the order of all epochs."""
    counts, found = index.split(config.data.train_split).counts, hashlib.sha256()
    for epoch in range(config.train.epochs):
        found.update(epoch_order(counts, config.train.seed, epoch, config.data.shuffle_window).tobytes())
    return found.hexdigest()


def stream(config: Config, split: str, batch: int) -> EvaluationStream:
    """Return one pass over a split, through the test-time transform."""
    index = load_index(config.data.path, config.data)
    return EvaluationStream(index, config.data, split, batch=batch)


@torch.no_grad()
def answers(network: AdaptiveNetwork, batches: Iterable[Any], device: torch.device) -> Scored:
    """Run every exit over all batches in eval mode; padded places are left out."""
    network.eval()
    found = []
    for batch in batches:
        real = batch.labels >= 0
        logits = torch.stack(network(batch.images.to(device))).cpu()[:, real]  # (k, N, C)
        found.append(Scored.of(logits.float().softmax(-1), batch.labels[real]))
    return Scored(torch.cat([a.scores for a in found], 1), torch.cat([a.correct for a in found], 1))


def measure(folder: Path, device: torch.device) -> dict[str, Any]:
    """Measure the last step's network: every exit on val and test, and the budgeted curve calibrated on val."""
    trained = runs.load(folder, "last")
    network, config = trained.network.to(device), trained.config
    macs = [cost.macs for cost in network.costs()]
    val, test = (
        answers(network, stream(config, split, config.evaluate.batch), device)
        for split in (config.data.val_split, config.data.test_split)
    )
    curve = []
    for point in sweep(val, macs):
        there = apply_thresholds(point.thresholds, test, macs)
        curve.append(
            {
                "q": point.q,
                "thresholds": point.thresholds.tolist(),
                "val_top1": point.expected.top1,
                "val_macs": point.expected.cost,
                "test_top1": there.top1,
                "test_macs": there.cost,
                "test_counts": there.counts,
            }
        )
    return {
        "step": trained.checkpoint.step,
        "macs": macs,
        "images": {"val": val.correct.shape[1], "test": test.correct.shape[1]},
        "val_top1": percent(val),
        "test_top1": percent(test),
        "curve": curve,
    }


def percent(found: Scored) -> list[float]:
    """Accuracy of every exit."""
    return (100 * found.correct.double().mean(dim=1)).tolist()


def gradients(folder: Path, device: torch.device, images: int) -> list[dict[str, Any]]:
    """Record the exits' gradients at the checkpoints nearest to MOMENTS, on the same training images in every run."""
    config = load_config(folder / "config.yaml")
    batch = next(iter(stream(config, config.data.train_split, images)))
    real = batch.labels >= 0
    saved = [checkpoint.step for checkpoint in CheckpointStore(folder / "checkpoints").all()]
    steps = [min(saved, key=lambda step: abs(step - share * saved[-1])) for share in MOMENTS]
    found = []
    for step in np.unique(steps).tolist():
        network = runs.load(folder, str(step)).network.to(device)
        record = conflict(network, batch.images[real].to(device), batch.labels[real].to(device))
        found.append({"step": step, "images": int(real.sum()), **asdict(record)})
    return found


if __name__ == "__main__":
    sys.exit(main())
