"""Packed data sets that the tests of this folder share."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from adaptive.data.packing.pack import PackOptions, PackReport, pack, pack_with_report
from adaptive.data.remote import transfer
from adaptive.data.shards.index import DatasetIndex
from tests.helpers.shard_server import ShardServer, serve


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in digits, in several shards of uneven size."""
    folder = tmp_path_factory.mktemp("digits") / "packed"
    pack("builtin:digits", folder, shard_count=300, progress=False, workers=2)
    return folder


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Downloads are tried again at once."""
    monkeypatch.setattr(transfer, "FIRST_PAUSE", 0.01)


@pytest.fixture
def server(digits: Path) -> Iterator[ShardServer]:
    """The digits at a URL."""
    with serve(digits) as running:
        yield running


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A small folder of class folders with colour images of different sizes."""
    return make_photos(tmp_path / "photos")


def make_photos(folder: Path, classes: int = 3, each: int = 4) -> Path:
    generator = np.random.default_rng(0)
    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True)
        for number in range(each):
            colour_field(generator, 20 + 3 * number, 24).save(folder / f"class{label}" / f"{number}.png")
    return folder


def colour_field(generator: np.random.Generator, width: int, height: int) -> Image.Image:
    """Smooth colours, so that JPEG compression changes little."""
    corners = generator.integers(0, 256, (2, 2, 3), dtype=np.uint8)
    return Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR)


def total(index: DatasetIndex) -> int:
    return sum(split.count for split in index.splits.values())


def report(source: Path | str, destination: Path, **options: Any) -> PackReport:
    return pack_with_report(source, destination, PackOptions(progress=False, workers=2, **options))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
