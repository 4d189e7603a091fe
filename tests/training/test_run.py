"""What a run says and records at its start, before a first step."""

import json
from pathlib import Path

from adaptive.distributed.ranks import Ranks
from adaptive.training import run
from adaptive.training.run import prepare
from tests.training.setups import config


def test_a_derived_micro_batch_is_told_and_recorded(digits: Path, tmp_path: Path) -> None:
    asked = {"global_batch": 48, "micro_batch": 32, "device": "cpu"}
    prepared = prepare(config(digits, tmp_path / "run", train=asked), Ranks())
    told = list(run._introduction(prepared, None, []))
    [where] = [i for i, line in enumerate(told) if "1 rank(s) x 24 images x 2 accumulated = 48 per step" in line]
    assert told[where + 1].startswith("train.micro_batch = 32: the 48 images of a rank divide into 24 per forward pass")
    run._observers(prepared, {})
    [start] = [json.loads(line) for line in (tmp_path / "run/environment.jsonl").read_text().splitlines()]
    assert start["batch"] == {"global_batch": 48, "micro_batch": 24, "accumulation": 2}


def test_what_was_asked_for_needs_no_line(digits: Path, tmp_path: Path) -> None:
    prepared = prepare(config(digits, tmp_path / "run", train={"micro_batch": 16, "device": "cpu"}), Ranks())
    assert not [line for line in run._introduction(prepared, None, []) if "train.micro_batch" in line]
