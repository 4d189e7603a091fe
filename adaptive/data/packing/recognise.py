"""Recognises the kind of a source to pack: class folders, a known download, or a library's data set."""

from __future__ import annotations

from pathlib import Path

from adaptive.data.packing import cifar, imagenet, tiny_imagenet
from adaptive.data.packing.folders.choices import FolderChoices
from adaptive.data.packing.folders.scan import open_folder
from adaptive.data.packing.sources import Source, open_builtin
from adaptive.errors import DataError

KINDS = (
    "a folder of class folders, the folder of an ImageNet or Tiny-ImageNet download, cifar-10-binary.tar.gz, "
    "cifar-100-binary.tar.gz, or builtin:digits"
)


def open_source(source: str | Path, choices: FolderChoices | None = None) -> Source:
    """List the images of a source; downloads are recognised by the files in them.

    Args:
        source: path of a folder or archive, or ``builtin:digits``.
        choices: how a folder is read where it can be read in several ways.

    Raises:
        DataError: the source is missing, cut off, damaged or of no known kind, a training class is empty, or another
            split has classes that train lacks.
        MachineError: a library that this source needs is not installed.
    """
    if str(source).startswith("builtin:"):
        return open_builtin(str(source))
    path, choices = Path(source), choices or FolderChoices()
    try:
        if path.is_file():
            return _open_file(path)
        if not path.is_dir():
            kind = "is neither file nor folder" if path.exists() else "does not exist"
            raise DataError(f"source {path} {kind}; give {KINDS}")
        for reader in (imagenet, tiny_imagenet):
            if reader.is_download(path):
                return reader.open_download(path, choices)
        return open_folder(path, choices)
    except OSError as error:
        raise DataError(
            f"source {error.filename or source} cannot be read: {error.strerror or error}; check it"
        ) from None


def _open_file(path: Path) -> Source:
    if path.name.startswith("ILSVRC2012_"):
        raise DataError(f"source {path} is one file of the ImageNet download; give the folder in which it lies")
    if path.suffix == ".zip":
        raise DataError(f"source {path} is a zip file; unpack it and give the folder in it that holds train")
    if not path.name.endswith((".tar.gz", ".tgz", ".tar")):
        raise DataError(f"source {path} is not a folder; give {KINDS}")
    return cifar.open_archive(path)
