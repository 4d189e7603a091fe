import io
import itertools
import os
import random
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from adaptive.config.sections import DataConfig
from adaptive.data.packing.pack import pack
from adaptive.data.reading.order import epoch_order
from adaptive.data.reading.pipeline import Loading
from adaptive.data.reading.stream import PADDING, EvaluationStream, LoaderOptions, TrainStream
from adaptive.data.shards.index import SplitInfo, load_index, write_index
from adaptive.data.shards.reader import ShardReader
from adaptive.errors import ConfigError, DataError
from adaptive.files import file_sha256 as sha256

# More workers than this machine has cores are what some of these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def config(folder, **changes):
    settings = {"image_size": 8, "crop": "pad", "crop_padding": 1, "erasing": 0.3, "shuffle_window": 2}
    return DataConfig(path=str(folder), **(settings | changes))


def train(folder, *, workers=0, rank=0, world=1, micro=16, batch=48, seed=5, **changes):
    data, loader = config(folder, **changes), LoaderOptions(rank, world, workers)
    return TrainStream(load_index(folder), data, "train", loader, seed=seed, global_batch=batch, micro_batch=micro)


def evaluation(folder, split="val", *, batch=32, rank=0, world=1, workers=0, **changes):
    data, loader = config(folder, **changes), LoaderOptions(rank, world, workers)
    return EvaluationStream(load_index(folder), data, split, loader, batch=batch)


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def repack(folder, change):
    """Rewrite the validation shard with changed members, and an index that fits."""
    index = load_index(folder)
    shard = index.splits["val"].shards[0]
    path = folder / shard.name
    with tarfile.open(path) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(path, "w") as tar:
        for name, data in change(members):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    shard = shard.model_copy(update={"bytes": path.stat().st_size, "sha256": sha256(path)})
    val = SplitInfo(shards=[shard], count=shard.count)
    write_index(folder, index.classes, index.splits | {"val": val})
    return path


@pytest.fixture
def small(tmp_path):
    pack("builtin:digits", tmp_path / "digits", progress=False, workers=1)
    return tmp_path / "digits"


def test_batches_follow_the_plan_and_hold_the_right_images(digits):
    stream = train(digits, crop="none", flip=0.0, erasing=0.0, crop_padding=0)
    info = load_index(digits).split("train")
    assert len(info.shards) > 3
    order = epoch_order(info.counts, 5, 1, 2)
    stored = []
    for shard in info.shards:
        with tarfile.open(digits / shard.name) as tar:
            content = {member.name: tar.extractfile(member).read() for member in tar}
        for name in content:
            if name.endswith(".png"):
                stored.append((content[name], int(content[name.replace(".png", ".cls")])))
    first = stream.steps_per_epoch
    batches = list(stream.batches(first, first + 2))
    assert torch.cat([batch.ids for batch in batches]).tolist() == order[:96].tolist()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for batch in batches:
        for image, label, identity in zip(*batch, strict=True):
            data, expected = stored[identity]
            pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1) / 255
            torch.testing.assert_close(image, (pixels - mean[:, None, None]) / std[:, None, None])
            assert label == expected


@pytest.mark.device
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_batches_on_the_device_are_the_cpus(digits, device, workers, layout, monkeypatch):
    """Copied from pinned memory and normalised there, where a division may round its last bit otherwise."""
    pinned = []
    finish = Loading.finish

    def spy(loading, made):
        pinned.append(made.images.is_pinned())
        return finish(loading, made)

    monkeypatch.setattr(Loading, "finish", spy)
    streams = []
    for where in (torch.device("cpu"), device):
        pinned.clear()
        loader = LoaderOptions(workers=workers, device=where, layout=layout)
        stream = TrainStream(
            load_index(digits), config(digits), "train", loader, seed=5, global_batch=48, micro_batch=16
        )
        streams.append(list(stream.batches(2, 4)))
    assert len(pinned) == 6
    for expected, batch in zip(*streams, strict=True):
        assert batch.images.device == device
        assert batch.images.is_contiguous(memory_format=layout)
        torch.testing.assert_close(batch.images.cpu(), expected.images, rtol=1e-6, atol=1e-6)
        assert torch.equal(batch.labels, expected.labels)
        assert torch.equal(batch.ids, expected.ids)
        assert batch.labels.is_pinned() == (device.type == "cuda")
    assert set(pinned) == {device.type == "cuda"}


