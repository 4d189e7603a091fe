"""Archives of the form of ILSVRC's, made from a sample of its photographs: known class and split of every image."""

import hashlib
import io
import json
import shutil
import sys
import tarfile
from dataclasses import dataclass

import numpy as np
import pytest
import torchvision.datasets.imagenet as reference
from PIL import Image

from adaptive.data.packing.imagenet import HOLD_OUT, TRAIN, VALIDATION
from adaptive.data.packing.pack import pack
from adaptive.data.packing.recognise import open_source
from adaptive.data.shards.index import load_index
from adaptive.errors import DataError, MachineError
from tests.data.conftest import content, report
from tests.data.packing.test_pack import samples
from tests.data.packing.test_pack_interrupted import start_slow_pack
from tests.helpers.locations import DATA

SAMPLE = DATA / "imagenet-sample-125.tar"
EACH = 4  # training images per class
DEVKIT, TRUTH, TABLE = (
    "ILSVRC2012_devkit_t12.tar.gz",
    "ILSVRC2012_validation_ground_truth.txt",
    "LOC_val_solution.csv",
)


@dataclass
class Photos:
    """JPEG bytes by file name and class, and the devkit's two files."""

    train: dict[str, dict[str, bytes]]
    val: dict[str, bytes]
    val_classes: dict[str, str]
    meta: bytes
    truth: bytes

    @property
    def wnids(self):
        return sorted(self.train)

    def known(self):
        """Return the class and original split of an image by the hash of its bytes."""
        found = {digest(data): (wnid, "train") for wnid, images in self.train.items() for data in images.values()}
        return found | {digest(data): (self.val_classes[name], "val") for name, data in self.val.items()}


def digest(data):
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(scope="module")
def photos() -> Photos:
    if not SAMPLE.is_file():
        pytest.skip(f"{SAMPLE} is missing; set ADAPTIVE_DATA to the folder that holds it")
    views = {}
    with tarfile.open(SAMPLE) as tar:
        for member in tar:
            if member.isfile():
                views[member.name.split("/")[-2]] = make_views(tar.extractfile(member).read())
    return arrange(views)


@pytest.fixture(scope="module")
def few(photos) -> Photos:
    return arrange({wnid: [*photos.train[wnid].values(), photo_of(photos, wnid)] for wnid in photos.wnids[:6]})


def photo_of(photos, wnid):
    return next(data for name, data in photos.val.items() if photos.val_classes[name] == wnid)


def make_views(data):
    """Cut EACH + 1 different small pictures out of a photograph; grey ones stay grey."""
    photo = Image.open(io.BytesIO(data))
    photo.draft(photo.mode, (96, 96))
    photo = photo.resize((60, 60))
    views = []
    for corner in range(EACH + 1):
        stream = io.BytesIO()
        photo.crop((2 * corner, corner, 2 * corner + 48, corner + 48 - corner)).save(stream, "jpeg")
        views.append(stream.getvalue())
    return views


def arrange(views) -> Photos:
    """Give every class EACH training images and a validation image; numbers and class IDs are in no helpful order."""
    generator = np.random.default_rng(7)
    wnids = sorted(views)
    train = {w: {f"{w}_{1000 - 9 * n}.JPEG": data for n, data in enumerate(views[w][:EACH])} for w in wnids}
    order = [wnids[n] for n in generator.permutation(len(wnids))]
    names = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, len(wnids) + 1)]
    ids = {wnid: int(n) + 1 for wnid, n in zip(wnids, generator.permutation(len(wnids)), strict=True)}
    truth = "".join(f"{ids[wnid]}\n" for wnid in order).encode()
    val = {name: views[wnid][EACH] for name, wnid in zip(names, order, strict=True)}
    return Photos(train, val, dict(zip(names, order, strict=True)), make_meta(ids), truth)


def make_meta(ids):
    """Return a meta.mat of the devkit's structure, with inner nodes of WordNet behind the classes."""
    from scipy.io import savemat

    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height"]
    rows = [(number, wnid, f"{wnid}, thing", "a thing", 0, np.array([], float), 0) for wnid, number in ids.items()]
    rows.sort()
    rows += [(len(ids) + n, f"n0000000{n}", "whole", "a group", 2, np.array([1.0, 2.0]), 1) for n in (1, 2)]
    synsets = np.empty((len(rows), 1), [(name, object) for name in [*fields, "num_train_images"]])
    for number, row in enumerate(rows):
        synsets[number, 0] = (*row, 1300)
    stream = io.BytesIO()
    savemat(stream, {"synsets": synsets})
    return stream.getvalue()


