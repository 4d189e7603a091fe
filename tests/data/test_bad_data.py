"""Bad data within a budget: replaced in training, left out in evaluation, counted, listed."""

import io
import json
import logging
import os
import tarfile

import pytest
import torch

from adaptive.commands.main import main
from adaptive.config.sections import DataConfig
from adaptive.data.faults import Fault, Ledger
from adaptive.data.packing.pack import pack
from adaptive.data.packing.verify import verify
from adaptive.data.reading.stream import EvaluationStream, LoaderOptions, TrainStream
from adaptive.data.remote import transfer
from adaptive.data.shards import reader
from adaptive.data.shards.index import SplitInfo, load_index, write_index
from adaptive.errors import DataError
from adaptive.files import file_sha256
from adaptive.inference.outputs import collect
from adaptive.metrics import measure_exits
from tests.helpers.shard_server import Faulty, serve

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

KEY = "train-00000{:03d}"


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad") / "digits"
    pack("builtin:digits", folder, shard_count=300, progress=False, workers=1)
    return folder


@pytest.fixture(scope="module")
def good(packed):
    """The batches of an epoch of the dataset before anything was done to it."""
    return epoch(train(packed, max_bad=0))


@pytest.fixture(scope="module")
def planned(good):
    return ids_of(good)