def test_workers_do_not_change_anything(digits):
    first = train(digits).steps_per_epoch - 2  # over the end of an epoch
    expected = list(train(digits, workers=0).batches(first, first + 4))
    assert len(expected) == 12
    for workers in (1, 3):
        found = list(train(digits, workers=workers).batches(first, first + 4))
        assert all(same(a, b) for a, b in zip(expected, found, strict=True))


def test_any_step_can_be_the_first(digits):
    stream = train(digits)
    steps = stream.steps_per_epoch + 3
    everything = list(stream.batches(0, steps))
    assert len(everything) == 3 * steps
    for start in (1, stream.steps_per_epoch - 1, stream.steps_per_epoch, steps - 1):
        resumed = list(train(digits).batches(start, steps))
        assert all(same(a, b) for a, b in zip(everything[3 * start :], resumed, strict=True))


@pytest.mark.parametrize(("world", "micro"), [(2, 8), (3, 16), (4, 4)])
def test_global_batches_are_the_same_on_any_number_of_ranks(digits, world, micro):
    alone = list(train(digits, micro=48).batches(3, 6))
    ranks = [list(train(digits, rank=rank, world=world, micro=micro).batches(3, 6)) for rank in range(world)]
    accumulation = 48 // (micro * world)
    for step in range(3):
        parts = [
            ranks[rank][step * accumulation + m] for m, rank in itertools.product(range(accumulation), range(world))
        ]
        joined = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
        assert same(joined, alone[step])  # ids, labels and the augmented pixels


def test_an_epoch_takes_no_sample_twice_and_epochs_augment_anew(digits):
    stream = train(digits)
    ids = torch.cat([batch.ids for batch in stream.batches(0, stream.steps_per_epoch)])
    assert len(set(ids.tolist())) == len(ids) == stream.steps_per_epoch * 48
    first, second = {}, {}
    for images, start in ((first, 0), (second, stream.steps_per_epoch)):
        for batch in stream.batches(start, start + stream.steps_per_epoch):
            images.update(zip(batch.ids.tolist(), batch.images, strict=True))
    shared = set(first) & set(second)
    assert sum(not torch.equal(first[i], second[i]) for i in shared) > 0.6 * len(shared)


def test_reading_in_the_main_process_leaves_its_generators_alone(digits):
    before = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist()
    next(train(digits).batches(0, 1))
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert np.random.get_state()[1].tolist() == before[2]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("split", ["val", "train"])
def test_evaluation_sees_every_image_once(digits, world, split):
    total = load_index(digits).split(split).count
    streams = [evaluation(digits, split, rank=rank, world=world, workers=rank * 2) for rank in range(world)]
    parts = [list(stream) for stream in streams]
    assert {len(part) for part in parts} == {len(streams[0])}
    batches = list(itertools.chain.from_iterable(parts))
    ids = torch.cat([batch.ids for batch in batches])
    assert sorted(ids[ids != PADDING].tolist()) == list(range(total))
    for batch in batches:
        assert batch.images.shape == (32, 3, 8, 8)
        padded = batch.ids == PADDING
        assert torch.equal(padded, batch.labels == PADDING)
        assert not batch.images[padded].any()


def test_one_shard_feeds_many_workers_and_passes_repeat(small):
    assert len(load_index(small).split("val").shards) == 1
    stream = evaluation(small, workers=8, batch=20)
    first, second = list(stream), list(stream)
    assert all(same(a, b) for a, b in zip(first, second, strict=True))
    assert sum(int((batch.ids >= 0).sum()) for batch in first) == 200


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_is_one_line_that_names_shard_and_key(small, workers):
    def truncate(members):
        return [(n, d[: len(d) // 2] if n.startswith("val-00000150") and n.endswith("png") else d) for n, d in members]

    path = repack(small, truncate)
    batches = iter(evaluation(small, workers=workers))
    for _ in range(4):
        next(batches)  # what comes before the damage is delivered
    with pytest.raises(DataError, match=rf"{path}, sample val-00000150: .*truncated") as caught:
        next(batches)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda ms: [(n, b"77" if n == "val-00000003.cls" else d) for n, d in ms], r"val-00000003: label 77 .* 0\.\.9"),
        (lambda ms: [(n, b"dog" if n == "val-00000003.cls" else d) for n, d in ms], "val-00000003: label b'dog'"),
        (lambda ms: [(n, d) for n, d in ms if n != "val-00000003.cls"], r"val-00000003: has no label"),
        (lambda ms: [(n.replace("3.png", "3.pyd"), d) for n, d in ms], r"has no image .* only cls, json, pyd"),
        (
            lambda ms: [(n.replace("3.png", "3.seg.png"), d) for n, d in ms],
            "has no image .* only cls, json, seg.png; a key ends at the first dot",
        ),
        (
            lambda ms: [(n, d) for n, d in ms if n[-3:] != "cls"],
            "a class in json or txt, as img2dataset writes, is not",
        ),
        (lambda ms: ms[:-3], "holds 199 samples, the index says 200"),
    ],
)
def test_wrong_content_is_refused(small, change, reason):
    repack(small, change)
    with pytest.raises(DataError, match=reason):
        list(evaluation(small))