def tar_of(files, mode="w"):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as tar:
        for name, data in files.items():
            member = data if isinstance(data, tarfile.TarInfo) else tarfile.TarInfo(name)
            if not isinstance(data, tarfile.TarInfo):
                member.size = len(data)
            tar.addfile(member, None if isinstance(data, tarfile.TarInfo) else io.BytesIO(data))
    return stream.getvalue()


def link(name, target):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, target
    return member


def train_tar(photos):
    # The order of classes and images in the real archive is not relied upon.
    return tar_of({f"{wnid}.tar": tar_of(images) for wnid, images in reversed(photos.train.items())})


def devkit(photos):
    base = "ILSVRC2012_devkit_t12"
    files = {
        f"{base}/readme.txt": b"readme",
        f"{base}/data/meta.mat": photos.meta,
        f"{base}/data/{TRUTH}": photos.truth,
    }
    return tar_of(files, "w:gz")


def write_archives(folder, photos, labels=True):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TRAIN).write_bytes(train_tar(photos))
    (folder / VALIDATION).write_bytes(tar_of(dict(reversed(photos.val.items()))))
    if labels:
        (folder / DEVKIT).write_bytes(devkit(photos))
    return folder


def write_folders(folder, photos, flat_val=False):
    for wnid, images in photos.train.items():
        (folder / "train" / wnid).mkdir(parents=True)
        for name, data in images.items():
            (folder / "train" / wnid / name).write_bytes(data)
    for name, data in photos.val.items():
        path = folder / "val" / ("" if flat_val else photos.val_classes[name]) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def table(photos):
    rows = [f"{name[:-5]},{wnid} 85 1 499 272 {wnid} 1 2 3 4 " for name, wnid in photos.val_classes.items()]
    return "\n".join(["ImageId,PredictionString", *reversed(rows)]) + "\n"


def labels_of(source):
    return {item.name.rpartition("/")[2]: source.classes[item.label] for item in source.splits["test"]}


@pytest.fixture(scope="module")
def archives(photos, tmp_path_factory):
    return write_archives(tmp_path_factory.mktemp("imagenet"), photos)


@pytest.fixture(scope="module")
def packed(archives, tmp_path_factory):
    """The archives, packed, and the report of it."""
    folder = tmp_path_factory.mktemp("packed") / "imagenet"
    return folder, report(archives, folder, seed=3)


def test_every_image_has_the_class_that_it_is_known_to_have(photos, packed):
    folder, result = packed
    held_out = EACH * 125 // 25
    counts = {name: split.count for name, split in result.index.splits.items()}
    assert counts == {"train": EACH * 125 - held_out, "val": held_out, "test": 125}
    assert result.index.classes == sorted(photos.train)
    assert (result.converted, result.ignored, result.bad) == (0, 0, [])
    known, seen = photos.known(), []
    assert len(known) == (EACH + 1) * 125
    for split in counts:
        for name, (_, _, data, label, about) in samples(folder, split).items():
            wnid, origin = known[digest(data)]
            assert (result.index.classes[label], about["class"]) == (wnid, wnid), name
            assert origin == ("val" if split == "test" else "train")
            assert name.startswith(f"{origin}/{wnid}/")
            seen.append(digest(data))
    assert sorted(seen) == sorted(known)
    assert any("20 of 500 training images" in note for note in result.notes)


def test_the_devkit_is_read_as_torchvision_reads_it(photos, archives, tmp_path, monkeypatch):
    shutil.copy(archives / DEVKIT, tmp_path)
    monkeypatch.setattr(reference, "_verify_archive", lambda *arguments: None)
    reference.parse_devkit_archive(tmp_path)
    _, wnids = reference.load_meta_file(tmp_path)
    assert labels_of(open_source(archives)) == dict(zip(sorted(photos.val), wnids, strict=True)) == photos.val_classes
    ids = [int(line) for line in photos.truth.split()]
    alphabetical = [photos.wnids[number - 1] for number in ids]
    assert sum(a == b for a, b in zip(alphabetical, wnids, strict=True)) < 10  # the classic mistake would show


