"""Shards that others made, indexed and verified by the command: the checks that packing makes of folders."""

import io
import json
import tarfile

import pytest
from PIL import Image

from adaptive.commands.main import main
from adaptive.data.packing.verify import verify
from adaptive.data.shards.index import INDEX_NAME, ShardInfo, SplitInfo, load_index, write_index
from adaptive.errors import DataError
from adaptive.files import file_sha256


def jpeg(shade=0):
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(stream, "jpeg")
    return stream.getvalue()


def tar(path, members, **options):
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT, **options) as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))


def pairs(labels, prefix=""):
    return [
        (f"{prefix}{number}.{part}", jpeg(number) if part == "jpg" else str(label).encode())
        for number, label in enumerate(labels)
        for part in ("jpg", "cls")
    ]


@pytest.fixture
def folder(tmp_path):
    tar(tmp_path / "train-0000.tar", pairs([0, 1, 2]))
    tar(tmp_path / "val-0000.tar", pairs([2, 1, 0], "v"))
    return tmp_path


@pytest.fixture
def index(folder, capsys):
    """The command: its exit code, and what it printed."""

    def call(*words):
        (folder / INDEX_NAME).unlink(missing_ok=True)
        with pytest.raises(SystemExit) as ended:
            main(["pack", "--index", str(folder), *words])
        printed = capsys.readouterr()
        return ended.value.code, printed.out + printed.err

    return call


def test_good_shards_are_indexed(folder, index):
    code, printed = index("--json")
    assert code == 0, printed
    account = json.loads(printed)["account"]
    assert (account["found"], account["packed"], account["ignored"]) == (6, 6, 0)
    assert verify(str(folder), workers=1, progress=False).faults == []


@pytest.mark.parametrize(
    ("train", "val", "message", "meant"),
    [
        ([1, 2, 3], [1], "The labels run from 1 to 3: number them from 0", True),
        ([0, 2, 3], [0], "1 of 4 classes have no training image: 1", True),
        ([0, 1], [0, 1, 2], "split val has classes that train lacks", True),
        ([0, "cat"], [0], "label 'cat' is no number", False),
        ([0, "1.0"], [0], "label '1.0' is no number", False),
        ([0, -1], [0], "label -1 is below 0", False),
    ],
)
def test_labels_without_names_of_classes(folder, index, train, val, message, meant):
    tar(folder / "train-0000.tar", pairs(train))
    tar(folder / "val-0000.tar", pairs(val, "v"))
    code, printed = index()
    assert (code, message in printed, "--classes-as-named" in printed) == (1, True, meant), printed
    assert index("--classes-as-named")[0] == (0 if meant else 1)


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        (b"\xef\xbb\xbfcat\ndog\nowl\n\n", ["cat", "dog", "owl"]),
        (b"cat\r\ndog \r\nowl\r\n \r\n", ["cat", "dog", "owl"]),
        ("cat\nd\u2028og\nowl".encode(), ["cat", "d\u2028og", "owl"]),
        (b"cat\n\nowl\n", "line 2 is empty"),
        (b"cat\ndog\ncat\n", "cat and cat, one class twice"),
        (b"cat\ndog\nCat\n", "--classes-as-named"),
        (b"cat\ndog\nowl\nyak\n", "1 of 4 classes have no training image: yak (label 3)"),
        (b"\xff\xfec\0a\0t\0", "is not UTF-8"),
    ],
)
def test_names_of_classes(folder, index, text, classes):
    (folder / "classes.txt").write_bytes(text)
    code, printed = index()
    if isinstance(classes, list):
        assert code == 0, printed
        assert load_index(folder).classes == classes
    else:
        assert (code, classes in printed) == (1, True), printed


J, L = ("jpg", jpeg()), ("cls", b"0")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("k.jpg", J[1]), ("k.cls", b"0"), ("k.jpg", J[1]), ("k.cls", b"1")], "sample k: has two members jpg"),
        ([("k.jpg", J[1]), ("k.cls", b"0"), ("x.jpg", J[1]), ("x.cls", b"1"), ("k.png", J[1])], "do not lie together"),
        ([("k.jpg", J[1]), ("k.png", J[1]), ("k.cls", b"0")], "has 2 images (jpg, png)"),
        ([("v1.0.jpg", J[1]), ("v1.0.cls", b"0")], "a key ends at the first dot"),
        ([("k.jpg", J[1]), ("k.json", b"{}"), ("k.txt", b"cat")], "as img2dataset writes"),
        (
            [("a/.ipynb_checkpoints/k.jpg", J[1]), ("a/.ipynb_checkpoints/k.cls", b"0")],
            "a copy that a tool made, in .ipynb_checkpoints",
        ),
    ],
)
def test_samples_that_a_reader_would_mistake(folder, index, members, message):
    tar(folder / "train-0001.tar", members)
    code, printed = index()
    assert (code, message in printed) == (1, True), printed
    assert "pack again" not in printed


