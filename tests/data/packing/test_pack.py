import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from adaptive.commands.main import main
from adaptive.data.images.image_files import EXTENSIONS
from adaptive.data.packing import writer
from adaptive.data.packing.pack import PackOptions, pack
from adaptive.data.packing.sources import Item
from adaptive.data.packing.verify import verify
from adaptive.data.packing.writer import ShardTask, finished_record, write_shard
from adaptive.data.shards.index import check_shards, load_index
from adaptive.errors import DataError, MachineError
from tests.data.conftest import colour_field, content, make_photos, report, total


def samples(folder, split="train"):
    """Read a split with nothing but tarfile: {source: (key, extension, image bytes, label, json)}."""
    found = {}
    for shard in load_index(folder).splits[split].shards:
        with tarfile.open(folder / shard.name) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        for name in members:
            key, extension = name.split(".")
            if extension in ("jpg", "png"):
                about = json.loads(members[f"{key}.json"])
                found[about["source"]] = (key, extension, members[name], int(members[f"{key}.cls"]), about)
    return found


def rgb(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def test_digits_are_deterministic_and_stratified(tmp_path):
    one = pack("builtin:digits", tmp_path / "one", progress=False, shard_count=400, workers=2)
    pack("builtin:digits", tmp_path / "two", progress=False, shard_count=400, workers=1)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert {name: split.count for name, split in one.splits.items()} == {"train": 1297, "val": 200, "test": 300}
    assert one.classes == [str(n) for n in range(10)]
    everything = [sample for split in one.splits for sample in samples(tmp_path / "one", split).values()]
    assert len(everything) == len({key for key, *_ in everything}) == 1797
    for split, count in (("val", 200), ("test", 300)):
        labels = np.bincount([label for _, _, _, label, _ in samples(tmp_path / "one", split).values()])
        assert np.abs(labels - count / 10).max() <= 2
    for split in one.splits:
        check_shards(one, tmp_path / "one", split, deep=True)


def test_folders_become_splits_and_originals_are_kept(tmp_path):
    source = tmp_path / "source"
    make_photos(source / "train")
    make_photos(source / "validation", each=2)
    make_photos(source / "test", classes=2, each=1)
    (source / "train" / "class0" / "notes.txt").write_text("not an image")
    (source / "classes.tsv").write_text("class0")
    (source / "train" / "class0" / "._0.png").write_text("not an image")
    result = report(source, tmp_path / "packed")
    assert {name: split.count for name, split in result.index.splits.items()} == {"train": 12, "val": 6, "test": 2}
    assert (result.ignored, result.converted, result.bad) == (3, 0, [])
    for name, (key, extension, data, label, about) in samples(tmp_path / "packed").items():
        assert data == (source / name).read_bytes()
        assert extension == "png"
        assert "." not in key
        assert about["class"] == f"class{label}" == Path(name).parent.name
        assert (about["width"], about["height"]) == Image.open(source / name).size
    assert not list(tmp_path.glob("*.packing"))
    assert set(IMG_EXTENSIONS) <= EXTENSIONS


def test_awkward_files_are_converted_or_kept(tmp_path):
    folder = tmp_path / "source" / "a"
    folder.mkdir(parents=True)
    image = colour_field(np.random.default_rng(0), 40, 30)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "rotated.jpg", quality=98, subsampling=0, exif=exif)
    image.convert("CMYK").save(folder / "cmyk.jpg", quality=98)
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(folder / "deep.png")
    image.save(folder / "really.JPEG", "png")
    image.convert("L").save(folder / "grey.jpg")
    image.save(folder / "bitmap.bmp")
    image.quantize(16).save(folder / "single.gif")
    result = report(tmp_path / "source", tmp_path / "packed")
    found = {Path(name).name: sample for name, sample in samples(tmp_path / "packed").items()}
    assert result.converted == 5
    for name, extension in [("really.JPEG", "png"), ("grey.jpg", "jpg")]:
        assert found[name][1] == extension
        assert found[name][2] == (folder / name).read_bytes()
    for name, extension, tolerance, expected in [
        ("rotated.jpg", "jpg", 14, image.transpose(Image.Transpose.ROTATE_270)),
        ("cmyk.jpg", "jpg", 14, image),
        ("deep.png", "png", 0, Image.new("RGB", (8, 8), (156, 156, 156))),
        ("bitmap.bmp", "png", 0, image),
        ("single.gif", "png", 0, image.quantize(16).convert("RGB")),
    ]:
        assert found[name][1] == extension
        assert np.abs(rgb(found[name][2]) - np.asarray(expected)).max() <= tolerance
        assert Image.open(io.BytesIO(found[name][2])).mode == "RGB"


