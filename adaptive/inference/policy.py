"""Policies: which images leave at an exit, given the outputs so far.

A policy turns what the exits answered so far into one score per image and exit, the higher the surer; an image leaves
at the first exit whose threshold its score reaches. The same code runs on torch tensors (the dynamic runner), on numpy
arrays (exported networks, where no torch is) and over stored outputs (calibration), through the array API standard.
"""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from array_api_compat import array_namespace, device
from pydantic import Field, ValidationError, model_validator

from adaptive.errors import PolicyError
from adaptive.files import write_atomically
from adaptive.inference.drift.counts import Counts
from adaptive.inference.frozen_model import FrozenModel
from adaptive.inference.measuring.conditions import Conditions
from adaptive.inference.policy_kinds import Kind

Array = Any  # a torch tensor or a numpy array

NOBODY = 1e8  # a threshold that no score reaches
EVERYBODY = -1e8
FEATURES = ("confidence", "margin", "certainty", "agreement", "previous confidence", "highest confidence before")


class Gate(FrozenModel):
    """A learned gate: a small network that scores the answers of one exit.

    A layer of H rectified units on the features of `features`, and a sigmoid on their weighted sum.
    """

    weight: list[list[float]]
    """(H, features)."""
    bias: list[float]
    """(H,)."""
    out: list[float]
    """(H,)."""
    out_bias: float

    @model_validator(mode="after")
    def _fits(self) -> Gate:
        units = len(self.out)
        if len(self.weight) != units or len(self.bias) != units or any(len(w) != len(FEATURES) for w in self.weight):
            raise ValueError(f"a gate of {units} units needs a weight of {units} x {len(FEATURES)} and as many biases")
        return self


class NetworkIdentity(FrozenModel):
    """The network that a policy was calibrated for."""

    backbone: str
    exits: list[str]
    fingerprint: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Evidence(FrozenModel):
    """What images that chose nothing say about the target of a calibration."""

    shown: bool
    """Whether the target is shown to hold, with the probability that was asked for."""
    images: int
    """Number of images of the test."""
    words: str
    """What is promised; or why nothing is, and what would do."""
    needed: int | None = None
    """Where nothing is promised: held-out images in all that would do, if any number does."""


class Calibration(FrozenModel):
    """How thresholds were chosen, and what they brought on the images named there."""

    method: str
    """geometric, search, accuracy or risk."""
    target: dict[str, float]
    """What was asked for: budget, top1 and perhaps confidence, or epsilon and delta."""
    unit: str
    """Of the costs: MACs, ms, or share of the full cost."""
    costs: list[float]
    """Of one image up to each exit; in ms what one more adds to the mean, where these images leave."""
    images: int
    """Number of images that the thresholds were chosen on; with a test (top1, epsilon) of those that tested them."""
    top1: float
    """Accuracy there in percent, every image counted where it leaves."""
    cost: float
    """Mean cost of an image there."""
    counts: list[int]
    """How many images leave at each exit there."""
    split: str = ""
    """Split of the dataset that they came from."""
    timing: Conditions | None = None
    """For ms, what they hold for."""
    dataset: str = ""
    """Fingerprint of that dataset; empty where it is not known."""
    seen: Counts | None = None
    """Where all held-out images leave by the policy, and how sure of them the exits are."""
    bound: float | None = None
    """For top1: one-sided lower bound on the accuracy in truth, in percent, from images that chose nothing."""
    confidence: float | None = None
    """Of the bound."""
    evidence: Evidence | None = None
    """For top1 and epsilon: whether the target is shown."""


class Decision(NamedTuple):
    """A policy's decision on n images at one exit.

    Attributes:
        labels: (n,) the likeliest class.
        confidences: (n,) its probability.
        scores: (n,) how sure the policy is.
        leaves: (n,) bool, who leaves here.
        memory: (n, m) what it has to know at the next exit, or None; follows its images.
    """

    labels: Array
    confidences: Array
    scores: Array
    leaves: Array
    memory: Array | None


