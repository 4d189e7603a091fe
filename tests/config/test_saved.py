"""Configurations kept in run folders: secrets apart, and nothing granted by the file itself."""

import stat
from pathlib import Path
from typing import Any

import pytest

from adaptive.config.loading import load_config, parse_config
from adaptive.config.saved import (
    FETCHING,
    check_receiver,
    for_inference,
    granted,
    read_saved,
    split_overrides,
    write_config,
)
from adaptive.config.sections import Config, DataConfig
from adaptive.errors import ConfigError

URL = "https://me:pa55w0rd@host/set?sig=f00d"


def config(**sections: Any) -> Config:
    return parse_config({"model": {"backbone": "test_resnet"}, "data": {"path": URL}, **sections})


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_secrets_are_kept_apart(tmp_path: Path) -> None:
    whole, file, private = config(), tmp_path / "config.yaml", tmp_path / "config.private.yaml"
    write_config(whole, file)
    assert "pa55w0rd" not in file.read_text()
    assert (mode(file) & 0o044, mode(private)) == (0o044, 0o600)
    assert private.read_text() == f"data:\n  path: {URL}\n"
    assert read_saved(file) == whole
    assert load_config(file, ["train.run_folder=x"]).data == whole.data
    file.write_text(file.read_text().replace("https://***@host/set?***", "/elsewhere"))
    assert read_saved(file).data.path == "/elsewhere"
    write_config(config(data={"path": "/plain"}), file)
    assert not private.exists()


def test_a_private_file_fills_in_only_what_was_struck_out(tmp_path: Path) -> None:
    file, private = tmp_path / "config.yaml", tmp_path / "config.private.yaml"
    write_config(config(), file)
    private.write_text("data: {path: 'https://me:x@elsewhere/set?sig=y', pipe: true}\nextends: /etc/passwd\n")
    assert read_saved(file).data.path == "https://***@host/set?***"
    assert read_saved(file).data.pipe is False


def test_a_private_file_that_may_not_be_read_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file, private = tmp_path / "config.yaml", tmp_path / "config.private.yaml"
    write_config(config(), file)
    private.unlink()
    private.mkdir()  # no rights stop the root that tests may be
    assert read_saved(file).data.path == "https://***@host/set?***"
    assert f"{private} cannot be read (Is a directory): " in caplog.text
    assert "data.path=LOCATION" in caplog.text


def test_a_run_decides_nothing_that_is_its_readers(tmp_path: Path) -> None:
    said = config(
        data={
            "path": "/x",
            "pipe": True,
            "cache": "/theirs",
            "cache_gib": 1e-6,
            "cache_ahead": 10**6,
            "mean": [0, 0, 0],
        },
        model={
            "backbone": "test_resnet",
            "weights": "/w",
            "options": {"drop_rate": 0.5} | dict.fromkeys(FETCHING, "x"),
        },
        distillation={"teacher_weights": "/t", "teacher_options": {"checkpoint_path": "/t"}},
        tracking={"entity": "theirs", "project": "theirs", "name": "kept"},
        train={"run_folder": "/theirs"},
        deepspeed={"tensorboard": {"enabled": True, "output_path": "/theirs"}},
    )
    mine = for_inference(said, tmp_path)
    usual = DataConfig(path="/x")
    for key in ("pipe", "cache", "cache_gib", "cache_ahead"):
        assert getattr(mine.data, key) == getattr(usual, key), key
    assert mine.data.mean == [0, 0, 0]
    assert mine.model.options == {"drop_rate": 0.5}
    assert "/theirs" not in str(mine)
    assert "/w" not in str(mine.model)
    assert "/t'" not in str(mine.distillation)
    assert mine.tracking.name == "kept"
    given = for_inference(said, tmp_path, ["data.pipe=true", "data.cache=/mine", "tracking.entity=me"])
    assert (given.data.pipe, given.data.cache, given.tracking.entity) == (True, "/mine", "me")
    with pytest.raises(ConfigError, match=r"model\.weights cannot be given"):
        for_inference(said, tmp_path, ["model.weights=/w"])
    with pytest.raises(ConfigError, match=r"tracking\.entity=theirs tracking\.project=theirs"):
        check_receiver(said, mine, [])
    check_receiver(said, for_inference(said, tmp_path, words := ["tracking.entity=me", "tracking.project=p"]), words)
    own = parse_config(said.model_dump() | {"data": {"path": "/x", "pipe": True, "cache": "/a b'$c", "cache_gib": 5.5}})
    assert granted(own) == ["data.pipe=true", 'data.cache="/a b\'$c"', "data.cache_gib=5.5"]
    assert for_inference(own, tmp_path, granted(own)).data == own.data
    assert granted(config()) == []
    check_receiver(config(), for_inference(config(), tmp_path), [])


def test_overrides_stand_among_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data.pipe=true").mkdir()
    words = ["run", "data.cache=x", "data.pipe=true", "a=b", "tracking.project="]
    assert split_overrides(words) == (["run", "data.pipe=true", "a=b"], ["data.cache=x", "tracking.project="])
