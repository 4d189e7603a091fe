"""The start of a process group: which device counts, and what is printed."""

import io
from contextlib import redirect_stdout

import pytest
import torch

from adaptive.errors import MachineError
from adaptive.training.engine.group import resolve_device
from tests.helpers.device import DeviceRank


def _printed_at_the_start() -> str:
    from adaptive.training.engine.group import init_distributed, resolve_device

    resolve_device("cpu")
    with redirect_stdout(io.StringIO()) as printed:
        init_distributed()
    return printed.getvalue()


def test_a_start_without_news_prints_nothing(device_rank: DeviceRank) -> None:
    if device_rank.kind == "cpu":
        assert device_rank(_printed_at_the_start) == ""


def test_the_accelerator_of_the_environment_is_heeded_or_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "xpu")
    assert resolve_device("cpu").type == "cpu"
    assert "DS_ACCELERATOR = 'xpu' is not used" in caplog.text
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert resolve_device("auto").type == "cpu"
    with pytest.raises(MachineError, match=r"DS_ACCELERATOR = 'cpu'.*train\.device = 'cuda'.*unset it"):
        resolve_device("cuda")
