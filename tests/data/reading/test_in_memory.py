"""A split in memory gives the batches of its shards, bit for bit, and says why where it cannot."""

import itertools
import os
import random
import tarfile
from contextlib import closing
from multiprocessing import active_children
from multiprocessing.context import ForkProcess

import numpy as np
import pytest
import torch

from adaptive.config.sections import DataConfig
from adaptive.data.packing.pack import pack
from adaptive.data.reading import in_memory
from adaptive.data.reading.in_memory import DecodedSplit, check_memory, needed_bytes
from adaptive.data.reading.loading import Loading
from adaptive.data.reading.stream import PADDING, EvaluationStream, LoaderOptions, TrainStream
from adaptive.data.shards.index import load_index
from adaptive.errors import DataError, MachineError
from tests.data.conftest import make_photos
from tests.data.reading.test_stream import same
from tests.data.test_bad_data import change, spoil

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def config(folder, **changes):
    settings = {"image_size": 8, "crop": "pad", "crop_padding": 1, "shuffle_window": 2, "in_memory": True}
    return DataConfig(path=str(folder), **(settings | changes))


def decode(data, split="train", workers=0):
    return DecodedSplit.decode(load_index(data.path, data), data, split, training=split == "train", workers=workers)


def train(data, decoded=None, *, workers=0, rank=0, world=1, batch=48, seed=5):
    loader = LoaderOptions(rank, world, workers)
    micro = batch // world // 2
    index = load_index(data.path, data)
    return TrainStream(index, data, "train", loader, seed=seed, global_batch=batch, micro_batch=micro, decoded=decoded)


def evaluation(data, decoded=None, *, workers=0, rank=0, world=1):
    loader = LoaderOptions(rank, world, workers)
    return EvaluationStream(load_index(data.path, data), data, "val", loader, batch=32, decoded=decoded)


def equal(expected, found):
    return all(same(a, b) for a, b in zip(expected, found, strict=True))


@pytest.fixture(scope="module")
def decoded(digits):
    return decode(config(digits))


MATRIX = list(itertools.product(["pad", "none"], [0.0, 0.5, 1.0], [1, 2, 4]))
FEW = [("pad", 0.5, 1), ("pad", 0.0, 2), ("none", 0.5, 4), ("none", 1.0, 1)]


@pytest.mark.parametrize(
    ("crop", "flip", "world"),
    [pytest.param(*one, marks=[] if one in FEW else pytest.mark.full) for one in MATRIX],
)
def test_batches_are_those_of_the_shards(digits, decoded, crop, flip, world):
    data = config(digits, crop=crop, flip=flip)
    steps = train(data).steps_per_epoch
    first, last = steps - 2, 2 * steps + 1  # the second epoch, the last steps of the first and the third's first
    for rank in range(world):
        expected = train(data, rank=rank, world=world).batches(first, last)
        stream = train(data, decoded, rank=rank, world=world)
        assert equal(list(expected), list(stream.batches(first, last)))
        assert equal(list(train(data, rank=rank, world=world).batches(first + 5, first + 7)),
                     list(stream.batches(first + 5, first + 7)))  # fmt: skip


@pytest.mark.parametrize("world", [2, 4])
def test_global_batches_are_the_same_on_any_number_of_ranks(digits, decoded, world):
    def step(world):
        ranks = [list(train(config(digits), decoded, rank=rank, world=world).batches(30, 31)) for rank in range(world)]
        parts = [rank[micro] for micro in range(2) for rank in ranks]
        return [torch.cat(tensors) for tensors in zip(*parts, strict=True)]

    assert same(step(1), step(world))


@pytest.mark.parametrize("world", [1, 3])
def test_evaluation_is_that_of_the_shards(digits, world):
    data = config(digits)
    decoded = decode(data, "val")
    for rank in range(world):
        stream = evaluation(data, decoded, rank=rank, world=world)
        assert equal(list(evaluation(data, rank=rank, world=world)), list(stream))
    assert PADDING in list(stream)[-1].ids


def test_memory_starts_no_loader_processes(digits, decoded):
    def processes(stream):
        with closing(stream) as batches:
            next(batches)
            return sum(isinstance(child, ForkProcess) for child in active_children())

    data = config(digits)
    assert processes(train(data, workers=2).batches(0, 3)) == processes(iter(evaluation(data, workers=2))) == 2
    assert processes(train(data, decoded, workers=2).batches(0, 3)) == 0
    assert processes(iter(evaluation(data, decode(data, "val"), workers=2))) == 0


def test_cropping_on_the_device_changes_nothing(digits, decoded, monkeypatch):
    """A GPU gets whole images and crops them; the same arithmetic, here on the CPU."""
    data = config(digits, crop_padding=3)
    expected = list(train(data).batches(3, 6))
    monkeypatch.setattr(Loading, "crops_on_device", True)
    found = list(train(data, decoded).batches(3, 6))
    assert equal(expected, found)
    assert all(batch.images.is_contiguous() for batch in found)


