"""Configurations without what only their owner may know."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from adaptive.data.remote.pipes import PIPE

STRUCK = "***"
USER = re.compile(r"(?<=://)[^/\s@]+(?=@)")
QUERY = re.compile(r"(?<=://)([^\s?#]*\?)[^\s#]+")


def without_secrets(value: Any) -> Any:
    """Return plain values with every text's secrets struck out.

    These are user and password in a URL, its query, which is where stores put their signatures, and commands
    (``data.path=pipe:...``), which may hold a key anywhere.
    """
    if isinstance(value, Mapping):
        return {key: without_secrets(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(entry) for entry in value]
    if isinstance(value, str):
        return f"{PIPE}{STRUCK}" if value.startswith(PIPE) else QUERY.sub(rf"\1{STRUCK}", USER.sub(STRUCK, value))
    return value
