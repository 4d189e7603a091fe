"""The W&B sweeps in configs/sweeps: their parameters are keys of ours, and what an agent starts trains."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from adaptive.commands.train import sweep_overrides
from adaptive.config.loading import load_config
from adaptive.tracking.record import read
from tests.helpers.locations import REPOSITORY

SWEEPS = sorted((REPOSITORY / "configs" / "sweeps").glob("*.yaml"))
# As wandb/wandb_agent.py puts an agent's command together, from the functions that it calls.
EXPAND = """
import json, sys
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args
sweep, runs = json.load(sys.stdin)
expanded = []
for values in runs:
    words = create_sweep_command_args({"args": {key: {"value": value} for key, value in values.items()}})
    words |= {"interpreter": ["python"], "program": [sweep["program"]], "env": ["/usr/bin/env"]}
    command = []
    for part in create_sweep_command(list(sweep["command"])):
        command += words[part[2:-1]] if part.startswith("${") and part.endswith("}") else [part]
    expanded.append(command)
json.dump(expanded, sys.stdout)
"""


def load(path: Path) -> dict[str, Any]:
    return YAML(typ="safe", pure=True).load(path.read_text())


def combinations(sweep: dict[str, Any]) -> list[dict[str, Any]]:
    keys = list(sweep["parameters"])
    values = itertools.product(*(sweep["parameters"][key]["values"] for key in keys))
    return [dict(zip(keys, chosen, strict=True)) for chosen in values]


def expand(sweep: dict[str, Any], runs: list[dict[str, Any]]) -> list[list[str]]:
    pytest.importorskip("wandb")
    asked = json.dumps([sweep, runs])
    ended = subprocess.run([sys.executable, "-c", EXPAND], input=asked, capture_output=True, text=True, check=True)
    return json.loads(ended.stdout)


def test_there_are_sweeps() -> None:
    assert [path.stem for path in SWEEPS] == ["seeds_cifar10", "techniques"]


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_run_of_a_sweep_is_a_configuration(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    sweep = load(path)
    runs = combinations(sweep)
    commands = expand(sweep, runs)
    assert len({tuple(command) for command in commands}) == len(runs) > 1
    for values, command in zip(runs, commands, strict=True):
        assert command[:3] == ["/usr/bin/env", "python", "launcher/train.py"]
        assert Path(command[2]).is_file()
        config = load_config(command[3], command[4:])
        tree = config.model_dump()
        for key, value in values.items():
            section, name = key.split(".")
            assert tree[section][name] == value
        assert (config.tracking.wandb, config.tracking.project) == ("online", sweep["project"])
        assert sweep["metric"] == {"name": f"val/exit_{config.model.exits}/top1", "goal": "maximize"}


def test_the_agents_runs_have_folders_of_their_own() -> None:
    agent = {"WANDB_SWEEP_ID": "s1", "WANDB_RUN_ID": "r1"}
    assert sweep_overrides(agent) == ["train.run_folder=runs/sweeps/s1/r1"]
    for missing in agent:
        assert sweep_overrides({name: value for name, value in agent.items() if name != missing}) == []
    given = [*sweep_overrides(agent), "train.run_folder=elsewhere"]
    assert load_config(REPOSITORY / "configs/quickstart.yaml", given).train.run_folder == "elsewhere"


@pytest.mark.end_to_end
@pytest.mark.full
def test_an_agents_command_trains(tmp_path: Path, digits: Path) -> None:
    sweep = load(REPOSITORY / "configs/sweeps/techniques.yaml")
    [command] = expand(sweep, combinations(sweep)[-1:])
    command[command.index("tracking.wandb=online")] = "tracking.wandb=offline"
    for name in ("configs", "launcher"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    (tmp_path / "home").mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(tmp_path / "home"),
        "WANDB_SWEEP_ID": "sweep7",
        "WANDB_RUN_ID": "run7",
        "WANDB_ERROR_REPORTING": "false",
    }
    words = [*command, f"data.path={digits}", "train.max_steps=1", "evaluate.batch=250"]
    ended = subprocess.run(
        words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 0, ended.stderr
    folder = tmp_path / "runs" / "sweeps" / "sweep7" / "run7"
    config = load_config(folder / "config.yaml")
    assert (config.optimizer.lr, config.model.equilibrium, config.model.collaboration) == (0.1, False, False)
    assert any(sweep["metric"]["name"] in record for record in read(folder / "metrics.jsonl"))
    assert list(folder.glob("wandb/offline-run-*-run7/run-run7.wandb")), ended.stderr  # the id that the agent chose