@pytest.fixture
def folder(packed, tmp_path, monkeypatch):
    """A dataset of links, for tests to replace files of."""
    monkeypatch.setattr(transfer, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(reader, "_FIRST_PAUSE", 0.001)
    folder = tmp_path / "digits"
    folder.mkdir()
    for path in packed.iterdir():
        os.link(path, folder / path.name)
    return folder


def change(folder, split, number, edit):
    """Rewrite a shard with changed members, and an index that fits."""
    index = load_index(folder)
    info = index.split(split)
    shard = info.shards[number]
    path = folder / shard.name
    with tarfile.open(path) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    path.unlink()
    with tarfile.open(path, "w") as tar:
        for name, data in edit(members):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    shard = shard.model_copy(update={"bytes": path.stat().st_size, "sha256": file_sha256(path)})
    info = SplitInfo(shards=[*info.shards[:number], shard, *info.shards[number + 1 :]], count=info.count)
    write_index(folder, index.classes, index.splits | {split: info})


def spoil(*numbers, how="image", split="train"):
    """Members of which the samples with these numbers in the split are bad."""
    keys = {f"{split}-{number:08d}" for number in numbers}

    def edit(members):
        for name, data in members:
            key, _, extension = name.partition(".")
            if key not in keys:
                yield name, data
            elif how == "image" and extension == "png":
                yield name, data[: len(data) // 2]
            elif how == "range" and extension == "cls":
                yield name, b"10"
            elif how == "word" and extension == "cls":
                yield name, b"nine"
            elif how != "member" or extension != "cls":
                yield name, data

    return edit


def train(folder, *, max_bad, workers=0, rank=0, world=1, **changes):
    data = {"image_size": 8, "crop": "none", "flip": 0.0, "shuffle_window": 2, "max_bad": max_bad, **changes}
    config = DataConfig(**{"path": str(folder), **data})
    index, loader = load_index(folder, config), LoaderOptions(rank, world, workers)
    return TrainStream(index, config, "train", loader, seed=5, global_batch=48, micro_batch=48 // world)


def evaluation(folder, *, max_bad, workers=0, rank=0, world=1):
    config = DataConfig(path=str(folder), image_size=8, max_bad=max_bad)
    index = load_index(folder)
    return EvaluationStream(index, config, "val", LoaderOptions(rank, world, workers), batch=32)


def epoch(stream):
    return list(stream.batches(0, stream.steps_per_epoch))


def ids_of(batches):
    return torch.cat([batch.ids for batch in batches]).tolist()


@pytest.mark.parametrize(("how", "workers"), [("image", 2), ("range", 0), ("word", 0), ("member", 0)])
def test_the_next_sample_takes_a_bad_ones_place(folder, good, planned, how, workers):
    change(folder, "train", 0, spoil(7, 8, how=how))
    stream = train(folder, max_bad=2, workers=workers)
    batches = epoch(stream)
    assert ids_of(batches) == [9 if identity in (7, 8) else identity for identity in planned]
    met = {7, 8} & set(planned)
    assert stream.bad.count == len(met) > 0
    kind = {"image": "undecodable image", "range": "wrong label", "word": "wrong label", "member": "corrupt member"}
    assert stream.bad.by_kind == {kind[how]: len(met)}
    whole = {i: image for batch in good for i, image in zip(batch.ids.tolist(), batch.images, strict=True)}
    for batch in batches:
        assert (batch.labels >= 0).all()
        found = zip(batch.ids.tolist(), batch.images, strict=True)
        assert all(torch.equal(image, whole[i]) for i, image in found if i in whole)


def test_the_last_of_a_shard_is_followed_by_its_first(folder, packed, planned):
    count = load_index(packed).split("train").counts[0]
    change(folder, "train", 0, spoil(count - 1, how="range"))
    found = dict(zip(planned, ids_of(epoch(train(folder, max_bad=1))), strict=True))
    assert found.get(count - 1, 0) == 0
    assert all(now == then for then, now in found.items() if then != count - 1)


def lose(folder, number):
    (folder / load_index(folder).split("train").shards[number].name).unlink()


def garble(folder, number):
    path = folder / load_index(folder).split("train").shards[number].name
    size = path.stat().st_size
    path.unlink()
    path.write_bytes(b"no tar" * (size // 6) + b"x" * (size % 6))


def truncate(folder, number):
    path = folder / load_index(folder).split("train").shards[number].name
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: len(content) // 2])


def drop_sample(folder, number):
    change(folder, "train", number, lambda members: members[3:])


@pytest.mark.parametrize(
    ("harm", "kind"),
    [
        (lose, "missing shard"),
        (garble, "corrupt member"),
        (truncate, "truncated shard"),
        (drop_sample, "wrong sample count"),
    ],
)
def test_the_next_shard_takes_a_bad_ones_place(folder, packed, planned, harm, kind):
    counts = load_index(packed).split("train").counts
    harm(folder, 1)
    stream = train(folder, max_bad=counts[1])
    low, high, following = counts[0], counts[0] + counts[1], counts[2]
    expected = [high + (i - low) % following if low <= i < high else i for i in planned]
    assert ids_of(epoch(stream)) == expected
    assert stream.bad.by_kind == {kind: sum(low <= i < high for i in set(planned))}
    with pytest.raises(DataError):
        epoch(train(folder, max_bad=10))


def test_ranks_workers_and_resuming_change_nothing(folder):
    change(folder, "train", 0, spoil(3, 5, 6))
    change(folder, "train", 2, spoil(610, 611, how="word"))
    lose(folder, 3)
    alone = epoch(train(folder, max_bad=500))
    ranks = [epoch(train(folder, max_bad=500, rank=rank, world=2, workers=rank * 2)) for rank in range(2)]
    for step, batch in enumerate(alone):
        assert torch.cat([ranks[0][step].ids, ranks[1][step].ids]).tolist() == batch.ids.tolist()
        assert torch.equal(torch.cat([ranks[0][step].images, ranks[1][step].images]), batch.images)
    resumed = list(train(folder, max_bad=500).batches(9, 20))
    assert ids_of(resumed) == ids_of(alone[9:20])


@pytest.mark.parametrize("workers", [0, 2])
def test_past_the_budget_everything_found_is_listed(folder, workers):
    change(folder, "train", 0, spoil(*range(20)))
    stream = train(folder, max_bad=14, workers=workers)
    with pytest.raises(DataError) as caught:
        epoch(stream)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("15 bad samples, data.max_bad = 14 allows no more: undecodable image: shard ")
    assert message.count("train-000000") >= 10
    assert "and 5 more of kind undecodable image" in message
    assert "adaptive pack --verify" in message


def test_without_a_budget_the_first_one_stops(folder):
    change(folder, "train", 0, spoil(7))
    with pytest.raises(
        DataError, match=r"train-00000\.tar, sample train-00000007: .*truncated.*; copy the shard again"
    ):
        epoch(train(folder, max_bad=0))


def test_one_line_for_each_kind_and_shard(folder, caplog):
    change(folder, "train", 0, spoil(3, 4, 5))
    change(folder, "train", 1, spoil(310, 311))
    change(folder, "train", 1, spoil(320, how="range"))
    with caplog.at_level(logging.WARNING):
        stream = train(folder, max_bad=10, workers=2)
        for _ in range(2):
            epoch(stream)
    lines = [record.getMessage() for record in caplog.records if record.name == "adaptive.data.faults"]
    assert len(lines) == 3
    assert stream.bad.count == 6
    assert all("bad data, " in line and "\n" not in line for line in lines)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_leaves_them_out_and_knows_how_many(folder, workers):
    change(folder, "val", 0, spoil(3, 4, 150, split="val"))
    change(folder, "val", 0, spoil(9, how="word", split="val"))
    streams = [evaluation(folder, max_bad=4, rank=rank, world=2, workers=workers) for rank in range(2)]
    for _ in range(2):  # a second pass counts the same
        found = [list(stream) for stream in streams]
        ids = [i for part in found for batch in part for i in batch.ids.tolist() if i >= 0]
        assert sorted(ids) == sorted(set(range(200)) - {3, 4, 9, 150})
        for batch in found[0]:
            assert torch.equal(batch.ids < 0, batch.labels < 0)
            assert not batch.images[batch.ids < 0].any()
        assert sum(sum(stream.left_out.values()) for stream in streams) == 4
        assert sum(stream.bad.count for stream in streams) == 4


def forward(images):
    return [images.flatten(1)[:, :10]] * 2


def test_totals_stay_asserted(folder):
    change(folder, "val", 0, spoil(3, 150, split="val"))
    stream = evaluation(folder, max_bad=2)
    measured = measure_exits(forward, stream, 2, torch.device("cpu"), stream.total)
    assert measured.samples == 198
    outputs = collect(forward, stream, torch.device("cpu"), stream.total)
    assert outputs.left_out == {"undecodable image": 2}
    assert len(outputs.labels) == 198
    with pytest.raises(DataError, match="evaluation counted 198 images, but the split holds 199"):
        measure_exits(forward, stream, 2, torch.device("cpu"), stream.total + 1)
    with pytest.raises(DataError, match=r"4 bad images over all ranks, data\.max_bad = 2"):
        measure_exits(forward, stream, 2, torch.device("cpu"), stream.total, lambda values: values * 2)


def test_shards_at_a_url(folder, packed, planned, tmp_path):
    index = load_index(packed).split("train")
    low, high = index.counts[0], index.counts[0] + index.counts[1]
    expected = [high + (i - low) % index.counts[2] if low <= i < high else i for i in planned]
    for how, kind in (("404", "missing shard"), ("wrong", "checksum mismatch"), ("503", "unreadable shard")):
        with serve(folder) as server:
            stream = train(server.url, max_bad=300, attempts=2, cache=str(tmp_path / how), workers=1)
            server.faults = {index.shards[1].name: Faulty(how)}
            assert ids_of(epoch(stream)) == expected
            assert stream.bad.by_kind == {kind: sum(low <= i < high for i in set(planned))}


def test_ledger():
    ledger = Ledger(2)
    faults = [Fault("wrong label", "a.tar", n, f"line {n}") for n in range(3)]
    ledger.add(faults[:2])
    ledger.add(faults[:2])
    assert (ledger.count, ledger.by_kind) == (2, {"wrong label": 2})
    ledger.check()
    ledger.add(faults)
    with pytest.raises(DataError, match=r"3 bad samples, data\.max_bad = 2 allows no more: .*line 0 \| .*line 2"):
        ledger.check()


class TestVerify:
    """``adaptive pack --verify``."""

    def test_a_good_dataset_is_fine(self, packed, capsys):
        with pytest.raises(SystemExit) as ended:
            main(["pack", "--verify", str(packed), "--workers", "2"])
        assert ended.value.code == 0
        assert "1,797 of 1,797 images are fine, 0 faults" in capsys.readouterr().out

    def test_every_fault_is_listed(self, folder, capsys):
        change(folder, "train", 0, spoil(3, 4))
        change(folder, "train", 0, spoil(5, how="range"))
        change(folder, "train", 2, spoil(610, how="member"))
        drop_sample(folder, 3)
        lose(folder, 1)
        path = folder / "val-00000.tar"
        content = bytearray(path.read_bytes())
        content[-5000] ^= 1  # in the end of the tar, where no sample is
        path.unlink()
        path.write_bytes(content)
        with pytest.raises(SystemExit) as ended:
            main(["pack", "--verify", str(folder), "--json"])
        assert ended.value.code == 1
        found = json.loads(capsys.readouterr().out)
        assert [
            (fault["kind"], fault["shard"], fault["key"]) for fault in found["faults"] if "train" in fault["shard"]
        ] == [
            ("undecodable image", "train-00000.tar", "train-00000003"),
            ("undecodable image", "train-00000.tar", "train-00000004"),
            ("wrong label", "train-00000.tar", "train-00000005"),
            ("missing shard", "train-00001.tar", ""),
            ("corrupt member", "train-00002.tar", "train-00000610"),
            ("wrong sample count", "train-00003.tar", ""),
        ]
        assert ("checksum mismatch", "val-00000.tar") in {(f["kind"], f["shard"]) for f in found["faults"]}
        counts = load_index(folder).split("train").counts
        assert found["fine"] == 1797 - counts[1] - counts[3] - 4
        assert all("\n" not in fault["message"] for fault in found["faults"])

    def test_at_a_url(self, folder, capsys):
        change(folder, "train", 0, spoil(3))
        with serve(folder) as server:
            server.faults = {"val-00000.tar": Faulty("wrong")}
            found = verify(server.url, DataConfig(path=server.url, attempts=2), workers=1, progress=False)
        kinds = [(fault.kind, fault.shard, fault.key) for fault in found.faults]
        assert kinds[0] == ("undecodable image", "train-00000.tar", "train-00000003")
        assert ("checksum mismatch", "val-00000.tar", "") in kinds
        assert found.total == 1797
        assert 1790 < found.fine < 1797

    def test_what_is_no_dataset(self, tmp_path, capsys):
        for words, code, part in (
            (["pack", "--verify", str(tmp_path)], 1, "holds no index.json"),
            (["pack", "a", "--verify", "b"], 1, "stands alone"),
            (["pack"], 2, "SOURCE and DEST missing"),
            (["pack", "a"], 2, "DEST missing"),
        ):
            with pytest.raises(SystemExit) as ended:
                main(words)
            assert ended.value.code == code
            assert part in capsys.readouterr().err
