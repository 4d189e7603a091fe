"""Crops made from records on a device against those that a worker makes of the same draws.

simplejpeg stands in for nvJPEG behind the same interface: what decodes JPEGs of a batch, and refuses one it cannot.
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

from adaptive.config.loading import parse_config
from adaptive.config.sections import DataConfig
from adaptive.data.images.encoded import BatchDecoder, EncodedTransform, is_encoded, pack_records
from adaptive.data.images.nvjpeg import nvjpeg_decoder
from adaptive.data.images.transforms import train_transform
from adaptive.data.packing.pack import pack
from adaptive.data.reading.loading import LoaderOptions, Loading, load_batches
from adaptive.data.reading.pipeline import BatchSource, SampleTransform
from adaptive.data.reading.stream import Batch, TrainStream
from adaptive.data.seeding import AUGMENT, seeded
from adaptive.data.shards.index import load_index
from adaptive.errors import ConfigError, DataError, MachineError
from tests.data.conftest import colour_field
from tests.data.images.test_decode_window import encode, turned

CPU = torch.device("cpu")
PHOTO = colour_field(np.random.default_rng(5), 90, 61)


def config(**changes: Any) -> DataConfig:
    return DataConfig(path="unused", image_size=32, **changes)


class StandIn:
    """Decodes JPEGs on the CPU; refuses a batch that holds one of another kind, as nvJPEG does."""

    def __init__(self, most: int = 10**9) -> None:
        self.calls: list[int] = []
        self.most = most  # bytes of a file

    def __call__(self, files: Sequence[Tensor]) -> list[Tensor]:
        self.calls.append(len(files))
        if any(len(file) > self.most for file in files):
            raise RuntimeError("nvjpegDecode failed: 2")
        try:
            pixels = [simplejpeg.decode_jpeg(file.numpy().tobytes(), "RGB") for file in files]
        except ValueError as error:
            raise RuntimeError(str(error)) from None
        return [torch.from_numpy(p).permute(2, 0, 1) for p in pixels]


def both(data: DataConfig, files: Sequence[bytes], decode: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The CPU's crops, those of a device, and the records, from the same draws."""
    whole, encoded = train_transform(data, normalize=False), EncodedTransform(data)
    wanted, records = [], []
    for number, file in enumerate(files):
        with seeded(AUGMENT, number):
            wanted.append(whole(file))
            after = torch.rand(1)
        with seeded(AUGMENT, number):
            records.append(encoded(file))
            assert torch.equal(torch.rand(1), after), "as many draws"
    found = BatchDecoder(data.image_size, CPU, decode)(pack_records(records), range(len(files)))
    return torch.stack(wanted), found, records


def assert_same_crops(found: Tensor, wanted: Tensor) -> None:
    assert found.dtype == torch.uint8
    assert found.shape == wanted.shape
    assert (found.int() - wanted.int()).abs().max() <= 2, "the CPU resamples bytes, the device floats"


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "random"])
def test_the_crops_are_those_of_the_workers(interpolation: str) -> None:
    sizes = [(90, 61), (33, 200), (32, 32), (7, 9)]
    files = [encode(PHOTO.resize(size), quality=90, progressive=i % 2 == 1) for i in range(4) for size in sizes]
    files.append(encode(PHOTO.convert("L")))
    stand_in = StandIn()
    wanted, found, records = both(config(interpolation=interpolation), files, stand_in)
    assert_same_crops(found, wanted)
    assert all(record.dim() == 1 for record in records)
    assert stand_in.calls == [len(files)], "one call for all"


def test_what_no_gpu_decodes_alike_is_decoded_by_the_worker() -> None:
    files = [
        encode(PHOTO, "png"),
        turned(6),
        encode(PHOTO.convert("CMYK")),
        encode(PHOTO, quality=90),
    ]
    stand_in = StandIn()
    wanted, found, records = both(config(), files, stand_in)
    assert [record.dim() for record in records] == [3, 3, 3, 1]
    assert torch.equal(found[:3], wanted[:3])
    assert_same_crops(found, wanted)
    assert stand_in.calls == [1]
    assert is_encoded(records)
    assert not is_encoded(records[:3])


