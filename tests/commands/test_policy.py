"""`adaptive policy check`: verdicts, their exit codes, and what cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adaptive.commands.main import main
from adaptive.inference.calibration.calibrate import Target, fit
from adaptive.inference.drift.counts import Counts
from adaptive.inference.drift.seen import Seen
from adaptive.inference.outputs import simulate
from adaptive.inference.policy import Policy
from tests.inference.answers import made_up_logits


@pytest.fixture(scope="module")
def policy() -> Policy:
    logits, labels, costs = made_up_logits(3, 500)
    return fit(logits, labels, costs, Target(budget=1.8), method="geometric")


@pytest.fixture
def folder(policy: Policy, tmp_path: Path) -> Path:
    """A run folder, as far as the command reads it."""
    policy.save(tmp_path / "policy.json")
    return tmp_path


def see(policy: Policy, file: Path, images: int, factor: float = 1.0) -> Path:
    logits = factor * made_up_logits(3, images, seed=9)[0]
    found = simulate(policy, [policy.probabilities(i, z) for i, z in enumerate(logits)])
    Seen.of(policy, Counts.of(found.exits, found.confidences, 3)).save(file)
    return file


def check(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int | str | None, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["policy", "check", *map(str, words)])
    shown = capsys.readouterr()
    return ended.value.code, shown.out, shown.err


@pytest.mark.parametrize(
    ("images", "factor", "code", "verdict", "sentence"),
    [
        (800, 1.0, 0, "alike", "alike: the images leave as those of the calibration did; a change in "),
        (800, 0.6, 3, "drifted", "no longer alike: what the calibration promised does not hold for these images; "),
        (20, 1.0, 4, "too few", "too few images to tell: "),
    ],
)
def test_verdicts(
    folder: Path, policy: Policy, images: int, factor: float, code: int, verdict: str, sentence: str, capsys: Any
) -> None:
    seen = see(policy, folder / "seen.json", images, factor)
    ended, out, _ = check(capsys, folder, "--seen", seen)
    assert ended == code
    assert sentence in out
    assert all(words in out for words in ("where images leave", "500 of the calibration", f"{images} seen since"))
    ended, out, _ = check(capsys, folder / "policy.json", "--seen", seen, "--json", "--false-alarms", 0.01)
    found = json.loads(out)
    assert (ended, found["verdict"], found["false_alarms"]) == (code, verdict, 0.01)
    assert (found["p_value"] <= 0.01) == (verdict == "drifted")
    assert sum(found["now"]["counts"]) == found["now"]["images"] == images
    for share, (low, high) in zip(found["then"]["shares"], found["then"]["share_intervals"], strict=True):
        assert low <= share <= high


def test_several_files_are_added(folder: Path, policy: Policy, capsys: Any) -> None:
    files = [see(policy, folder / f"{i}.json", 300) for i in range(2)]
    _, out, _ = check(capsys, folder, "--seen", files[0], "--seen", files[1], "--json")
    assert json.loads(out)["now"]["images"] == 600


def test_what_cannot_be_compared_is_told(folder: Path, policy: Policy, capsys: Any) -> None:
    seen = see(policy, folder / "seen.json", 100)
    other = policy.with_thresholds([0.2, 0.3, 0.0], policy.calibration)
    old = policy.calibration.model_copy(update={"seen": None}) if policy.calibration else None
    for name, one in (("other", other), ("old", policy.model_copy(update={"calibration": old}))):
        (folder / name).mkdir()
        one.save(folder / name / "policy.json")
    for words, told in (
        (["other", "--seen", "seen.json"], "seen.json: counts of another policy (thresholds "),
        (["old", "--seen", "seen.json"], "policy.json remembers no images of a calibration: it is of an earlier"),
        ([".", "--seen", "policy.json"], "policy.json holds no counts: "),
        ([".", "--seen", "nothing.json"], "nothing.json cannot be read (No such file or directory); make them with: "),
        (["nothing", "--seen", "seen.json"], "policy "),
        ([".", "--seen", "seen.json", "--false-alarms", "0"], "--false-alarms 0: give a probability between 0 and 1"),
    ):
        placed = [str(folder / word) if word[0] not in "-0" else word for word in words]
        code, out, err = check(capsys, *placed)
        assert (code, out) == (1, "")
        assert err.startswith("adaptive policy: error: ")
        assert told in err
        assert len(err.splitlines()) == 1
    assert seen.is_file()
