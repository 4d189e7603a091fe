"""Policies against formulas of the tests' own, on torch and numpy alike, and their files."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from adaptive.errors import PolicyError
from adaptive.inference.outputs import scores, simulate
from adaptive.inference.policy import EVERYBODY, FEATURES, NOBODY, Gate, Policy
from adaptive.inference.policy_kinds import KINDS, Kind

EXITS, IMAGES, CLASSES = 4, 50, 7


def logits() -> torch.Tensor:
    return 2 * torch.randn(EXITS, IMAGES, CLASSES, generator=torch.Generator().manual_seed(0))


def gates() -> list[Gate]:
    draw = np.random.default_rng(0)
    return [
        Gate(
            weight=draw.normal(size=(3, len(FEATURES))).tolist(),
            bias=draw.normal(size=3).tolist(),
            out=draw.normal(size=3).tolist(),
            out_bias=0.1,
        )
        for _ in range(EXITS - 1)
    ]


def policy(kind: Kind, thresholds: list[float] | None = None, **further: object) -> Policy:
    return Policy(
        kind=kind,
        thresholds=thresholds or [0.4, 0.5, 0.6, EVERYBODY],
        gates=gates() if kind == "gate" else [],
        **further,  # type: ignore[arg-type]
    )


def expected_scores(kind: str, outputs: torch.Tensor) -> list[list[float]]:
    """One image, one exit at a time, in Python's double precision."""
    rows = []
    for i in range(EXITS):
        row = []
        for n in range(IMAGES):
            history = [np.exp(z[n].double().numpy()) for z in outputs[: i + 1]]
            history = [p / p.sum() for p in history]
            ranked = np.sort(history[-1])[::-1]
            answers = [int(p.argmax()) for p in history]
            streak = 0
            while streak < i and answers[i - 1 - streak] == answers[i]:
                streak += 1
            certainty = 1 + float((history[-1] * np.log(history[-1])).sum()) / math.log(CLASSES)
            if kind == "gate" and i < EXITS - 1:
                before = [float(p.max()) for p in history[:-1]]
                values = [ranked[0], ranked[0] - ranked[1], certainty, streak / max(1, i)]
                values += [before[-1] if before else 0, max(before, default=0)]
                gate = gates()[i]
                hidden = np.maximum(np.array(gate.weight) @ np.array(values) + gate.bias, 0)
                row.append(1 / (1 + math.exp(-float(hidden @ gate.out) - gate.out_bias)))
            else:
                row.append(
                    {
                        "confidence": ranked[0],
                        "margin": ranked[0] - ranked[1],
                        "entropy": certainty,
                        "patience": streak + 0.999 * ranked[0],
                        "gate": 1.0,
                    }[kind]
                )
        rows.append(row)
    return rows


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_formulas(kind: Kind) -> None:
    outputs = logits()
    chosen = policy(kind)
    probabilities = torch.stack([chosen.probabilities(i, z) for i, z in enumerate(outputs)])
    found = scores(chosen, probabilities)
    torch.testing.assert_close(found.double(), torch.tensor(expected_scores(kind, outputs)).double(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_numpy_decides_as_torch_does(kind: Kind) -> None:
    chosen = policy(kind, temperatures=[0.5, 1.0, 1.5, 2.0])
    memory = other = None
    for i, z in enumerate(logits()):
        ours = chosen.decide(i, chosen.probabilities(i, z), memory)
        theirs = chosen.decide(i, chosen.probabilities(i, z.numpy()), other)
        memory, other = ours.memory, theirs.memory
        for a, b in zip(ours[:4], theirs[:4], strict=True):
            np.testing.assert_allclose(a.numpy(), b, rtol=0, atol=1e-6)
            assert type(b) is np.ndarray
            assert a.numpy().dtype == b.dtype


def test_patience_at_a_whole_threshold_is_that_many_agreements() -> None:
    outputs = logits()
    answers = outputs.argmax(2)
    taken = simulate(policy("patience", [1.0, 1.0, 1.0, EVERYBODY]), outputs.softmax(2)).exits
    for n in range(IMAGES):
        agreeing = [i for i in range(1, EXITS) if answers[i, n] == answers[i - 1, n]]
        assert taken[n] == (agreeing[0] + 1 if agreeing else EXITS)


def test_temperature_divides_the_logits_of_its_exit() -> None:
    chosen = policy("confidence", temperatures=[1.0, 4.0, 1.0, 1.0])
    z = logits()
    torch.testing.assert_close(chosen.probabilities(1, z[1]), (z[1] / 4).softmax(1))
    torch.testing.assert_close(chosen.probabilities(0, z[0]), z[0].softmax(1))


def test_low_precision_is_decided_in_single() -> None:
    chosen = policy("confidence")
    assert chosen.probabilities(0, logits()[0].bfloat16()).dtype == torch.float32
    assert chosen.probabilities(0, logits()[0].double()).dtype == torch.float64


def test_which_exits_can_fire() -> None:
    assert [policy("confidence", [1.0, 1.1, NOBODY, -1]).can_fire(i) for i in range(4)] == [True, False, False, True]
    assert [policy("patience", [1.5, 1.5, 4.0, -1]).can_fire(i) for i in range(4)] == [False, True, False, True]


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_policy_comes_back_and_decides_alike(kind: Kind, tmp_path: Path) -> None:
    chosen = policy(kind, temperatures=[0.7, 1.3, 1.0, 1.1])
    chosen.save(tmp_path / "policy.json")
    again = Policy.load(tmp_path / "policy.json")
    assert again == chosen
    probabilities = logits().softmax(2)
    assert torch.equal(simulate(again, probabilities).exits, simulate(chosen, probabilities).exits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"thresholds": [0.5, 0.9]}, "everybody has to leave"),
        ({"temperatures": [1.0]}, "1 temperatures for 4 exits"),
        ({"temperatures": [1.0, 0.0, 1.0, 1.0]}, "greater than 0"),
        ({"kind": "gate"}, "0 gates for 4 exits"),
        ({"kind": "guess"}, "'confidence', 'margin'"),
        ({"threshold": []}, "Extra inputs"),
        ({"version": 2}, "Input should be 1"),
    ],
)
def test_what_is_no_policy_is_refused(change: dict[str, object], message: str, tmp_path: Path) -> None:
    file = tmp_path / "policy.json"
    file.write_text(json.dumps({**policy("confidence").model_dump(), **change}))
    with pytest.raises(PolicyError, match="is no policy") as caught:
        Policy.load(file)
    assert message in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="adaptive calibrate"):
        Policy.load(tmp_path / "missing.json")
    (tmp_path / "text.json").write_text("not json")
    with pytest.raises(PolicyError, match="is no policy"):
        Policy.load(tmp_path / "text.json")
    with pytest.raises(ValidationError, match="a gate of 1 units"):
        Gate(weight=[[1.0]], bias=[0.0], out=[1.0], out_bias=0.0)


def test_a_policy_without_calibration_has_no_expectation() -> None:
    with pytest.raises(PolicyError, match="not calibrated"):
        _ = policy("confidence").expected_accuracy
