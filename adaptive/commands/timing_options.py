"""Options of milliseconds (--timing-batch, --threads, --precision, --runtime, --rounds), and what they measure."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adaptive.commands.run_options import choose_device, network_for_inference
from adaptive.inference.runtime_names import RUNTIMES

if TYPE_CHECKING:
    from torch import Tensor

    from adaptive.inference.measuring.promises import Bench, Verdict
    from adaptive.inference.measuring.time_model import TimeModel
    from adaptive.inference.policy import Policy
    from adaptive.inference.policy_kinds import Kind
    from adaptive.inference.runtimes import Runner
    from adaptive.runs import TrainedRun

TIMING_BATCH = 64
ROUNDS = 10
HELD_OUT = 512  # images that the runner is timed on, besides those that are probed
_OPTIONS = ("timing_batch", "threads", "precision", "runtime", "rounds")


def add_timing(parser: argparse.ArgumentParser) -> None:
    """Declare the options that say what milliseconds are measured for."""
    group = parser.add_argument_group("milliseconds", "what a budget in ms holds for; measured on this machine")
    group.add_argument(
        "--timing-batch", type=int, metavar="N", help="images that arrive together (default evaluate.batch, at most 64)"
    )
    group.add_argument("--threads", type=int, metavar="N", help="of the processor (default all)")
    group.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="by default the run's; ONNX is fp32")
    group.add_argument("--runtime", choices=RUNTIMES, help="what runs the network (default torch)")
    group.add_argument("--rounds", type=int, metavar="N", help=f"of measuring, 4 or more (default {ROUNDS})")


def check_timing(arguments: argparse.Namespace, used: bool) -> None:
    """Refuse options that cannot be, or that nothing uses, before anything is loaded (raises PolicyError)."""
    from adaptive.errors import PolicyError
    from adaptive.foreign_text import visible

    for name, least in (("timing_batch", 1), ("threads", 1), ("rounds", 4)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise PolicyError(f"--{name.replace('_', '-')} {value} is too small; give {least} or more")
    if arguments.runtime == "onnx" and arguments.precision not in (None, "fp32"):
        raise PolicyError(f"--precision {arguments.precision}: --runtime onnx computes in fp32; leave one of them out")
    if arguments.runtime == "onnx" and arguments.device == "cuda":
        raise PolicyError("--device cuda: --runtime onnx is timed on the processor; leave one of them out")
    given = [name for name in _OPTIONS if getattr(arguments, name) is not None]
    if given and not used:
        flag, value = given[0].replace("_", "-"), visible(str(getattr(arguments, given[0])))
        raise PolicyError(f"--{flag} {value} goes with a budget in milliseconds (--budget 3.5ms); leave it out")


@dataclass
class Timing:
    """A run's network being timed, with the models of its probe."""

    bench: Bench
    runner: Runner
    models: list[TimeModel]
    probed: Tensor
    held_out: Tensor
    rounds: int

    @property
    def model(self) -> TimeModel:
        """What policies are chosen by."""
        from adaptive.inference.measuring.time_model import middle

        return middle(self.models)

    def verdict(self, policy: Policy) -> Verdict:
        """Run the policy on held-out images, beside a second probe."""
        from adaptive.inference.measuring.promises import verify

        return verify(self.bench, self.runner, policy, self.models, self.probed, self.held_out, self.rounds)


@contextmanager
def timed_run(trained: TrainedRun, arguments: argparse.Namespace, split: str, kind: Kind) -> Iterator[Timing]:
    """Probe a run's network as the options say; torch keeps to their threads inside of the block.

    Args:
        trained: the run; its network is moved to the device.
        arguments: with the options of `add_timing` and `add_loading`.
        split: that images come from: the first ones for the probe, those behind them for the runner.
        kind: of the policies.
    """
    from adaptive.inference.measuring.promises import Bench, probe, template
    from adaptive.inference.runtimes import cpu_threads
    from adaptive.runs import first_images

    network = network_for_inference(trained, choose_device("cpu" if arguments.runtime == "onnx" else arguments.device))
    batch = arguments.timing_batch or min(arguments.batch or trained.config.evaluate.batch, TIMING_BATCH)
    rounds = arguments.rounds or ROUNDS
    images = first_images(trained, split, arguments.data, batch + max(HELD_OUT, batch))
    few = len(images) < 2 * batch  # then the same ones serve both
    probed, held_out = (images, images) if few else (images[:batch], images[batch:])
    with cpu_threads(arguments.threads):
        precision = arguments.precision or trained.config.train.precision
        bench = Bench.of(network, arguments.runtime or "torch", precision, batch, arguments.threads)
        policy = template(kind, len(network.exits), arguments.temperature)
        runner = bench.runner(policy)
        yield Timing(bench, runner, probe(bench, runner, policy, probed, rounds), probed, held_out, rounds)
