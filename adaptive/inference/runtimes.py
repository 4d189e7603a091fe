"""Runtimes: one network with its policy, run by torch, compiled by torch, or by onnxruntime."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from adaptive.errors import ConfigError
from adaptive.inference.acceleration.accelerated import BATCH_SIZES, Acceleration
from adaptive.inference.export.export import export
from adaptive.inference.export.onnx_runner import OnnxClassifier
from adaptive.inference.export.preprocess import Preprocess
from adaptive.inference.observer import Observer
from adaptive.inference.policy import Policy
from adaptive.inference.runner import DynamicClassifier
from adaptive.inference.runtime_names import RUNTIMES, Runtime
from adaptive.networks.network import AdaptiveNetwork


class Runner(Protocol):
    """A network with its policy in some runtime: `DynamicClassifier`, `OnnxClassifier`."""

    @property
    def policy(self) -> Policy:
        """Who leaves where."""

    def run(self, images: Any, observe: Observer | None = None) -> tuple[Any, Any]:
        """Images (N, C, H, W), floats -> probabilities (N, classes), and exits (N,) from 1 to k."""

    def with_policy(self, policy: Policy, decide_everywhere: bool = False) -> Runner:
        """Return a runner of the same network in the same runtime, in which another policy decides."""


def open_runner(
    network: AdaptiveNetwork,
    policy: Policy,
    runtime: Runtime = "torch",
    precision: str = "fp32",
    *,
    threads: int | None = None,
    batch_sizes: Sequence[int] | None = None,
    decide_everywhere: bool = False,
    backbone: str = "",
    classes: Sequence[str] = (),
    preprocess: Preprocess | None = None,
) -> Runner:
    """Open a network in a runtime.

    Args:
        network: on its device; ONNX runs a copy of it on the CPU.
        policy: of that network.
        runtime: ``torch`` runs it as it is, ``compile`` what lies between two decisions by torch.compile, ``onnx`` an
            export by onnxruntime, which takes some seconds to write.
        precision: as `DynamicClassifier` takes it; an export computes in fp32, whatever it is.
        threads: of onnxruntime, by default as many as there are cores; torch's belong to the process: `cpu_threads`.
        batch_sizes: with ``compile``, the numbers of images that are prepared for; groups are padded up to them.
        decide_everywhere: decide also where the policy can let nobody leave, to measure what decisions cost.
        backbone: name of the plain model, for messages.
        classes: of the export; by default numbers.
        preprocess: of the export, which answers arrays without it.

    Raises:
        ConfigError: there is no such runtime, or ``batch_sizes`` cannot be.
        ExportError: the network cannot be exported, onnxruntime is missing, or ``threads`` cannot be.
        PolicyError: the policy is for another number of exits, or was calibrated for other weights.
    """
    if runtime in ("torch", "compile"):
        accelerate: Acceleration | None = "compile" if runtime == "compile" else None
        return DynamicClassifier(network, policy, precision, decide_everywhere, accelerate, batch_sizes or BATCH_SIZES)
    if runtime != "onnx":
        raise ConfigError(f"runtime = {runtime!r}: use one of {', '.join(map(repr, RUNTIMES))}")
    with tempfile.TemporaryDirectory(prefix="adaptive-onnx-") as folder:  # sessions hold what they have read
        export(
            network,
            Path(folder) / "export",
            backbone=backbone or "network",
            classes=classes or [str(number) for number in range(network.num_classes)],
            preprocess=preprocess or _as_it_comes(network.input_size),
            policy=policy,
            formats=["onnx"],
        )
        return OnnxClassifier(Path(folder) / "export", threads, decide_everywhere=decide_everywhere)


def _as_it_comes(side: int) -> Preprocess:
    return Preprocess(resize="squash", size=side, interpolation="bilinear", crop=side, mean=[0, 0, 0], std=[1, 1, 1])


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Let torch compute with so many threads inside of the block; None leaves it as it is.

    Raises:
        ConfigError: fewer than one.
    """
    if count is not None and count < 1:
        raise ConfigError(f"threads = {count}: give 1 or more")
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)