def test_a_tar_that_ends_at_a_member_or_begins_again(folder, index):
    path = folder / "train-0000.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[: 4 * 1024])  # after three members, of a header and one or two blocks each
    code, printed = index()
    assert (code, "was cut off between two members" in printed) == (1, True), printed
    path.write_bytes(whole + whole)
    code, printed = index()
    assert (code, "holds data behind its end mark" in printed) == (1, True), printed
    damaged = bytearray(whole)
    damaged[4 * 1024 + 20] ^= 255
    path.write_bytes(damaged)
    code, printed = index()
    assert (code, "is damaged at byte 4096" in printed) == (1, True), printed


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("train-0001.tar.gz", "is compressed"),
        ("train-0001.tgz", "is compressed"),
        ("train-0001.TAR", "in lower case"),
        ("train-0001.tar.part", "unfinished"),
        ("train-val-0001.tar", "say train and val"),
    ],
)
def test_other_shards_beside_them(folder, index, name, message):
    (folder / name).write_bytes((folder / "train-0000.tar").read_bytes())
    code, printed = index()
    assert (code, message in printed) == (1, True), printed


def test_what_is_told_and_does_no_harm(folder, index):
    tar(folder / "train-0002.tar", [("._3.jpg", b"fork"), ("3.jpg", jpeg(3)), ("3.cls", b"0"), ("3.txt", b"a cat")])
    tar(folder / "Training-0007.tar", pairs([0, 1]))
    (folder / "labels.txt").write_text("cat")
    (folder / "._val-0000.tar").write_text("fork")
    (folder / "more").mkdir()
    tar(folder / "more" / "train-0009.tar", pairs([0]))
    with tarfile.open(folder / "val-0001.tar", "w") as file:
        link = tarfile.TarInfo("w.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "v1.jpg"
        file.addfile(link)
        for name, data in pairs([0], "w"):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    code, printed = index()
    assert code == 0, printed
    for part in (
        "by the numbers of its shards train- lacks 1: train-1",
        "2 keys are in several shards",
        "labels.txt is not read",
        "more/train-0009.tar",
        "attributes that macOS adds, for example train-0002.tar/._3.jpg",
        "no regular file, for example val-0001.tar/w.jpg",
        "member that is neither image nor label, for example train-0002.tar/3.txt",
        "adaptive pack --verify",
    ):
        assert part in printed, printed
    assert {name: split.count for name, split in load_index(folder).splits.items()} == {"train": 6, "val": 4}


def test_verify_makes_the_same_checks(folder, index, capsys):
    def indexed(classes):
        splits = {}
        for split, count in (("train", 3), ("val", 3)):
            path = folder / f"{split}-0000.tar"
            shard = ShardInfo(name=path.name, count=count, bytes=path.stat().st_size, sha256=file_sha256(path))
            splits[split] = SplitInfo(shards=[shard], count=count)
        write_index(folder, classes, splits)
        return [fault.message for fault in verify(str(folder), workers=1, progress=False).faults]

    assert any("names 1 classes twice (a)" in message for message in indexed(["a", "b", "a"]))
    with pytest.raises(DataError, match=r"index.json names 1 classes twice \(a\); rename one of each"):
        load_index(folder)  # what trains and evaluates begins with it
    assert any("1 of 4 classes have no training image: d (label 3)" in message for message in indexed([*"abcd"]))
    tar(folder / "train-0000.tar", [*pairs([0, 1, 2]), ("2.cls", b"0")])
    assert any("sample 2: has two members cls" in message for message in indexed([*"abc"]))
    tar(folder / "train-0000.tar", [*pairs([0, 1, 2]), ("2.png", jpeg())])
    assert any("has 2 images" in message for message in indexed([*"abc"]))
    tar(folder / "train-0000.tar", pairs([0, 1, 2]))
    (folder / "train-0000.tar").write_bytes((folder / "train-0000.tar").read_bytes()[: 3 * 2560])
    assert any("was cut off between two members" in message for message in indexed([*"abc"]))
