"""All configuration keys with their types, defaults and documentation, read from the sections."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from adaptive.config.base import ConfigSection
from adaptive.config.sections import Config


def documented_keys(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every configuration key with its field (type, default, description), depth first."""
    for name, field in section.model_fields.items():
        nested = next((t for t in types_in(field.annotation) if is_section(t)), None)
        if nested is None:
            yield prefix + name, field
        else:
            yield from documented_keys(nested, f"{prefix}{name}.")


def types_in(annotation: Any) -> Iterator[Any]:
    """Yield a type and all types nested in its arguments."""
    yield annotation
    for argument in get_args(annotation):
        yield from types_in(argument)


def is_section(annotation: Any) -> bool:
    """Tell whether a type is one of the sections."""
    return isinstance(annotation, type) and issubclass(annotation, ConfigSection)
