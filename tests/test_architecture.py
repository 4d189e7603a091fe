"""The house rules that a machine can check: floors, circles, who imports heavy packages, small files, keys in use."""

import ast
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from setuptools import find_packages

from adaptive.config.keys import documented_keys
from adaptive.config.reference import configuration_reference
from adaptive.config.sections import Config
from adaptive.files import code_digest, code_sources
from adaptive.jobs.code_version import code_version
from tests.helpers.locations import REPOSITORY

# From the ground up; a module imports from its own floor or below. The package itself only names what lies in all.
FLOORS = [
    {
        "adaptive.errors",
        "adaptive.files",
        "adaptive.foreign_text",
        "adaptive.locks",
        "adaptive.passing_faults",
        "adaptive.requirements",
        "adaptive.standard_streams",
    },
    {"adaptive.config", "adaptive.distributed", "adaptive.metrics"},
    {"adaptive.networks", "adaptive.data"},
    {"adaptive.inference", "adaptive.tracking"},
    {"adaptive.training", "adaptive.reporting"},
    {"adaptive.planning", "adaptive.doctor", "adaptive.jobs", "adaptive.runs"},
    {"adaptive.commands", "adaptive.__main__"},
    {"launcher"},
]
STRANGERS = [("training", "inference"), ("networks", "data")]
MOST_MODULES, MOST_LINES, LONGEST_FUNCTION = 16, 400, 70
SHELL = re.compile(r"shell=True|os\.system|os\.popen|subprocess\.getoutput|create_subprocess_shell")


@dataclass(frozen=True)
class Source:
    """A module, read once."""

    name: str
    path: Path
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def imports(self) -> set[str]:
        """Full names of what is imported anywhere in the module: lazily and for types alone as well."""
        found = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        return found

    @property
    def wing(self) -> str:
        return ".".join(self.name.split(".")[:2])


def read(path: Path) -> Source:
    name = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
    return Source(name, path, path.read_text())


SOURCES = [read(path) for path in sorted([*REPOSITORY.glob("adaptive/**/*.py"), *REPOSITORY.glob("launcher/**/*.py")])]
MODULES = {source.name: source for source in SOURCES}
# A package's own name stands for its __init__, which imports nothing (but the topmost one, which names what all hold).
GRAPH = {source.name: {n for n in source.imports if n in MODULES} - {source.name} for source in SOURCES}
del GRAPH["adaptive"]


def floor_of(module: str) -> int | None:
    for height, names in enumerate(FLOORS):
        if any(module == name or module.startswith(f"{name}.") for name in names):
            return height
    return None


def circle(graph: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_every_module_stands_on_a_floor() -> None:
    assert [name for name in GRAPH if floor_of(name) is None] == []


def test_nothing_imports_upwards() -> None:
    heights = {name: floor_of(name) for name in MODULES}
    pairs = [(name, other) for name, others in GRAPH.items() for other in others if other != "adaptive"]
    assert [pair for pair in pairs if (heights[pair[1]] or 0) > (heights[pair[0]] or 0)] == []


def test_no_circle_of_modules() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}), "a circle is not seen"
    assert circle(GRAPH) == []


def test_wings_import_one_way() -> None:
    wings: dict[str, set[str]] = {}
    for name, others in GRAPH.items():
        mine = MODULES[name].wing
        wings.setdefault(mine, set()).update(MODULES[n].wing for n in others if MODULES[n].wing != mine)
    assert circle(wings) == []


@pytest.mark.parametrize(("one", "other"), STRANGERS, ids=" and ".join)
def test_neighbours_do_not_know_each_other(one: str, other: str) -> None:
    between = {f"adaptive.{one}", f"adaptive.{other}"}
    pairs = [(name, found) for name, others in GRAPH.items() for found in others]
    assert [pair for pair in pairs if {MODULES[name].wing for name in pair} == between] == []


def test_packages_import_nothing() -> None:
    offering = {"adaptive", "adaptive.planning"}  # names, which they import on first use
    packages = [s for s in SOURCES if s.path.name == "__init__.py" and s.name not in offering]
    assert len(packages) > 20
    assert [s.name for s in packages if len(s.tree.body) != 1 or not ast.get_docstring(s.tree)] == []


