"""The pages of docs/ say what is: their code prints what they show, links lead somewhere, commands are commands."""

import ast
import pkgutil
import re
import runpy
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, blocks, run_python
from tests.helpers.locations import REPOSITORY
from tests.test_architecture import FLOORS

LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = [("cutting.md", ""), ("inference.md", "### How the search moves two thresholds at once")]


@pytest.mark.parametrize(("page", "heading"), CODE, ids=lambda value: value.split(" ")[0])
def test_code_prints_what_the_page_shows(page: str, heading: str) -> None:
    results = run_python(blocks(page, heading))
    assert any(shown for _, shown in results)
    for printed, shown in results:
        assert printed == shown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = [link.split("#")[0] for link in LINK.findall(page.read_text()) if "://" not in link]
    assert [target for target in targets if target and not (page.parent / target).exists()] == []


def test_links_to_headings_lead_somewhere() -> None:
    for page in PAGES:
        for link in LINK.findall(page.read_text()):
            path, _, heading = link.partition("#")
            if heading and "://" not in link:
                target = (page.parent / path).read_text() if path else page.read_text()
                headings = re.findall(r"^#+ (.*)$", target, re.MULTILINE)
                assert heading in {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}, link


def test_every_page_is_in_the_index() -> None:
    index = (REPOSITORY / "docs" / "README.md").read_text()
    pages = [str(p.relative_to(REPOSITORY / "docs")) for p in REPOSITORY.glob("docs/**/*.md") if p.name != "README.md"]
    assert [page for page in pages if f"]({page})" not in index] == []


def test_files_named_are_there() -> None:
    folders = "adaptive|tests|docs|launcher|slurm|configs|benchmarks"
    named = re.compile(rf"(?<![\w/.-])(?:{folders})/[\w/-]+\.(?:py|yaml|sbatch|sh|md|json|png|j2)\b")
    missing = {file for page in PAGES for file in named.findall(page.read_text()) if not (REPOSITORY / file).exists()}
    assert missing == set()


def test_python_names_are_there() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    for name in set(re.findall(r"(?<![\w/.])adaptive(?:\.\w+)+", text)):
        if name.split(".")[1] not in ("py", "slurm"):
            assert pkgutil.resolve_name(name) is not None


def names_of(path: Path) -> set[str]:
    """What a module defines, with the methods of its classes as Class.method."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
            found |= {f"{node.name}.{part.name}" for part in ast.walk(node) if isinstance(part, ast.FunctionDef)}
        elif isinstance(node, ast.Assign):
            found |= {ast.unparse(target) for target in node.targets}
    return found


def test_architecture_names_what_is_there() -> None:
    text = (REPOSITORY / "docs/architecture.md").read_text()
    named = [(path, re.split(r",\s+", names)) for path, names in re.findall(r"`([\w/]+\.py):\s+([\w.,\s]+)`", text)]
    assert len(named) > 60
    defined = {path: names_of(REPOSITORY / "adaptive" / path) for path, _ in named}
    assert [f"{path}: {name}" for path, names in named for name in names if name not in defined[path]] == []
    alone = [path for path in re.findall(r"`([a-z][\w/]*(?:\.py|/))`", text) if "NAME" not in path]
    homes = [REPOSITORY, REPOSITORY / "adaptive", REPOSITORY / "adaptive/training"]
    assert [path for path in alone if not any((home / path).exists() for home in homes)] == []


def test_architecture_draws_the_floors() -> None:
    drawn = {}
    for line in next(block.text for block in blocks("architecture.md") if block.language == "text").splitlines():
        height, *names = line.split()
        drawn[int(height)] = {name if name == "launcher/" else f"adaptive.{name}" for name in names}
    assert [{re.sub(r"/$|\.py$", "", name) for name in drawn[height]} for height in range(len(drawn))] == FLOORS


def test_interface_page_is_up_to_date() -> None:
    page = runpy.run_path(str(REPOSITORY / "docs" / "generate_api.py"))["page"]
    assert (REPOSITORY / "docs/reference/api.md").read_text() == page(), "run: python docs/generate_api.py"
