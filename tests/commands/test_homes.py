"""Users without a home folder, or with one that they may not write: a line that names the variable, or it works."""

import os
import pwd
from pathlib import Path

import pytest

from adaptive.config.sections import DataConfig
from adaptive.data.shards.cache import cache_folder
from adaptive.doctor.checks import software
from adaptive.doctor.finding import CheckSettings
from adaptive.errors import ConfigError, MachineError
from adaptive.tracking.wandb_server import find_key, server
from adaptive.training.engine.operators import check_operator_folder
from tests.helpers.commands import Forks, start_command

NOWHERE = "/dev/null/home"  # not even root can make a folder there


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user whom the system does not know, as in many containers (a mock: this process is somebody)."""

    def unknown(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "TORCH_EXTENSIONS_DIR", "WANDB_CONFIG_DIR", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def test_training_is_refused_where_its_operator_cannot_be_compiled(
    config_file: Path, forks: Forks, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = ["train", str(config_file), f"train.run_folder={run}"]
    line = forks.start(words, TORCH_EXTENSIONS_DIR=f"{NOWHERE}/ext").wait().error_line()
    assert f"TORCH_EXTENSIONS_DIR = '{NOWHERE}/ext', and " in line
    assert "cannot be written: Not a directory" in line
    assert "name a folder of your own, export TORCH_EXTENSIONS_DIR=FOLDER" in line
    assert not (run / "checkpoints").exists()


def test_a_home_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", NOWHERE)
    with pytest.raises(MachineError, match=r"TORCH_EXTENSIONS_DIR is not set, and /dev/null/home.* cannot be written"):
        check_operator_folder()
    found = software.extensions(CheckSettings())
    assert found.status == "error"
    assert "export TORCH_EXTENSIONS_DIR=" in found.remedy


def test_no_home_at_all(homeless: None) -> None:
    with pytest.raises(ConfigError, match=r"data\.cache is not set, and this user has no home folder"):
        cache_folder(DataConfig(path="https://host/set"))
    assert software.extensions(CheckSettings()).status == "error"
    assert server() == "https://api.wandb.ai"
    assert find_key(server()) == ("", "")


def test_an_operator_that_somebody_else_has_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = tmp_path / "deepspeed_shm_comm"
    built.mkdir()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    check_operator_folder()
    # A mock: for root every folder can be written.
    monkeypatch.setattr(os, "access", lambda path, _mode: Path(path) != built)
    with pytest.raises(MachineError, match="deepspeed_shm_comm cannot be written: Permission denied"):
        check_operator_folder()
    assert "which torch does at every start" in software.extensions(CheckSettings()).found


@pytest.mark.full
@pytest.mark.end_to_end
def test_all_else_works_without_a_home(config_file: Path, existing_run: Path, tmp_path: Path) -> None:
    """matplotlib, W&B's client, torch.compile and DeepSpeed make do with a temporary folder."""
    bare = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR", "WANDB_CACHE_DIR"), NOWHERE)
    bare |= {"WANDB_CONFIG_DIR": NOWHERE, "WANDB_DATA_DIR": NOWHERE, "TRITON_HOME": NOWHERE}
    words = ["train", str(config_file), f"train.run_folder={tmp_path / 'run'}", "tracking.wandb=offline"]
    ended = start_command(words, **bare)
    assert ended.code == 0, ended
    assert "W&B is switched off" not in ended.err
    ended = start_command(["report", str(existing_run), "--workers", "0", "--out", str(tmp_path / "page")], **bare)
    assert ended.code == 0, ended
