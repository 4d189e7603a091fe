"""The loaders that benchmarks/data.py compares, all with the same training transform, and the photos they read."""

from __future__ import annotations

import io
import itertools
import json
import random
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import psutil
import simplejpeg  # type: ignore[import-untyped]
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_dataset, create_loader
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch.utils.data import DataLoader
from torchvision import transforms  # type: ignore[import-untyped]
from torchvision.datasets import ImageFolder  # type: ignore[import-untyped]
from torchvision.io import ImageReadMode, decode_jpeg  # type: ignore[import-untyped]

from adaptive.config.sections import DataConfig
from adaptive.data.packing.pack import pack
from adaptive.data.reading.stream import LoaderOptions, TrainStream
from adaptive.data.shards.index import load_index
from adaptive.errors import DataError

SIZE = 224
CLASSES = 10


@dataclass(frozen=True)
class Job:
    """What a loader has to do.

    Attributes:
        photos: folder with train/CLASS/FILE, the shards in packed/ and those with smaller images in smaller/.
        interpolation: bilinear or bicubic.
        batch: images per batch.
        workers: processes; 0 reads in this one.
    """

    photos: str
    interpolation: Literal["bilinear", "bicubic"]
    batch: int
    workers: int = 0


def prepare(source: Path | None, folder: Path, count: int, side: int) -> list[int]:
    """Lay ``count`` photos out in folders, and as shards: as they are, and with sides of at most ``side``.

    Args:
        source: a tar file or folder of JPEGs, repeated until there are enough; None draws some.

    Returns:
        The bytes of the photos, one number each.

    Raises:
        DataError: no JPEG in the source.
    """
    photos = _drawn() if source is None else _read(source)
    if not photos:
        raise DataError(f"--source {source}: holds no file named .jpg or .jpeg; give a tar file or folder of photos")
    for number, photo in zip(range(count), itertools.cycle(photos), strict=False):
        path = folder / "train" / f"class_{number % CLASSES}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo)
    for name in ("val", "test"):  # packing wants them; nothing reads them here
        for number in range(CLASSES):
            path = folder / name / f"class_{number}" / "0.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(photos[0])
    pack(folder, folder.with_name("packed"), progress=False)
    pack(folder, folder.with_name("smaller"), max_side=side, progress=False)
    return [len(photo) for photo in itertools.islice(itertools.cycle(photos), count)]


def _read(source: Path) -> list[bytes]:
    if source.is_dir():
        return [p.read_bytes() for p in sorted(source.rglob("*")) if p.suffix.lower() in (".jpg", ".jpeg")]
    with tarfile.open(source) as tar:
        named = sorted(m.name for m in tar if m.isfile() and m.name.lower().endswith((".jpg", ".jpeg")))
        return [tar.extractfile(name).read() for name in named]  # type: ignore[union-attr]


def _drawn(count: int = 100) -> list[bytes]:
    """Draw soft colours with some noise: as many pixels and bytes as ImageNet's photos have."""
    generator, found = np.random.default_rng(0), []
    for _ in range(count):
        colours = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((500, 375))
        noise = generator.normal(0, 9, (375, 500, 1))
        stream = io.BytesIO()
        pixels = np.clip(np.asarray(colours) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(stream, "JPEG", quality=90)
        found.append(stream.getvalue())
    return found


def adaptive_stream(job: Job, shards: str = "packed", device: str = "cpu") -> Iterator[int]:
    """Yield the sizes of the batches that TrainStream makes."""
    folder = str(Path(job.photos).with_name(shards))
    data = DataConfig(path=folder, image_size=SIZE, interpolation=job.interpolation, workers=job.workers, flip=0.5)
    loader = LoaderOptions(workers=job.workers, device=torch.device(device))
    stream = TrainStream(
        load_index(folder), data, "train", loader, seed=0, global_batch=job.batch, micro_batch=job.batch
    )
    return (len(batch.images) for batch in stream.batches(0, 10**9))


def pixel_stream(job: Job) -> Iterator[int]:
    """Yield as `adaptive_stream` does, from a stream whose pixels an accelerator normalises: no core has to."""
    return adaptive_stream(job, device="meta")


def smaller_stream(job: Job) -> Iterator[int]:
    """Yield as `adaptive_stream` does, from images packed with --max-side."""
    return adaptive_stream(job, "smaller")


def torchvision_loader(job: Job) -> Iterator[int]:
    """Yield batches of ImageFolder and DataLoader with torchvision's transforms."""
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, interpolation=transforms.InterpolationMode(job.interpolation)),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
        ]
    )
    dataset = ImageFolder(str(Path(job.photos) / "train"), transform)
    loader = DataLoader(dataset, job.batch, shuffle=True, num_workers=job.workers, drop_last=True)
    return (len(images) for _ in itertools.count() for images, _ in loader)


