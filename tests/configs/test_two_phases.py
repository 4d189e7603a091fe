"""The paper's two phases, from the recipe files themselves, on a small MSDNet and the digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptive.config.loading import load_config
from tests.helpers.locations import REPOSITORY
from tests.helpers.ranks import run_ranks
from tests.training.setups import train_here

CONFIGS = REPOSITORY / "configs"
STEPS = 13  # per phase: 1,297 images by 96, the last incomplete batch left out


def overrides(data: str, folder: Path, *more: str) -> list[str]:
    small = ("base=1", "step=1", "channels=4", "growth=2")
    return [
        f"data.path={data}", "data.workers=0", "train.device=cpu", f"train.run_folder={folder}", "model.exits=3",
        *(f"model.options.{option}" for option in small), "train.epochs=1", "train.global_batch=96",
        "checkpoint.keep=9", "checkpoint.every_epochs=1", "tracking.every_steps=1", "evaluate.batch=100", *more,
    ]  # fmt: skip


def weights(folder: Path) -> list[dict[str, Tensor]]:
    from adaptive.training.checkpoints.store import CheckpointStore

    return [c.tensors("weights") for c in CheckpointStore(folder / "checkpoints").all()]


def two_phases(data: str, folder: str, recipe: str) -> dict[str, Any]:
    """Train a recipe in one piece, and stopped in either phase; returns what to compare."""
    from adaptive.tracking.record import read

    path = CONFIGS / "cifar10" / f"{recipe}.yaml"
    whole = Path(train_here(load_config(path, overrides(data, Path(folder) / "whole"))))
    for stop in (STEPS // 2, STEPS + STEPS // 2, 2 * STEPS):
        more = (f"train.max_steps={stop}",)
        broken = Path(train_here(load_config(path, overrides(data, Path(folder) / "broken", *more))))
    before, after = weights(whole)
    first_records = [r for r in read(whole / "metrics.jsonl") if r["step"] in (STEPS, STEPS + 1) and "train/loss" in r]
    resumed = weights(broken)[-1]
    return {
        "resumed equals": all(torch.equal(after[name], resumed[name]) for name in after),
        "changed": sorted(name for name in after if not torch.equal(before[name], after[name])),
        "names": sorted(after),
        "divergence": [sum(r[f"train/exit_{i}/divergence"] for i in (1, 2)) for r in first_records],
    }  # fmt: skip


@pytest.mark.ranks
@pytest.mark.full  # a run that stops in either phase is in tests/training/test_trainer.py
@pytest.mark.parametrize("recipe", ["imta", "imta_released"])
def test_both_phases_run_from_one_file_and_continue_in_either(recipe: str, digits: Path, tmp_path: Path) -> None:
    found = run_ranks(two_phases, 1, str(digits), str(tmp_path), recipe)[0]
    assert found["resumed equals"]
    assert not [name for name in found["changed"] if name.startswith("blocks.")]  # parameters and buffers alike
    learned = {name for name in found["names"] if name.startswith("exits.")}
    if recipe == "imta_released":
        learned = {name for name in learned if ".classifier." in name or ".link." in name}
    assert set(found["changed"]) == learned
    assert found["divergence"][0] == 0
    assert found["divergence"][1] > 0


RANET = (
    "model.backbone=ranet", "model.exits=null",
    "model.options={blocks: 1, block_step: 1, step: 2, channels: 4, growth: 4, scales: [1, 2, 2], stem: cifar}",
)  # fmt: skip


def probe() -> Tensor:
    """Images on which networks are compared."""
    return torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def watch_teachers() -> list[Tensor]:
    """Collect, from now on and in this process, what every phase's teacher says of the `probe` as the phase begins."""
    from adaptive.training.active_phase import ActivePhase

    seen: list[Tensor] = []
    build = ActivePhase.start

    def start(*arguments: Any, **named: Any) -> ActivePhase:
        active = build(*arguments, **named)
        if active.learner.teacher is not None:
            answer = active.learner.teacher(probe(), [])
            assert isinstance(answer, Tensor)
            seen.append(answer)
        return active

    ActivePhase.start = staticmethod(start)  # type: ignore[assignment,method-assign]
    return seen


def teachers_and_first_phase(data: str, folder: str, recipe: str, network: tuple[str, ...]) -> dict[str, Any]:
    """Logits of the frozen teacher in a real run and after a resume within phase 2, and of the network of phase 1."""
    from adaptive.runs import load

    images, seen = probe(), watch_teachers()
    path = CONFIGS / "cifar10" / f"{recipe}.yaml"
    for stop in (STEPS + 2, STEPS + 4):  # the second start resumes within phase 2
        more = (f"train.max_steps={stop}", "checkpoint.every_steps=1", "evaluate.every_epochs=9", *network)
        run = train_here(load_config(path, overrides(data, Path(folder) / "run", *more)))
    first = load(run, which=str(STEPS))
    with torch.no_grad():
        logits = first.network(images)[-1]
        first.network.collaboration = True
        linked = first.network(images)[-1]
    return {"teachers": seen, "first": logits, "with untrained links": linked}


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("recipe", "network"),
    [
        pytest.param("imta", (), id="MSDNet"),
        pytest.param("imta", RANET, id="RANet", marks=pytest.mark.full),
        pytest.param("imta_released", (), id="fresh classifiers", marks=pytest.mark.full),
    ],
)
def test_the_frozen_teacher_is_the_network_of_the_first_phase(
    recipe: str, network: tuple[str, ...], digits: Path, tmp_path: Path
) -> None:
    found = run_ranks(teachers_and_first_phase, 1, str(digits), str(tmp_path), recipe, network)[0]
    assert len(found["teachers"]) == 2
    for teacher in found["teachers"]:
        torch.testing.assert_close(teacher, found["first"], rtol=0, atol=1e-6)
    # The links of phase 2 begin at random here: with them it would be another network.
    assert (found["with untrained links"] - found["first"]).abs().mean() > 0.01


