"""The house rules that a machine can check: floors, single importers, small files, documented and used keys."""

import ast
import re
from pathlib import Path

import pytest

from adaptive.config.reference import configuration_reference
from adaptive.config.sections import Config, documented_keys
from tests.helpers.locations import REPOSITORY

SOURCES = sorted([*REPOSITORY.glob("adaptive/**/*.py"), *REPOSITORY.glob("launcher/**/*.py")])

# From the ground up; a module imports from its own floor or below.
FLOORS = [
    {"adaptive.errors", "adaptive.files"},
    {"adaptive.config", "adaptive.distributed", "adaptive.metrics", "adaptive.measure"},
    {"adaptive.networks", "adaptive.data"},
    {"adaptive.inference", "adaptive.tracking"},
    {"adaptive.training", "adaptive.reporting"},
    {"adaptive.planning", "adaptive.doctor", "adaptive.jobs", "adaptive.runs"},
    {"adaptive.commands", "adaptive.__main__"},
    {"launcher"},
]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
    return found


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


def floor_of(module: str) -> int | None:
    for height, names in enumerate(FLOORS):
        if any(module == name or module.startswith(f"{name}.") for name in names):
            return height
    return None


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_nothing_imports_upwards(path: Path) -> None:
    module = module_name(path)
    if module == "adaptive":
        return  # the package only names what lies in its floors, lazily
    mine = floor_of(module)
    assert mine is not None, f"{module} stands on no floor"
    for imported in imports(path):
        theirs = floor_of(imported)
        assert theirs is None or theirs <= mine, f"{module} imports {imported} from a higher floor"
        if not imported.startswith("adaptive."):
            continue
        beside = {module.split(".")[1] if "." in module else "", imported.split(".")[1]}
        assert beside != {"networks", "data"}, (
            f"{module} imports {imported}: networks and data know nothing of each other"
        )


@pytest.mark.parametrize(
    ("package", "only"),
    [
        ("deepspeed", "adaptive.training.engine.engine"),
        ("webdataset", "adaptive.data.reading.stream"),
        ("wandb", "adaptive.tracking.wandb_client"),
        ("wandb_workspaces", "adaptive.tracking.workspace"),
    ],
)
def test_one_module_imports_each_heavy_package(package: str, only: str) -> None:
    importers = {module_name(p) for p in SOURCES if any(i.split(".")[0] == package for i in imports(p))}
    assert importers == {only}


def test_only_the_allowed_command_reaches_a_shell() -> None:
    shell = re.compile(r"shell=True|os\.system|os\.popen|subprocess\.getoutput|create_subprocess_shell")
    assert [module_name(p) for p in SOURCES if shell.search(p.read_text())] == ["adaptive.data.remote.pipes"]


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 400, f"{path} has grown; look for the idea hidden in it"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or 0) - node.lineno
            assert length <= 70, f"{path}: {node.name} has {length} lines"


@pytest.mark.parametrize("key", [key for key, _ in documented_keys()])
def test_every_configuration_key_is_read_and_documented(key: str) -> None:
    fields = dict(documented_keys())
    assert fields[key].description, f"{key} has no sentence under it"
    name = key.split(".")[-1]
    elsewhere = [p.read_text() for p in SOURCES if "config" not in p.relative_to(REPOSITORY).parts]
    assert any(re.search(rf"\.{name}\b", text) for text in elsewhere), f"nothing reads {key}"


def test_reference_page_is_up_to_date() -> None:
    page = REPOSITORY / "docs" / "configuration.md"
    assert page.read_text() == configuration_reference(), "run: adaptive train --help-config > docs/configuration.md"


def test_the_set_of_sections_is_what_was_promised() -> None:
    promised = "model data optimizer schedule train distillation phases evaluate checkpoint tracking deepspeed"
    assert list(Config.model_fields) == promised.split()


def test_every_fault_in_the_table_names_tests_that_are_there() -> None:
    rows = [line for line in (REPOSITORY / "docs/reliability.md").read_text().splitlines() if line.startswith("| ")]
    head = next(row for row in rows if "Tested by" in row)
    faults = rows[rows.index(head) + 1 :]
    assert len(faults) > 20
    for row in faults:
        named = re.findall(r"[a-z_/]+\.py", row.rsplit("|", 2)[1])
        assert named, row
        for name in named:
            assert (REPOSITORY / "tests" / name).is_file(), f"{name}: {row}"
