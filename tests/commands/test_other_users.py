"""What a colleague under another user meets: files follow the umask, and what may not be read is told in one line."""

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptive.inference.export.plain_weights import write_weights
from adaptive.training.checkpoints.store import CheckpointStore
from tests.helpers.commands import Ended, Forks

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def modes(folder: Path) -> dict[str, str]:
    """What may be done with files and folders, where it is not what the umask says."""
    mask = os.umask(0)
    os.umask(mask)
    found = {}
    for path in (folder, *folder.rglob("*")):
        mode = stat.S_IMODE(path.lstat().st_mode)
        wanted = (0o777 if path.is_dir() else 0o666) & ~mask
        if not path.is_symlink() and mode & ~0o111 != wanted & ~0o111:
            found[str(path.relative_to(folder))] = oct(mode)
    return found


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o027, 0o077])
def test_what_tensors_are_written_to_follows_the_umask(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        folder = tmp_path / "run" / "checkpoints"
        folder.parent.mkdir()
        CheckpointStore(folder).save(1, {"weights": {"a": torch.zeros(2)}, "ema": {"a": torch.ones(2)}}, {}, None)
        write_weights({"a": torch.zeros(2)}, tmp_path / "run" / "plain.safetensors", {})
        assert modes(tmp_path / "run") == {}
    finally:
        os.umask(before)


def test_a_run_s_files_follow_the_umask(existing_run: Path, digits: Path) -> None:
    assert modes(existing_run) == {}
    assert modes(digits) == {}


@pytest.fixture(scope="module")
def theirs(existing_run: Path, digits: Path) -> Iterator[Path]:
    """Another user's run, in a folder that everybody may look into, which the tests' own folder is not."""
    folder = Path(tempfile.mkdtemp(prefix="adaptive-theirs-"))
    folder.chmod(0o755)
    shutil.copytree(existing_run, folder / "run")
    shutil.copytree(digits, folder / "digits")
    from PIL import Image

    Image.new("RGB", (32, 32)).save(folder / "image.png")
    config = (folder / "run" / "config.yaml").read_text()
    (folder / "own.yaml").write_text(config.replace(str(digits), str(folder / "digits")))
    (folder / "run" / "config.yaml").write_text(config.replace(str(digits), str(folder / "digits")))
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    (folder / "own").mkdir()
    (folder / "own").chmod(0o777)
    yield folder
    shutil.rmtree(folder)


def become_nobody(operators: str = "/nonexistent") -> None:
    # Libraries import these late, and the interpreter may lie where nobody may look.
    import filecmp  # noqa: F401
    import getopt  # noqa: F401

    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    os.environ["HOME"] = "/nonexistent"
    os.environ["TORCH_EXTENSIONS_DIR"] = operators


def as_nobody(forks: Forks, words: list[str], folder: Path) -> Ended:
    return forks.start(words, cwd=folder, prepare=(become_nobody, (str(folder / "own" / "operators"),))).wait()


CHECKPOINT = "run/checkpoints/step-00000001"
WEIGHTS = f"{CHECKPOINT}/weights.safetensors"
EVALUATE = ["evaluate", "run", "--workers", "0"]
REPORT = ["report", "run", "--workers", "0", "--out", "own/page"]
TRAIN = ["train", "own.yaml", "train.run_folder=own/never"]
DOORS = [
    *((closed, ["checkpoint", "run"]) for closed in ("run/config.yaml", "run", "run/checkpoints", CHECKPOINT, WEIGHTS)),
    (f"{CHECKPOINT}/manifest.json", ["checkpoint", "run"]),
    *((closed, EVALUATE) for closed in ("run/config.yaml", WEIGHTS, CHECKPOINT, "digits/index.json", "digits")),
    *((f"{CHECKPOINT}/{name}.json", EVALUATE) for name in ("state", "manifest")),
    *((closed, ["predict", "run", "image.png"]) for closed in (WEIGHTS, "image.png")),
    (WEIGHTS, REPORT),
    *((closed, ["plan", "own.yaml"]) for closed in ("own.yaml", "digits/index.json")),
    *((closed, TRAIN) for closed in ("own.yaml", "digits/index.json")),
    ("run", ["train", "own.yaml", "train.run_folder=run"]),
    ("run", ["dashboard", "--sync", "run"]),
    (WEIGHTS, ["export", "run", "own/never"]),
    (WEIGHTS, ["calibrate", "run", "--budget", "0.5", "--workers", "0"]),
    (WEIGHTS, [*TRAIN, "model.from_run=run"]),
    (WEIGHTS, [*TRAIN, f"model.weights={WEIGHTS}"]),
]


@needs_root
@pytest.mark.full
@pytest.mark.parametrize(("closed", "words"), DOORS)
def test_what_may_not_be_read_is_told_in_a_line(closed: str, words: list[str], theirs: Path, forks: Forks) -> None:
    path = theirs / closed
    before = path.stat().st_mode
    path.chmod(0o700 if path.is_dir() else 0o600)
    try:
        found = as_nobody(forks, words, theirs)
    finally:
        path.chmod(before)
    assert "Traceback" not in found.err, found
    assert found.code == 1, found
    line = next(line for line in found.err.splitlines() if "error: " in line)
    assert "ermission denied" in line, found
    assert Path(closed).name in line, found
    assert "; " in line  # and what to do


@needs_root
@pytest.mark.full
def test_nobody_may_load_what_is_not_theirs(theirs: Path, forks: Forks) -> None:
    """The same for those who call Python's functions."""
    weights = theirs / WEIGHTS
    weights.chmod(0o600)
    context = forks.context
    reader, writer = context.Pipe()
    process = context.Process(target=load_as_nobody, args=(str(theirs / "run"), writer))
    process.start()
    writer.close()
    said = reader.recv()
    process.join()
    weights.chmod(0o644)
    assert said.startswith(
        f"CheckpointError: {weights}: Permission denied ({weights} belongs to root, and this is nobody); "
    )
    assert f"ask for chmod -R go+rX {weights}" in said


def load_as_nobody(folder: str, answer: Any) -> None:
    become_nobody()
    import adaptive

    try:
        adaptive.load(folder)
        answer.send("loaded")
    except Exception as error:
        answer.send(f"{type(error).__name__}: {error}")


@needs_root
@pytest.mark.full
def test_a_colleague_does_not_write_into_somebody_else_s_run(theirs: Path, forks: Forks) -> None:
    words = ["train", "own.yaml", "train.run_folder=run", "train.max_steps=2"]
    line = as_nobody(forks, words, theirs).error_line("train")
    assert "train.run_folder = 'run' cannot be written: Permission denied; choose another folder" in line