def teachers_and_the_run_before(data: str, folder: str, collaboration: str) -> dict[str, Any]:
    """Logits of the frozen teacher of a run that begins from another, also after a resume, and of that other's end."""
    from adaptive.runs import load

    source = (f"model.collaboration={collaboration}", "train.max_steps=2", "evaluate.every_epochs=9")
    first = train_here(load_config(CONFIGS / "cifar10" / "ge.yaml", overrides(data, Path(folder) / "first", *source)))
    changes = (f"model.from_run={first}", "phases=[{name: exits, learn: exits}]", "evaluate.every_epochs=9")
    if collaboration == "false":
        changes += ("model.collaboration=false",)
    seen = watch_teachers()
    for stop in (2, 4):
        more = (*changes, f"train.max_steps={stop}")
        train_here(load_config(CONFIGS / "cifar10" / "imta.yaml", overrides(data, Path(folder) / "next", *more)))
    with torch.no_grad():
        return {"teachers": seen, "first": load(first).network(probe())[-1]}


@pytest.mark.ranks
@pytest.mark.full
@pytest.mark.parametrize("collaboration", ["true", "false"])
def test_the_frozen_teacher_is_the_network_that_a_run_begins_from(
    collaboration: str, digits: Path, tmp_path: Path
) -> None:
    found = run_ranks(teachers_and_the_run_before, 1, str(digits), str(tmp_path), collaboration)[0]
    assert len(found["teachers"]) == 2
    for teacher in found["teachers"]:
        torch.testing.assert_close(teacher, found["first"], rtol=0, atol=1e-6)


def continued_without_its_teacher(data: str, folder: str) -> str:
    """What a run says that is to go on within phase 2 from a checkpoint in which the frozen teacher is missing."""
    from adaptive.errors import CheckpointError
    from adaptive.training.checkpoints.store import CheckpointStore

    path = CONFIGS / "cifar10" / "imta.yaml"
    changes = overrides(data, Path(folder) / "run", "evaluate.every_epochs=9")
    train_here(load_config(path, [*changes, f"train.max_steps={STEPS + 1}"]))
    store = CheckpointStore(Path(folder) / "run" / "checkpoints")
    newest = store.all()[-1]
    kept = {name: newest.tensors(name) for name in ("weights", "optimizer", "statistics")}
    store.save(newest.step, kept, newest.state(), None, phase=1, epoch=2)
    try:
        train_here(load_config(path, [*changes, f"train.max_steps={STEPS + 2}"]))
    except CheckpointError as error:
        return str(error)
    return "it went on"


@pytest.mark.ranks
@pytest.mark.full
def test_no_other_network_takes_a_lost_teachers_place(digits: Path, tmp_path: Path) -> None:
    said = run_ranks(continued_without_its_teacher, 1, str(digits), str(tmp_path))[0]
    assert "step-00000014 holds no frozen teacher" in said
    assert "phase 'exits'" in said
    assert "another train.run_folder" in said


def released_second_phase(data: str, folder: str) -> dict[str, Any]:
    """How the second phase of the released recipe begins: fresh classifiers, the old last exit as teacher."""
    from adaptive.training.checkpoints.store import CheckpointStore
    from adaptive.training.engine.group import init_distributed
    from adaptive.training.run import Ranks, prepare
    from adaptive.training.streams import Streams
    from adaptive.training.supervision.supervisor import Supervisor
    from adaptive.training.trainer import Trainer

    config = load_config(CONFIGS / "cifar10" / "imta_released.yaml", overrides(data, Path(folder) / "run"))
    prepared = prepare(config, Ranks())
    init_distributed()
    trainer = Trainer(
        prepared, Streams.open(prepared), CheckpointStore(Path(folder) / "run" / "checkpoints"), [], Supervisor()
    )
    before = {name: t.clone() for name, t in prepared.network.state_dict().items()}
    trainer.progress.next_phase()
    trainer._start_phase()
    active = trainer.active
    frozen = active.learner.frozen
    assert frozen is not None
    now, teacher = active.network.state_dict(), frozen.state_dict()
    return {
        "fresh": sorted(n for n in before if not torch.equal(before[n], now[n])),
        "teacher": all(torch.equal(before[n], teacher[n]) for n in before),
        "training": sorted(n for n, m in active.network.named_modules() if m.training and n.count(".") == 2),
        "attached": [exit_.link.attached for exit_ in active.network.exits if exit_.link is not None],
    }


@pytest.mark.ranks
def test_the_released_second_phase_begins_with_fresh_classifiers(digits: Path, tmp_path: Path) -> None:
    found = run_ranks(released_second_phase, 1, str(digits), str(tmp_path))[0]
    assert all(".classifier.weight" in n or ".classifier.bias" in n or ".link." in n for n in found["fresh"])
    assert {n.split(".")[1] for n in found["fresh"]} == {"0", "1", "2"}
    assert found["teacher"]
    assert found["training"] == [
        "exits.0.classifier",
        *(f"exits.{i}.{m}" for i in (1, 2) for m in ("classifier", "link")),
    ]
    assert found["attached"] == [True, True]
