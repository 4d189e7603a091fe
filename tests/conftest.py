import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.helpers.commands import Forks

settings.register_profile("steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as adaptive train does, before torch is imported


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
