import json

import pytest

from adaptive.data.shards.index import (
    INDEX_NAME,
    ShardInfo,
    SplitInfo,
    check_shards,
    fingerprint,
    load_index,
    write_index,
)
from adaptive.errors import DataError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train-00000.tar").write_bytes(b"x" * 100)
    (tmp_path / "train-00001.tar").write_bytes(b"y" * 50)
    digests = [
        "09ecb6ebc8bcefc733f6f2ec44f791abeed6a99edf0cc31519637898aebd52d8",
        "0" * 64,
    ]
    shards = [
        ShardInfo(name=f"train-{n:05d}.tar", count=3 - n, bytes=(100, 50)[n], sha256=digests[n]) for n in range(2)
    ]
    write_index(tmp_path, ["cat", "dög"], {"train": SplitInfo(shards=shards, count=5)})
    return tmp_path


def rewrite(folder, change):
    path = folder / INDEX_NAME
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def test_round_trip(folder):
    index = load_index(folder)
    assert index.classes == ["cat", "dög"]
    assert index.split("train").counts == [3, 2]
    assert index.split("train").total_bytes == 150
    assert index.fingerprint == fingerprint(index.classes, index.splits)
    assert [path.name for path in folder.glob(".*")] == []
    check_shards(index, folder, "train")


def test_fingerprint_follows_classes_and_shards(folder):
    index = load_index(folder)
    assert fingerprint(["dög", "cat"], index.splits) != index.fingerprint
    renamed = {"other": index.splits["train"]}
    assert fingerprint(index.classes, renamed) != index.fingerprint


def test_missing_and_foreign_files(folder, tmp_path_factory):
    with pytest.raises(DataError, match=r"nowhere does not exist.*adaptive pack"):
        load_index(folder / "nowhere")
    with pytest.raises(DataError, match=r"holds no index.json.*adaptive pack"):
        load_index(tmp_path_factory.mktemp("empty"))
    for text, reason in [
        ("{half", "not valid JSON"),
        ("[1, 2]", "not written by adaptive pack"),
        ('{"images": 3}', "not written by adaptive pack"),
        ('{"version": 99}', "version 99"),
        ('{"version": 1, "classes": ["a"]}', "splits: Field required"),
    ]:
        (folder / INDEX_NAME).write_text(text)
        with pytest.raises(DataError, match=reason):
            load_index(folder)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tree: tree["classes"].reverse(), "fingerprint"),
        (lambda tree: tree["splits"]["train"]["shards"].reverse(), "fingerprint"),
        (lambda tree: tree["splits"]["train"].update(count=6), "not the sum"),
        (lambda tree: tree["splits"]["train"]["shards"][0].update(name="../../etc/passwd"), "name"),
        (lambda tree: tree.update(extra=1), "extra"),
    ],
)
def test_changed_index_is_refused(folder, change, reason):
    rewrite(folder, change)
    with pytest.raises(DataError, match=reason):
        load_index(folder)


def test_shards_are_checked(folder):
    index = load_index(folder)
    with pytest.raises(DataError, match=r"no split 'val'; it has train"):
        check_shards(index, folder, "val")
    with pytest.raises(DataError, match=r"train-00001.tar is damaged"):
        check_shards(index, folder, "train", deep=True)
    (folder / "train-00001.tar").write_bytes(b"short")
    with pytest.raises(DataError, match=r"train-00001.tar has 5 bytes, the index says 50"):
        check_shards(index, folder, "train")
    (folder / "train-00001.tar").unlink()
    with pytest.raises(DataError, match=r"lacks 1 of 2 train shards: train-00001.tar"):
        check_shards(index, folder, "train")


def test_an_index_that_would_fill_memory_is_refused_before_it_is_read(tmp_path):
    with (tmp_path / "index.json").open("wb") as file:
        file.truncate(1 << 40)  # takes no room on the disk
    with pytest.raises(DataError, match=r"index.json has 1099511627776 bytes, no index has over 268435456"):
        load_index(tmp_path)
