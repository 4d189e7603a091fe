"""Promised and measured milliseconds: a model of time from a probe, and the runner with the policy held against it.

Nothing is promised tighter than the machine repeats it: two halves of the probe's rounds promise, each by itself, and
how far they are apart is part of the promise.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaptive.errors import DataError
from adaptive.inference.measuring.conditions import Conditions
from adaptive.inference.measuring.time_model import Asked, TimeModel
from adaptive.inference.measuring.time_probe import Contender, Scripted, batches_of, measure, promise, repeats
from adaptive.inference.measuring.timing import apart, device_name, synchronize
from adaptive.inference.policy import EVERYBODY, FEATURES, NOBODY, Gate, Policy
from adaptive.inference.policy_kinds import Kind
from adaptive.inference.runner import DynamicClassifier
from adaptive.inference.runtime_names import Runtime
from adaptive.inference.runtimes import Runner, open_runner
from adaptive.networks.network import AdaptiveNetwork

LIMIT = 0.05  # relative: what promised and measured may differ by, and how well a machine has to repeat itself
_LEAST_IMAGES = 64  # that a runner is timed on in a round
_PIECES = 4  # that a round of a runner is timed in, between the runs of a probe
_UNITS = 16  # of a gate, as they are fitted


@dataclass(frozen=True)
class Verdict:
    """What was promised, and what the runner took. All times are in ms per image.

    Attributes:
        promised: by the probe that chose the policy, for its images.
        again: by a second probe, of this policy alone and interleaved with the runner, for the images that were timed.
        measured: by the runner with the policy, on images that were not probed if there were enough.
        full: by the same runner if nobody leaves.
        ratio: measured / promised.
        repeats: how far two halves of the rounds are apart, as a share: of the first probe, the second, or the runner,
            whichever is the most.
        images: how many were timed, each of them as often as any.
        shares: of them that left at each exit.
    """

    promised: float
    again: float
    measured: float
    full: float
    ratio: float
    repeats: float
    images: int
    shares: list[float]

    def document(self, conditions: Conditions) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "conditions": conditions.model_dump()}

    def lines(self, conditions: Conditions) -> list[str]:
        """In sentences."""
        noise = f"{100 * self.repeats:.1f} %"
        promised = f"promised {self.promised:.3g} ms an image (this machine repeats to {noise})"
        measured = f"measured {self.measured:.3g} on {self.images:,} images: {self.ratio:.3f} of it"
        found = [
            f"{promised}, {measured}; {self.full:.3g} if nobody leaves",
            f"on {conditions.machine}: {conditions.words()}",
        ]
        if self.repeats > LIMIT:
            found.append(
                f"too noisy to promise tighter than {noise}: end what else runs here, or give more --rounds, or "
                "--threads fewer than there are cores"
            )
        if abs(self.ratio - 1) <= LIMIT:
            return found
        way = "above" if self.ratio > 1 else "below"
        said = f"measured is {100 * abs(self.ratio - 1):.1f} % {way} promised"
        if abs(self.ratio - 1) <= self.repeats:
            meaning = "no more than this machine differs from itself; repeat it on a quiet one"
        elif abs(self.measured / self.again - 1) <= LIMIT < abs(self.again / self.promised - 1):
            meaning = (
                "the second probe agrees with the runner: the images that were timed leave elsewhere than those that "
                "chose the policy, or the machine changed in between; repeat it, with more held-out images"
            )
        elif self.ratio > 1:
            meaning = "the budget is not kept here; give a lower one by that much"
        else:
            meaning = "the policy leaves some of the budget over"
        return [*found, f"{said}: {meaning}"]


@dataclass(frozen=True)
class Bench:
    """A network in a runtime, ready to be probed and timed.

    Attributes:
        network: on its device.
        conditions: what is measured.
    """

    network: AdaptiveNetwork
    conditions: Conditions

    @classmethod
    def of(
        cls, network: AdaptiveNetwork, runtime: Runtime, precision: str, batch: int, threads: int | None = None
    ) -> Bench:
        """With as many threads as torch has unless given, and in fp32 where a runtime knows nothing else."""
        device = torch.device("cpu") if runtime == "onnx" else next(network.parameters()).device
        conditions = Conditions(
            machine=device_name(device),
            device=device.type,
            batch=batch,
            threads=threads or torch.get_num_threads(),
            precision="fp32" if runtime == "onnx" else precision,
            runtime=runtime,
        )
        return cls(network, conditions)

    @property
    def padded(self) -> tuple[int, ...]:
        """Numbers of images that a runtime pads to, if it does."""
        if self.conditions.runtime != "compile":
            return ()
        batch = self.conditions.batch
        return (*(2**i for i in range(batch.bit_length()) if 2**i < batch), batch)

    def runner(self, policy: Policy) -> Runner:
        """Open a runner with a policy."""
        given = self.conditions
        runtime: Any = given.runtime
        sizes = self.padded or None
        return open_runner(self.network, policy, runtime, given.precision, threads=given.threads, batch_sizes=sizes)

    def images(self, images: Tensor) -> Any:
        """Images (N, C, H, W) as the runner takes them."""
        if self.conditions.runtime == "onnx":
            return np.ascontiguousarray(images.cpu().float().numpy())
        return images.to(next(self.network.parameters()).device)

    def contender(self, runner: Runner, policy: Policy, opened: Sequence[bool]) -> Contender:
        """A runner to be probed with policies of a kind, where images can leave at the open exits."""
        device = torch.device(self.conditions.device)
        scripted = Scripted.like(policy, opened, 2 * self.conditions.batch, device)
        asked = Asked.of_policy(scripted, self.network.collaboration)
        return Contender(runner.with_policy(scripted), scripted, asked, self.conditions, device, self.padded)


def template(kind: Kind, exits: int, temperature: bool = False) -> Policy:
    """A policy that decides as those of a kind do; what it decides does not count."""
    gate = Gate(weight=[[0.1] * len(FEATURES)] * _UNITS, bias=[0.0] * _UNITS, out=[0.1] * _UNITS, out_bias=0.0)
    return Policy(
        kind=kind,
        thresholds=[NOBODY] * (exits - 1) + [EVERYBODY],
        temperatures=[1.5] * exits if temperature else [],
        gates=[gate] * (exits - 1) if kind == "gate" else [],
    )


def probe(bench: Bench, runner: Runner, policy: Policy, images: Tensor, rounds: int) -> list[TimeModel]:
    """Probe policies of a kind that ask every exit: one model per round."""
    contender = bench.contender(runner, policy, [True] * policy.exits)
    return measure([contender], bench.images(images), bench.conditions.batch, rounds)[0]


def verify(
    bench: Bench,
    runner: Runner,
    policy: Policy,
    first: Sequence[TimeModel],
    probed: Tensor,
    held_out: Tensor,
    rounds: int,
) -> Verdict:
    """Run the runner with its policy, interleaved with a second probe.

    Args:
        bench: the network.
        runner: with any policy.
        policy: whose time was promised; calibrated.
        first: the models that the promise comes from.
        probed: (N, C, H, W) images for the second probe.
        held_out: (M, C, H, W) images to be timed on.
        rounds: of everything, at least 2.
    """
    assert policy.calibration is not None
    collaboration = bench.network.collaboration
    asked = Asked.of_policy(policy, collaboration)
    counts = policy.calibration.counts
    chosen = [count / sum(counts) for count in counts]
    batch = bench.conditions.batch
    real = TimedRunner(runner.with_policy(policy), bench.images(held_out), batch, policy.exits)
    straight = policy.with_thresholds([NOBODY] * (policy.exits - 1) + [EVERYBODY])
    full = TimedRunner(runner.with_policy(straight), bench.images(held_out), batch, policy.exits)
    for one in (real, full):
        one.warm_up()
    contender = bench.contender(runner, policy, asked.fires)
    beside = partial(in_turn, (real, full))
    second = measure([contender], bench.images(probed), batch, rounds, seed=1, beside=beside)[0]
    promised, measured = promise(first, chosen, asked), statistics.median(real.rounds)
    noise = max(
        repeats(first, chosen, asked), repeats(second, real.shares, asked), apart(real.rounds[::2], real.rounds[1::2])
    )
    return Verdict(
        promised=promised,
        again=promise(second, real.shares, asked),
        measured=measured,
        full=statistics.median(full.rounds),
        ratio=measured / promised,
        repeats=noise,
        images=real.images,
        shares=real.shares,
    )


class TimedRunner:
    """A runner that is timed on batches of images in turn, on the same ones in every other round.

    So even and odd rounds differ by the machine alone, and not by where their images leave.

    Args:
        runner: with its policy.
        images: (N, C, H, W) as it takes them, at least one.
        batch: images that arrive together.
        exits: of the network.

    Attributes:
        rounds: milliseconds of an image, by round.
    """

    def __init__(self, runner: Runner, images: Any, batch: int, exits: int) -> None:
        if not len(images):
            raise DataError("there are no images to time a runner on; give more held-out images")
        self._runner, self._batch, self._exits = runner, batch, exits
        self._batches = batches_of(images, batch)
        self._several = max(1, _LEAST_IMAGES // batch, min(4, len(images) // batch))
        self._counts = np.zeros(exits, dtype=np.int64)
        self._most = len(images)
        self._chosen: list[Any] = []
        self._taken = 0
        self.rounds: list[float] = []

    def warm_up(self) -> None:
        """Prepare what is compiled, for every number of images, and run a round that does not count."""
        if isinstance(self._runner, DynamicClassifier):
            self._runner.warm_up()
        self.round()
        self.rounds.clear()
        self._counts[:] = 0
        self._taken = 0

    @property
    def images(self) -> int:
        """How many different images were timed."""
        return min(self._taken, self._most)

    @property
    def shares(self) -> list[float]:
        """Of the images that left at each exit."""
        return (self._counts / self._counts.sum()).tolist()

    def round(self) -> None:
        """Time a few batches: a round is their milliseconds of an image."""
        for piece in self.pieces():
            piece()

    def pieces(self) -> list[Callable[[], None]]:
        """Return the parts of the next round, each with some of its batches; after the last one it is in ``rounds``."""
        if len(self.rounds) % 2 == 0:
            self._chosen = [next(self._batches) for _ in range(self._several)]
            self._taken += self._several * self._batch
        spent: list[float] = []
        each = -(-self._several // _PIECES)

        def piece(start: int) -> None:
            spent.extend(map(self._time, self._chosen[start : start + each]))
            if len(spent) == self._several:
                self.rounds.append(statistics.fmean(spent) / self._batch)

        return [partial(piece, start) for start in range(0, self._several, each)]

    def _time(self, images: Any) -> float:
        """Answer a batch and return the milliseconds."""
        device = images.device if isinstance(images, Tensor) else torch.device("cpu")
        synchronize(device)
        start = time.perf_counter()
        _, exits = self._runner.run(images)
        synchronize(device)
        spent = 1000 * (time.perf_counter() - start)
        left = exits.cpu().numpy() if isinstance(exits, Tensor) else exits
        self._counts += np.bincount(left - 1, minlength=self._exits)
        return spent


def in_turn(runners: Sequence[TimedRunner], number: int) -> list[Callable[[], None]]:
    """Return the pieces of runners' next rounds, one of each in turn; who begins changes with the round's number."""
    pairs = zip(*(one.pieces() for one in runners[:: 1 if number % 2 else -1]), strict=True)
    return [piece for pair in pairs for piece in pair]
