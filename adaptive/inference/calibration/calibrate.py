"""`calibrate`: fits a policy on held-out images for a mean cost, an accuracy, or a bounded loss of accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from adaptive.errors import PolicyError
from adaptive.inference.calibration.gates import fit_gates
from adaptive.inference.calibration.geometric import GeometricCurve
from adaptive.inference.calibration.guarantees.judged import Judged, images_of_the_test
from adaptive.inference.calibration.input_checks import check_name, check_outputs, check_probabilities
from adaptive.inference.calibration.reference import with_counts
from adaptive.inference.calibration.search import search
from adaptive.inference.calibration.temperature import fit_temperatures
from adaptive.inference.calibration.thresholds import Choice, Scored, check_budget
from adaptive.inference.calibration.timed import Clockwork, within
from adaptive.inference.measuring.time_model import TimeModel
from adaptive.inference.outputs import ExitProbabilities, decisions
from adaptive.inference.policy import EVERYBODY, NOBODY, Calibration, Gate, Policy
from adaptive.inference.policy_kinds import KINDS, Kind

METHODS = ("search", "geometric", "maximum")


@dataclass(frozen=True)
class Target:
    """What a policy has to keep: a mean cost, an accuracy, or a bound on the loss of accuracy; one of the three.

    Attributes:
        budget: highest mean cost of an image, in the unit of the costs.
        top1: lowest accuracy in percent, at the least cost: on the images that choose, or in truth where a confidence
            is given.
        confidence: with top1; probability over the draw of the held-out images that the accuracy in truth is top1.
        epsilon: how much accuracy may be lost against the full network, as a share (0.01 is one point), at the least
            cost, with probability 1 - delta over the draw of the held-out images.
        delta: with epsilon; 0.1 unless given.
    """

    budget: float | None = None
    top1: float | None = None
    epsilon: float | None = None
    delta: float | None = None
    confidence: float | None = None

    def __post_init__(self) -> None:
        """Refuse anything but one target in its range (PolicyError)."""
        given = [name for name in ("budget", "top1", "epsilon") if getattr(self, name) is not None]
        if len(given) != 1:
            raise PolicyError(f"target: {' and '.join(given) or 'nothing'} given; give one of budget, top1, epsilon")
        if self.delta is not None and self.epsilon is None:
            raise PolicyError(f"delta {self.delta:g} without epsilon; delta belongs to a bound on the loss of accuracy")
        if self.confidence is not None and self.top1 is None:
            remedy = "give delta, 1 - confidence" if self.epsilon is not None else "a mean cost has none"
            raise PolicyError(f"confidence {self.confidence:g} without top1; it belongs to an accuracy: {remedy}")
        if self.epsilon is not None and self.delta is None:
            object.__setattr__(self, "delta", 0.1)
        for name, highest in (("top1", 100), ("epsilon", 1), ("delta", 1), ("confidence", 1)):
            value = getattr(self, name)
            if value is not None and not 0 < value < highest:
                raise PolicyError(f"{name} {value:g}: has to lie between 0 and {highest}")

    @property
    def tests(self) -> bool:
        """Whether half of the held-out images are kept for a test."""
        return self.budget is None

    def named(self) -> dict[str, float]:
        """What was asked for, by name."""
        return {name: float(value) for name, value in vars(self).items() if value is not None}


def calibrate(
    probabilities: Any,
    labels: Any,
    costs: Sequence[float],
    budget: float,
    method: str = "search",
    *,
    kind: Kind = "confidence",
    unit: str = "MACs",
    split: str = "",
    seed: int = 0,
) -> Policy:
    """Choose the thresholds of a policy for a mean cost.

    Args:
        probabilities: (k, N, C), what k exits answered to N held-out images; a torch tensor or a numpy array.
        labels: (N,).
        costs: (k,), of one image up to each exit, strictly rising.
        budget: mean cost of an image, in the unit of ``costs``.
        method: ``search`` goes through all thresholds for the highest expected accuracy, smoothed against chance, and
            leaves the geometric ones only for a gain; ``maximum`` for the highest accuracy on the very images, which
            promises more than it keeps unless they are many; ``geometric`` goes along the classic one-parameter curve,
            where a budget that is the mean cost of a row of the classic sweep gives that row.
        kind: score of the policy; see `Policy`.
        unit: of the costs, for the record.
        split: where the images come from, for the record.
        seed: for kind gate, of the halves: gates are fitted on one, thresholds chosen on the other.

    Raises:
        PolicyError: shapes that do not fit, no images, labels out of range, no probabilities, costs that do not rise,
            a budget out of range, an unknown method or kind.
        ModelError: probabilities are NaN or infinite.
    """
    values, truth, prices = _checked("probabilities", probabilities, labels, costs, kind, method)
    check_probabilities(values)
    target = Target(budget=budget)
    check_budget(budget, prices, unit)
    parts = _Parts.of(len(truth), kind, target, seed)
    ready = _Ready.of(values, truth, prices, kind, budget, parts, [], seed)
    return with_counts(ready.policy(target, ready.choose(target, method), method, unit, split), values)


def fit(
    logits: Any,
    labels: Any,
    costs: Sequence[float] | TimeModel,
    target: Target,
    *,
    kind: Kind = "confidence",
    method: str = "search",
    temperature: bool = False,
    unit: str = "MACs",
    split: str = "",
    seed: int = 0,
    collaboration: bool = False,
) -> Policy:
    """Build a policy for any target.

    With epsilon or top1, half of the images (by seed) serve everything that is fitted and the other half the test; with
    kind gate, the gates are fitted on half of what is left and thresholds chosen on the other half. The policy's
    calibration reports the images that thresholds were chosen on, or with a test those of the test, and what they say
    about the target (``evidence``, and for top1 ``bound``).

    Args:
        logits: (k, N, C) of k exits for N held-out images.
        labels: (N,).
        costs: (k,), of one image up to each exit, strictly rising; or for a budget in ms per image a model of time,
            by which the policy is within it. Its calibration then has the prices of the exits where its images leave.
        target: what the policy has to keep.
        kind: score of the policy; see `Policy`.
        method: as in `calibrate`; others than ``search`` for a budget only.
        temperature: divide each exit's logits by a fitted temperature.
        unit: of the costs, for the record; ms with a model of time.
        split: where the images come from, for the record.
        seed: of all that is drawn.
        collaboration: with a model of time, whether an exit of the network takes the answer of the one before.

    Raises:
        PolicyError: as in `calibrate`; a target that cannot be met.
        ModelError: logits are NaN or infinite.
    """
    timed = costs if isinstance(costs, TimeModel) else None
    named = costs.linearised([1.0] * len(costs.parts)) if isinstance(costs, TimeModel) else costs
    values, truth, prices = _checked("logits", logits, labels, named, kind, method)
    if timed is not None and target.budget is None:
        raise PolicyError(f"a model of time is for a budget; give costs for {next(iter(target.named()))}")
    if target.budget is None and method != "search":
        raise PolicyError(f"method {method} is for a budget; use method search for {next(iter(target.named()))}")
    middle = (prices[0] + prices[-1]) / 2
    if target.budget is not None:
        if timed is None:
            check_budget(target.budget, prices, unit)
        middle = target.budget
    parts = _Parts.of(len(truth), kind, target, seed)
    ready = _Ready.from_logits(values, truth, prices, kind, middle, parts, temperature, seed)
    if timed is not None:
        policy = ready.within(target, timed, collaboration, method, split)
    else:
        policy = ready.policy(target, ready.choose(target, method), method, unit, split)
    return with_counts(policy, ExitProbabilities(values, policy))


def curve(
    logits: Any,
    labels: Any,
    costs: Sequence[float],
    budgets: Sequence[float],
    *,
    kind: Kind = "confidence",
    method: str = "search",
    temperature: bool = False,
    unit: str = "MACs",
    split: str = "",
    seed: int = 0,
) -> list[Policy]:
    """Build one policy per budget, in the order of the budgets; the arguments are those of `fit`.

    Temperatures are fitted once. So are gates, for the mean of the budgets: what they learn is a ranking of the
    images, and the thresholds on it are chosen budget by budget.
    """
    values, truth, prices = _checked("logits", logits, labels, costs, kind, method)
    targets = [Target(budget=budget) for budget in budgets]
    if not targets:
        raise PolicyError("budgets: none given; give at least one")
    for budget in budgets:
        check_budget(budget, prices, unit)
    parts = _Parts.of(len(truth), kind, targets[0], seed)
    middle = sum(budgets) / len(budgets)
    ready = _Ready.from_logits(values, truth, prices, kind, middle, parts, temperature, seed)
    choices = ready.choose_all(budgets, method)
    return [
        ready.policy(target, Judged(choice), method, unit, split)
        for target, choice in zip(targets, choices, strict=True)
    ]


@dataclass(frozen=True)
class _Parts:
    """Which images serve the fit of temperatures and gates, the choice of thresholds, and the test."""

    fitting: Tensor
    choosing: Tensor
    testing: Tensor | None

    @classmethod
    def of(cls, images: int, kind: Kind, target: Target, seed: int) -> _Parts:
        pieces = (2 if kind == "gate" else 1) * (2 if target.tests else 1)
        if images < pieces:
            raise PolicyError(f"labels: {images} held-out images are too few to divide by {pieces}; give more")
        testing = images_of_the_test(images, seed) if target.tests else None
        order = torch.randperm(images, generator=torch.Generator().manual_seed(seed))
        order = order[: images // 2] if target.tests else order
        half = len(order) // 2
        fitting, choosing = (order[:half], order[half:]) if kind == "gate" else (order, order)
        return cls(fitting.sort().values, choosing.sort().values, testing)


@dataclass(frozen=True)
class _Ready:
    """A policy with all but its thresholds (kind, temperatures, gates), and its scores of all held-out images."""

    template: Policy
    scored: Scored
    costs: list[float]
    parts: _Parts

    @classmethod
    def from_logits(
        cls,
        logits: Tensor,
        labels: Tensor,
        costs: list[float],
        kind: Kind,
        budget: float,
        parts: _Parts,
        temperature: bool,
        seed: int,
    ) -> _Ready:
        fitting = parts.fitting
        temperatures = fit_temperatures((values[fitting] for values in logits), labels[fitting]) if temperature else []
        probabilities = ExitProbabilities(logits, _template("confidence", len(costs), temperatures, []))
        return cls.of(probabilities, labels, costs, kind, budget, parts, temperatures, seed)

    @classmethod
    def of(
        cls,
        probabilities: Tensor | Sequence[Tensor],
        labels: Tensor,
        costs: list[float],
        kind: Kind,
        budget: float,
        parts: _Parts,
        temperatures: list[float],
        seed: int,
    ) -> _Ready:
        gates: list[Gate] = []
        if kind == "gate":
            gates = fit_gates(probabilities, labels, costs, budget, seed, parts.fitting)
        template = _template(kind, len(costs), temperatures, gates)
        found = decisions(template, probabilities)
        correct = torch.stack([decision.labels for decision in found]) == labels
        return cls(template, Scored(torch.stack([decision.scores for decision in found]), correct), costs, parts)

    def choose(self, target: Target, method: str) -> Judged:
        """Choose thresholds, and test them where the target asks for that."""
        chosen = self.scored.subset(self.parts.choosing)
        if target.budget is not None:
            return Judged(self.choose_all([target.budget], method)[0])
        assert self.parts.testing is not None
        tested = self.scored.subset(self.parts.testing)
        if target.top1 is not None:
            return Judged.by_accuracy(chosen, tested, self.costs, target.top1, target.confidence)
        assert target.epsilon is not None
        assert target.delta is not None
        return Judged.by_loss(chosen, tested, self.costs, target.epsilon, target.delta)

    def choose_all(self, budgets: Sequence[float], method: str) -> list[Choice]:
        chosen = self.scored.subset(self.parts.choosing)
        if method != "geometric":
            return search(chosen, self.costs, budgets, smooth=method == "search")
        geometric = GeometricCurve(chosen, self.costs)
        return [geometric.at(budget) for budget in budgets]

    def within(self, target: Target, model: TimeModel, collaboration: bool, method: str, split: str) -> Policy:
        """The policy for a budget in milliseconds by a model of time."""
        assert target.budget is not None
        clockwork = Clockwork(model, self.template, collaboration)
        chosen = self.scored.subset(self.parts.choosing)

        def choose(prices: list[float], budget: float) -> Choice:
            return replace(self, costs=prices).choose_all([budget], method)[0]

        found = within(chosen, choose, clockwork, target.budget)
        policy = replace(self, costs=found.prices).policy(target, Judged(found.choice), method, "ms", split)
        assert policy.calibration is not None
        timing = policy.calibration.model_copy(update={"timing": model.conditions})
        return policy.model_copy(update={"calibration": timing})

    def policy(self, target: Target, judged: Judged, method: str, unit: str, split: str) -> Policy:
        outcome = judged.choice.outcome
        name = "risk" if target.epsilon is not None else "accuracy" if target.top1 is not None else method
        calibration = Calibration(
            method=name,
            target=target.named(),
            unit=unit,
            costs=self.costs,
            images=len(outcome.leaves),
            top1=outcome.top1,
            cost=outcome.cost,
            counts=outcome.counts,
            split=split,
            bound=judged.bound,
            confidence=judged.confidence,
            evidence=judged.evidence,
        )
        return self.template.with_thresholds(judged.choice.thresholds, calibration)


def _template(kind: Kind, exits: int, temperatures: list[float], gates: list[Gate]) -> Policy:
    thresholds = [NOBODY] * (exits - 1) + [EVERYBODY]
    return Policy(kind=kind, thresholds=thresholds, temperatures=temperatures, gates=gates)


def _checked(
    name: str, outputs: Any, labels: Any, costs: Sequence[float], kind: str, method: str
) -> tuple[Tensor, Tensor, list[float]]:
    check_name("kind", kind, KINDS)
    check_name("method", method, METHODS)
    return check_outputs(name, outputs, labels, costs)
