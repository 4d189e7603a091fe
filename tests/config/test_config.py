import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptive.config import loading
from adaptive.config.loading import differences, dump_config, load_config, parse_config
from adaptive.config.sections import Config
from adaptive.errors import ConfigError

BASE: dict[str, Any] = {"model": {"backbone": "resnet18"}, "data": {"path": "somewhere"}}
MEMORY = {"path": "somewhere", "in_memory": True, "crop": "pad"}


def tree(**sections: Any) -> dict[str, Any]:
    return copy.deepcopy({**BASE, **sections})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"trian": {}}, "unknown key trian; did you mean train"),
        ({"train": {"epoch": 3}}, "unknown key train.epoch; did you mean epochs"),
        ({"train": {"lr": 3}}, "unknown key train.lr; did you mean optimizer.lr"),
        ({"phases": [{"epochs": 1, "lern": "all"}]}, "unknown key phases.0.lern; did you mean learn"),
        ({"train": {"epochs": "3"}}, "train.epochs = '3' is not allowed: input should be a valid integer"),
        ({"train": {"epochs": 0}}, "train.epochs = 0 is not allowed: input should be greater than or equal to 1"),
        ({"train": {"epochs": True}}, "train.epochs = True is not allowed"),
        ({"train": {"precision": "fp8"}}, "'fp32', 'bf16' or 'fp16'"),
        ({"optimizer": {"lr": float("nan")}}, "optimizer.lr = nan is not allowed"),
        ({"train": {"zero_stage": 4}}, "train.zero_stage = 4 is not allowed: input should be less than or equal to 3"),
        ({"distillation": {"teacher": "model"}}, "needs distillation.teacher_model"),
        ({"distillation": {"teacher": "ema", "gamma": 0.1}}, "needs train.ema_decay > 0"),
        ({"deepspeed": {"optimizer": {}}}, "deepspeed.optimizer is set by the optimizer section"),
        ({"deepspeed": {"zero_optimization": {"stage": 1}}}, "set by train.zero_stage"),
        ({"deepspeed": {"zero_optimisation": {}}}, "unknown key deepspeed.zero_optimisation; did you mean zero_opt"),
        ({"deepspeed": {"zero_optimization": 3}}, "deepspeed.zero_optimization = 3 is not allowed"),
        ({"model": {"backbone": "a", "exits": 4}, "train": {"exit_weights": [1.0]}}, "has 1 values for 4 exits"),
        ({"phases": [{"epochs": 1, "exit_weights": [0.0] * 4}]}, "at least one exit must have a weight above 0"),
        (
            {"train": {"exit_weights": "linaer_up"}},
            "= 'linaer_up' is no weighting; did you mean linear_up?",
        ),
        ({"phases": [{"epochs": 1, "exit_weights": "x"}]}, "phases.0.exit_weights = 'x' is no weighting; use equal"),
        ({"train": {"exit_weights": 3}}, "train.exit_weights = 3 is not allowed"),
        ({"train": {"exit_drop": 1.0}}, "train.exit_drop = 1.0 is not allowed: input should be less than 1"),
        ({"train": {"last_only_epochs": 90}}, "train.last_only_epochs = 90.0 must be below the 90 epochs"),
        (
            {"train": {"last_only_epochs": 1}, "phases": [{"epochs": 2, "learn": "early_exits"}]},
            "the last exit does not learn in phase 'train'; use 0, or phases.0.last_only_epochs=0",
        ),
        (
            {"train": {"last_only_epochs": 1, "exit_weights": [1.0, 1.0, 1.0, 0.0]}},
            "the last exit's weight in [1.0, 1.0, 1.0, 0.0] is 0",
        ),
        ({"train": {"gradient_surgery": "pcgard"}}, "input should be 'none' or 'pcgrad'"),
        ({"train": {"gradient_surgery": "pcgrad", "zero_stage": 3}}, "use train.zero_stage=2 or less"),
        ({"train": {"gradient_surgery": "pcgrad", "compile": True}}, "use train.compile=false"),
        ({"train": {"gradient_surgery": "pcgrad", "checkpointing": True}}, "use train.checkpointing=false"),
        ({"distillation": {"teacher": "nxt"}}, "input should be 'last', 'next'"),
        ({"optimizer": {"name": "adamw", "nesterov": True}}, "optimizer.nesterov is for sgd only"),
        ({"model": {"backbone": "a", "pretrained": True, "weights": "f"}}, "exclude each other"),
        ({"data": {"path": "x", "crop_scale": [0.9, 0.1]}}, "the lower end comes first"),
        (
            {"data": {"path": "x", "in_memory": True}},
            "data.crop = 'resize' crops them at their own size; use data.crop=pad",
        ),
        (
            {"data": MEMORY | {"erasing": 0.1}},
            "data.erasing = 0.1 is drawn image by image; use data.erasing=0, or data.i",
        ),
        ({"data": MEMORY | {"color_jitter": 0.4}}, "data.color_jitter = 0.4 is drawn image by image"),
        (
            {"data": MEMORY | {"auto_augment": "original"}},
            "data.auto_augment = 'original' is drawn image by image; use d",
        ),
        ({"model": {}}, "model.backbone is missing"),
    ],
)
def test_mistakes_name_key_value_and_remedy(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(tree(**sections))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def test_file_overrides_and_dump_agree(tmp_path: Path) -> None:
    text = "model: {backbone: resnet18}\ndata: {path: d}\nphases: [{epochs: 2}]\noptimizer: {lr: 1e-3}\n"
    path = write(tmp_path, text)
    config = load_config(path, ["train.epochs=7", "phases.0.epochs=5", "model.exits=[a, b.c]", "tracking.group=x y"])
    assert (config.train.epochs, config.phases[0].epochs, config.model.exits) == (7, 5, ["a", "b.c"])
    assert config.optimizer.lr == 0.001
    assert config.tracking.group == "x y"
    assert config.train.run_folder == "runs/run"
    again = load_config(write(tmp_path, dump_config(config)))
    assert again == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs", "expected section.key=value"),
        ("phases.1.epochs=3", "'1' is no index of a list of 1"),
        ("model.backbone.x=1", "backbone is a value"),
        ("train.epochs=[1", "not valid YAML"),
        ("train.epochs=many", "train.epochs = 'many' is not allowed"),
    ],
)
def test_wrong_overrides(tmp_path: Path, override: str, message: str) -> None:
    path = write(tmp_path, "model: {backbone: r}\ndata: {path: d}\nphases: [{epochs: 2}]\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override])
    assert message in str(caught.value)


def test_wrong_files(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {backbone: r}\nmodel: {backbone: s}\n")
    with pytest.raises(ConfigError, match="duplicate key"):
        load_config(path)
    with pytest.raises(ConfigError, match=r"did you mean .*run\.yaml"):
        load_config(tmp_path / "rum.yaml")
    with pytest.raises(ConfigError, match="expected sections"):
        load_config(write(tmp_path, "- a\n- b\n"))
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(write(tmp_path, "model: !!python/object/apply:os.system ['touch owned']\n"))
    assert not Path("owned").exists()


def test_a_file_extends_others(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "data.yaml").write_text(
        "data: {path: d, mean: [0.1, 0.2, 0.3]}\ntrain: {epochs: 7, seed: 3}\nphases: [{epochs: 2}, {learn: exits}]\n"
    )
    (tmp_path / "parts" / "model.yaml").write_text("extends: data.yaml\nmodel: {backbone: r, options: {a: 1}}\n")
    (tmp_path / "parts" / "later.yaml").write_text("train: {seed: 4}\nmodel: {options: {b: 2}}\n")
    path = write(tmp_path, "extends: [parts/model.yaml, parts/later.yaml]\ndata: {mean: [0.5, 0.5, 0.5]}\n")
    config = load_config(path, ["train.epochs=9"])
    assert (config.train.epochs, config.train.seed) == (9, 4)
    assert config.model.options == {"a": 1, "b": 2}
    assert (config.data.path, config.data.mean) == ("d", [0.5, 0.5, 0.5])
    assert [phase.epochs for phase in config.resolved_phases()] == [2, 9]
    again = tmp_path / "dumped.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config


def test_each_file_is_read_once_however_often_it_is_extended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 2^30 ways down to the first file each is one reading, and the later of two bases wins on every level."""
    (tmp_path / "0-a.yaml").write_text("data: {path: somewhere, image_size: 64}\nmodel: {backbone: resnet18}\n")
    (tmp_path / "0-b.yaml").write_text("data: {image_size: 32}\n")
    for level in range(1, 31):
        for name in "ab":
            (tmp_path / f"{level}-{name}.yaml").write_text(f"extends: [{level - 1}-a.yaml, {level - 1}-b.yaml]\n")
    counted, parse = [], loading._parse_yaml
    monkeypatch.setattr(loading, "_parse_yaml", lambda text, source: counted.append(source) or parse(text, source))
    config = load_config(write(tmp_path, "extends: [30-b.yaml, 30-a.yaml]\n"), ["data.image_size=48"])
    assert (config.data.image_size, config.data.path) == (48, "somewhere")
    assert len(counted) == 64  # 62 files, the first one, and the override
    assert load_config(write(tmp_path, "extends: [30-b.yaml, 0-a.yaml]\n")).data.image_size == 64


def test_files_that_extend_are_bounded(tmp_path: Path) -> None:
    (tmp_path / "0.yaml").write_text("model: {}\n")
    for level in range(1, 150):
        (tmp_path / f"{level}.yaml").write_text(f"extends: {level - 1}.yaml\n")
    with pytest.raises(ConfigError, match=r"149.yaml extends more than 100 files"):
        load_config(tmp_path / "149.yaml")
    bases = ", ".join(f"wide-{number}.yaml" for number in range(150))
    for number in range(150):
        (tmp_path / f"wide-{number}.yaml").write_text("model: {}\n")
    with pytest.raises(ConfigError, match=r"run.yaml extends more than 100 files"):
        load_config(write(tmp_path, f"extends: [{bases}]\n"))


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(
            ["a: &v0 [x, x]", *(f"k{n}: &v{n} [*v{n - 1}, *v{n - 1}]" for n in range(1, 40)), "data: {mean: *v39}"]
        ),
        "\n".join(["a: &v0 {x: 1}", *(f"k{n}: &v{n} {{p: *v{n - 1}, q: *v{n - 1}}}" for n in range(1, 40))]),
        "\n".join(["a: &v0 {x: 1}", *(f"k{n}: &v{n} {{<<: [*v{n - 1}, *v{n - 1}]}}" for n in range(1, 40))]),
        "data: &d {path: *d}",
        "model: {options: &o [*o, *o]}",
    ],
    ids=["lists", "sections", "merged", "circle", "circles"],
)
def test_aliases_that_stand_for_billions_of_values_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"run.yaml: more than 100000 values, aliases"):
        load_config(write(tmp_path, text))


def test_aliases_are_taken_and_a_huge_file_is_not(tmp_path: Path) -> None:
    text = "x: &m [0.5, 0.5, 0.5]\n"
    with pytest.raises(ConfigError, match="unknown key x"):
        load_config(write(tmp_path, text + "model: {backbone: r}\ndata: {path: s, mean: *m, std: *m}\n"))
    with pytest.raises(ConfigError, match=r"run.yaml has more than 1048576 bytes"):
        load_config(write(tmp_path, "# a long comment\n" * 100_000))


def test_wrong_extensions(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"bases\.yaml does not exist \(extended by .*run\.yaml\)"):
        load_config(write(tmp_path, "extends: bases.yaml\n"))
    with pytest.raises(ConfigError, match="extends = 3"):
        load_config(write(tmp_path, "extends: 3\n"))
    (tmp_path / "other.yaml").write_text("extends: run.yaml\n")
    with pytest.raises(ConfigError, match="extends itself by way of"):
        load_config(write(tmp_path, "extends: other.yaml\n"))


@pytest.mark.parametrize(
    ("file", "folder"),
    [
        ("configs/cifar10/ge.yaml", "cifar10/ge"),
        ("configs/a.yaml", "a"),
        ("x/configs/b/c.yaml", "b/c"),
        ("d/e.yaml", "e"),
    ],
)
def test_run_folder_is_named_after_the_file(tmp_path: Path, file: str, folder: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text("model: {backbone: r}\ndata: {path: d}\n")
    assert load_config(path).train.run_folder == f"runs/{folder}"


def test_values_are_never_expanded_or_executed(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {backbone: r}\ndata: {path: d}\n")
    for value in ("$(touch owned)", "`id`", "${HOME}", "a 'b' \"c\"", "line\nbreak"):
        quoted = "'" + value.replace("'", "''").replace("\n", "\n\n") + "'"
        assert load_config(path, [f"tracking.name={quoted}"]).tracking.name == value


def test_differences_are_named_by_dotted_key() -> None:
    one, other = parse_config(tree()), parse_config(tree(train={"epochs": 3}, tracking={"tags": ["a"]}))
    assert differences(one, other) == {"tracking.tags": ([], ["a"]), "train.epochs": (90, 3)}
    assert differences(one, one) == {}


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
TREES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner))


@given(st.sampled_from(sorted(Config.model_fields)), TREES)
def test_nothing_but_a_config_error_comes_of_nonsense(section: str, value: Any) -> None:
    outcome = None
    try:
        outcome = parse_config({**BASE, section: value})
    except ConfigError as error:
        outcome = str(error)
    assert outcome
