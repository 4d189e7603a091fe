"""Every kind of backbone as plain weights: the image size is an argument, tensors have two names, exits are its own."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import timm
import torch

import adaptive
from adaptive.errors import ExportError
from adaptive.inference.export.plain_weights import plain_state, write_weights
from tests.helpers.waiting import PATIENCE


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("test_vit", 32, {}),
        ("test_convnext", 64, {"drop_path_rate": 0.1}),
        ("test_efficientnet", 64, {}),
        ("msdnet", 32, {"base": 2, "step": 1, "channels": 4, "growth": 2}),
    ],
)
def test_timm_builds_the_model_that_the_weights_fit(name: str, size: int, options: dict, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = adaptive.create_model(name, num_classes=7, exits=3, input_size=size, **options)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    state, arguments = plain_state(network, name, options)
    write_weights(state, tmp_path / "plain.safetensors", {"backbone": name})
    plain = timm.create_model(name, checkpoint_path=str(tmp_path / "plain.safetensors"), **arguments).eval()
    network.eval().collaboration = False
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = network(images)[-1]
        found = plain(images)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert [path.name for path in tmp_path.iterdir()] == ["plain.safetensors"]


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"nowhere.a\.safetensors cannot be written: .*free space or rights"):
        write_weights({"a": torch.zeros(1)}, tmp_path / "nowhere" / "a.safetensors", {})
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_appears_meanwhile_is_not_replaced_unless_asked(tmp_path: Path) -> None:
    """Whether there is one is looked at before the network is loaded, which takes its time."""
    file = tmp_path / "a.safetensors"
    file.write_text("another's")
    with pytest.raises(ExportError, match=r"a\.safetensors exists; give another name, or --overwrite"):
        write_weights({"a": torch.zeros(1)}, file, {})
    assert file.read_text() == "another's"
    assert list(tmp_path.iterdir()) == [file]
    write_weights({"a": torch.zeros(1)}, file, {}, overwrite=True)
    assert file.stat().st_size > 9


def test_what_a_killed_export_left_goes_with_the_next(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"

    def die() -> None:
        os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        write_weights({"a": torch.zeros(1)}, file, {})

    process = multiprocessing.get_context("fork").Process(target=die)
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) != []
    write_weights({"a": torch.zeros(1)}, file, {})
    assert list(tmp_path.iterdir()) == [file]
