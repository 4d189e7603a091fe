"""model.from_run: a run begins from another's whole network, for more epochs, other data, or a higher resolution."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import adaptive
from adaptive.config.loading import load_config
from adaptive.data.packing.pack import pack
from adaptive.distributed.ranks import Ranks
from adaptive.errors import ConfigError
from adaptive.training.checkpoints.store import CheckpointStore
from adaptive.training.prepared_run import Prepared
from adaptive.training.run import prepare
from adaptive.training.starting import from_run
from adaptive.training.starting.from_run import begin_from, open_network, take_architecture
from tests.helpers.commands import Forks
from tests.training.setups import config


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, config_file: Path, forks: Forks) -> Path:
    """A run of a ViT with a moving average, whose mean is its own, trained for two steps."""
    folder = tmp_path_factory.mktemp("runs") / "source"
    words = ["model={backbone: test_vit, exits: 3, head_width: 8, options: {depth: 4}}", "train.ema_decay=0.5"]
    words += ["data.mean=[0.1, 0.2, 0.3]", "train.max_steps=2", "train.epochs=1", f"train.run_folder={folder}"]
    ended = forks.run(["train", str(config_file), *words])
    assert ended.code == 0, ended
    return folder


def begin(dataset: Path, folder: Path, source: Path, **sections: Any) -> Prepared:
    model = {"backbone": "test_vit", "from_run": str(source), **sections.pop("model", {})}
    tree = config(dataset, folder, **{**sections, "model": model})
    given = {name: value for name, value in tree.model.model_dump().items() if name in model}
    tree = tree.model_copy(update={"model": type(tree.model).model_validate(given)})
    return prepare(tree, Ranks())


def test_it_begins_with_all_exits_and_links_of_the_averaged_weights(source: Path, digits: Path, tmp_path: Path) -> None:
    prepared = begin(digits, tmp_path / "new", source)
    trained = adaptive.load(source)
    assert trained.averaged
    found, expected = prepared.network.state_dict(), trained.network.state_dict()
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []
    model = prepared.config.model
    assert (model.exits, model.head_width, model.options) == (trained.network.exit_names, 8, {"depth": 4})
    assert prepared.config.data.mean == [0.1, 0.2, 0.3]
    line = prepared.notes[0]
    assert str(source) in line
    assert "averaged weights of step-00000002" in line
    assert prepared.begins_from is not None
    assert prepared.begins_from["step"] == 2


def test_a_higher_resolution_is_resampled_and_the_exits_stay(source: Path, digits: Path, tmp_path: Path) -> None:
    network = begin(digits, tmp_path / "new", source, data={"image_size": 64}).network
    old = adaptive.load(source).network
    assert network.input_size == 64
    found, expected = network.state_dict(), old.state_dict()
    changed = {name for name, value in expected.items() if found[name].shape != value.shape}
    assert {name.rpartition(".")[2] for name in changed} == {"pos_embed"}
    assert all(torch.equal(found[name], value) for name, value in expected.items() if name not in changed)


def of_three_classes(folder: Path) -> Path:
    for split in ("train", "val", "test"):
        for name in ("ant", "bee", "cat"):
            (folder / "images" / split / name).mkdir(parents=True)
            for i in range(20):
                Image.new("RGB", (32, 32), (i, 90, 200)).save(folder / "images" / split / name / f"{i}.png")
    pack(str(folder / "images"), folder / "packed", workers=1, progress=False)
    return folder / "packed"


def test_other_classes_begin_with_fresh_ends_and_it_is_told(source: Path, tmp_path: Path) -> None:
    data = of_three_classes(tmp_path)
    prepared = begin(data, tmp_path / "new", source)
    found, expected = prepared.network.state_dict(), adaptive.load(source).network.state_dict()
    changed = {name for name, value in expected.items() if not torch.equal(found[name], value)}
    assert changed
    assert all("classifier" in name or "link" in name or ".head.head." in name for name in changed), changed
    assert {"exits.0.classifier.weight", "exits.2.head.head.weight"} <= changed
    assert {"exits.0.widen.0.weight", "exits.0.norm.weight"} & set(found) - changed
    assert "its 10 classes are not the 3" in prepared.notes[0]
    with pytest.raises(ConfigError, match=r"phases\.0\.learn = 'early_exits': the last exit is frozen"):
        begin(data, tmp_path / "new", source, phases=[{"epochs": 1, "learn": "early_exits"}])


def test_as_many_classes_of_other_names_are_others(source: Path) -> None:
    """A last layer that tells digits says nothing of letters, and frozen it would be wrong without a word."""
    run, old_network = open_network(source)
    settings = run.config.model_copy(update={"model": take_architecture(run.config.model, run)})
    network, told = begin_from(settings, run, list("abcdefghij"), old_network)
    old = adaptive.load(source).network.state_dict()
    assert not torch.equal(network.state_dict()["exits.0.classifier.weight"], old["exits.0.classifier.weight"])
    assert not torch.equal(network.state_dict()["exits.2.head.head.weight"], old["exits.2.head.head.weight"])
    assert {"exits.0.classifier.weight", "exits.2.head.head.weight"} <= network.untrained
    assert "its classes ('0', ...) are not those here ('a', ...)" in told


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        ({"backbone": "test_resnet"}, ["model.backbone = 'test_resnet'", "'test_vit'"]),
        ({"exits": 2}, ["model.exits = 2", "blocks."]),
        ({"head_width": 4}, ["model.head_width = 4", "has 8"]),
        ({"options": {"depth": 5}}, ["model.options.depth = 5", "has 4"]),
        ({"collaboration": False}, ["model.collaboration = False", "has True"]),
        ({"from_run": "nowhere"}, ["model.from_run = 'nowhere'", "no run folder"]),
    ],
)
def test_another_architecture_is_refused_with_key_and_values(
    model: dict[str, Any], parts: list[str], source: Path, digits: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        begin(digits, tmp_path / "new", source, model=model)
    assert [part for part in parts if part not in str(caught.value)] == [], str(caught.value)


def test_the_same_said_again_and_rates_of_training_are_accepted(source: Path, digits: Path, tmp_path: Path) -> None:
    model = {"exits": 3, "head_width": 8, "options": {"drop_path_rate": 0.1}, "head_dropout": 0.2}
    prepared = begin(digits, tmp_path / "new", source, model=model)
    assert prepared.config.model.options == {"depth": 4, "drop_path_rate": 0.1}


def test_a_damaged_run_is_one_line(source: Path, digits: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(source, broken)
    for file in broken.glob("checkpoints/*/weights.safetensors"):
        file.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"model\.from_run = .*no valid checkpoint"):
        begin(digits, tmp_path / "new", broken)


def test_extending_a_finished_run(source: Path, config_file: Path, tmp_path: Path, forks: Forks, digits: Path) -> None:
    """What a user meets: the refusal names the way, which works, and needs the old folder only once."""
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(source, old)
    words = ["train", str(config_file), "data.mean=[0.1, 0.2, 0.3]", "train.ema_decay=0.5"]
    model = "model={backbone: test_vit, exits: 3, head_width: 8, options: {depth: 4}}"
    line = forks.run([*words, model, f"train.run_folder={old}", "train.epochs=3"]).error_line()
    assert "train.epochs = 1, now it is 3" in line
    assert f"model.from_run={old}" in line
    begun = [*words, f"model={{backbone: test_vit, from_run: {old}}}", f"train.run_folder={new}", "train.epochs=3"]
    frozen = tmp_path / "frozen.yaml"
    printed = forks.run([*begun, "--print-config"])
    frozen.write_text(printed.out)  # what `adaptive submit` freezes
    assert load_config(frozen).model.head_width == 8
    ended = forks.run(["train", str(frozen), "train.max_steps=1"])
    assert ended.code == 0, ended
    assert f"begins from {old}: averaged weights of step-00000002" in ended.out
    environment = json.loads((new / "environment.jsonl").read_text().splitlines()[0])
    assert environment["begins_from"]["checkpoint"] == "step-00000002"
    shutil.rmtree(old)
    for again in (["train", str(frozen)], begun):
        ended = forks.run([*again, "train.max_steps=2"])
        assert ended.code == 0, ended
    assert load_config(new / "config.yaml").data.mean == [0.1, 0.2, 0.3]


@pytest.mark.parametrize("moment", ["rebuild_network", "for_inference"])
def test_a_checkpoint_that_is_pruned_meanwhile_is_chosen_again(
    source: Path, digits: Path, tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other run goes on."""
    copied = Path(shutil.copytree(source, tmp_path / "copied"))
    store = CheckpointStore(copied / "checkpoints")
    (first,) = store.all()
    real, saved = getattr(from_run, moment), []

    def late(*arguments: Any) -> Any:
        found = real(*arguments)
        if len(saved) < 2:
            newest = store.all()[-1]
            tensors = {name: newest.tensors(name) for name in ("weights", "ema")}
            saved.append(store.save(newest.step + 1, tensors, newest.state(), score=101.0))
            store.prune(1)
        return found

    monkeypatch.setattr(from_run, moment, late)
    prepared = begin(digits, tmp_path / "new", copied)
    assert saved
    assert prepared.begins_from is not None
    assert prepared.begins_from["step"] == saved[-1].step > first.step
    assert prepared.begins_from["averaged"]