@pytest.mark.device
def test_batches_on_the_device_are_the_shards(digits, decoded, device):
    """A division there may round its last bit otherwise."""
    data, index = config(digits), load_index(digits)
    loader = LoaderOptions(device=device, layout=torch.channels_last)
    stream = TrainStream(index, data, "train", loader, seed=5, global_batch=48, micro_batch=24, decoded=decoded)
    for expected, batch in zip(train(data).batches(3, 6), stream.batches(3, 6), strict=True):
        assert batch.images.device == device
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(batch.images.cpu(), expected.images, rtol=1e-6, atol=1e-6)
        assert torch.equal(batch.ids, expected.ids)
        assert batch.labels.is_pinned() == (device.type == "cuda")


def test_no_generator_is_touched(digits, decoded):
    before = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist()
    next(train(config(digits), decoded).batches(0, 1))
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert np.random.get_state()[1].tolist() == before[2]


@pytest.fixture
def damaged(digits, tmp_path):
    """The digits with bad images and labels: some side by side, one the last of its shard."""
    for path in digits.iterdir():
        os.link(path, tmp_path / path.name)
    first = load_index(digits).split("train").counts[0]
    change(tmp_path, "train", 0, spoil(3, 4, first - 1))
    change(tmp_path, "train", 1, spoil(first + 7, how="word"))
    change(tmp_path, "val", 0, spoil(0, 40, split="val"))
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_replaced_and_left_out_alike(damaged, workers):
    data = config(damaged, max_bad=6)
    shards, memory = train(data), train(data, decode(data, workers=workers), workers=workers)
    assert equal(list(shards.batches(0, 28)), list(memory.batches(0, 28)))
    assert shards.bad.by_kind == memory.bad.by_kind
    assert shards.bad.count >= 3
    shards, memory = evaluation(data), evaluation(data, decode(data, "val", workers))
    assert equal(list(shards), list(memory))
    assert shards.left_out == memory.left_out == {"undecodable image": 2}


def test_more_bad_samples_than_allowed_end_it_at_once(damaged):
    with pytest.raises(DataError, match=r"train-00000\.tar, sample train-00000003"):
        decode(config(damaged))
    with pytest.raises(DataError, match=r"4 bad samples, data\.max_bad = 3"):
        decode(config(damaged, max_bad=3))


def test_a_url_is_loaded_through_the_cache_once(digits, decoded, server, tmp_path):
    data = config(server.url, cache=str(tmp_path / "cache"), shuffle_window=1)
    found = decode(data)
    assert torch.equal(found.pixels, decoded.pixels)
    asked = {name: count for name, count in server.gets().items() if name.endswith(".tar")}
    assert asked == {shard.name: 1 for shard in load_index(digits).split("train").shards}
    list(train(data, found).batches(0, 40))
    assert sum(server.gets().values()) == sum(asked.values()) + sum(
        count for name, count in server.gets().items() if not name.endswith(".tar")
    )


def test_images_of_another_size_are_refused(digits, tmp_path):
    with pytest.raises(DataError, match=r"data\.image_size = 32, but .* 8 x 8 pixels.*data\.image_size=8.*in_memory=f"):
        decode(config(digits, image_size=32))
    pack(make_photos(tmp_path / "photos", each=9), tmp_path / "packed", progress=False, workers=1)
    with pytest.raises(DataError, match=r"has 2\d x 24 pixels.*images of one square size, or data\.in_memory=false"):
        decode(config(tmp_path / "packed", image_size=24))


def test_what_does_not_fit_is_refused_with_the_numbers(digits, monkeypatch):
    data, index = config(digits), load_index(digits)
    images = index.split("train").count + index.split("val").count
    assert needed_bytes(index, data) == images * (8 * 8 * 3 + 16)
    check_memory(index, data)
    monkeypatch.setattr(in_memory, "available_memory", lambda: 3 * 2**17)
    with pytest.raises(MachineError) as caught:
        check_memory(index, data.model_copy(update={"image_size": 1024}))
    needed = images * (1024**2 * 3 + 16) / 2**20
    assert f"take {needed:,.0f} MiB of this machine's memory (0 MiB are available)" in str(caught.value)
    assert "data.in_memory=false" in str(caught.value)
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: os.open("/nowhere/at/all", 0))
    with pytest.raises(MachineError, match="No such file or directory"):
        decode(data)


def test_memory_is_mapped_by_others_while_it_is_offered(digits, decoded):
    own = decode(config(digits))
    other = DecodedSplit.attach(own.offer())
    own.pixels[0] = 17
    assert (other.pixels[0] == 17).all()
    assert torch.equal(other.pixels[1:], decoded.pixels[1:])
    assert np.array_equal(other.labels, decoded.labels)
    offer = own.offer()
    own.close_handle()
    assert (other.pixels[0] == 17).all()
    with pytest.raises(MachineError, match="cannot be reached"):
        DecodedSplit.attach(offer)


def test_a_system_without_anonymous_files_keeps_memory_to_itself(digits, decoded, monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    own = decode(config(digits), workers=1)
    assert torch.equal(own.pixels, decoded.pixels)
    assert not own.shared
    assert own.offer().path == ""


def test_pixels_are_the_stored_ones(digits, decoded):
    shard = load_index(digits).split("train").shards[0]
    with tarfile.open(digits / shard.name) as tar:
        labels = [int(tar.extractfile(member).read()) for member in tar if member.name.endswith(".cls")]
    assert decoded.labels[: len(labels)].tolist() == labels
    assert decoded.ids.tolist() == list(range(len(decoded.ids)))
    assert decoded.pixels.shape == (len(decoded.ids), 8, 8, 3)