def test_large_images_shrink_and_small_ones_stay(tmp_path):
    folder = tmp_path / "source" / "a"
    folder.mkdir(parents=True)
    image = colour_field(np.random.default_rng(0), 100, 60)
    for name in ("large.png", "large.jpg"):
        image.save(folder / name)
    image.resize((50, 50)).save(folder / "small.png")
    assert report(tmp_path / "source", tmp_path / "packed", max_side=50).converted == 2
    found = {Path(name).name: sample for name, sample in samples(tmp_path / "packed").items()}
    expected = np.asarray(image.resize((50, 30), Image.Resampling.LANCZOS))
    assert np.array_equal(rgb(found["large.png"][2]), expected)
    assert np.abs(rgb(found["large.jpg"][2]) - expected).max() <= 20
    assert found["large.jpg"][4]["width"] == 50
    assert found["small.png"][2] == (folder / "small.png").read_bytes()


def test_bad_files_are_listed_and_nothing_is_published(photos, tmp_path):
    (photos / "class0" / "0.png").write_bytes((photos / "class0" / "1.png").read_bytes()[:60])
    (photos / "class1" / "text.jpg").write_text("hello")
    with pytest.raises(
        DataError, match=r"2 of 13 images.*class0/0\.png: .*class1/text\.jpg: not an image.*--max-bad 2"
    ):
        report(photos, tmp_path / "packed", max_bad=1)
    assert not (tmp_path / "packed").exists()
    (photos / "class2" / "link.png").symlink_to("nowhere")
    result = report(photos, tmp_path / "packed", max_bad=3)
    assert [name for name, _ in result.bad] == ["class0/0.png", "class1/text.jpg", "class2/link.png"]
    assert total(result.index) == 11