def test_a_refused_batch_is_decoded_one_by_one_and_by_pillow(caplog: pytest.LogCaptureFixture) -> None:
    large = encode(Image.effect_noise((200, 200), 90).convert("RGB"), quality=95)
    files = [encode(PHOTO), large, encode(PHOTO, quality=95)]
    stand_in = StandIn(most=len(large) - 1)
    with caplog.at_level(logging.WARNING):
        wanted, found, _ = both(config(), files, stand_in)
    assert_same_crops(found, wanted)
    assert stand_in.calls == [3, 1, 1, 1]
    assert "decoded one by one" in caplog.text
    damaged = encode(PHOTO)
    table = damaged.index(b"\xff\xc4") + 4
    damaged = damaged[:table] + b"\x77" + damaged[table + 1 :]  # a Huffman table that is not there
    record = EncodedTransform(config())(damaged)
    decoder = BatchDecoder(32, CPU, StandIn(most=0))
    with pytest.raises(DataError, match=r"sample 7: .*; copy its shard again or pack again, or .* data.decoder=cpu"):
        decoder(pack_records([record]), [7])


def test_batches_of_a_stream_on_workers_and_without(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for number in range(24):
        folder = tmp_path / "photos" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        colour_field(generator, 40 + number, 50).save(folder / f"{number}.{'png' if number % 5 == 0 else 'jpg'}")
    pack(str(tmp_path / "photos"), tmp_path / "packed", progress=False, workers=1)
    index = load_index(tmp_path / "packed")
    base = DataConfig(path=str(tmp_path / "packed"), image_size=32)
    plain = TrainStream(index, base, "train", seed=3, global_batch=4, micro_batch=4)
    wanted = list(plain.batches(0, 6))

    def encoded(workers: int) -> Iterator[Batch]:
        data = base.model_copy(update={"decoder": "cuda"})
        loading = Loading.of(data, 4, LoaderOptions(workers=workers))
        loading = Loading(4, workers, CPU, loading.normalize, BatchDecoder(32, CPU, StandIn()))
        transform = SampleTransform.for_training(data, 3, index.split("train").count)
        source = BatchSource(plain._schedule, 0, 6, plain._shards, transform, replace_bad=True)
        yield from load_batches(source, loading)

    for workers in (0, 2):
        for found, expected in zip(encoded(workers), wanted, strict=True):
            assert found.ids.tolist() == expected.ids.tolist()
            assert found.labels.tolist() == expected.labels.tolist()
            assert (found.images - expected.images).abs().max() <= 2.1 / 255 / min(base.std)


def test_mistakes_name_the_remedy() -> None:
    plain = {"path": "none", "decoder": "cuda"}
    tree = {"model": {"backbone": "resnet18"}, "data": plain}
    parse_config(tree)
    for change, message in (
        ({"auto_augment": "rand-m9"}, r"no pixels for data.auto_augment = 'rand-m9'; use data.auto_augment=null or "),
        ({"color_jitter": 0.4}, r"data.color_jitter = 0.4; use data.color_jitter=0 or data.decoder=cpu"),
        ({"erasing": 0.25}, r"data.erasing = 0.25; use data.erasing=0"),
        ({"crop": "pad"}, r"knows data.crop = 'resize', not 'pad'; use data.decoder=cpu"),
        ({"max_bad": 3}, r"data.max_bad = 3: .*; use data.max_bad=0 or data.decoder=cpu"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_config({**tree, "data": {**plain, **change}})
    with pytest.raises(ConfigError, match=r"train.device = 'cpu'; use data.decoder=cpu"):
        parse_config({**tree, "train": {"device": "cpu"}})
    with pytest.raises(MachineError, match=r"needs a CUDA device, training is on 'cpu'; use data.decoder=cpu"):
        nvjpeg_decoder(CPU)


@pytest.mark.device
def test_nvjpeg(device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("nvJPEG needs a GPU: pytest --device cuda")
    pytest.importorskip("torchcodec")
    files = [encode(PHOTO, quality=90, progressive=progressive) for progressive in (False, True)]
    files += [encode(PHOTO.convert("L")), encode(PHOTO, "png")]
    wanted, _, records = both(config(), files, StandIn())
    found = BatchDecoder(32, device, nvjpeg_decoder(device))(pack_records(records), range(len(files))).cpu()
    assert (found.int() - wanted.int()).abs().float().mean() < 2, "another inverse transform, other chroma upsampling"