class Policy(FrozenModel):
    """Thresholds on the score of every exit; the last one lets everybody leave.

    ``confidence`` is the highest probability, ``margin`` its distance to the second highest, ``entropy`` is
    1 - H / log C, ``patience`` the number of exits in a row, up to this one, that gave the same answer before
    (arXiv 2006.04152), with 0.999 times the confidence as its fraction, so that thresholds between two whole numbers
    mean something; ``gate`` is a small network on these (in the line of EENet, arXiv 2301.07099, and JEI-DNN,
    arXiv 2310.09163).
    """

    kind: Kind = "confidence"
    thresholds: Annotated[list[float], Field(min_length=1)]
    """One per exit, first exit first."""
    temperatures: list[Annotated[float, Field(gt=0)]] = Field(default_factory=list)
    """What the logits of each exit are divided by; without any, 1."""
    gates: list[Gate] = Field(default_factory=list)
    """For kind gate: one for every exit but the last."""
    network: NetworkIdentity | None = None
    calibration: Calibration | None = None
    version: Literal[1] = 1

    _highest: ClassVar[float] = 1.0

    @model_validator(mode="after")
    def _fits(self) -> Policy:
        exits = len(self.thresholds)
        if self.thresholds[-1] > 0:
            raise ValueError(f"the last threshold is {self.thresholds[-1]:g}: at the last exit everybody has to leave")
        if self.temperatures and len(self.temperatures) != exits:
            raise ValueError(f"{len(self.temperatures)} temperatures for {exits} exits")
        if len(self.gates) != (exits - 1 if self.kind == "gate" else 0):
            raise ValueError(f"{len(self.gates)} gates for {exits} exits and kind {self.kind}")
        if self.calibration and self.calibration.seen and len(self.calibration.seen.cells) != exits:
            raise ValueError(f"calibration.seen counts {len(self.calibration.seen.cells)} exits of {exits}")
        return self

    @property
    def exits(self) -> int:
        """The number of exits."""
        return len(self.thresholds)

    @property
    def expected_accuracy(self) -> float:
        """Top-1 in percent on the images of the calibration."""
        return self._calibrated().top1

    @property
    def expected_cost(self) -> float:
        """Mean cost of an image on the images of the calibration, in ``calibration.unit``."""
        return self._calibrated().cost

    def _calibrated(self) -> Calibration:
        if self.calibration is None:
            raise PolicyError("this policy was not calibrated: its thresholds were given by hand")
        return self.calibration

    @property
    def needs_every_exit(self) -> bool:
        """Whether the score of an exit depends on the exits before it."""
        return self.kind in ("patience", "gate")

    def can_fire(self, i: int) -> bool:
        """Whether any image could leave at exit i (from 0)."""
        highest = i + self._highest if self.kind == "patience" else self._highest
        return self.thresholds[i] <= highest

    def probabilities(self, i: int, logits: Array) -> Array:
        """Logits (n, C) of exit i (from 0) -> probabilities (n, C) at its temperature, float32 or float64."""
        xp = array_namespace(logits)
        if logits.dtype not in (xp.float32, xp.float64):
            logits = xp.astype(logits, xp.float32)
        if self.temperatures and self.temperatures[i] != 1:
            logits = logits / self.temperatures[i]
        powers = xp.exp(logits - xp.max(logits, axis=-1, keepdims=True))
        return powers / xp.sum(powers, axis=-1, keepdims=True)

    def decide(self, i: int, probabilities: Array, memory: Array | None = None) -> Decision:
        """Say who leaves at exit i (from 0).

        Args:
            i: number of the exit.
            probabilities: (n, C), as `probabilities` gave them.
            memory: that of the previous exit's decision, for the same images.
        """
        xp = array_namespace(probabilities)
        labels = xp.argmax(probabilities, axis=-1)
        confidences = xp.max(probabilities, axis=-1)
        if self.kind == "confidence":
            scores = confidences
        elif self.kind == "margin":
            scores = margin(probabilities, labels)
        elif self.kind == "entropy":
            scores = certainty(probabilities)
        else:
            memory = remember(memory, labels, confidences)
            if self.kind == "patience":
                scores = memory[:, _STREAK] + 0.999 * confidences
            elif i < self.exits - 1:
                scores = self._gate(i, features(i, probabilities, memory))
            else:
                scores = xp.ones_like(confidences)
        last = i == self.exits - 1
        leaves = xp.ones_like(labels, dtype=xp.bool) if last else scores >= self.thresholds[i]
        return Decision(labels, confidences, scores, leaves, memory)

    @cached_property
    def _constants(self) -> dict[Any, Any]:
        """The gates' weights as arrays, by kind and device; no private attribute, for torch.compile cannot read one."""
        return {}

    def _gate(self, i: int, values: Array) -> Array:
        """Score (n,) of a gate from its features (n, 6)."""
        xp = array_namespace(values)
        key = (i, xp.__name__, values.dtype, str(device(values)))
        if key not in self._constants:
            gate = self.gates[i]
            self._constants[key] = tuple(
                xp.asarray(part, dtype=values.dtype, device=device(values))
                for part in (gate.weight, gate.bias, gate.out, gate.out_bias)
            )
        weight, bias, out, out_bias = self._constants[key]
        hidden = values @ weight.T + bias
        logit = xp.where(hidden > 0, hidden, xp.zeros_like(hidden)) @ out + out_bias
        return 1 / (1 + xp.exp(-logit))

    def with_thresholds(self, thresholds: list[float], calibration: Calibration | None = None) -> Policy:
        """The same policy with other thresholds."""
        return Policy.model_validate({**self.model_dump(), "thresholds": thresholds, "calibration": calibration})

    def save(self, path: str | Path) -> None:
        """Write it as JSON, atomically."""
        write_atomically(Path(path), self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Policy:
        """Read a policy that `save` wrote.

        Raises:
            PolicyError: there is no such file, or it is none of a policy.
        """
        path = Path(path)
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise PolicyError(
                f"policy {path} cannot be read ({error.strerror}); make one with: adaptive calibrate RUN --budget 0.5"
            ) from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "content"
            raise PolicyError(f"{path} is no policy: {where}: {first['msg']}; calibrate again") from None


# Columns of the memory.
_LABEL, _STREAK, _PREVIOUS, _HIGHEST, _CONFIDENCE = range(5)


def remember(memory: Array | None, labels: Array, confidences: Array) -> Array:
    """Bring the memory (n, 5) of the exits so far up to date with this exit's answers."""
    xp = array_namespace(confidences)
    own = xp.astype(labels, confidences.dtype)
    if memory is None:
        zeros = xp.zeros_like(confidences)
        return xp.stack([own, zeros, zeros, zeros, confidences], axis=1)
    streak = xp.where(own == memory[:, _LABEL], memory[:, _STREAK] + 1, xp.zeros_like(confidences))
    before = memory[:, _CONFIDENCE]
    highest = xp.where(before > memory[:, _HIGHEST], before, memory[:, _HIGHEST])
    return xp.stack([own, streak, before, highest, confidences], axis=1)


def margin(probabilities: Array, labels: Array) -> Array:
    """Highest probability minus the second highest: (n, C), its argmax (n,) -> (n,)."""
    xp = array_namespace(probabilities)
    classes = xp.arange(probabilities.shape[-1], device=device(probabilities))
    others = xp.where(classes == labels[:, None], xp.zeros_like(probabilities), probabilities)
    return xp.max(probabilities, axis=-1) - xp.max(others, axis=-1)


def certainty(probabilities: Array) -> Array:
    """1 - entropy / log C: (n, C) -> (n,), 0 for a uniform distribution and 1 for a single class."""
    xp = array_namespace(probabilities)
    logs = xp.log(xp.where(probabilities > 0, probabilities, xp.ones_like(probabilities)))
    return 1 + xp.sum(probabilities * logs, axis=-1) / math.log(max(2, probabilities.shape[-1]))


def features(i: int, probabilities: Array, memory: Array) -> Array:
    """What the gate of exit i (from 0) reads, (n, 6), in the order of ``FEATURES``.

    Args:
        i: number of the exit.
        probabilities: (n, C) there.
        memory: (n, 5) as `remember` made it, this exit included.
    """
    xp = array_namespace(probabilities)
    labels = xp.argmax(probabilities, axis=-1)
    agreement = memory[:, _STREAK] / max(1, i)
    parts = [memory[:, _CONFIDENCE], margin(probabilities, labels), certainty(probabilities)]
    return xp.stack([*parts, agreement, memory[:, _PREVIOUS], memory[:, _HIGHEST]], axis=1)
