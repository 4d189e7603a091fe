from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.helpers.commands import Forks
from tests.helpers.device import DeviceRank, device_problem, prepare_cuda

if TYPE_CHECKING:
    import torch

if find_spec("hypothesis"):  # a machine with a GPU that runs the device tests alone may lack it
    from hypothesis import HealthCheck, settings

    settings.register_profile("steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("steady")

# Folders and files that take longest: begun first, none of them keeps one worker busy alone at the end.
LONGEST_FIRST = (
    "benchmarks", "chaos", "docs", "networks", "test_standard_streams.py", "training", "inference", "end_to_end",
    "tracking", "cluster", "reporting",
)  # fmt: skip

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as adaptive train does, before torch is imported


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where tests marked `device` compute")
    if not pluginmanager.hasplugin("timeout"):
        parser.addini("timeout", "seconds that a test may take; acts where pytest-timeout is installed")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse a GPU that is not there, rather than skip everything that was asked for."""
    if config.getoption("--device") == "cpu":
        return
    if problem := device_problem():
        raise pytest.UsageError(f"--device cuda: {problem}; leave --device out to run these tests on the CPU")
    prepare_cuda()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m device` read only the files that hold such tests: the others import what a GPU's machine may lack."""
    if config.getoption("markexpr") != "device" or not collection_path.name.startswith("test_"):
        return None
    return True if "pytest.mark.device" not in collection_path.read_text(encoding="utf-8") else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the tests' files by LONGEST_FIRST, and as pytest does otherwise."""
    ranks = {folder: rank for rank, folder in enumerate(LONGEST_FIRST)}
    root = Path(__file__).parent
    items.sort(key=lambda item: ranks.get(item.path.relative_to(root).parts[0], len(ranks)))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device that `--device` names; on a GPU without TF32, whose 10 bits of mantissa would hide mistakes."""
    import torch

    return torch.device("cuda", 0) if request.config.getoption("--device") == "cuda" else torch.device("cpu")


@pytest.fixture(scope="session")
def device_rank(device: torch.device) -> Iterator[DeviceRank]:
    """Calls functions in a process that trains as the only rank, on the device that `--device` names."""
    rank = DeviceRank(device.type)
    yield rank
    rank.close()


@pytest.fixture(autouse=True)
def _no_rank_remains() -> Iterator[None]:
    """Later tests, and what they start, would take this process for a rank."""
    yield
    assert not {"RANK", "WORLD_SIZE", "MASTER_PORT"} & set(os.environ)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scanned digits, packed once for the whole session, in several shards."""
    from adaptive.data.packing.pack import pack

    folder = tmp_path_factory.mktemp("data") / "digits"
    pack("builtin:digits", folder, shard_bytes=600_000, workers=1, progress=False)
    return folder


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Forks:
    """Runs commands without the seconds that every start of Python with torch costs."""
    return Forks(tmp_path_factory.mktemp("forks"))


@pytest.fixture(scope="session")
def config_file(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """A correct configuration: what is wrong is for the tests to add."""
    file = tmp_path_factory.mktemp("configs") / "small.yaml"
    file.write_text(
        f"""
model: {{backbone: test_resnet, exits: 3}}
data: {{path: {digits}, image_size: 32, crop: none, flip: 0.0, workers: 0}}
train: {{run_folder: {file.parent / "run"}, epochs: 2, global_batch: 64, max_steps: 1, device: cpu}}
evaluate: {{batch: 250}}
"""
    )
    return file


@pytest.fixture(scope="session")
def existing_run(tmp_path_factory: pytest.TempPathFactory, config_file: Path, forks: Forks) -> Path:
    """A run folder in which one step was trained."""
    folder = tmp_path_factory.mktemp("runs") / "existing"
    ended = forks.run(["train", str(config_file), f"train.run_folder={folder}"])
    assert ended.code == 0, ended
    return folder


@pytest.fixture
def other_digits(digits: Path, tmp_path: Path) -> Path:
    """The digits' folder anew, made of links, so that a test may change an entry."""
    folder = tmp_path / "digits"
    folder.mkdir()
    for file in digits.iterdir():
        os.link(file, folder / file.name)
    return folder
