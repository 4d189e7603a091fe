"""Checks of the dataset before a run: what could only be learned by rote is refused."""

from pathlib import Path

import pytest
from PIL import Image

from adaptive.data.packing.pack import pack
from adaptive.errors import DataError
from adaptive.training.preflight import check_dataset
from tests.training.setups import config


def test_a_dataset_of_one_class_is_refused(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        (tmp_path / "images" / split / "cat").mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (32, 32), (60 * i, 0, 0)).save(tmp_path / "images" / split / "cat" / f"{i}.png")
    pack(str(tmp_path / "images"), tmp_path / "packed", workers=1, progress=False)
    with pytest.raises(DataError, match=r"data\.path = .*packed' has 1 class.*two classes or more"):
        check_dataset(config(tmp_path / "packed", train={"global_batch": 2}))