def test_images_that_were_unreadable_for_a_moment_are_tried_again(photos, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(writer, "_read", lambda task, item: b"")
        with pytest.raises(DataError, match="12 of 12 images"):
            report(photos, tmp_path / "packed")
    assert total(report(photos, tmp_path / "packed").index) == 12


def test_hold_out_is_deterministic_and_leaves_every_class(photos, tmp_path):
    one = report(photos, tmp_path / "one", hold_out=5, seed=3)
    report(photos, tmp_path / "two", hold_out=5, seed=3)
    report(photos, tmp_path / "three", hold_out=5, seed=4)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert set(samples(tmp_path / "one", "val")) != set(samples(tmp_path / "three", "val"))
    assert {name: split.count for name, split in one.index.splits.items()} == {"train": 7, "val": 5}
    assert len({label for _, _, _, label, _ in samples(tmp_path / "one").values()}) == 3
    assert not set(samples(tmp_path / "one")) & set(samples(tmp_path / "one", "val"))
    with pytest.raises(DataError, match=r"--hold-out 12 is too many.*take 9 or less"):
        report(photos, tmp_path / "four", hold_out=12)
    with pytest.raises(DataError, match=r"--hold-out 5: the source already has a val split"):
        report("builtin:digits", tmp_path / "five", hold_out=5)


def test_shard_size_limits(photos, tmp_path):
    assert len(report(photos, tmp_path / "few").index.splits["train"].shards) == 1
    by_count = report(photos, tmp_path / "count", shard_count=5).index.splits["train"]
    assert by_count.counts == [4, 4, 4]
    by_bytes = report(photos, tmp_path / "bytes", shard_bytes=20_000).index.splits["train"]
    assert len(by_bytes.shards) > 2
    assert all(shard.bytes <= 40_000 for shard in by_bytes.shards)


def test_sources_that_cannot_be_packed(photos, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = [(tmp_path / "nowhere", "does not exist"), (empty, "no class folders"), ("builtin:cats", "unknown")]
    (tmp_path / "file").write_text("x")
    cases.append((tmp_path / "file", "not a folder"))
    make_photos(tmp_path / "hollow")
    (tmp_path / "hollow" / "void").mkdir()
    cases.append((tmp_path / "hollow", r"1 of 4 classes.*void"))
    make_photos(tmp_path / "strange" / "train", classes=2)
    make_photos(tmp_path / "strange" / "val", classes=3)
    cases.append((tmp_path / "strange", r"classes that train lacks: class2"))
    make_photos(tmp_path / "twice" / "train")
    make_photos(tmp_path / "twice" / "val")
    make_photos(tmp_path / "twice" / "validation")
    cases.append((tmp_path / "twice", "both val and validation"))
    make_photos(tmp_path / "trainless" / "val")
    cases.append((tmp_path / "trainless", "no train folder"))
    for source, reason in cases:
        with pytest.raises(DataError, match=reason):
            report(source, tmp_path / "packed")
    with pytest.raises(DataError, match=r"--max-side 0 is too small"):
        PackOptions(max_side=0)


def test_destinations_that_cannot_be_written(photos, tmp_path, monkeypatch):
    report(photos, tmp_path / "packed")
    before = content(tmp_path / "packed")
    with pytest.raises(DataError, match=r"already holds a dataset.*--overwrite"):
        report(photos, tmp_path / "packed")
    with pytest.raises(DataError, match="lies inside the source"):
        report(photos, photos / "packed")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.tex").write_text("precious")
    with pytest.raises(DataError, match="not empty and holds no dataset"):
        report(photos, tmp_path / "own", overwrite=True)
    (tmp_path / "packed" / "thesis.tex").write_text("precious")
    with pytest.raises(DataError, match=r"also holds thesis\.tex"):
        report(photos, tmp_path / "packed", overwrite=True)
    (tmp_path / "packed" / "thesis.tex").unlink()
    assert content(tmp_path / "packed") == before
    with pytest.raises(MachineError, match=r"cannot write .*: Not a directory"):
        report(photos, tmp_path / "own" / "thesis.tex" / "packed")
    report(photos, tmp_path / "packed", overwrite=True, seed=1)
    assert content(tmp_path / "packed") != before
    (tmp_path / "blank").mkdir()
    report(photos, tmp_path / "blank")
    assert not list(tmp_path.glob("*.packing"))


def test_a_full_disk_is_reported_and_finished_shards_are_kept(photos, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer.os, "fsync", full)
    with pytest.raises(MachineError, match="no space left"):
        report(photos, tmp_path / "packed")
    monkeypatch.undo()
    assert not (tmp_path / "packed").exists()
    assert total(report(photos, tmp_path / "packed").index) == 12


def test_a_bad_image_whose_name_is_not_utf8_is_named(tmp_path, capsysbinary):
    """In the error, the summary, the JSON, the list of suspects and of what is left out, and when packing goes on."""
    source = make_photos(tmp_path / "photos", classes=2, each=3)
    bad = os.fsencode(source / "class0") + b"/bad\xe9.png"
    Path(os.fsdecode(bad)).touch()
    shutil.copy(source / "class1" / "0.png", os.fsencode(source / "class1") + b"/good\xe9.pn\xe9")
    Path(os.fsdecode(os.fsencode(source / "class1") + b"/notes\xe9.txt")).write_text("no image")
    with pytest.raises(DataError, match=r"class0/bad\\udce9.png: the file is empty"):
        report(source, tmp_path / "packed")
    found = report(source, tmp_path / "packed", max_bad=1)
    assert found.bad == [("class0/bad\udce9.png", "the file is empty")]
    assert (found.account.total("packed"), found.ignored) == (7, 1)
    for more in ([], ["--json"]):
        with pytest.raises(SystemExit) as ended:
            main(["pack", str(source), str(tmp_path / f"again{len(more)}"), "--max-bad", "1", "--workers", "1", *more])
        out, err = capsysbinary.readouterr()
        assert (ended.value.code, err) == (0, b"")
        assert rb"bad\udce9.png" in out
        assert rb"notes\udce9.txt" in out
    assert verify(str(tmp_path / "packed"), workers=1, progress=False).faults == []


def test_a_record_with_such_a_name_is_read_again(tmp_path):
    """A shard that holds re-encoded images of such an extension is not written anew."""
    (tmp_path / "records").mkdir()
    name = "image.\udce9"
    Image.new("RGB", (8, 8)).save(tmp_path / name, "tiff")
    task = ShardTask("a-0.tar", tmp_path, tmp_path / "records", tmp_path, "a", 0, [Item(name, 0, 1)], ["class0"], None)
    written = write_shard(task)
    assert written.converted == [((".", ".\udce9"), 1)]
    assert finished_record(task) == written
