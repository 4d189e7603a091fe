"""A small run on the digits that the commands after training share."""

from pathlib import Path

import pytest

from tests.helpers.commands import Forks


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Forks:
    return Forks(tmp_path_factory.mktemp("forks"))


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, digits: Path, commands: Forks) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "digits"
    config = folder.with_name("digits.yaml")
    config.write_text(
        f"""
model: {{backbone: test_resnet, exits: 3}}
data: {{path: {digits}, image_size: 32, crop: none, flip: 0.0, workers: 0}}
optimizer: {{lr: 0.05}}
train: {{run_folder: {folder}, epochs: 3, global_batch: 32, ema_decay: 0.9, device: cpu}}
"""
    )
    ended = commands.run(["train", str(config)])
    assert ended.code == 0, ended
    return folder