def test_long_names_and_pickles_are_no_problem(small):
    before = list(evaluation(small))

    def extend(members):
        for name, data in members:
            yield f"{'folder/' * 20}{name}", data
            if name.endswith(".cls"):
                yield f"{'folder/' * 20}{name[:-4]}.pyd", b"cos\nsystem\n(S'touch /tmp/never'\ntR."

    repack(small, lambda members: list(extend(members)))
    assert all(same(a, b) for a, b in zip(before, evaluation(small), strict=True))


def test_missing_and_garbled_shards_are_found(small):
    path = small / "val-00000.tar"
    size = path.stat().st_size
    path.write_bytes(b"no tar" * (size // 6) + b"x" * (size % 6))
    with pytest.raises(DataError, match=r"val-00000\.tar is not a tar file"):
        list(evaluation(small, workers=1))
    path.unlink()
    with pytest.raises(DataError, match="lacks 1 of 1 val shards"):
        evaluation(small)


def test_settings_that_cannot_work_are_refused(small):
    with pytest.raises(DataError, match="global_batch = 5000"):
        train(small, batch=5000, micro=5000)
    with pytest.raises(ConfigError, match="not divisible"):
        train(small, batch=48, micro=20)
    with pytest.raises(DataError, match="no split 'dev'"):
        evaluation(small, "dev")


@pytest.mark.parametrize("erasing", [0.0, 0.3])  # normalised on the device, or with the transform
def test_images_come_in_the_layout_asked_for(digits, erasing):
    def batches(layout):
        data = config(digits, erasing=erasing)
        loader = LoaderOptions(workers=1, layout=layout)
        index = load_index(digits)
        stream = TrainStream(index, data, "train", loader, seed=5, global_batch=16, micro_batch=16)
        return [*stream.batches(0, 2), *EvaluationStream(index, data, "val", loader, batch=32)]

    for plain, last in zip(batches(torch.contiguous_format), batches(torch.channels_last), strict=True):
        assert plain.images.is_contiguous()
        assert last.images.is_contiguous(memory_format=torch.channels_last)
        assert same(plain, last)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("split", ["val", "train"])
def test_headers_are_scanned_once_for_all_validations_and_workers(digits, tmp_path, monkeypatch, split, workers):
    """Each shard once, counted over all processes; a shard that was replaced meanwhile is scanned anew."""
    counted, scan = tmp_path / "scans", ShardReader._scan

    def counting(self, shown, descriptor, shard):
        with counted.open("a") as file:
            file.write(f"{shard.name}\n")
        return scan(self, shown, descriptor, shard)

    monkeypatch.setattr(ShardReader, "_scan", counting)
    folder = tmp_path / "copy"
    shutil.copytree(digits, folder)
    shards = load_index(folder).split(split).shards
    stream = evaluation(folder, split, workers=workers)
    first, second = list(stream), list(stream)
    assert sorted(counted.read_text().split()) == [shard.name for shard in shards]
    for one, other in zip(first, second, strict=True):
        assert same(one, other)
    again = folder / shards[0].name
    again.write_bytes(again.read_bytes())
    os.utime(again, (1, 1))
    for one, other in zip(first, stream, strict=True):
        assert same(one, other)
    assert sorted(counted.read_text().split()).count(shards[0].name) == (2 if not workers else 1 + workers)


def test_a_shard_that_cannot_be_scanned_beforehand_is_the_readers_to_report(small):
    stream = evaluation(small, workers=1, max_bad=0)
    path = small / load_index(small).split("val").shards[0].name
    content = path.read_bytes()
    path.write_bytes(b"x" * len(content))
    with pytest.raises(DataError, match="is not a tar file"):
        list(stream)
    path.write_bytes(content)
    assert sum(int((batch.labels >= 0).sum()) for batch in stream) == stream.total
