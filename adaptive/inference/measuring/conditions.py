"""The conditions that a time was measured under: milliseconds mean nothing without them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from adaptive.inference.frozen_model import FrozenModel


class Conditions(FrozenModel):
    """What milliseconds hold for."""

    machine: str
    """Name of the processor or GPU."""
    device: str
    """cpu or cuda."""
    batch: Annotated[int, Field(ge=1)]
    """Images that arrive together."""
    threads: Annotated[int, Field(ge=1)]
    """Of the processor, inside an operation."""
    precision: str
    """As the runner takes it."""
    runtime: str
    """torch, compile or onnx."""

    def words(self) -> str:
        """The conditions in words, without the machine."""
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{self.runtime}, {self.precision}, {self.device}, batch {self.batch}, {threads}"
