"""What ``adaptive bench inference`` measures: run folders and exports, opened, and the images that they are shown."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptive.commands.run_options import choose_device, load_run, network_for_inference, no_policy_notice
from adaptive.foreign_text import shown_location

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from adaptive.config.sections import DataConfig
    from adaptive.inference.export.onnx_runner import OnnxClassifier
    from adaptive.inference.measuring.side_by_side import Contender
    from adaptive.inference.policy import Policy
    from adaptive.runs import TrainedRun


@dataclass(frozen=True)
class Target:
    """A run folder or an export.

    Attributes:
        name: as it was given.
        network: the run, or the export.
        classes: their names.
        exits: how many there are.
        policy: who leaves where, if it has one.
        data: where its images come from, and how they are made ready for it.
        split: of that dataset.
        flag: flag or key that gave the split, for messages.
        notice: a line for the user, or nothing.
    """

    name: str
    network: TrainedRun | OnnxClassifier
    classes: list[str]
    exits: int
    policy: Policy | None
    data: DataConfig
    split: str
    flag: str
    notice: str = ""


@dataclass
class Images:
    """Images of datasets, read once for all targets that take the same, and notices about them."""

    count: int
    notices: list[str] = field(default_factory=list)
    _read: dict[str, tuple[torch.Tensor, NDArray[np.int64]]] = field(default_factory=dict)

    def of(self, target: Target) -> tuple[torch.Tensor, NDArray[np.int64]]:
        """Return a target's images (N, C, H, W) and labels (N,), the first of its split, each of them once.

        Raises:
            DataError: no such dataset or split, other classes than the target's, or images that cannot be read.
        """
        key = f"{target.split} {target.data.model_dump_json()}"
        if key not in self._read:
            self._read[key] = self._first(target)
        return self._read[key]

    def _first(self, target: Target) -> tuple[torch.Tensor, NDArray[np.int64]]:
        from adaptive.data.reading.first_images import first_images
        from adaptive.data.shards.index import check_split, load_index
        from adaptive.errors import DataError

        data, shown = target.data, shown_location(target.data.path)
        index = load_index(data.path, data)
        check_split(index, target.flag, target.split)
        if index.classes != target.classes:
            raise DataError(
                f"{shown} has other classes than {target.name} ({len(index.classes)} and {len(target.classes)}); give "
                "--data a dataset with the same ones, or measure it by itself"
            )
        images, labels = first_images(index, data, target.split, self.count, target.flag)
        if len(images) < self.count:
            self.notices.append(f"{target.split} of {shown} has {len(images):,} images, of {self.count:,} asked for")
        return images, labels.numpy()


def open_targets(arguments: argparse.Namespace, overrides: Sequence[str], threads: int) -> list[Target]:
    """Open what was named on the command line (raises AdaptiveError)."""
    runs = {name: _open_run(name, arguments, overrides) for name in arguments.targets if not is_export(name)}
    return [
        runs[name] if name in runs else _open_export(name, arguments, overrides, threads, list(runs.values()))
        for name in arguments.targets
    ]


def is_export(name: str) -> bool:
    """Say whether a folder is an export; neither that nor a run is refused (AdaptiveError)."""
    from adaptive.errors import AdaptiveError

    if (Path(name) / "manifest.json").is_file():
        return True
    if not (Path(name) / "config.yaml").is_file():
        raise AdaptiveError(
            f"{name} is neither a run folder (it has no config.yaml) nor an export (no manifest.json); give what "
            "adaptive train or adaptive export wrote"
        )
    return False


def _open_run(name: str, arguments: argparse.Namespace, overrides: Sequence[str]) -> Target:
    from adaptive.runs import load_policy

    trained = load_run(name, arguments.checkpoint, arguments.weights, overrides)
    own = trained.folder / "policy.json"
    given = arguments.policy or (str(own) if own.is_file() else None)
    data = trained.config.data
    return Target(
        name,
        trained,
        trained.classes,
        len(trained.network.exits),
        load_policy(given, trained) if given else None,
        data.model_copy(update={"path": arguments.data or data.path}),
        arguments.split or data.test_split,
        "--split" if arguments.split else "data.test_split",
        "" if given else no_policy_notice(trained, "so only its full network is measured"),
    )


def _open_export(
    name: str, arguments: argparse.Namespace, overrides: Sequence[str], threads: int, runs: Sequence[Target]
) -> Target:
    from adaptive.config.loading import parse_config
    from adaptive.config.saved import for_inference
    from adaptive.errors import DataError
    from adaptive.inference.checks import read_policy
    from adaptive.inference.export.onnx_runner import OnnxClassifier

    classifier = OnnxClassifier(name, threads)
    if arguments.policy:
        classifier.set_policy(read_policy(arguments.policy, classifier.policy.exits))
    like = next((run for run in runs if run.classes == classifier.classes), None)
    if like is not None:
        data, split = like.data, like.split
    elif arguments.data:
        least = {"model": {"backbone": "export"}, "data": {"path": arguments.data}, "train": {"run_folder": name}}
        data = for_inference(parse_config(least, source="--data"), Path(name), overrides).data
        split = arguments.split or data.test_split
    else:
        raise DataError(
            f"{name} is an export, which names no dataset: give --data FOLDER with its {len(classifier.classes)} "
            "classes, or a run of the same classes beside it"
        )
    policy = classifier.policy
    early = any(policy.can_fire(i) for i in range(policy.exits - 1))
    return Target(
        name,
        classifier,
        classifier.classes,
        policy.exits,
        policy if early else None,
        data.model_copy(update=classifier.preprocess.settings()),
        split,
        "--split" if arguments.split else "data.test_split",
    )


def open_contenders(targets: Sequence[Target], images: Images, arguments: argparse.Namespace) -> list[Contender]:
    """Open every target in every runtime that it has, with its policy and to the end (raises AdaptiveError)."""
    return [
        contender
        for number, target in enumerate(targets)
        for runtime in (arguments.runtime if _is_run(target) else ["onnx"])
        for contender in _contenders(number, target, runtime, images, arguments)
    ]


def _is_run(target: Target) -> bool:
    from adaptive.inference.export.onnx_runner import OnnxClassifier

    return not isinstance(target.network, OnnxClassifier)


def _contenders(
    number: int, target: Target, runtime: Any, images: Images, arguments: argparse.Namespace
) -> list[Contender]:
    import torch

    from adaptive.inference.measuring.side_by_side import Contender
    from adaptive.inference.policy import EVERYBODY, NOBODY, Policy

    tensor, labels = images.of(target)
    device = torch.device("cpu") if runtime == "onnx" else choose_device(arguments.device)
    runner, precision = _runner(target, runtime, device, arguments)
    shown = tensor.numpy() if runtime == "onnx" else tensor.to(device)
    nobody = Policy(thresholds=[NOBODY] * (target.exits - 1) + [EVERYBODY])
    ends = runner.with_policy(nobody)
    here = (number, target.name, runtime, precision)
    found = [Contender(*here, "full", ends, shown, labels, device)]
    if target.policy is not None and target.exits > 1:
        found.insert(0, Contender(*here, "policy", runner, shown, labels, device))
    return found


def _runner(target: Target, runtime: Any, device: torch.device, arguments: argparse.Namespace) -> tuple[Any, str]:
    """Return what runs a target, and the precision that it computes in."""
    import torch

    from adaptive.inference.acceleration.accelerated import BATCH_SIZES
    from adaptive.inference.export.onnx_runner import OnnxClassifier
    from adaptive.inference.export.preprocess import Preprocess
    from adaptive.inference.policy import EVERYBODY, NOBODY, Policy
    from adaptive.inference.runtimes import open_runner

    if isinstance(target.network, OnnxClassifier):
        return target.network, "fp32"
    trained = target.network
    precision = arguments.precision or trained.config.train.precision
    runner = open_runner(
        network_for_inference(trained, device),
        target.policy or Policy(thresholds=[NOBODY] * (target.exits - 1) + [EVERYBODY]),
        runtime,
        precision,
        threads=torch.get_num_threads(),
        batch_sizes=sorted({size for size in BATCH_SIZES if size < max(arguments.batch)} | {*arguments.batch}),
        backbone=trained.config.model.backbone,
        classes=trained.classes,
        preprocess=Preprocess.of(trained.config.data),
    )
    return runner, "fp32" if runtime == "onnx" else precision
