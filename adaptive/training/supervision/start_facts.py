"""What must be the same on all ranks of a run: configuration, dataset, weights, versions, code, kind of device."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from adaptive.config.loading import leaves
from adaptive.distributed.same_start import Fact, digest_of
from adaptive.errors import StartError
from adaptive.files import code_digest, file_sha256, installed_version
from adaptive.foreign_text import shown_location, without_secrets
from adaptive.networks.network import AdaptiveNetwork
from adaptive.training.checkpoints.checkpoint_manifest import MANIFEST, verify
from adaptive.training.checkpoints.store import Checkpoint, CheckpointStore
from adaptive.training.engine.group import from_first_rank, gather_objects
from adaptive.training.prepared_run import Prepared
from adaptive.training.supervision.peers import host_name

# By import name: what computes, draws or decodes. The name under which it is installed, where that is another.
LIBRARIES = {
    "torch": "torch", "torchvision": "torchvision", "deepspeed": "deepspeed", "timm": "timm",
    "webdataset": "webdataset", "numpy": "numpy", "PIL": "pillow", "adaptive": "adaptive-training",
}  # fmt: skip
SAME_FILE = "start every rank with the same configuration file and overrides"
SAME_SOFTWARE = "give all nodes one environment, or install the same version on each (adaptive doctor compares them)"
LONGEST = 4096  # of a value that travels to the other ranks
SAMPLE = 4096  # weights of a tensor
VISIBLE_WITHIN = 10.0  # seconds; network file systems keep what they know of a folder for some


def start_facts(prepared: Prepared) -> dict[str, Fact]:
    """Return this rank's facts by name, the most telling first.

    What costs time is left to the first rank of each node: the others read the same disk.
    """
    config, ranks = prepared.config, prepared.ranks
    facts = dict(_configuration(prepared))
    facts["the dataset's fingerprint"] = Fact(
        prepared.index.fingerprint[:12],
        f"data.path = {shown_location(config.data.path)!r} must hold the same dataset on every node; copy it anew",
        digest_of(prepared.index.fingerprint),
    )
    facts["the kind of device"] = Fact(
        prepared.device.type, "let all ranks have a GPU, or give train.device=cpu to all of them"
    )
    for module, package in LIBRARIES.items():
        facts[f"the version of {package}"] = Fact(_version(module, package), SAME_SOFTWARE)
    facts["the version of Python"] = Fact(platform.python_version(), SAME_SOFTWARE)
    if ranks.local_rank == 0:
        facts["adaptive's code (its checksum)"] = Fact(code_digest(), "run the same commit on every node; copy it anew")
        begun = bool(CheckpointStore(prepared.folder / "checkpoints").all())
        facts["the run folder"] = Fact(
            "a run to continue" if begun else "no run yet",
            f"train.run_folder = {str(prepared.folder)!r} must lie on a file system that all nodes share",
        )
        size = _magnitude(prepared.network)
        facts["the initial weights (the sum of a sample)"] = Fact(
            f"{size:.9g}", "give every node the same file for model.weights, or the same cache of timm", number=size
        )
        teacher = config.distillation.teacher_weights
        if config.distillation.teacher == "model" and teacher and Path(teacher).is_file():
            facts["the checksum of distillation.teacher_weights"] = Fact(
                file_sha256(Path(teacher))[:12], f"give every node the same file {teacher!r}"
            )
    return facts


def check_same_checkpoint(prepared: Prepared, store: CheckpointStore, checkpoint: Checkpoint | None) -> None:
    """Check that every node finds the checkpoint that the first rank has chosen, or none as it does (collective).

    The first rank of each node looks: the others read the same disk.

    Raises:
        StartError: on all ranks, where the run folder of one is not the first one's.
    """
    ranks = prepared.ranks
    if ranks.world == 1:
        return
    own = expected = from_first_rank(_seen(store, checkpoint) if ranks.rank == 0 else None)
    limit = time.monotonic() + VISIBLE_WITHIN
    while ranks.local_rank == 0 and (own := _seen(store, checkpoint)) != expected and time.monotonic() < limit:
        time.sleep(0.5)
    found = gather_objects((host_name(), own))
    node, _ = found[0]
    for rank, (other, seen) in enumerate(found):
        if seen != expected:
            raise StartError(
                f"the ranks see different run folders: {prepared.folder} holds {expected} on {node} (rank 0), {seen} "
                f"on {other} (rank {rank}); train.run_folder must lie on a file system that all nodes share"
            )


def _configuration(prepared: Prepared) -> Iterator[tuple[str, Fact]]:
    tree = prepared.config.model_dump()
    for (key, value), (_, shown) in zip(leaves(tree), leaves(without_secrets(tree)), strict=True):
        text = json.dumps(shown, ensure_ascii=False, default=str)
        yield key, Fact(text[:LONGEST], SAME_FILE, digest_of(json.dumps(value, default=str)))


def _version(module: str, package: str) -> str:
    """Return the version that runs, and where it differs the one that is installed."""
    installed = installed_version(package)
    running = getattr(sys.modules.get(module), "__version__", None)
    if running is None or running == installed:
        return str(installed or "unknown")
    return f"{running} (installed: {installed})"


@torch.no_grad()
def _magnitude(network: AdaptiveNetwork) -> float:
    """Return the summed magnitudes of a sample of the weights: other weights give another sum.

    It is a sum and no checksum because processors round a random initialisation differently, by parts of a million.
    """
    strided = (p.detach().flatten()[:: max(1, p.numel() // SAMPLE)] for p in network.parameters())
    return sum(part.double().abs().sum().item() for part in strided)


def _seen(store: CheckpointStore, checkpoint: Checkpoint | None) -> str:
    """Return what this rank sees of a checkpoint, or whether it sees any where there should be none."""
    if checkpoint is None:
        steps = [str(other.step) for other in store.all()]
        return f"checkpoints of the steps {', '.join(steps[-3:])}" if steps else "no checkpoint"
    path = store.folder / checkpoint.path.name
    if not path.is_dir():
        return f"no checkpoint of step {checkpoint.step}"
    if fault := verify(path, quick=True):
        return f"a checkpoint of step {checkpoint.step} in which {fault}"
    checksum = hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest()[:12]
    return f"the checkpoint of step {checkpoint.step} with checksum {checksum}"
