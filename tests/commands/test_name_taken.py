"""PyPI has another package named `adaptive`: installed over this one, beside it, or removed again, it is named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.commands.test_wheel import installed, python  # noqa: F401 - a fixture

# Without the finder that an editable installation of this project puts behind all others.
COMMAND = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
from adaptive_training import main
main(sys.argv[1:])
"""
REMEDY = "pip uninstall -y adaptive && pip install --force-reinstall --no-deps adaptive-training"
WORKING = "__version__ = '1.5.2'\n__all__ = ['Runner']\nclass Runner: ...\n"
BROKEN = "import a_package_that_it_needs\n"


@pytest.fixture
def site(installed: Path, tmp_path: Path) -> Path:  # noqa: F811
    """A folder of installed packages, with this one from its wheel."""
    folder = tmp_path / "site"
    shutil.copytree(installed, folder)
    return folder


def install_other(folder: Path, content: str) -> None:
    """What `pip install adaptive` leaves in a folder of installed packages."""
    (folder / "adaptive").mkdir(parents=True, exist_ok=True)
    (folder / "adaptive" / "__init__.py").write_text(content)
    (folder / "adaptive" / "runner.py").write_text("")
    about = folder / "adaptive-1.5.2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: adaptive\nVersion: 1.5.2\n")
    (about / "RECORD").write_text("adaptive/__init__.py,,\nadaptive/runner.py,,\nadaptive-1.5.2.dist-info/METADATA,,\n")


def remove_other(folder: Path) -> None:
    """What `pip uninstall adaptive` does."""
    for line in (folder / "adaptive-1.5.2.dist-info" / "RECORD").read_text().splitlines():
        (folder / line.split(",")[0]).unlink()
    shutil.rmtree(folder / "adaptive-1.5.2.dist-info")


def command(site: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return python(site, site.parent, "-P", "-c", COMMAND, *words)


def error_line(ended: subprocess.CompletedProcess[str]) -> str:
    assert (ended.returncode, ended.stdout) == (1, ""), ended
    [line] = ended.stderr.splitlines()
    return line


@pytest.mark.parametrize("words", [["doctor"], pytest.param(["train", "x.yaml"], marks=pytest.mark.full)])
def test_another_package_over_this_one_is_named(site: Path, words: list[str]) -> None:
    install_other(site, WORKING)
    line = error_line(command(site, *words))
    assert line == (
        f"adaptive {words[0]}: error: {site}/adaptive/__init__.py is not Adaptive's: another package of the name, "
        f"adaptive 1.5.2 of PyPI, was installed over it; {REMEDY}"
    )


@pytest.mark.full
def test_one_that_cannot_be_imported_is_named(site: Path) -> None:
    install_other(site, BROKEN)
    line = error_line(command(site, "doctor"))
    assert "adaptive: error: Adaptive cannot be imported (ModuleNotFoundError: No module named 'a_package_" in line
    assert "another package of the name, adaptive 1.5.2 of PyPI" in line
    assert "pip uninstall -y adaptive, and then install Adaptive anew: pip install --force-reinstall" in line


@pytest.mark.full
def test_one_that_hides_this_one_is_named(site: Path, tmp_path: Path) -> None:
    """As it does with an editable installation, which comes last on Python's path."""
    install_other(tmp_path / "first", WORKING)
    shutil.copy(site / "adaptive_training.py", tmp_path / "first")
    line = error_line(command(tmp_path / "first", "train", "x.yaml"))
    assert (
        "(ModuleNotFoundError: No module named 'adaptive.commands'): another package of the name, adaptive 1.5.2"
        in line
    )


def test_one_that_was_removed_again_is_named(site: Path) -> None:
    install_other(site, WORKING)
    remove_other(site)
    line = error_line(command(site, "doctor"))
    assert (
        f"{site}/adaptive/__init__.py is missing: another package of the name, adaptive of PyPI, was installed" in line
    )
    assert line.endswith("; pip install --force-reinstall --no-deps adaptive-training")


@pytest.mark.full
def test_modules_that_it_took_along_are_named(site: Path) -> None:
    original = (site / "adaptive" / "__init__.py").read_text()
    install_other(site, original)
    (site / "adaptive" / "commands" / "models.py").unlink()
    line = error_line(command(site, "models"))
    assert "Adaptive is incomplete (" in line
    assert "adaptive.commands.models" in line or "'models'" in line
    assert line.endswith(REMEDY)
    remove_other(site)
    (site / "adaptive" / "__init__.py").write_text(original)
    ended = command(site, "doctor", "--only", "name", "--json")
    [found] = json.loads(ended.stdout)["findings"]
    assert (found["status"], found["found"]) == (
        "error", f"adaptive/commands/models.py of adaptive-training is missing in {site}"
    )  # fmt: skip


@pytest.mark.full
def test_the_doctor_warns_of_one_that_lies_beside_it(site: Path, tmp_path: Path) -> None:
    [found] = json.loads(command(site, "doctor", "--only", "name", "--json").stdout)["findings"]
    assert (found["status"], found["found"]) == ("ok", f"adaptive is adaptive-training's, in {site}")
    install_other(tmp_path / "other", WORKING)
    shutil.move(tmp_path / "other" / "adaptive-1.5.2.dist-info", site)
    [found] = json.loads(command(site, "doctor", "--only", "name", "--json").stdout)["findings"]
    assert (found["status"], found["remedy"]) == ("warning", REMEDY)
    assert "adaptive 1.5.2 of PyPI, another package of the same name, is installed too" in found["found"]


@pytest.mark.full
def test_the_remedy_installs_from_where_it_came(site: Path) -> None:
    [about] = site.glob("adaptive_training-*.dist-info")
    origin = {"url": "file:///home/me/my%20code", "dir_info": {"editable": True}}
    (about / "direct_url.json").write_text(json.dumps(origin))
    install_other(site, WORKING)
    assert error_line(command(site, "doctor")).endswith("--force-reinstall --no-deps -e '/home/me/my code'")


@pytest.mark.full
def test_pip_really_does_this(installed: Path, tmp_path: Path) -> None:  # noqa: F811
    """A wheel of the other name, installed by pip itself."""
    prefix = tmp_path / "environment"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(prefix), "platbase": str(prefix)}))
    shutil.copytree(installed, site)
    source = tmp_path / "other"
    (source / "adaptive").mkdir(parents=True)
    (source / "adaptive" / "__init__.py").write_text(WORKING)
    setup = "from setuptools import setup; setup(name='adaptive', version='1.5.2', packages=['adaptive'])"
    (source / "setup.py").write_text(setup)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, check=True)
    [wheel] = source.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--ignore-installed", "--prefix"]
    subprocess.run([*pip, str(prefix), str(wheel)], capture_output=True, check=True)
    assert "is not Adaptive's: another package of the name, adaptive 1.5.2 of PyPI" in error_line(
        command(site, "doctor")
    )
