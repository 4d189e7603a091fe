"""Write docs/reference/api.md from the docstrings of the public names: ``python docs/generate_api.py``.

The sources are parsed, not imported: the page does not depend on what is installed.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import adaptive

PAGE = Path(__file__).with_name("reference") / "api.md"
WIDTH = 100  # of a signature on one line
SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises):(.*)$")
HEAD = """# Python interface

The names that `import adaptive` offers, and what they return, from the docstrings (`python docs/generate_api.py`).
Errors are the exceptions of `adaptive/errors.py`, all of them an `AdaptiveError`, with a message of one line.
"""
Definition = ast.ClassDef | ast.FunctionDef


@dataclass(frozen=True)
class Named:
    """A class or function where it is defined."""

    module: str
    node: Definition


@cache
def _tree(module: str) -> ast.Module:
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return ast.parse(Path(spec.origin).read_text(encoding="utf-8"))


def _find(module: str, name: str) -> Named | None:
    """A name of a module: defined there, or imported from another module of this project."""
    for node in _tree(module).body:
        if isinstance(node, Definition) and node.name == name:
            return Named(module, node)
        if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
            module = str(node.module)
            return _find(module, name) if module.startswith("adaptive.") else None
    return None


def page() -> str:
    """Return the page as Markdown."""
    public = {name: _find(adaptive._HOMES[name], name) for name in adaptive.__all__}
    parts = [HEAD]
    related: dict[str, Named] = {}
    for name, found in public.items():
        assert found is not None, name
        parts += _entry(found)
        for mentioned in _mentioned(found.node):
            other = _find(found.module, mentioned)
            if other and isinstance(other.node, ast.ClassDef) and mentioned not in public:
                related.setdefault(mentioned, other)
    parts.append("# What they return\n")
    for name in sorted(related):
        parts += _entry(related[name])
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts)).strip() + "\n"


def _mentioned(node: Definition) -> Iterator[str]:
    """Names in the annotations of what a function, or a class's methods and fields, give."""
    for part in [node] if isinstance(node, ast.FunctionDef) else _members(node):
        annotation = part.returns if isinstance(part, ast.FunctionDef) else part.annotation
        yield from (n.id for n in ast.walk(annotation or ast.Constant(None)) if isinstance(n, ast.Name))


def _members(node: ast.ClassDef) -> list[ast.FunctionDef | ast.AnnAssign]:
    """Public fields and methods; of a property the part that reads."""
    found: dict[str, ast.FunctionDef | ast.AnnAssign] = {}
    for part in node.body:
        name = part.target.id if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name) else ""
        name = part.name if isinstance(part, ast.FunctionDef) else name
        if isinstance(part, ast.FunctionDef | ast.AnnAssign) and name and not name.startswith("_"):
            found.setdefault(name, part)
    return list(found.values())


def _entry(found: Named) -> list[str]:
    node = found.node
    parts = [f"\n## {node.name}\n", f"`{found.module}.{node.name}`\n"]
    if isinstance(node, ast.FunctionDef):
        return [*parts, _signature(node, node.name), _text(node)]
    start = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    text = _text(node)
    if start and "**Args**" in text:
        parts.append(_signature(start, node.name, method=True))
    parts += [text] if "**Attributes**" in text else [text, _fields(node)]
    for part in _members(node):
        if isinstance(part, ast.FunctionDef):
            parts += [f"### {node.name}.{part.name}\n", *_method(part), _text(part)]
    return parts


def _method(node: ast.FunctionDef) -> list[str]:
    marks = {ast.unparse(mark) for mark in node.decorator_list}
    if "property" in marks:
        return [f"```python\n{node.name}: {ast.unparse(node.returns or ast.Constant(None))}\n```\n"]
    return [_signature(node, node.name, method=True)]


def _fields(node: ast.ClassDef) -> str:
    """A table of the fields, each with the string under it."""
    rows = []
    for part, following in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(part, ast.AnnAssign) or part not in _members(node):
            continue
        text = ""
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            text = " ".join(str(following.value.value).split())
        default = f" = {ast.unparse(part.value)}" if part.value else ""
        kind = f"{ast.unparse(part.annotation)}{default}".replace("|", "\\|")
        rows.append(f"| `{ast.unparse(part.target)}` | `{kind}` | {text} |")
    return "\n".join(["| Field | Type | |", "|---|---|---|", *rows, ""]) if rows else ""


def _signature(node: ast.FunctionDef, name: str, method: bool = False) -> str:
    parts = _parameters(node.args)
    if method and "staticmethod" not in {ast.unparse(mark) for mark in node.decorator_list}:
        del parts[0]
    gives = f" -> {ast.unparse(node.returns)}" if node.returns and node.name != "__init__" else ""
    line = f"{name}({', '.join(parts)}){gives}"
    if len(line) > WIDTH:
        line = f"{name}(\n{''.join(f'    {part},' + chr(10) for part in parts)}){gives}"
    return f"```python\n{line}\n```\n"


def _parameters(arguments: ast.arguments) -> list[str]:
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + arguments.defaults
    parts = [_parameter(*pair) for pair in zip(positional, defaults, strict=True)]
    if arguments.vararg or arguments.kwonlyargs:
        parts.append(f"*{_parameter(arguments.vararg) if arguments.vararg else ''}")
    parts += [_parameter(*pair) for pair in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    return [*parts, f"**{_parameter(arguments.kwarg)}"] if arguments.kwarg else parts


def _parameter(argument: ast.arg, default: ast.expr | None = None) -> str:
    if argument.annotation is None:
        return argument.arg
    value = f" = {ast.unparse(default)}" if default else ""
    return f"{argument.arg}: {ast.unparse(argument.annotation)}{value}"


def _text(node: Definition) -> str:
    """A docstring as Markdown: its sections become lists."""
    parts, kind = [], ""
    for line in inspect.cleandoc(ast.get_docstring(node) or "").replace("``", "`").splitlines():
        if section := SECTION.match(line):
            kind = section[1]
            parts += ["", f"**{kind}**{section[2]}", ""]
        elif kind in ("Args", "Attributes", "Raises") and (entry := re.match(r"^    (\*{0,2}[\w, ]+): (.*)$", line)):
            parts.append(f"* `{entry[1]}`: {entry[2]}")
        elif kind and line.startswith("    "):
            parts.append(f"  {line.strip()}" if kind in ("Args", "Attributes", "Raises") else line.strip())
        else:
            kind = kind if line.startswith(" ") or not line else ""
            parts.append(line)
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
