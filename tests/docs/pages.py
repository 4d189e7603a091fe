"""The documentation's pages, read as tests need them: code blocks, and what they are said to print."""

import contextlib
import io
import re
from dataclasses import dataclass

from tests.helpers.locations import REPOSITORY

PAGES = sorted(REPOSITORY.glob("docs/**/*.md")) + [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md")]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class CodeBlock:
    language: str
    text: str


def blocks(page: str, heading: str = "") -> list[CodeBlock]:
    """Code blocks of a page below docs/, from a heading on up to the next of its level."""
    text = (REPOSITORY / "docs" / page).read_text()
    if heading:
        level = heading.split(" ")[0]
        _, text = text.split(f"{heading}\n", 1)
        text = re.split(rf"^#{{1,{len(level)}}} ", text, maxsplit=1, flags=re.MULTILINE)[0]
    return [CodeBlock(*match) for match in BLOCK.findall(text)]


def outputs(found: list[CodeBlock]) -> list[tuple[CodeBlock, list[str]]]:
    """Every block of code with the lines of the ``text`` block right behind it; none where there is none."""
    code = [(block, following) for block, following in zip(found, [*found[1:], None], strict=True)]
    return [
        (block, lines(following.text) if following and following.language == "text" else [])
        for block, following in code
        if block.language != "text"
    ]


def lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def run_python(found: list[CodeBlock]) -> list[tuple[list[str], list[str]]]:
    """Run a page's Python blocks one after another: what each printed, and what the page says."""
    names: dict[str, object] = {"__name__": "page"}
    results = []
    for block, shown in outputs(found):
        assert block.language == "python"
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block.text, "<page>", "exec"), names)
        results.append((lines(printed.getvalue()), shown))
    return results
