"""The kinds of policies by name, apart from `Policy` so that command lines import nothing heavy."""

from __future__ import annotations

from typing import Literal, get_args

Kind = Literal["confidence", "margin", "entropy", "patience", "gate"]
KINDS: tuple[Kind, ...] = get_args(Kind)
