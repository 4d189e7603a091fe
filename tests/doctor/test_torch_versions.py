import ast
import re
from pathlib import Path

import pytest
import torch
import torchvision
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from adaptive.doctor.checks import software
from adaptive.doctor.finding import CheckSettings, Finding
from adaptive.doctor.torch_versions import PYTHONS, TRIED, install_command, known_fault, tried
from tests.helpers.locations import REPOSITORY


def look(monkeypatch: pytest.MonkeyPatch, **facts: str) -> Finding:
    monkeypatch.setattr(software, "torch_facts", lambda: facts)
    return software.torchvision(CheckSettings())


def declared(name: str) -> object:
    for node in ast.walk(ast.parse((REPOSITORY / "setup.py").read_text())):
        if isinstance(node, ast.keyword) and node.arg == name:
            return ast.literal_eval(node.value)
    raise AssertionError(name)


def test_what_these_tests_run_with_was_tried() -> None:
    assert tried(torch.__version__, torchvision.__version__)


@pytest.mark.parametrize("name", ["torch", "torchvision"])
def test_bounds_of_the_package_are_what_was_tried(name: str) -> None:
    bounds = next(r.specifier for r in map(Requirement, declared("install_requires")) if r.name == name)
    versions = [Version(getattr(pair, name)) for pair in TRIED]
    oldest, newest = min(versions), max(versions)
    assert all(bounds.contains(version) for version in versions)
    assert not bounds.contains(f"{oldest.major}.{oldest.minor - 1}.9")
    assert not bounds.contains(f"{newest.major}.{newest.minor + 1}.0")


def test_pythons_of_the_package_are_those_that_were_tried() -> None:
    wanted = SpecifierSet(declared("python_requires"))
    assert {pair.python for pair in TRIED} == set(PYTHONS)
    assert [minor for minor in range(8, 20) if wanted.contains(f"3.{minor}.1")] == [
        int(python.split(".")[1]) for python in PYTHONS
    ]


def test_the_table_of_the_docs_is_the_list() -> None:
    page = (REPOSITORY / "docs" / "dependencies.md").read_text()
    rows = re.findall(r"^\| (\d\S+) \| (\d\S+) \| (\d\S+) \|$", page, re.MULTILINE)
    assert rows == [tuple(pair) for pair in TRIED]


def test_the_constraints_hold_the_newest_pair() -> None:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    assert f"torch=={TRIED[-1].torch}" in lines
    assert f"torchvision=={TRIED[-1].torchvision}" in lines


def test_the_cpu_build_without_torchvisions_operators_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    message = "RuntimeError: operator torchvision::nms does not exist"
    monkeypatch.setattr(software, "installed_version", lambda name: "0.28.0")
    found = look(monkeypatch, torch="2.13.0+cpu", torchvision_error=message)
    assert found.status == "error"
    assert "torch 2.13.0+cpu is a CPU build, torchvision 0.28.0 is not" in found.found
    assert found.remedy == "pip install --force-reinstall torch===2.13.0 torchvision===0.28.0"
    assert known_fault("2.13.0+cpu", "0.28.0+cpu") is None
    assert known_fault("2.13.0+cu130", "0.28.0+cu130") is None


def test_another_fault_is_told_as_torchvision_tells_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = look(monkeypatch, torch="2.11.0+cu130", torchvision_error="ImportError: undefined symbol")
    assert (found.status, found.found) == (
        "error",
        "torchvision does not fit torch 2.11.0+cu130: ImportError: undefined symbol",
    )
    assert found.remedy == install_command("2.11.0+cu130")


@pytest.mark.parametrize("pair", [("2.15.0", "0.28.0"), ("2.16.0", "0.30.0"), ("2.10.0", "0.25.0")])
def test_a_pair_that_was_not_tried_is_a_warning(pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = look(monkeypatch, torch=pair[0], torchvision=pair[1])
    assert found.status == "warning"
    assert f"torch {pair[0]} with torchvision {pair[1]} is no pair that was tried (2.11.0 with 0.26.0, " in found.found
    assert found.remedy == install_command(pair[0])


def test_a_later_release_of_a_line_counts_as_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    assert look(monkeypatch, torch="2.12.9+cu130", torchvision="0.27.3").status == "ok"


def test_a_machine_without_a_dashboard_is_no_fault_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    version = software.metadata.version

    def without_wandb(name: str) -> str:
        if name == "wandb":
            raise software.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(software.metadata, "version", without_wandb)
    assert software.packages(CheckSettings()).found.startswith("wandb is missing")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    found = software.packages(CheckSettings())
    assert (found.status, found.found) == ("warning", "wandb is missing: training needs tracking.wandb=disabled")


@pytest.mark.parametrize("words", [["2.11"], ["oldest", "--folder"]])
def test_wrong_words_are_refused(words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from tests import versions

    if "--folder" in words:
        with pytest.raises(SystemExit):
            versions.main(words)
    else:
        assert versions.main(words) == 1
        assert "2.11: no such pair; take oldest, newest, all, or some of torch2.11.0" in capsys.readouterr().err


def test_the_smoke_part_is_there() -> None:
    from tests import versions

    for place in versions.SMOKE:
        file, _, function = place.partition("::")
        path = REPOSITORY / "tests" / file
        assert path.exists(), place
        assert not function or f"def {function}(" in path.read_text(), place


def test_a_missing_python_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from adaptive.errors import MachineError
    from tests import versions

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    with pytest.raises(MachineError, match=r"no Python 3.12 on PATH or among pyenv's versions"):
        versions.interpreter("3.12")
