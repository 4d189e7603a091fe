"""Loads configurations from YAML and dotted overrides, with errors that name key, value and remedy."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import CollectionNode, MappingNode, Node

from adaptive.config.checks import check_consistency
from adaptive.config.keys import documented_keys, is_section, types_in
from adaptive.config.sections import Config
from adaptive.errors import ConfigError, nearest, reason_of, refusal
from adaptive.foreign_text import without_secrets
from adaptive.passing_faults import passing, patiently

LOGGER = logging.getLogger(__name__)
LONGEST_VALUE = 300  # characters of a wrong value in a message
LARGEST_FILE = 1 << 20  # bytes; the longest configuration of this project has some thousand
MOST_VALUES = 100_000  # of a configuration, each alias counted with all that it stands for
MOST_FILES = 100  # that a configuration extends, directly or by way of others


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML configuration and apply ``section.key=value`` overrides.

    A file may say ``extends: FILE`` or a list of files (paths relative to itself): it then holds only what differs from
    them. Sections are merged key by key, the later file over the earlier one; values and lists are replaced.
    What was struck out as secret when a file was written (``***``) is filled in from FILE.private.yaml beside it.

    Raises:
        ConfigError: a file cannot be read, a key is unknown (with the nearest names), a value has the wrong type or
            lies outside its range, or two keys contradict each other.
    """
    path = Path(path)
    tree = load_tree(path)
    for override in overrides:
        _apply_override(tree, override)
    config = parse_config(tree, source=str(path))
    if config.train.run_folder is None:
        train = config.train.model_copy(update={"run_folder": str(Path("runs") / _run_name(path))})
        config = config.model_copy(update={"train": train})
    return config


def parse_config(tree: dict[str, Any], source: str = "configuration") -> Config:
    """Validate a plain tree, as read from YAML, and return the typed one (raises ConfigError)."""
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        by_key: dict[str, list[ErrorDetails]] = {}
        for fault in error.errors():
            by_key.setdefault(_key_of(fault), []).append(fault)  # a key of several types has a fault for each of them
        key, faults = next(iter(by_key.items()))
        more = f" (and {len(by_key) - 1} more)" if len(by_key) > 1 else ""
        raise ConfigError(f"{source}: {_explain(key, faults)}{more}") from None
    check_consistency(config)
    return config


def load_tree(path: Path, may_extend: bool = True) -> dict[str, Any]:
    """Read a file, and those that it extends, as a plain tree (raises ConfigError; also where it may not extend)."""
    return _read_tree(path, (), {}, may_extend)


def overridden(config: Config, overrides: Sequence[str]) -> Config:
    """Return a configuration changed by ``section.key=value`` overrides (raises ConfigError)."""
    tree = config.model_dump()
    for override in overrides:
        _apply_override(tree, override)
    return parse_config(tree, source="the command line")


def private_file(path: Path) -> Path:
    """Return where the secrets of a configuration file are kept: config.yaml -> config.private.yaml."""
    return path.with_suffix(f".private{path.suffix}")


def dump_config(config: Config | dict[str, Any]) -> str:
    """Return the complete configuration, or a tree of it, as YAML, every default written out."""
    stream = io.StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.width = 110
    yaml.dump(config.model_dump() if isinstance(config, Config) else config, stream)
    return stream.getvalue()


def differences(one: Config, other: Config) -> dict[str, tuple[Any, Any]]:
    """Return the dotted keys in which two configurations differ, with both values."""
    first, second = (dict(leaves(c.model_dump())) for c in (one, other))
    return {k: (first.get(k), second.get(k)) for k in sorted({*first, *second}) if first.get(k) != second.get(k)}


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys of a nested mapping with their values; an empty mapping is a value."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


def _parse_yaml(text: str, source: str) -> Any:
    try:
        _check_size(YAML(typ="safe", pure=True).compose(text), source)
        return YAML(typ="safe", pure=True).load(text)
    except RecursionError:
        raise ConfigError(f"{source}: nested too deeply to be a configuration; mend the brackets") from None
    except YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        reason = reason_of(problem or error)
        raise ConfigError(f"{source}: not valid YAML{where}: {reason}") from None


def _check_size(node: Node | None, source: str) -> None:
    """Refuse aliases of aliases, with which a few lines stand for billions of values (raises ConfigError)."""
    pending, count = [node], 0
    while pending:
        found = pending.pop()
        if isinstance(found, CollectionNode):
            parts = found.value
            pending += chain.from_iterable(parts) if isinstance(found, MappingNode) else parts
        count += 1
        if count + len(pending) > MOST_VALUES:
            raise ConfigError(f"{source}: more than {MOST_VALUES} values, aliases (*name) written out; use fewer")


def _run_name(path: Path) -> Path:
    """configs/cifar10/ge.yaml -> cifar10/ge; a file outside of a folder of that name -> its name."""
    parts = path.with_suffix("").parts
    below = parts[len(parts) - parts[::-1].index("configs") :] if "configs" in parts[:-1] else parts[-1:]
    return Path(*below)