def test_archives_and_folders_give_the_same_dataset(photos, packed, tmp_path):
    folder, result = packed
    count = result.index.splits["val"].count
    folders = write_folders(tmp_path / "folders", photos)
    same = report(folders, tmp_path / "one", seed=3, hold_out=count, test_split="val")
    assert same.index.fingerprint == result.index.fingerprint
    assert content(tmp_path / "one") == content(folder)
    kaggle = tmp_path / "kaggle"
    write_folders(kaggle / "ILSVRC" / "Data" / "CLS-LOC", photos, flat_val=True)
    (kaggle / "ILSVRC" / "Data" / "CLS-LOC" / "test").mkdir()
    (kaggle / TABLE).write_text(table(photos))
    (kaggle / "LOC_train_solution.csv").write_text(
        "ImageId,PredictionString\nn02017213_7894,n02017213 115 49 448 294\n"
    )
    (kaggle / "LOC_synset_mapping.txt").write_text("n01440764 tench, Tinca tinca\n")
    also = report(kaggle, tmp_path / "two", seed=3)
    assert also.index.fingerprint == result.index.fingerprint
    assert any("test has no labels" in note for note in also.notes)


def test_labels_come_from_any_of_their_usual_forms(few, tmp_path):
    root = write_archives(tmp_path / "source", few, labels=False)
    expected = few.val_classes

    (root / TABLE).write_text(table(few))
    assert labels_of(open_source(root)) == expected
    (root / "val_map.txt").write_text("".join(f"{name} {wnid}\n" for name, wnid in expected.items()))
    with pytest.raises(DataError, match=r"LOC_val_solution.csv and val_map.txt, which both give labels; keep one"):
        open_source(root)
    (root / TABLE).unlink()
    assert labels_of(open_source(root)) == expected
    (root / "val_map.txt").unlink()

    (root / TRUTH).write_bytes(few.truth)
    with pytest.raises(DataError, match=r"class IDs that only meta\.mat of the devkit explains"):
        open_source(root)
    (root / "ILSVRC2012_devkit_t12" / "data").mkdir(parents=True)
    (root / "ILSVRC2012_devkit_t12" / "data" / "meta.mat").write_bytes(few.meta)
    assert labels_of(open_source(root)) == expected


def test_parts_of_the_download(few, tmp_path):
    root = write_archives(tmp_path / "source", few)
    with_test = write_folders(tmp_path / "folders", few)
    (root / VALIDATION).rename(tmp_path / VALIDATION)
    alone = report(root, tmp_path / "alone", hold_out=5)
    assert {name: split.count for name, split in alone.index.splits.items()} == {"train": 19, "val": 5}
    assert any(f"there is no {VALIDATION}" in note for note in alone.notes)
    shutil.move(with_test / "val", root / "val")
    assert labels_of(open_source(root)) == few.val_classes
    none = report(root, tmp_path / "none", hold_out=0)
    assert set(none.index.splits) == {"train", "test"}
    assert not any("held out" in note for note in none.notes)
    (root / TRAIN).unlink()
    shutil.copy(tmp_path / VALIDATION, root)
    with pytest.raises(DataError, match=r"neither ILSVRC2012_img_train\.tar nor a folder train"):
        open_source(root)
    with pytest.raises(DataError, match="give the folder in which it lies"):
        open_source(root / VALIDATION)
    shutil.move(with_test / "train", root / "train")
    mixed = open_source(root)
    assert labels_of(mixed) == few.val_classes
    assert mixed.hold_out == EACH * 6 // 25


def test_the_default_hold_out_is_that_of_the_papers(few, tmp_path, monkeypatch):
    assert HOLD_OUT == 50_000
    monkeypatch.setattr("adaptive.data.packing.imagenet.HOLD_OUT", 2)
    monkeypatch.setattr("adaptive.data.packing.imagenet._HOLD_OUT_SHARE", 4)
    assert open_source(write_archives(tmp_path, few)).hold_out == 2


