"""Configurations from YAML and dotted overrides, with errors that name key, value and remedy."""

from __future__ import annotations

import difflib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from adaptive.config import Config, documented_keys, is_section, types_in
from adaptive.config_checks import check_consistency
from adaptive.errors import ConfigError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML configuration and apply ``section.key=value`` overrides.

    Raises:
        ConfigError: the file cannot be read, a key is unknown (with the nearest names), a value has the wrong type or
            lies outside its range, or two keys contradict each other.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"configuration file {path} does not exist{_nearest_file(path)}")
    tree = _parse_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected sections such as model: and data:, found {type(tree).__name__}")
    for override in overrides:
        _apply_override(tree, override)
    config = parse_config(tree, source=str(path))
    if config.train.run_folder is None:
        train = config.train.model_copy(update={"run_folder": str(Path("runs") / path.stem)})
        config = config.model_copy(update={"train": train})
    return config


def parse_config(tree: dict[str, Any], source: str = "configuration") -> Config:
    """Validate a plain tree, as read from YAML, and return the typed one (raises ConfigError)."""
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise ConfigError(f"{source}: {_explain(first)}{more}") from None
    check_consistency(config)
    return config


def dump_config(config: Config) -> str:
    """Return the complete configuration as YAML, every default written out."""
    stream = io.StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.width = 110
    yaml.dump(config.model_dump(), stream)
    return stream.getvalue()


def differences(one: Config, other: Config) -> dict[str, tuple[Any, Any]]:
    """Return the dotted keys in which two configurations differ, with both values."""
    first, second = (dict(_leaves(c.model_dump())) for c in (one, other))
    return {k: (first.get(k), second.get(k)) for k in sorted({*first, *second}) if first.get(k) != second.get(k)}


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {' '.join(str(error).split())[:300]}") from None


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: expected section.key=value, for example train.epochs=10")
    *parents, last = key.split(".")
    node: Any = tree
    for name in parents:
        node = _child(node, name, key)
    value = _parse_yaml(text, f"override {override!r}") if text else ""
    if isinstance(node, list):
        node[_position(node, last, key)] = value
    else:
        node[last] = value


def _child(node: Any, name: str, key: str) -> Any:
    if isinstance(node, list):
        return node[_position(node, name, key)]
    if node.get(name) is None:
        node[name] = {}
    child = node[name]
    if not isinstance(child, dict | list):
        raise ConfigError(f"override {key}: {name} is a value ({child!r}), not a section")
    return child


def _position(node: list[Any], name: str, key: str) -> int:
    if not name.isdigit() or int(name) >= len(node):
        raise ConfigError(f"override {key}: {name!r} is no position in a list of {len(node)}; use 0..{len(node) - 1}")
    return int(name)


def _explain(error: ErrorDetails) -> str:
    location = [str(part) for part in error["loc"]]
    if error["type"] == "extra_forbidden":
        known = sorted(_keys_at(location[:-1]))
        close = difflib.get_close_matches(location[-1], known, n=3) or [
            key for key, _ in documented_keys() if key.split(".")[-1] == location[-1]
        ]
        remedy = f"did you mean {' or '.join(close)}?" if close else f"known here: {', '.join(known)}"
        return f"unknown key {'.'.join(location)}; {remedy}"
    key = ".".join(part for part in location if part.replace("_", "").isalnum() and not part.startswith("function"))
    if error["type"] == "missing":
        return f"{key} is missing; add it to the file or give {key}=..."
    value = error["input"]
    message = error["msg"][0].lower() + error["msg"][1:]
    return f"{key} = {value!r} is not allowed: {message}"


def _keys_at(location: list[str]) -> set[str]:
    section: type[BaseModel] = Config
    for part in location:
        if part.isdigit() or part not in section.model_fields:
            continue
        nested = next((t for t in types_in(section.model_fields[part].annotation) if is_section(t)), None)
        section = nested or section
    return set(section.model_fields)


def _nearest_file(path: Path) -> str:
    folder = path.parent
    names = [p.name for p in folder.glob("*.yaml")] if folder.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.4)
    return f"; did you mean {' or '.join(str(folder / n) for n in close)}?" if close else ""
