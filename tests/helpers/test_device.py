"""The option --device, and what `-m device` needs."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import pytest_configure
from tests.helpers.locations import REPOSITORY

ABSENT = ("hypothesis", "pytest_timeout", "xdist")  # on a machine that somebody lends for its GPU
BARE = f"import sys; sys.modules |= dict.fromkeys({ABSENT}); import pytest; sys.exit(pytest.main(sys.argv[1:]))"


def run_pytest(*words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "-c", BARE, "-q", *words],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_cuda_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(pytest.UsageError, match=r"--device cuda: .* finds no usable GPU .*; leave --device out"):
        pytest_configure(SimpleNamespace(getoption=lambda _: "cuda"))
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(pytest.UsageError, match="was built without CUDA"):
        pytest_configure(SimpleNamespace(getoption=lambda _: "cuda"))


@pytest.mark.full
def test_the_refusal_is_a_line() -> None:
    ended = run_pytest("--device", "cuda", "-m", "device")
    assert ended.returncode == pytest.ExitCode.USAGE_ERROR
    assert "ERROR: --device cuda: " in ended.stderr
    assert "leave --device out to run these tests on the CPU" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.full
def test_the_devices_tests_need_no_package_that_only_tests_need() -> None:
    ended = run_pytest("-m", "device", "--collect-only")
    assert ended.returncode == pytest.ExitCode.OK, ended.stdout + ended.stderr
    assert "test_every_precision_has_the_closed_form" in ended.stdout