def test_test_split_flag(few, tmp_path):
    folders = write_folders(tmp_path / "folders", few)
    with pytest.raises(DataError, match=r"--hold-out 3: the source already has a val split.*--test-split val"):
        report(folders, tmp_path / "packed", hold_out=3)
    assert set(report(folders, tmp_path / "plain").index.splits) == {"train", "val"}
    assert set(report(folders, tmp_path / "renamed", test_split="val").index.splits) == {"train", "test"}
    shutil.copytree(folders / "val", folders / "test")
    with pytest.raises(DataError, match=r"--test-split val: the source has a test split besides"):
        report(folders, tmp_path / "packed", test_split="val")
    archives = write_archives(tmp_path / "archives", few)
    with pytest.raises(DataError, match=r"--test-split train: only val or test can become split test"):
        report(archives, tmp_path / "packed", test_split="train")
    with pytest.raises(DataError, match=r"--test-split val: the source has no such split, it has test, train"):
        report(archives, tmp_path / "packed", test_split="val")


def damage(root, few, kind):
    """Spoil a good download in one way."""
    train, val = root / TRAIN, root / VALIDATION
    first, ids = few.wnids[0], few.truth.split()
    if kind == "cut train":
        train.write_bytes(train.read_bytes()[:-30_000])
    elif kind == "cut val":
        val.write_bytes(val.read_bytes()[:7_000])
    elif kind == "cut between members":
        val.write_bytes(val.read_bytes()[: open_source(root).splits["test"][0].offset - 512])
    elif kind == "compressed":
        train.write_bytes(tar_of({f"{first}.tar": b"x"}, "w:gz"))
    elif kind == "inner":
        train.write_bytes(tar_of({f"{first}.tar": b"no tar" * 500}))
    elif kind == "foreign":
        train.write_bytes(tar_of({"a.jpg": b"x"}))
    elif kind == "hollow":
        train.write_bytes(tar_of({f"{w}.tar": tar_of({} if w == first else few.train[w]) for w in few.wnids}))
    elif kind == "outside":
        train.write_bytes(tar_of({f"{first}.tar": tar_of({"../../x.JPEG": b"x"})}))
    elif kind == "absolute":
        val.write_bytes(tar_of({"/etc/ILSVRC2012_val_00000001.JPEG": b"x"}))
    elif kind == "no labels":
        (root / DEVKIT).unlink()
    elif kind == "cut devkit":
        (root / DEVKIT).write_bytes(devkit(few)[:-40])
    elif kind == "no meta":
        (root / DEVKIT).write_bytes(tar_of({f"data/{TRUTH}": few.truth}, "w:gz"))
    elif kind == "bad meta":
        (root / DEVKIT).write_bytes(tar_of({f"data/{TRUTH}": few.truth, "meta.mat": few.meta[:300]}, "w:gz"))
    elif kind == "few lines":
        (root / TRUTH).write_bytes(b"\n".join(ids[:-1]))
    elif kind == "inner node":
        (root / TRUTH).write_bytes(b"\n".join([*ids[:-1], b"7"]))
    elif kind == "gap":
        images = {name.replace("00000006", "00000009"): data for name, data in few.val.items()}
        val.write_bytes(tar_of(images))
    elif kind == "bad line":
        (root / TABLE).write_text(table(few) + "ILSVRC2012_val_00000003,85 1 2 3\n")
    elif kind == "two classes":
        (root / TABLE).write_text(table(few) + table(few).splitlines()[1].replace(",n0", ",n1") + "\n")
    elif kind == "class without training":
        train.write_bytes(tar_of({f"{wnid}.tar": tar_of(few.train[wnid]) for wnid in few.wnids[1:]}))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cut train", r"ILSVRC2012_img_train\.tar is cut off.*download it again"),
        ("cut val", r"ILSVRC2012_img_val\.tar is cut off"),
        ("cut between members", r"ILSVRC2012_img_val\.tar is cut off or damaged at byte"),
        ("compressed", r"ILSVRC2012_img_train\.tar is .*not an uncompressed tar"),
        ("inner", r"n\d{8}\.tar in .*ILSVRC2012_img_train\.tar is cut off, damaged or not"),
        ("foreign", r"holds no class archives like n01440764\.tar"),
        ("hollow", r"1 of 6 classes in .* have no training image: n\d{8}"),
        ("outside", r"n\d{8}\.tar in .* holds '\.\./\.\./x\.JPEG'"),
        ("absolute", r"holds '/etc/ILSVRC2012_val_00000001\.JPEG'"),
        ("no labels", r"no labels for the images of ILSVRC2012_img_val\.tar; put ILSVRC2012_devkit_t12\.tar\.gz there"),
        ("cut devkit", r"ILSVRC2012_devkit_t12\.tar\.gz is cut off"),
        ("no meta", r"only meta\.mat of the devkit explains"),
        ("bad meta", r"meta\.mat is damaged"),
        ("few lines", r"ground_truth\.txt has 5 lines, .*ILSVRC2012_img_val\.tar holds 6 images"),
        ("inner node", r"line 6: '7' is none of the 6 class IDs"),
        ("gap", r"lacks 1 of 6 images that are in .*: ILSVRC2012_val_00000009\.JPEG"),
        ("bad line", r"LOC_val_solution\.csv, line 8: 'ILSVRC2012_val_00000003,85 1 2 3' is not an image"),
        ("two classes", r"line 8: ILSVRC2012_val_00000006 is n1.*, and n0.* before"),
        ("class without training", r"is of class n\d{8}, which the training images lack"),
    ],
)
def test_a_damaged_download_is_refused_in_one_line(few, tmp_path, kind, message):
    root = write_archives(tmp_path / "source", few)
    damage(root, few, kind)
    with pytest.raises(DataError, match=message) as caught:
        report(root, tmp_path / "packed")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "packed").exists()


