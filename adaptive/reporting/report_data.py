"""The data of a report: one run's outputs on a split, reduced to what figures and tables need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from adaptive.errors import AdaptiveError
from adaptive.foreign_text import visible
from adaptive.inference.checks import check_answers
from adaptive.inference.in_sample import NOTHING, InSample
from adaptive.inference.measuring.time_model import Asked, TimeModel
from adaptive.inference.outputs import Outputs, simulate
from adaptive.inference.policy import Policy
from adaptive.metrics import measure_outputs

_CHUNK = 2048  # images at a time: ten exits of a thousand classes are 80 MB


@dataclass(frozen=True)
class Timing:
    """Measured milliseconds of one image if all leave at an exit, with the machine, device and images per batch.

    ``model`` tells what policies cost; evaluations before it was measured have none.
    ``together`` says that all runs of the report were measured in one process, interleaved: only then they compare.
    """

    machine: str
    device: str
    batch: int
    milliseconds: list[float]
    model: TimeModel | None = None
    together: bool = False


@dataclass(frozen=True)
class BudgetPoint:
    """One policy of a budgeted curve: mean multiply-adds, top-1 in percent, share of images per exit (sums to 1).

    ``intervals`` holds what `intervals.compared` and `mean_cost` said of it; evaluations before them have none.
    """

    cost: float
    top1: float
    shares: list[float]
    intervals: Mapping[str, Any] = field(default_factory=dict)

    @property
    def top1_range(self) -> tuple[float, float] | None:
        """Interval of the accuracy in percent, if known."""
        return self.intervals.get("top1_interval")


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """The facts about a run and its network of k exits and C classes that do not follow from its outputs.

    Attributes:
        name: of the run.
        backbone: of the network.
        checkpoint: whose weights were measured.
        dataset: its name.
        split: of the dataset.
        classes: C names.
        exit_names: k modules that the exits follow, the last one the backbone's end.
        macs: (k,) multiply-adds of one image up to each exit.
        parameters: (k,) up to each exit.
        policy: of the run, if any.
        folder: of the run, as a shell reads it, for the commands that the page names.
        in_sample: what the measured images had chosen before.
        split_option: what `adaptive evaluate` has to be told to measure this split, with a space in front.
    """

    name: str
    backbone: str
    checkpoint: str
    dataset: str
    split: str
    classes: list[str]
    exit_names: list[str]
    macs: list[int]
    parameters: list[int]
    policy: Policy | None = None
    folder: str = ""
    in_sample: InSample = NOTHING
    split_option: str = ""


@dataclass(frozen=True, kw_only=True)
class RunReport(RunFacts):
    """One run on one split: its facts, and what its outputs for N images say. Exits are numbered 1..k.

    Attributes:
        top1: (k,) percent.
        top5: (k,) percent.
        loss: (k,) cross entropy.
        labels: (N,) true classes.
        ids: (N,) of the images in the split.
        answers: (k, N) the likeliest class at each exit.
        confidences: (k, N) its probability at temperature 1.
        calibrated: (k, N) its probability at the policy's temperatures; None where it has none.
        exits: (N,) where each image leaves by the policy.
        leaving: (N,) probability of its answer there.
        budgeted: the curve of policies over budgets, by rising cost; empty where it was not measured.
        budgeted_by: how these policies were chosen.
        timing: measured milliseconds, if any.
    """

    top1: list[float]
    top5: list[float]
    loss: list[float]
    labels: NDArray[np.int64]
    ids: NDArray[np.int64]
    answers: NDArray[np.int32]
    confidences: NDArray[np.float32]
    calibrated: NDArray[np.float32] | None = None
    exits: NDArray[np.int64] | None = None
    leaving: NDArray[np.float32] | None = None
    budgeted: tuple[BudgetPoint, ...] = ()
    budgeted_by: str = ""
    timing: Timing | None = None

    @property
    def images(self) -> int:
        """Number of images."""
        return len(self.labels)

    @property
    def given(self) -> NDArray[np.int64]:
        """The answer (N,) that each image leaves with; needs a policy."""
        return self.answers[self._exits() - 1, np.arange(self.images)].astype(np.int64)

    @property
    def right(self) -> NDArray[np.bool_]:
        """Whether the answer (N,) that each image leaves with is right; needs a policy."""
        return self.given == self.labels

    def left_at(self, number: int) -> NDArray[np.intp]:
        """Indices of the images that leave at an exit, surest first; needs a policy."""
        assert self.leaving is not None
        found = np.flatnonzero(self._exits() == number)
        return found[np.argsort(-self.leaving[found], kind="stable")]

    @property
    def shares(self) -> list[float]:
        """Share of images (k,) that leave at each exit, sums to 1; needs a policy."""
        return (np.bincount(self._exits() - 1, minlength=len(self.macs)) / self.images).tolist()

    @property
    def policy_top1(self) -> float:
        """Accuracy in percent, every image counted where it leaves; needs a policy."""
        return 100 * float(self.right.mean())

    @property
    def policy_macs(self) -> float:
        """Mean multiply-adds of an image; needs a policy."""
        return float(np.dot(self.shares, self.macs))

    def mean_milliseconds(self, shares: Sequence[float]) -> float:
        """Mean milliseconds of an image when these shares (k,) leave at each exit; needs a timing.

        By the model of time, with exits that take nobody not asked. Without one it is the shares of what full batches
        take, which is too little: batches shrink, and small ones take longer per image.
        """
        assert self.timing is not None
        if self.timing.model is not None:
            taken = [*(share > 0 for share in shares[:-1]), True]
            return self.timing.model.mean(shares, Asked(taken, taken, taken))
        return float(np.dot(shares, self.timing.milliseconds))

    def accuracy_at(self, number: int) -> float | None:
        """Accuracy in percent of the images that leave at an exit, None where none does; needs a policy."""
        here = self._exits() == number
        return 100 * float(self.right[here].mean()) if here.any() else None

    def _exits(self) -> NDArray[np.int64]:
        assert self.exits is not None, "the run has no policy"
        return self.exits


class _File(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)


class _Clock(_File):
    machine: str
    device: str
    batch: int
    exits: list[float]
    model: TimeModel | None = None


class _Point(_File):
    cost: float
    top1: float
    shares: list[float]
    top1_interval: tuple[float, float] | None = None
    cost_interval: tuple[float, float] | None = None
    top1_loss: float | None = None
    top1_loss_interval: tuple[float, float] | None = None


class _Curve(_File):
    kind: str
    method: str
    split: str
    points: list[_Point]


class Evaluation(_File):
    """What a report reads of the file that ``adaptive evaluate`` wrote."""

    checkpoint: str
    weights: str
    milliseconds: _Clock | None = None
    budgeted: _Curve | None = None


def build_run(outputs: Outputs, facts: RunFacts, evaluation: Mapping[str, Any] | None = None) -> RunReport:
    """Reduce a run's outputs to what a report needs, a piece at a time: logits may fill most of the memory.

    Args:
        outputs: of k exits for the N images of the split.
        facts: about the run.
        evaluation: what ``adaptive evaluate`` wrote for this split, if it did; its keys ``budgeted`` and
            ``milliseconds`` are read where it has them.

    Raises:
        AdaptiveError: the numbers of exits or classes do not fit together, or there are no images.
        ModelError: answers are NaN or infinite.
    """
    facts = _harmless(facts)
    _check(outputs, facts)
    check_answers(outputs.logits)
    measured = measure_outputs(outputs.logits, outputs.labels)
    timing, points, how = _from_evaluation(evaluation or {}, len(facts.macs))
    return RunReport(
        **vars(facts),
        top1=measured.top1,
        top5=measured.top5,
        loss=measured.loss,
        labels=outputs.labels.numpy(),
        ids=outputs.ids.numpy(),
        budgeted=points,
        budgeted_by=how,
        timing=timing,
        **_answers(outputs, facts.policy),
    )


def _harmless(facts: RunFacts) -> RunFacts:
    """Return the facts with all names as they can be drawn, printed and put into a page."""
    return replace(
        facts,
        name=visible(facts.name),
        backbone=visible(facts.backbone),
        checkpoint=visible(facts.checkpoint),
        dataset=visible(facts.dataset),
        split=visible(facts.split),
        classes=[*map(visible, facts.classes)],
        exit_names=[*map(visible, facts.exit_names)],
    )


def _check(outputs: Outputs, facts: RunFacts) -> None:
    """Check that outputs, network, policy and classes fit together (raises AdaptiveError)."""
    k, images, width = outputs.logits.shape
    for what, count, expected in (
        ("costs", len(facts.macs), k),
        ("exit names", len(facts.exit_names), k),
        ("thresholds", facts.policy.exits if facts.policy else k, k),
        ("class names", len(facts.classes), width),
    ):
        if count != expected:
            raise AdaptiveError(
                f"run {facts.name}: {count} {what} for {expected}; the policy or evaluation is another's"
            )
    if not images:
        raise AdaptiveError(f"run {facts.name}: split {facts.split} holds no images; give another one with --split")


def _answers(outputs: Outputs, policy: Policy | None) -> dict[str, Any]:
    """The arrays of `RunReport` that come from logits."""
    k, images = outputs.logits.shape[:2]
    plain = Policy(thresholds=[0.0] * k)
    found: dict[str, Any] = {
        "answers": np.empty((k, images), dtype=np.int32),
        "confidences": np.empty((k, images), dtype=np.float32),
    }
    if policy is not None:
        found |= {"exits": np.empty(images, dtype=np.int64), "leaving": np.empty(images, dtype=np.float32)}
        if policy.temperatures:
            found["calibrated"] = np.empty((k, images), dtype=np.float32)
    for start in range(0, images, _CHUNK):
        piece = slice(start, start + _CHUNK)
        part = Outputs(outputs.logits[:, piece], outputs.labels[piece], outputs.ids[piece])
        confidences, answers = torch.stack(list(part.probabilities(plain))).max(dim=-1)
        found["confidences"][:, piece], found["answers"][:, piece] = confidences.numpy(), answers.numpy()
        if policy is None:
            continue
        probabilities = torch.stack(list(part.probabilities(policy)))
        predictions = simulate(policy, probabilities)
        found["exits"][piece], found["leaving"][piece] = predictions.exits.numpy(), predictions.confidences.numpy()
        if policy.temperatures:
            found["calibrated"][:, piece] = torch.amax(probabilities, dim=-1).numpy()
    return found


def _from_evaluation(evaluation: Mapping[str, Any], exits: int) -> tuple[Timing | None, tuple[BudgetPoint, ...], str]:
    """Timing and budgeted curve of an evaluation; nothing where an older one lacks them."""
    clock, curve = evaluation.get("milliseconds"), evaluation.get("budgeted")
    timing = None
    if clock and len(clock["exits"]) == exits:
        model = TimeModel.model_validate(clock["model"]) if clock.get("model") else None
        timing = Timing(
            visible(clock["machine"]),
            visible(clock["device"]),
            clock["batch"],
            list(clock["exits"]),
            model if model and len(model.parts) == exits else None,
        )
    if not curve:
        return timing, (), ""
    points = [BudgetPoint(p["cost"], p["top1"], list(p["shares"]), _intervals(p)) for p in curve["points"]]
    how = visible(f"kind {curve['kind']}, method {curve['method']}, chosen on {curve['split']}")
    return timing, tuple(sorted((p for p in points if len(p.shares) == exits), key=lambda p: p.cost)), how


def _intervals(point: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("top1_interval", "cost_interval", "top1_loss", "top1_loss_interval")
    return {key: point[key] for key in keys if point.get(key) is not None}
