"""Classes of the ILSVRC 2012 validation images, from the development kit, Kaggle's table, or a text map.

The devkit's ground truth holds one ILSVRC2012_ID per image, in the order of the images. These IDs are not the positions
of the sorted WordNet IDs (WNIDs) that networks are trained on: data/meta.mat says which WNID an ID is. See the devkit's
readme.txt, and torchvision/datasets/imagenet.py.
"""

from __future__ import annotations

import io
import re
from collections.abc import Collection
from pathlib import Path

from adaptive.data.packing.archives import read_files
from adaptive.data.packing.label_files import Labels, check_same_images, read_labels
from adaptive.errors import DataError, MachineError

IMAGE = re.compile(r"ILSVRC2012_val_([0-9]{8})\.JPEG")

_DEVKITS = ("ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_devkit_t12.gz", "ILSVRC2012_devkit_t12.tar")
_DEVKIT_FOLDER = Path("ILSVRC2012_devkit_t12", "data")
_TRUTH, _META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
_TABLE_HEADER = "ImageId,PredictionString"
# `ILSVRC2012_val_00000001.JPEG n01751748`, or Kaggle's `ILSVRC2012_val_00048981,n03995372 85 1 499 272`.
_TABLE_LINE = re.compile(r"(?:\S*/)?(?P<image>ILSVRC2012_val_[0-9]{8})(?:\.JPEG)?[\s,]+(?P<name>n[0-9]{8})\b")
_LIMIT = 64 << 20  # bytes of a file of the devkit
_REMEDY = (
    f"put {_DEVKITS[0]} there, or LOC_val_solution.csv of Kaggle, or a text file with lines like "
    "'ILSVRC2012_val_00000001.JPEG n01751748'"
)


def validation_labels(root: Path, images: Collection[str], where: Path) -> Labels:
    """Return the WNID of every validation image by file name.

    Args:
        root: Folder with the label files.
        images: File names of the images.
        where: The archive or folder that holds them, for messages.

    Raises:
        DataError: there are no labels, they contradict each other, or they are not those of these images.
        MachineError: the devkit's meta.mat has to be read and scipy is not installed.
    """
    tables = [path for path in sorted(root.iterdir()) if path.suffix in (".txt", ".csv") and _is_table(path)]
    if len(tables) > 1:
        raise DataError(f"{root} holds {' and '.join(path.name for path in tables)}, which both give labels; keep one")
    if tables:
        table = read_labels(tables[0], _TABLE_LINE, _TABLE_HEADER)
        labels = Labels(table.file, {f"{image}.JPEG": wnid for image, wnid in table.classes.items()})
    else:
        labels = _devkit_labels(root, images, where)
    check_same_images(labels, images, where)
    return labels


def read_meta(content: bytes, path: Path) -> dict[int, str]:
    """Return the WNID of every ILSVRC2012_ID from the bytes of meta.mat; inner nodes of WordNet are left out.

    Raises:
        DataError: the file is damaged or another one.
        MachineError: scipy is not installed.
    """
    try:
        from scipy.io import loadmat
    except ImportError:
        raise MachineError(
            f"reading {path} needs scipy; install it with: pip install scipy (or use LOC_val_solution.csv of Kaggle)"
        ) from None
    try:
        synsets = loadmat(io.BytesIO(content), squeeze_me=True, variable_names=["synsets"])["synsets"].reshape(-1)
        columns = (synsets["ILSVRC2012_ID"], synsets["WNID"], synsets["num_children"])
        return {int(number): str(wnid) for number, wnid, children in zip(*columns, strict=True) if int(children) == 0}
    except Exception as error:  # on damaged bytes scipy raises nearly anything
        raise DataError(f"{path} is damaged or no {_META} of the devkit ({error}); download it again") from None


def _is_table(path: Path) -> bool:
    with path.open(encoding="utf-8", errors="replace") as stream:
        return any(_TABLE_LINE.match(stream.readline(4096)) for _ in range(2))


def _devkit_labels(root: Path, images: Collection[str], where: Path) -> Labels:
    files = _devkit_files(root)
    if _TRUTH not in files:
        raise DataError(f"{root} has no labels for the images of {where.name}; {_REMEDY}")
    truth, text = files[_TRUTH]
    if _META not in files:
        raise DataError(f"{truth} holds class IDs that only {_META} of the devkit explains; {_REMEDY}")
    wnids = read_meta(files[_META][1], files[_META][0])
    lines = text.decode("ascii", "replace").split()
    if len(lines) != len(images):
        raise DataError(
            f"{truth} has {len(lines)} lines, {where} holds {len(images)} images; one of the two is incomplete, "
            "download it again"
        )
    classes = {}
    for number, line in enumerate(lines, start=1):
        if not line.isdecimal() or int(line) not in wnids:
            raise DataError(
                f"{truth}, line {number}: {line[:20]!r} is none of the {len(wnids)} class IDs of {_META}; "
                "take both from one devkit"
            )
        classes[f"ILSVRC2012_val_{number:08d}.JPEG"] = wnids[int(line)]
    return Labels(truth, classes)


def _devkit_files(root: Path) -> dict[str, tuple[Path, bytes]]:
    """Return the ground truth and meta.mat, each from the first place that has it, with the path to name in errors."""
    found = {}
    for folder in (root, root / _DEVKIT_FOLDER):
        for name in (_TRUTH, _META):
            if name not in found and (folder / name).is_file():
                found[name] = (folder / name, (folder / name).read_bytes())
    for archive in (root / name for name in _DEVKITS):
        if len(found) < 2 and archive.is_file():
            contents, _ = read_files(archive, (_TRUTH, _META).__contains__, _LIMIT)
            found = {name: (archive / name, content) for name, content in contents.items()} | found
    return found