def test_links_and_other_files_in_archives_are_ignored(few, tmp_path):
    root = write_archives(tmp_path / "source", few)
    secret = tmp_path / "secret.JPEG"
    secret.write_bytes(photo_of(few, few.wnids[0]))
    extra = {"link.JPEG": link("link.JPEG", str(secret)), "notes.txt": b"notes", "._n0.JPEG": b"forks"}
    inner = {f"{w}.tar": tar_of(images | (extra if w == few.wnids[0] else {})) for w, images in few.train.items()}
    (root / TRAIN).write_bytes(tar_of({"readme.txt": b"x", "n00000001.tar": link("n00000001.tar", "/etc")} | inner))
    source = open_source(root)
    assert source.classes == few.wnids
    assert len(source.splits["train"]) == EACH * 6
    assert source.ignored == 5


def test_a_bad_image_in_an_archive_is_named(few, tmp_path):
    root = write_archives(tmp_path / "source", few)
    wnid = few.wnids[2]
    spoilt = few.train | {wnid: few.train[wnid] | {f"{wnid}_5.JPEG": b"no photo"}}
    (root / TRAIN).write_bytes(tar_of({f"{name}.tar": tar_of(images) for name, images in spoilt.items()}))
    with pytest.raises(DataError, match=rf"1 of 31 images.*train/{wnid}/{wnid}_5\.JPEG: not an image"):
        report(root, tmp_path / "packed")


def test_without_scipy_the_error_says_what_to_install(few, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    root = write_archives(tmp_path / "source", few)
    with pytest.raises(MachineError, match=r"meta\.mat needs scipy; install it with: pip install scipy"):
        open_source(root)
    (root / TABLE).write_text(table(few))
    assert labels_of(open_source(root)) == few.val_classes


def test_a_killed_packing_of_archives_continues(archives, packed, tmp_path):
    process = start_slow_pack(archives, tmp_path / "packed")
    process.kill()
    process.communicate()
    records = tmp_path / "packed.packing" / "records"
    kept = {path.name for path in records.glob("*.tar.json")}
    shards = tmp_path / "packed.packing" / "dataset"
    before = {path.name: path.stat().st_ino for path in shards.glob("*.tar")}
    index = pack(archives, tmp_path / "packed", shard_count=8, progress=False)
    again = [path.name for path in (tmp_path / "packed").glob("*.tar") if before.get(path.name) != path.stat().st_ino]
    assert len(kept) >= 2
    assert len(again) <= sum(len(split.shards) for split in index.splits.values()) - len(kept)
    assert json.loads((tmp_path / "packed" / "index.json").read_text())["classes"] == load_index(packed[0]).classes
    assert {name: split.count for name, split in index.splits.items()} == {"train": 480, "val": 20, "test": 125}