def timm_loader(job: Job) -> Iterator[int]:
    """Yield batches of timm's dataset and loader, as its train.py makes them without a GPU."""
    dataset = create_dataset("", root=job.photos, split="train", is_training=True, batch_size=job.batch)
    loader = create_loader(
        dataset, (3, SIZE, SIZE), job.batch, is_training=True, no_aug=False, color_jitter=None,
        interpolation=job.interpolation, num_workers=job.workers, use_prefetcher=False, device=torch.device("cpu"),
        persistent_workers=False,
    )  # fmt: skip
    return (len(images) for _ in itertools.count() for images, _ in loader)


def bare(job: Job, decode: Callable[[bytes], torch.Tensor], packed: bool = False) -> Iterator[int]:
    """Yield batches of which nothing was done but to decode files in memory, to crop and to resize.

    With ``packed`` the crop is copied together first, which torch resamples in half of the time.
    """
    crop = RandomResizedCropAndInterpolation(SIZE, interpolation=job.interpolation)
    endless = _in_memory(job)
    while True:
        for photo in itertools.islice(endless, job.batch):
            pixels = decode(photo)
            top, left, height, width = crop.get_params(pixels, crop.scale, crop.ratio)
            window = pixels[None, :, top : top + height, left : left + width]
            if packed:
                window = window.contiguous(memory_format=torch.channels_last)
            F.interpolate(window, size=(SIZE, SIZE), mode=job.interpolation, antialias=True)
        yield job.batch


def _in_memory(job: Job) -> Iterator[bytes]:
    """Yield the photos for ever, in an order drawn once: any part of them is a fair sample, as a loader's batches are.

    In the order of their folders it would not be, for a folder holds every tenth of a few that are repeated.
    """
    paths = sorted((Path(job.photos) / "train").rglob("*.jpg"))
    random.Random(0).shuffle(paths)
    return itertools.cycle([path.read_bytes() for path in paths])


def bare_fastest(job: Job) -> Iterator[int]:
    """Yield as `bare` does, with the fastest decoder and resampling that were found, those of Adaptive."""
    return bare(job, lambda data: torch.from_numpy(simplejpeg.decode_jpeg(data, "RGB")).permute(2, 0, 1), packed=True)


def bare_torchvision(job: Job) -> Iterator[int]:
    """Yield as `bare` does, with torchvision's decoder."""
    return bare(job, lambda data: decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB))


def bare_pillow(job: Job) -> Iterator[int]:
    """Yield batches of which nothing was done but to decode, crop and resize with Pillow."""
    crop = RandomResizedCropAndInterpolation(SIZE, interpolation=job.interpolation)
    endless = _in_memory(job)
    while True:
        for photo in itertools.islice(endless, job.batch):
            crop(Image.open(io.BytesIO(photo)).convert("RGB"))
        yield job.batch


LOADERS: dict[str, tuple[str, Callable[[Job], Iterator[int]]]] = {
    "torchvision": ("torchvision ImageFolder + DataLoader", torchvision_loader),
    "timm": ("timm create_loader", timm_loader),
    "adaptive": ("Adaptive, packed as they are", adaptive_stream),
    "pixels": ("Adaptive, packed as they are, normalised by an accelerator", pixel_stream),
    "smaller": ("Adaptive, packed with --max-side", smaller_stream),
    "bare": ("bare: Adaptive's decoder and resampling", bare_fastest),
    "bare_torchvision": ("bare: torchvision's decoder, torch's resampling", bare_torchvision),
    "bare_pillow": ("bare: Pillow's decoder and resampling", bare_pillow),
}
WITH_WORKERS = ("torchvision", "timm", "adaptive", "smaller")


def alone(name: str, job: Job, batches: int) -> dict[str, float]:
    """Measure one loader in this process: seconds to its first batch, images/s after it, bytes of memory it takes.

    Memory is the proportional set size of this process and its workers, above what this process took before.
    """
    torch.set_num_threads(1)
    before = _memory()
    began = time.perf_counter()
    iterator = LOADERS[name][1](job)
    next(iterator)
    first = time.perf_counter()
    made = sum(itertools.islice(iterator, batches))
    ended = time.perf_counter()
    return {"first_batch_s": first - began, "images_per_second": made / (ended - first), "bytes": _memory() - before}


def in_turns(name: str, job: Job, asked: Connection) -> None:
    """Make a batch whenever something arrives, and send its size back."""
    torch.set_num_threads(1)
    iterator = LOADERS[name][1](job)
    while True:
        asked.recv()
        asked.send(next(iterator))


def _memory() -> float:
    process = psutil.Process()
    return float(sum(p.memory_full_info().pss for p in [process, *process.children(recursive=True)]))


if __name__ == "__main__":  # a fresh process of benchmarks/data.py
    given = json.loads(sys.argv[1])
    print(json.dumps(alone(given["name"], Job(**given["job"]), given["batches"])), flush=True)
