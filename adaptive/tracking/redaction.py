"""Redaction: a configuration without the secrets in its URLs and commands, fit to be shown."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from adaptive.data.remote.pipes import PIPE

REDACTED = "***"
USER = re.compile(r"(?<=://)[^/\s@]+(?=@)")
QUERY = re.compile(r"(?<=://)([^\s?#]*\?)[^\s#]+")


def without_secrets(value: Any) -> Any:
    """Return plain values with the secrets in every text replaced by ``***``.

    These are user and password in a URL, its query, which may be a store's signature, and commands
    (``data.path=pipe:...``), which may hold a key anywhere.
    """
    if isinstance(value, Mapping):
        return {key: without_secrets(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(entry) for entry in value]
    if isinstance(value, str):
        return f"{PIPE}{REDACTED}" if value.startswith(PIPE) else QUERY.sub(rf"\1{REDACTED}", USER.sub(REDACTED, value))
    return value
