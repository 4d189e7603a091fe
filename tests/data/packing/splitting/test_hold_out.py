import shutil
from collections import Counter

import pytest

from adaptive.data.packing.folders.choices import FolderChoices
from adaptive.data.packing.pack import PackOptions, pack
from adaptive.data.packing.recognise import open_source
from adaptive.data.packing.splitting.hold_out import arrange_splits
from adaptive.errors import DataError
from tests.data.conftest import make_photos, report
from tests.data.packing.test_pack import samples

ALWAYS = ("0/5", "0/8", "1/1", "1/6", "2/3", "2/5")  # of ten images per class, 6 held out by seed 0


def doubled(folder):
    """Three classes of four images, each of which is there twice under another name."""
    make_photos(folder)
    for path in sorted(folder.rglob("*.png")):
        shutil.copy(path, path.with_name(f"z{path.name}"))
    return folder


def sides(folder):
    return [{data for _, _, data, *_ in samples(folder, split).values()} for split in ("train", "val")]


def test_twins_are_held_out_together(tmp_path):
    source = doubled(tmp_path / "source")
    result = report(source, tmp_path / "packed", hold_out=7)
    train, val = sides(tmp_path / "packed")
    assert len(val) == 3
    assert not train & val
    assert any("24 training images have the same bytes" in note and "1 fewer" in note for note in result.notes)


def test_twins_that_nobody_looked_for_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr("adaptive.data.packing.splitting.twins.MOST_COMPARED", 5)
    result = report(doubled(tmp_path / "source"), tmp_path / "packed", hold_out=9)
    train, val = sides(tmp_path / "packed")
    assert train & val
    assert any(f"{len(train & val)} images of val are in train as well" in note for note in result.notes)


def test_twins_in_the_splits_of_a_source_and_in_two_classes_are_told(tmp_path):
    make_photos(tmp_path / "source" / "train")
    make_photos(tmp_path / "source" / "val", each=1)
    first = tmp_path / "source" / "train" / "class0"
    shutil.copy(first / "1.png", tmp_path / "source" / "train" / "class1" / "same.png")
    shutil.copy(first / "2.png", tmp_path / "source" / "val" / "class0" / "same.png")
    notes = " | ".join(report(tmp_path / "source", tmp_path / "packed").notes)
    assert "2 images of val are in train as well, byte for byte" in notes
    assert "train/class1/same.png (class1) is train/class0/1.png (class0)" in notes


def arranged(folder, hold_out=None, hold_out_test=0, seed=0, test_split=None):
    """A source with its splits as `pack` arranges them, without packing."""
    source = open_source(folder, FolderChoices.of(folder, False, False, ()))
    arrange_splits(source, test_split, hold_out, hold_out_test, seed)
    return source


def names(source, split):
    return [item.name for item in source.splits[split]]


def test_images_are_held_out_for_a_test_as_well(tmp_path):
    """Each class in proportion, no image twice; val is what it is without a test, and what it always was."""
    folder = make_photos(tmp_path / "source", each=10)
    index = pack(folder, tmp_path / "packed", hold_out=6, hold_out_test=9, workers=1, progress=False)
    assert {split: found.count for split, found in index.splits.items()} == {"train": 15, "val": 6, "test": 9}
    source, alone = arranged(folder, 6, 9), arranged(folder, 6)
    assert set(samples(tmp_path / "packed", "test")) == set(names(source, "test"))
    assert len({name for split in source.splits for name in names(source, split)}) == 30
    assert names(source, "val") == names(alone, "val") == [f"class{image}.png" for image in ALWAYS]
    labels = [Counter(item.label for item in source.splits[split]) for split in ("val", "test")]
    assert labels == [{0: 2, 1: 2, 2: 2}, {0: 3, 1: 3, 2: 3}]
    assert names(arranged(folder, 6, 9, seed=1), "test") != names(source, "test")
    assert len(names(arranged(folder, hold_out_test=9), "test")) == 9
    assert arranged(folder, 6, 0).splits == alone.splits


def test_twins_are_on_one_side_of_all_three(tmp_path):
    result = report(doubled(tmp_path / "source"), tmp_path / "packed", hold_out=7, hold_out_test=5)
    sides = [{data for _, _, data, *_ in samples(tmp_path / "packed", split).values()} for split in result.index.splits]
    assert sum(map(len, sides)) == len(set().union(*sides)) == 12
    assert [result.index.splits[split].count for split in ("val", "test")] == [6, 4]
    assert any("1 fewer are held out for val and 1 fewer" in note for note in result.notes)


@pytest.mark.parametrize(
    ("hold_out", "hold_out_test", "message"),
    [
        (5, 5, r"--hold-out 5 and --hold-out-test 5 are too many: of 12.*take 9 or less together"),
        (None, 10, r"--hold-out-test 10 is too many: of 12 training images.*take 9 or less"),
    ],
)
def test_a_test_that_would_leave_too_few_is_refused(photos, hold_out, hold_out_test, message):
    with pytest.raises(DataError, match=message):
        arranged(photos, hold_out, hold_out_test)


def test_fewer_than_none_are_refused():
    with pytest.raises(DataError, match=r"--hold-out-test -1 is too small; give 0 or more"):
        PackOptions(hold_out_test=-1)


def test_a_source_with_a_test_split_keeps_it(tmp_path):
    for split in ("train", "val"):
        make_photos(tmp_path / split)
    with pytest.raises(DataError, match=r"--hold-out-test 3: the source already has a test split"):
        arranged(tmp_path, hold_out_test=3, test_split="val")
    assert len(names(arranged(tmp_path, hold_out_test=3), "test")) == 3


def test_a_dataset_without_images_for_a_test_is_told(photos):
    told = "no split test: checkpoint and policy are chosen on val"
    assert any(told in note for note in arranged(photos, 3).notes)
    assert not any(told in note for source in (arranged(photos, 3, 3), arranged(photos)) for note in source.notes)
