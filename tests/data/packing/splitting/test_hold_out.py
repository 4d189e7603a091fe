import shutil

from tests.data.conftest import make_photos, report
from tests.data.packing.test_pack import samples


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
