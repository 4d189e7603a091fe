"""The runtimes by name, apart from what opens them so that command lines import nothing heavy."""

from __future__ import annotations

from typing import Literal, get_args

Runtime = Literal["torch", "compile", "onnx"]
RUNTIMES: tuple[Runtime, ...] = get_args(Runtime)