@pytest.mark.parametrize(
    ("package", "only"),
    [
        ("deepspeed", "adaptive.training.engine"),  # the one adapter, a folder
        ("webdataset", "adaptive.data.reading.pipeline"),
        ("wandb", "adaptive.tracking.wandb_client"),
        ("wandb_workspaces", "adaptive.tracking.workspace"),
        ("torchcodec", "adaptive.data.images.nvjpeg"),
    ],
)
def test_one_place_imports_each_heavy_package(package: str, only: str) -> None:
    importers = [s.name for s in SOURCES if any(name.split(".")[0] == package for name in s.imports)]
    assert importers
    assert [name for name in importers if name != only and not name.startswith(f"{only}.")] == []


def test_ranks_are_found_without_torch() -> None:
    code = "import sys, adaptive.distributed.ranks; print({'torch', 'deepspeed'} & set(sys.modules))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "set()"


def test_only_the_allowed_command_reaches_a_shell() -> None:
    assert [s.name for s in SOURCES if SHELL.search(s.text)] == ["adaptive.data.remote.pipes"]


def test_files_stay_small() -> None:
    assert {s.name: n for s in SOURCES if (n := s.text.count("\n")) > MOST_LINES} == {}


def test_functions_stay_small() -> None:
    lengths = {
        f"{s.name}.{node.name}": (node.end_lineno or 0) - node.lineno
        for s in SOURCES
        for node in ast.walk(s.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: n for name, n in lengths.items() if n > LONGEST_FUNCTION} == {}


def test_folders_hold_one_idea() -> None:
    folders = Counter(s.path.parent.relative_to(REPOSITORY) for s in SOURCES if s.path.name != "__init__.py")
    del folders[Path("adaptive/commands")]
    assert {str(folder): n for folder, n in folders.items() if n > MOST_MODULES} == {}


def test_the_package_is_found_whole() -> None:
    """What the wheel installs, and what finds the code by where it lies."""
    found = set(find_packages(str(REPOSITORY), include=["adaptive", "adaptive.*"]))
    assert found == {".".join(s.path.parent.relative_to(REPOSITORY).parts) for s in SOURCES} - {"launcher"}
    about = code_version()
    assert about["root"] == str(REPOSITORY)
    if (REPOSITORY / ".git").exists():
        assert re.fullmatch("[0-9a-f]{40}", about["commit"])
    assert len(code_sources()) == len(SOURCES) - 2
    assert re.fullmatch("[0-9a-f]{12}", code_digest())


def unread(keys: list[str]) -> list[str]:
    """Configuration keys that no module outside of adaptive/config/ reads."""
    text = "\n".join(s.text for s in SOURCES if s.wing != "adaptive.config")
    return [key for key in keys if not re.search(rf"\.{key.split('.')[-1]}\b", text)]


def test_every_configuration_key_is_read() -> None:
    keys = [key for key, _ in documented_keys()]
    assert unread(["train.read_by_nobody"]) == ["train.read_by_nobody"]
    assert unread(keys) == []


def test_every_configuration_key_is_documented() -> None:
    assert [key for key, field in documented_keys() if not field.description] == []


def test_reference_page_is_up_to_date() -> None:
    page = "docs/reference/configuration.md"
    remedy = f"run: adaptive train --help-config > {page}"
    assert (REPOSITORY / page).read_text() == configuration_reference(), remedy


def test_the_set_of_sections_is_what_was_promised() -> None:
    promised = "model data optimizer schedule train distillation phases evaluate checkpoint tracking deepspeed"
    assert list(Config.model_fields) == promised.split()


def test_every_fault_in_the_table_names_tests_that_are_there() -> None:
    rows = [line for line in (REPOSITORY / "docs/reliability.md").read_text().splitlines() if line.startswith("| ")]
    head = next(row for row in rows if "Tested by" in row)
    faults = rows[rows.index(head) + 1 :]
    assert len(faults) > 20
    named = {row: re.findall(r"[a-z_/]+\.py", row.rsplit("|", 2)[1]) for row in faults}
    assert [row for row, names in named.items() if not names] == []
    everything = {name for names in named.values() for name in names}
    assert [name for name in everything if not (REPOSITORY / "tests" / name).is_file()] == []
