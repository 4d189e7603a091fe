"""The manifest of an export (manifest.json): its content, and checks of the files against it; no torch here."""

from __future__ import annotations

import hashlib
import importlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from adaptive.errors import ExportError
from adaptive.files import file_sha256, write_atomically
from adaptive.inference.export.preprocess import Preprocess
from adaptive.inference.frozen_model import FrozenModel
from adaptive.inference.policy import Policy
from adaptive.requirements import missing_package

MANIFEST = "manifest.json"
VERSION = 1

Format = Literal["onnx", "torch"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# A name, never a path: a foreign manifest must not make us read outside its folder.
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]
AGAIN = "export again: adaptive export RUN DEST"


class FileEntry(FrozenModel):
    """A file: its name inside the folder, what reads it, size in bytes and checksum."""

    name: FileName
    format: Format
    bytes: int
    sha256: Sha256


class StateTensor(FrozenModel):
    """A tensor that crosses from one block to the next.

    ``batch`` is (dimension, multiple): the batch lies in that dimension, ``multiple`` entries (windows, patches) in a
    row belonging to one image; None where the tensor does not depend on the images' number.
    """

    name: str
    batch: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=1)]] | None


class BlockEntry(FrozenModel):
    """A block with its exit: its files, and the names of what goes in and comes out.

    A block's outputs have the names under which the next block takes them.
    """

    onnx: FileName | None
    torch: FileName | None
    state: list[StateTensor]
    """In front of the block: its first inputs."""
    previous_logits: str | None
    """Its last input, where the exit reads the previous exit's logits."""
    next_state: list[StateTensor]
    """Behind the block: its first outputs; empty for the last block."""
    logits: str
    """Its last output, (N, classes)."""

    @property
    def inputs(self) -> list[str]:
        """Names of all inputs, in order."""
        names = [tensor.name for tensor in self.state]
        return names if self.previous_logits is None else [*names, self.previous_logits]

    @property
    def outputs(self) -> list[str]:
        """Names of all outputs, in order."""
        return [*(tensor.name for tensor in self.next_state), self.logits]


class Manifest(FrozenModel):
    """What an export folder holds."""

    version: Literal[1] = 1
    backbone: str
    exits: list[str]
    """Modules of the backbone after which the early exits branch off."""
    fingerprint: Sha256
    """Of the network."""
    classes: list[str]
    input_size: int
    """Side of the square images in pixels."""
    channels: int
    """Of the images."""
    preprocess: Preprocess
    policy: Policy
    costs: list[int]
    """Multiply-adds of one image up to each exit."""
    blocks: list[BlockEntry]
    files: list[FileEntry]

    @model_validator(mode="after")
    def _fits(self) -> Manifest:
        lengths = {len(self.exits) + 1, len(self.costs), len(self.blocks), self.policy.exits}
        if len(lengths) != 1:
            raise ValueError("exits, costs, blocks and policy differ in number")
        formats = {file.name: file.format for file in self.files}
        for block in self.blocks:
            for kind, name in (("onnx", block.onnx), ("torch", block.torch)):
                if name is not None and formats.get(name) != kind:
                    raise ValueError(f"{name} is not among the {kind} files")
        return self

    def write(self, folder: Path) -> None:
        """Write it into its folder, with a digest over all of it."""
        content = self.model_dump(mode="json")
        write_atomically(folder / MANIFEST, json.dumps({**content, "digest": _digest(content)}, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read a folder's manifest.

        Raises:
            ExportError: there is none, it is of another version, or it was changed after the export.
        """
        path = folder / MANIFEST
        try:
            content = json.loads(path.read_bytes())
        except OSError as error:
            raise ExportError(f"{path} cannot be read ({error.strerror}); give a folder that export wrote") from None
        except ValueError:
            raise ExportError(f"{path} is not JSON: it is damaged; {AGAIN}") from None
        if not isinstance(content, dict) or "version" not in content:
            raise ExportError(f"{path} is no manifest of an export; give a folder that export wrote")
        if content["version"] != VERSION:
            raise ExportError(f"{path} has version {content['version']!r}, this program reads {VERSION}; {AGAIN}")
        if content.pop("digest", None) != _digest(content):
            raise ExportError(f"{path} was changed after the export: its digest does not fit its content; {AGAIN}")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "content"
            raise ExportError(f"{path} cannot be used: {where}: {first['msg']}; {AGAIN}") from None

    def check_files(self, folder: Path, kind: Format) -> None:
        """Compare the files of one format with their sizes and checksums.

        Raises:
            ExportError: a file is missing or another one, or the export has none of that format.
        """
        files = [file for file in self.files if file.format == kind]
        if not files:
            raise ExportError(f"{folder} holds no {kind} files; {AGAIN} --formats {kind}")
        for file in files:
            path = folder / file.name
            try:
                size = path.stat().st_size
                if size != file.bytes:
                    raise ExportError(f"{path} has {size} bytes instead of {file.bytes}; copy it anew, or {AGAIN}")
                if file_sha256(path) != file.sha256:
                    raise ExportError(f"{path} was changed after the export (sha256); copy it anew, or {AGAIN}")
            except OSError as error:
                raise ExportError(f"{path} cannot be read ({error.strerror}); copy it anew, or {AGAIN}") from None


def file_entry(path: Path, kind: Format) -> FileEntry:
    """Describe a file that was written."""
    return FileEntry(name=path.name, format=kind, bytes=path.stat().st_size, sha256=file_sha256(path))


def require(package: str) -> Any:
    """Import a package of the extra ``export`` (raises ExportError where it is missing)."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ExportError(str(missing_package(error) or error)) from None


def _digest(content: dict[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
