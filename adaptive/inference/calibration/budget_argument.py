"""The value of ``--budget``: cost or accuracy that a policy shall keep, as ``0.5``, ``120M``, ``3.5ms`` or ``95%``."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from adaptive.errors import PolicyError

MULTIPLES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
FORMS = "a share of the full cost (0.5), multiply-adds (120M), milliseconds (3.5ms) or a top-1 accuracy (95%)"


@dataclass(frozen=True)
class Budget:
    """A number and what it counts: share of the full cost, MACs, ms per image, or top-1 accuracy in percent."""

    value: float
    unit: Literal["share", "MACs", "ms", "top1"]

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read what ``--budget`` was given (raises PolicyError)."""
        found = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*(ms|%|[kmgt]?(?:macs?)?)\s*", text.lower())
        try:
            value = float(found[1]) if found else math.nan
        except ValueError:
            value = math.nan
        if found is None or not (math.isfinite(value) and value > 0):
            raise PolicyError(f"--budget {text} is not understood; give {FORMS}")
        suffix = found[2]
        if suffix == "ms":
            return cls(value, "ms")
        if suffix == "%":
            if value > 100:
                raise PolicyError(f"--budget {text} is more than every image right; give an accuracy up to 100%")
            return cls(value, "top1")
        if not suffix and value <= 1:
            return cls(value, "share")
        return cls(value * MULTIPLES[suffix.removesuffix("s").removesuffix("mac")], "MACs")
