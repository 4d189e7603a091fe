"""The folders of tiny-imagenet-200.zip, with few and small images."""

import numpy as np
import pytest

from adaptive.data.packing import tiny_imagenet
from adaptive.data.packing.recognise import open_source
from adaptive.errors import DataError
from tests.data.conftest import colour_field, report
from tests.data.packing.test_pack import samples

WNIDS = ["n01443537", "n01629819", "n02321529"]


@pytest.fixture
def download(tmp_path):
    generator = np.random.default_rng(0)
    root = tmp_path / "tiny-imagenet-200"
    for wnid in WNIDS:
        folder = root / "train" / wnid / "images"
        folder.mkdir(parents=True)
        for number in range(10):
            colour_field(generator, 12, 12).save(folder / f"{wnid}_{number}.JPEG")
        (folder.parent / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t10\t63\t58\n")
    for folder in ("val", "test"):
        (root / folder / "images").mkdir(parents=True)
        for number in range(9):
            colour_field(generator, 12, 12).save(root / folder / "images" / f"{folder}_{number}.JPEG")
    lines = [f"val_{number}.JPEG\t{WNIDS[number * 2 % 3]}\t0\t32\t44\t62\n" for number in range(9)]
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "wnids.txt").write_text("\n".join(reversed(WNIDS)))
    return root


def test_the_download_becomes_three_splits(download, tmp_path):
    result = report(download, tmp_path / "packed")
    assert {name: split.count for name, split in result.index.splits.items()} == {"train": 27, "val": 3, "test": 9}
    assert result.index.classes == WNIDS
    for name, (_, _, data, label, _) in samples(tmp_path / "packed", "test").items():
        number = int(name.removeprefix("val/images/val_").removesuffix(".JPEG"))
        assert label == number * 2 % 3
        assert data == (download / name).read_bytes()
    assert all(name.startswith("train/") for split in ("train", "val") for name in samples(tmp_path / "packed", split))
    assert any("test has no labels and is left out" in note for note in result.notes)
    assert any("3 of 30 training images are held out" in note for note in result.notes)
    assert tiny_imagenet.HOLD_OUT == 10_000
    other = report(download, tmp_path / "other", hold_out=0)
    assert set(other.index.splits) == {"train", "test"}


def test_val_that_was_sorted_into_class_folders_is_read_as_such(download):
    for wnid in WNIDS:
        (download / "val" / wnid).mkdir()
    for number in range(9):
        name = f"val_{number}.JPEG"
        (download / "val" / "images" / name).rename(download / "val" / WNIDS[number * 2 % 3] / name)
    (download / "val" / "images").rmdir()
    (download / "test").rename(download / "unlabelled")
    source = open_source(download)
    assert {name: len(items) for name, items in source.splits.items()} == {"train": 30, "val": 9}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("val_3.JPEG\t", "val_9.JPEG\t", r"lacks 1 of 9 images that are in .*val/images: val_3\.JPEG"),
        ("val_8.JPEG\tn01629819\t0\t32\t44\t62\n", "", r"lacks 1 of 9 images .*val_8\.JPEG"),
        ("val_0.JPEG", "val_10.JPEG\tn01443537\t0\nval_0.JPEG", r"names 1 of 10 images that are not in"),
        ("val_3.JPEG\tn01443537", "val_3.JPEG 0", r"val_annotations\.txt, line 4: 'val_3"),
        ("val_3.JPEG\tn01443537", "val_3.JPEG\tn09999999", r"val_3\.JPEG is of class n09999999, which the training"),
    ],
)
def test_labels_that_do_not_fit_are_refused(download, old, new, message):
    table = download / "val" / "val_annotations.txt"
    text = table.read_text()
    assert old in text
    table.write_text(text.replace(old, new))
    with pytest.raises(DataError, match=message):
        open_source(download)


def test_a_download_without_train_is_refused(download):
    (download / "train").rename(download / "elsewhere")
    with pytest.raises(DataError, match="no folder train; unpack"):
        open_source(download)
