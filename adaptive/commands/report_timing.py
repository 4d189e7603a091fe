"""Times of several runs for a report: taken together, in one process and interleaved, so that they share an axis."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from adaptive.commands.run_options import choose_device, network_for_inference
from adaptive.commands.timing_options import TIMING_BATCH

if TYPE_CHECKING:
    from adaptive.inference.measuring.time_probe import Contender
    from adaptive.reporting.report_data import Timing
    from adaptive.runs import TrainedRun

ROUNDS = 5


def timed_together(runs: Sequence[TrainedRun], arguments: argparse.Namespace) -> list[Timing]:
    """Measure a model of time of every run, interleaved, at the largest batch of at most 64 that all evaluate with.

    Args:
        runs: their networks are moved to the device.
        arguments: with the options of `add_loading` and ``split``.

    Raises:
        DataError: images cannot be read.
    """
    import torch

    from adaptive.inference.measuring.time_model import middle
    from adaptive.inference.measuring.time_probe import measure
    from adaptive.reporting.report_data import Timing

    batch = min(TIMING_BATCH, *(arguments.batch or run.config.evaluate.batch for run in runs))
    contenders = [_contender(run, batch, arguments) for run in runs]
    found = measure(contenders, torch.arange(batch), batch, ROUNDS)
    timings = []
    for models in found:
        model = middle(models)
        where = model.conditions
        words = f"{where.machine}, {where.threads} thread{'s' if where.threads > 1 else ''}"
        timings.append(Timing(words, where.device, batch, model.exits, model, together=True))
    return timings


def _contender(run: TrainedRun, batch: int, arguments: argparse.Namespace) -> Contender:
    """Return a run's network, which answers its own images whatever it is shown: sizes and datasets may differ."""
    from dataclasses import replace

    from adaptive.inference.measuring.promises import Bench, template
    from adaptive.runs import first_images

    network = network_for_inference(run, choose_device(arguments.device))
    bench = Bench.of(network, "torch", run.config.train.precision, batch)
    exits = len(network.exits)
    policy = template("confidence", exits)
    images = bench.images(first_images(run, arguments.split or run.config.data.test_split, arguments.data, batch))
    images = images.repeat(-(-batch // len(images)), 1, 1, 1)[:batch]
    contender = bench.contender(bench.runner(policy), policy, [True] * exits)
    return replace(contender, runner=_Own(contender.runner, images))


class _Own:
    """A runner that takes its own images."""

    def __init__(self, runner: Any, images: Any) -> None:
        self._runner, self._images = runner, images

    def run(self, images: Any, observe: Any = None) -> Any:
        """Answer its own images, which are as many."""
        return self._runner.run(self._images, observe)
