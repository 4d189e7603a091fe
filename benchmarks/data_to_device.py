"""Images per second from packed shards to a device that waits for them, by the number of loader processes.

    python benchmarks/data_to_device.py --source PHOTOS --workers 1 4 8 16

Photos of ImageNet's size are read, cropped to 224 pixels by the training transform, copied and normalised on the
device; nothing trains. benchmarks/README.md says how to read the result.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from adaptive.config.sections import DataConfig
from adaptive.data.reading.stream import LoaderOptions, TrainStream
from adaptive.data.shards.index import load_index
from adaptive.errors import AdaptiveError, ConfigError
from adaptive.training.engine.group import resolve_device
from benchmarks.shared import pages
from benchmarks.shared.data_loaders import SIZE, prepare
from benchmarks.shared.results import machine
from benchmarks.shared.timing import Spread

STEM = "data_to_device"
WARMUP = 2  # batches per worker that do not count: files are not yet in memory, queues not yet full


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    options = parser().parse_args(arguments)
    try:
        result = run(options)
    except AdaptiveError as error:
        print(f"{STEM}: {error}", file=sys.stderr)
        return 1
    text = page(result)
    pages.write(options.output, f"{STEM}_{result['device']}", result, text)
    print(text)
    return 0


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    p = argparse.ArgumentParser(prog=STEM, description=(__doc__ or "").partition("\n")[0])
    p.add_argument("--source", type=Path, help="tar file or folder of JPEGs, repeated; without it photos are drawn")
    p.add_argument("--images", type=int, default=8000, help="photos in the data set (%(default)s)")
    p.add_argument("--batch", type=int, default=256, help="images per batch (%(default)s)")
    p.add_argument("--workers", type=int, nargs="+", default=[1, 4, 8, 16], help="loader processes (1 4 8 16)")
    p.add_argument("--seconds", type=float, default=6.0, help="of measuring per number of workers (%(default)g)")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU if there is one")
    p.add_argument("--needs", type=Path, help="gpu_steps.json: the training steps that the images are for")
    pages.add_output(p)
    return p


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure (raises ConfigError, DataError, MachineError)."""
    for name, least in {"images": 10, "batch": 1, "seconds": 0}.items():
        if getattr(options, name) < least:
            raise ConfigError(f"--{name} {getattr(options, name)}: must be at least {least}")
    if not options.workers or min(options.workers) < 0:
        raise ConfigError(f"--workers {' '.join(map(str, options.workers))}: numbers begin at 0")
    if options.images < options.batch:
        raise ConfigError(f"--images {options.images}: must hold a batch of {options.batch}")
    device = resolve_device(options.device)
    with tempfile.TemporaryDirectory() as folder:
        prepare(options.source, Path(folder) / "photos", options.images, 320)
        rates = {
            shards: {str(n): _rate(Path(folder) / shards, options, n, device) for n in options.workers}
            for shards in ("packed", "smaller")
        }
    return {
        "benchmark": STEM,
        "command": pages.command(parser(), options),
        "machine": machine(device.type),
        "device": device.type,
        "batch": options.batch,
        "drawn": options.source is None,
        "rates": rates,
        "needs": _needs(options.needs),
    }


def _rate(folder: Path, options: argparse.Namespace, workers: int, device: torch.device) -> dict[str, float]:
    """Images/s over ``--seconds``, and seconds to the first batch."""
    data = DataConfig(path=str(folder), image_size=SIZE, workers=workers)
    loader = LoaderOptions(workers=workers, device=device, layout=torch.channels_last)
    began = time.perf_counter()
    stream = TrainStream(
        load_index(data.path), data, "train", loader, seed=0, global_batch=options.batch, micro_batch=options.batch
    )
    seconds: list[float] = []
    batches = stream.batches(0, 10**9)
    with closing(batches):  # type: ignore[type-var]
        next(batches)
        first = time.perf_counter() - began
        for _ in range(WARMUP * max(1, workers)):
            next(batches)
        start = last = time.perf_counter()
        while last - start < options.seconds or len(seconds) < 2:
            next(batches)
            if device.type == "cuda":
                torch.cuda.synchronize()
            now = time.perf_counter()
            seconds.append(now - last)
            last = now
    return {
        "images_per_second": options.batch * len(seconds) / (last - start),
        "longest_wait_s": Spread.of(seconds).q3,
        "first_batch_s": first,
    }


def _needs(file: Path | None) -> dict[str, float]:
    """Images/s that measured training steps take, by their names; empty without a file, or from a rehearsal."""
    if file is None or not file.exists():
        return {}
    steps = json.loads(file.read_text(encoding="utf-8"))
    if steps["rehearsal"]:
        return {}
    cells = [cell for cell in steps["cells"] if cell["status"] == "measured"]
    return {f"{c['group']}, {c['title']}": c["images_per_second"] for c in cells if c["settings"]["image_size"] == SIZE}


def page(result: Mapping[str, Any]) -> str:
    """The page beside the JSON file."""
    kinds = {"packed": "photos as they are", "smaller": "sides of at most 320 pixels"}
    rows = [
        (
            f"{kinds[shards]}, {workers} workers",
            f"{rate['images_per_second']:.0f}",
            f"{rate['images_per_second'] / max(1, int(workers)):.0f}",
            f"{rate['first_batch_s']:.2f}",
        )
        for shards, by_workers in result["rates"].items()
        for workers, rate in by_workers.items()
    ]
    best = max(rate["images_per_second"] for by in result["rates"].values() for rate in by.values())
    needs = [(name, f"{need:.0f}", f"{best / need:.2f}") for name, need in result["needs"].items()]
    wanted = pages.table(["training step", "images/s it takes", "best above / it"], needs) if needs else ""
    return f"""# From shards to a waiting device: {"drawn photos" if result["drawn"] else "photos"}, {result["device"]}

`{result["command"]}`

{pages.hardware(result["machine"])}

Batches of {result["batch"]} images of 224 pixels, random resized crop and flip, copied to the device and normalised
there; nothing trains.

{pages.table(["", "images/s", "per worker", "first batch, s"], rows)}

{wanted}
"""


if __name__ == "__main__":
    sys.exit(main())
