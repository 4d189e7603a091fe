"""Every command that the documentation shows: taken by its program, its configuration, and the ranks that it starts."""

from __future__ import annotations

import pytest

from adaptive.config.loading import load_config
from adaptive.errors import ConfigError
from tests.docs.checkers import check, check_mention, script
from tests.docs.commands import Command, mentioned, typed
from tests.helpers.locations import REPOSITORY

# Programs of others, whose words are theirs; the tutorial's are run (test_tutorial.py), Slurm's in tests/cluster.
OTHERS = {
    "unzip tiny-imagenet-200.zip", "aws s3 sync data/imagenet s3://bucket/imagenet", "ls photos/train",
    "scancel --batch --signal=USR1 JOB", "scancel JOB", "scontrol update JobId=JOB Requeue=0", "scontrol requeue JOB",
}  # fmt: skip
# Beginnings of commands in running text, which name a way to start something.
BEGINNINGS = {
    "python -m", "python -m adaptive COMMAND", "adaptive COMMAND", "torchrun -m", "torchrun -m adaptive train",
    "deepspeed --hostfile", "srun --kill-on-bad-exit=1", "sbatch --requeue", "pip install ...", "pip uninstall ...",
}  # fmt: skip
# Shown with what they print.
REFUSED = {"adaptive train configs/quickstart.yaml train.epoch=3"}


def trouble(command: Command) -> str:
    """What is wrong with a command, empty where nothing is."""
    try:
        if "\n" in command.text:
            script(command.text)
        elif command.whole:
            check(command.words)
        else:
            check_mention(command.words)
    except (SystemExit, Exception) as error:
        return f"{command}: {type(error).__name__} {error}"
    return ""


def test_every_command_can_be_started_as_it_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    commands, set_apart = typed(), OTHERS | REFUSED
    assert len(commands) > 150
    found = [trouble(command) for command in commands if command.text not in set_apart]
    assert [line for line in found if line] == [], capsys.readouterr().err


def test_every_mention_of_a_command_names_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    commands = mentioned()
    assert len(commands) > 140
    found = [trouble(command) for command in commands if command.text not in OTHERS | BEGINNINGS]
    assert [line for line in found if line] == [], capsys.readouterr().err


def test_nothing_is_set_apart_that_no_page_shows() -> None:
    shown = {command.text for command in [*typed(), *mentioned()]}
    assert shown >= OTHERS | BEGINNINGS | REFUSED


def test_a_command_that_is_refused_prints_what_the_page_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    for text in REFUSED:
        _, _, config, override = text.split()
        with pytest.raises(ConfigError) as refusal:
            load_config(config, [override])
        assert f"$ {text}\nadaptive train: error: {refusal.value}\n" in (REPOSITORY / "README.md").read_text()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("adaptive plan configs/imagenet/resnet50.yaml --nodes 3 --gpus-per-node 8", "24 ranks; use 16 ranks"),
        ("deepspeed --num_gpus 8 --num_nodes 16 launcher/train.py configs/cifar10/resnet18.yaml", "an image each"),
        ("sbatch --nodes 2 --ntasks-per-node 4 --gpus-per-node 8 slurm/train.sbatch CONFIG", "one task per GPU"),
        ("srun --nodes 2 --tasks 8 adaptive doctor", "--tasks"),
        ("torchrun --nnodes 8 --nproc-per-node 16 -m adaptive train CONFIG", "128 ranks; use 32 ranks"),
        ("adaptive train configs/quickstart.yaml train.batch=3", "train.batch"),
        ("adaptive evaluate runs/mine --budgets 3", ""),
        ("make quick", "quick"),
        ("make bench PARTS=nothing", "no such part"),
        ("python benchmarks/data.py --sources x", ""),
        ("pip install 'adaptive-training[gpu]'", "gpu"),
        ("wandb sweep configs/sweeps/none.yaml", "none.yaml"),
        ("brew install adaptive", "unknown program brew"),
    ],
)
def test_what_would_fail_is_found(text: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The test's own test: a command that its program, its configuration or its ranks refuse."""
    found = trouble(Command("page.md", text))
    assert found
    assert reason in found + capsys.readouterr().err
