"""The ablation's data: a sample of a folder of classes, or all of it, packed as WebDataset shards."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from adaptive.data.packing.pack import pack
from adaptive.data.shards.index import INDEX_NAME
from adaptive.errors import DataError

SAMPLE_SEED = 0


def packed(source: Path, destination: Path, images: tuple[int, int, int] | None, hold_out: int) -> Path:
    """Pack ``source`` into ``destination``, unless that is done; returns ``destination``.

    Args:
        source: folder with train/ and test/ (or val/, which is then the test split), holding class folders.
        destination: the packed dataset.
        images: of train, val and test, drawn equally from all classes; None takes all.
        hold_out: without ``images``, number of training images that become val.

    Raises:
        DataError: the folder has no such splits, or too few images.
    """
    if (destination / INDEX_NAME).is_file():
        return destination
    test = next((name for name in ("test", "val") if (source / name).is_dir()), None)
    if test is None or not (source / "train").is_dir():
        raise DataError(f"--source {source}: it needs train/ and test/ (or val/) with class folders in them")
    destination.parent.mkdir(parents=True, exist_ok=True)
    if images is None:
        pack(source, destination, hold_out=hold_out, test_split=test, seed=SAMPLE_SEED)
        return destination
    sample = destination.with_name(f"{destination.name}.sample")
    shutil.rmtree(sample, ignore_errors=True)
    _draw(source, test, sample, images)
    pack(sample, destination, seed=SAMPLE_SEED)
    shutil.rmtree(sample)
    return destination


def _draw(source: Path, test: str, sample: Path, images: tuple[int, int, int]) -> None:
    """Copy a sample of every class: the first of a shuffled list are train, the next ones val."""
    classes = sorted(path.name for path in (source / "train").iterdir() if path.is_dir())
    if not classes:
        raise DataError(f"--source {source}: train/ holds no class folders")
    generator = np.random.default_rng(SAMPLE_SEED)
    wanted = [count // len(classes) for count in images]
    for name in classes:
        for folder, splits in (("train", {"train": wanted[0], "val": wanted[1]}), (test, {"test": wanted[2]})):
            files = sorted(path for path in (source / folder / name).rglob("*") if path.is_file())
            if len(files) < sum(splits.values()):
                raise DataError(
                    f"--source {source}: {folder}/{name} has {len(files)} images, {sum(splits.values())} are needed; "
                    "ask for fewer with --images"
                )
            order = iter(generator.permutation(len(files)))
            for split, count in splits.items():
                target = sample / split / name
                target.mkdir(parents=True)
                for _ in range(count):
                    file = files[next(order)]
                    shutil.copyfile(file, target / file.name)
