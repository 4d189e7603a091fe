"""Documented commands that one machine without a GPU or a network can carry out, run as written, page after page."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.docs.commands import Command, typed
from tests.docs.test_commands import REFUSED
from tests.helpers.commands import ADAPTIVE, Forks
from tests.helpers.locations import REPOSITORY

pytestmark = [pytest.mark.end_to_end, pytest.mark.full, pytest.mark.timeout(1800)]

# What is not run here, by a part of the command, and why; tests/docs/test_commands.py checks the words of all.
APART = {
    r"digits\.yaml|runs/digits|photos data/digits|deploy/digits": "the tutorial, run in test_tutorial.py",
    r"imagenet-folders|imagenet-downloads|cifar-\d+-binary|CIFAR_FOLDER|tiny-imagenet-200": "a download; data/packing",
    r"train configs/imagenet": "minutes a step on a CPU; configs/test_recipes.py takes one of each",
    r"s3://|https://|pipe:ssh": "a store of others; data/remote",
    r"adaptive submit": "a cluster; cluster/test_jobs.py and commands/test_submit.py",
    r"dashboard --(project|sync)": "W&B; tracking/test_dashboard.py",
    r"adaptive doctor": "judges this machine; doctor/test_doctor.py",
    r"pack --index FOLDER": "a folder of shards; data/packing",
    r"IMAGE\.\.\.": "the user's images",
}
VERDICTS = (3, 4)  # of images that are other than the calibration's, or too few: as here, where most were trained on
# Words that make a command quick, behind its own.
QUICK = {
    "adaptive train configs/quickstart.yaml": "data.image_size=32 train.epochs=6",
    "adaptive train": "train.max_steps=1 train.device=cpu data.workers=0 evaluate.batch=64",
}


def commands() -> list[Command]:
    """Those of `adaptive`, each once: first the README's, which make what others use, then those that pack."""
    found: dict[str, Command] = {}
    for command in sorted(typed(), key=lambda c: (c.page != "README.md", c.words[:2] != ["adaptive", "pack"])):
        if command.words[0] == "adaptive" and command.text not in REFUSED:
            found.setdefault(" ".join(command.words), command)
    return list(found.values())


def reason(command: Command) -> str:
    return next((why for part, why in APART.items() if re.search(part, command.text)), "")


def test_every_reason_is_needed() -> None:
    for part in APART:
        assert [c for c in commands() if re.search(part, c.text)], part


@pytest.fixture
def home(tmp_path: Path, digits: Path) -> Path:
    """A working folder: the checkout's configurations, photos in folders of classes, and packed data by its names."""
    from sklearn.datasets import load_digits

    scanned = load_digits()
    for number, (pixels, label) in enumerate(zip(scanned.images, scanned.target, strict=True)):
        for folder in (
            tmp_path / "FOLDER" / str(label),
            *([tmp_path / "photos" / str(label)] if number % 6 == 0 else ()),
        ):
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray((pixels * 15.9).astype(np.uint8)).resize((32, 32)).save(folder / f"{number}.png")
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/cifar10").symlink_to("mine")  # which the README's first command packs
    (tmp_path / "data/imagenet").symlink_to(digits)
    return tmp_path


def started(forks: Forks, words: list[str], folder: Path) -> tuple[int | None, str]:
    """Run a command in a folder; packing starts processes of its own, which a fork of the test's cannot."""
    if words[0] == "pack":
        ended = subprocess.run([ADAPTIVE, *words], cwd=folder, capture_output=True, text=True, timeout=600)
        return ended.returncode, ended.stderr
    fork = forks.start(words, cwd=folder).wait(900)
    return fork.code, fork.err


def test_every_command_that_one_machine_can_run_does(home: Path, forks: Forks) -> None:
    failed, run = [], 0
    for command in commands():
        if reason(command):
            continue
        text = " ".join(command.words)
        more = next((words for begin, words in QUICK.items() if text.startswith(begin)), "").split()
        place = home
        if text.startswith("adaptive pack photos"):  # another dataset by the name of the README's
            place = home / "elsewhere"
            place.mkdir()
            shutil.copytree(home / "FOLDER", place / "photos")
        code, told = started(forks, [*command.words[1:], *more], place)
        run += 1
        if code and not (text.startswith("adaptive policy check") and code in VERDICTS):
            failed.append(f"{command}: {code} {told[-300:]}")
        if text.startswith("adaptive train configs/quickstart.yaml data.path=data/mine"):
            assert failed == []
            for name in ("other", "plain"):
                shutil.copytree(home / "runs/mine", home / "runs" / name)
    assert "\n".join(failed) == ""
    assert run > 30