def _read_tree(
    path: Path, extending: tuple[Path, ...], known: dict[Path, dict[str, Any]], may_extend: bool = True
) -> dict[str, Any]:
    """Read a file and what it extends, each file once.

    Args:
        path: of the file.
        extending: the files that extend this one, the outermost first.
        known: the trees of files that were read, by their resolved paths; this one is added.
        may_extend: whether the file may extend others.
    """
    by = f" (extended by {extending[-1]})" if extending else ""
    if not patiently(path.is_file, path):
        raise ConfigError(f"configuration file {path} does not exist{by}{_nearest_file(path)}")
    here = path.resolve()
    if here in {other.resolve() for other in extending}:
        raise ConfigError(f"{path} extends itself by way of {', '.join(map(str, extending))}; break the circle")
    if here in known:
        return known[here]
    if len(known) + len(extending) >= MOST_FILES:
        first = extending[0] if extending else path
        raise ConfigError(f"{first} extends more than {MOST_FILES} files, with those that they extend; merge some")
    tree = _parse_file(path)
    if "extends" in tree and not may_extend:
        raise ConfigError(
            f"{path}: extends = {tree['extends']!r}: a run's configuration is complete and names no other file; "
            "remove that key"
        )
    _fill_in(tree, private_file(path))
    bases = tree.pop("extends", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: extends = {bases!r}: give a configuration file, or a list, relative to this one")
    merged: dict[str, Any] = {}
    for base in bases:
        merged = merge(merged, _read_tree(path.parent / base, (*extending, path), known))
    known[here] = merge(merged, tree)
    return known[here]


def _parse_file(path: Path) -> dict[str, Any]:
    try:
        content = patiently(lambda: _beginning(path), path)
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and not passing(error) and (known := refusal(error)):
            raise ConfigError(f"configuration file {known}") from None
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"configuration file {path} cannot be read: {reason}; give a YAML file") from None
    if len(content) > LARGEST_FILE:
        raise ConfigError(f"{path} has more than {LARGEST_FILE} bytes, no configuration has; give a YAML file")
    tree = _parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected sections such as model: and data:, found {type(tree).__name__}")
    return tree


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(LARGEST_FILE + 1)


def _fill_in(tree: dict[str, Any], private: Path) -> None:
    """Put the values of a private file in the place of those that were struck out, and of no others."""
    try:
        text = patiently(lambda: private.read_text(encoding="utf-8"), private)
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, UnicodeDecodeError) as error:  # somebody else's
        LOGGER.warning(
            "%s cannot be read (%s): what the configuration strikes out (***) is not known here; give it anew where it "
            "is needed, for example data.path=LOCATION",
            private,
            getattr(error, "strerror", None) or "it is not UTF-8 text",
        )
        return
    values = _parse_yaml(text, str(private))
    if isinstance(values, dict):
        _fill_in_values(tree, values)


def _fill_in_values(tree: dict[str, Any], values: dict[str, Any]) -> None:
    for key, value in values.items():
        there = tree.get(key)
        if isinstance(value, dict) and isinstance(there, dict):
            _fill_in_values(there, value)
        elif there is not None and there == without_secrets(value):
            tree[key] = value


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return nested mappings merged key by key; values and lists of ``changes`` replace those of ``base``."""
    merged = dict(base)
    for key, value in changes.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if nested else value
    return merged


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
        node[_list_index(node, last, key)] = value
    else:
        node[last] = value


def _child(node: Any, name: str, key: str) -> Any:
    if isinstance(node, list):
        return node[_list_index(node, name, key)]
    if node.get(name) is None:
        node[name] = {}
    child = node[name]
    if not isinstance(child, dict | list):
        raise ConfigError(f"override {key}: {name} is a value ({child!r}), not a section")
    return child


def _list_index(node: list[Any], name: str, key: str) -> int:
    if not name.isdigit() or int(name) >= len(node):
        raise ConfigError(f"override {key}: {name!r} is no index of a list of {len(node)}; use 0..{len(node) - 1}")
    return int(name)


def _key_of(error: ErrorDetails) -> str:
    """Dotted key of a fault, without the type that pydantic tried and appends, such as ``int`` or ``list[str]``."""
    section: type[BaseModel] | None = Config
    parts: list[str] = []
    for part in map(str, error["loc"]):
        if not part.isdigit():
            if section is None:
                break
            if part in section.model_fields:
                annotation = section.model_fields[part].annotation
                section = next((t for t in types_in(annotation) if is_section(t)), None)
        parts.append(part)
    return ".".join(parts)


def _explain(key: str, faults: list[ErrorDetails]) -> str:
    first = faults[0]
    if first["type"] == "extra_forbidden":
        *parents, name = map(str, first["loc"])
        known = sorted(_keys_at(parents))
        elsewhere = [other for other, _ in documented_keys() if other.split(".")[-1] == name]
        otherwise = f"did you mean {' or '.join(elsewhere)}?" if elsewhere else f"known here: {', '.join(known)}"
        return f"unknown key {key}; {nearest(name, known, otherwise)}"
    if first["type"] == "missing":
        return f"{key} is missing; add it to the file or give {key}=..."
    messages = dict.fromkeys(fault["msg"][0].lower() + fault["msg"][1:] for fault in faults)
    value = repr(first["input"])
    value = value if len(value) <= LONGEST_VALUE else f"{value[:LONGEST_VALUE]}..."
    return f"{key} = {value} is not allowed: {', or '.join(messages)}"


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
    remedy = nearest(path.name, names, cutoff=0.4, show=lambda name: str(folder / name))
    return f"; {remedy}" if remedy else ""
