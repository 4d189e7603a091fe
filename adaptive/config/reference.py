"""The configuration's reference, made from the documentation of its fields (docs/reference/configuration.md)."""

from __future__ import annotations

import json
import re
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from adaptive.config.keys import documented_keys
from adaptive.config.sections import Config

HEAD = """# Configuration

A run is one YAML file; every key can also be given on the command line as `section.key=value`, lists by index
(`phases.0.epochs=5`). A file that says `extends: FILE`, or a list of files (relative to itself), holds only what
differs from them: sections are merged key by key, values and lists replaced. Unknown keys, wrong types and values out
of range are refused before anything starts.
`adaptive train CONFIG --print-config` prints the complete configuration; this page is `adaptive train --help-config`.
"""


def configuration_reference() -> str:
    """Return the Markdown page that explains every key with its default."""
    lines = [HEAD]
    section = None
    for key, field in documented_keys():
        name = key.split(".")[0]
        if name != section:
            section = name
            text = Config.model_fields[name].description or ""
            lines += [f"\n## {name}\n", " ".join(text.split()), "", "| Key | Default | Meaning |", "|---|---|---|"]
        meaning = " ".join((field.description or "").split()).replace("|", "\\|")
        lines.append(f"| `{key}` | {_default(field)} | {meaning} |")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n"


def _default(field: FieldInfo) -> str:
    value: Any = field.get_default(call_default_factory=True)
    return "needed" if value is PydanticUndefined else f"`{json.dumps(value)}`"
