"""Images per second of small images held decoded in memory (data.in_memory), against the same batches from shards.

    python benchmarks/data_in_memory.py --source CIFAR10

Both make the same batches, padded and cropped, flipped and normalised, bit for bit; memory starts no loader processes.
In each round every way opens its stream and makes batches for some seconds; ratios are formed within the round.
benchmarks/README.md says how to read the result.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import psutil
import torch
from PIL import Image
from rich.console import Console
from rich.markdown import Markdown

from adaptive.config.sections import DataConfig
from adaptive.data.packing.pack import pack
from adaptive.data.reading.in_memory import DecodedSplit, decoded_bytes
from adaptive.data.reading.stream import LoaderOptions, TrainStream
from adaptive.data.shards.index import load_index
from adaptive.errors import AdaptiveError, ConfigError
from adaptive.training.engine.group import resolve_device
from benchmarks.shared import pages
from benchmarks.shared.results import MIB, machine
from benchmarks.shared.timing import Spread

LEAST = 8.0  # times the shards' images/s
SIZE, CLASSES = 32, 10
SOURCES = ("shards", "memory")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code is 1 where a limit does not hold."""
    options = parser().parse_args(arguments)
    try:
        result = run(options)
    except AdaptiveError as error:
        print(f"data_in_memory: {error}", file=sys.stderr)
        return 1
    text = page(result)
    written = pages.write(options.output, f"data_in_memory_{result['device']}", result, text)
    Console().print(Markdown(text))
    print("written: " + ", ".join(map(str, written)))
    return 0 if all(way["holds"] for way in result["ways"].values()) else 1


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    p = argparse.ArgumentParser(prog="data_in_memory", description=(__doc__ or "").partition("\n")[0])
    p.add_argument(
        "--source", type=Path, help="packed dataset of 32-pixel images, or what adaptive pack takes; without it drawn"
    )
    p.add_argument("--images", type=int, default=20_000, help="that are drawn (%(default)s)")
    p.add_argument("--batch", type=int, default=256, help="images per batch (%(default)s)")
    p.add_argument("--workers", type=int, default=2, help="worker processes of the shards, besides none (%(default)s)")
    p.add_argument("--rounds", type=int, default=9, help="counted rounds, at least 2 (%(default)s)")
    p.add_argument("--seconds", type=float, default=2.0, help="of every turn (%(default)s)")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU if there is one")
    pages.add_output(p)
    return p


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure (raises ConfigError, DataError, MachineError)."""
    for name, least in {"images": 100, "batch": 1, "rounds": 2, "workers": 1}.items():
        if getattr(options, name) < least:
            value = getattr(options, name)
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    if options.seconds <= 0:
        raise ConfigError(f"--seconds {options.seconds:g}: must be above 0")
    device = resolve_device(options.device)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = prepare(options.source, Path(scratch), options.images)
        data = DataConfig(path=str(folder), image_size=SIZE, crop="pad", flip=0.5)
        index = load_index(folder)
        count = index.split("train").count
        if count < options.batch:
            raise ConfigError(f"--batch {options.batch}: the training split has {count} images; give fewer")
        began = time.perf_counter()
        decoded = DecodedSplit.decode(index, data, "train", training=True, workers=options.workers)
        seconds = time.perf_counter() - began
        measured = measure(data, decoded, options, ways_on(device, options.workers))
    return {
        "benchmark": "data_in_memory",
        "command": pages.command(parser(), options),
        "machine": machine(device.type),
        "device": device.type,
        "drawn": options.source is None,
        "images": count,
        "batch": options.batch,
        "rounds": options.rounds,
        "decoding": {"seconds": seconds, "workers": options.workers, "bytes": decoded_bytes(count, SIZE)},
        "ways": {name: summary(sources) for name, sources in measured.items()},
    }


def ways_on(device: torch.device, workers: int) -> dict[str, tuple[int, torch.device]]:
    """Workers and device of every way to make batches, by its title."""
    ways = {"no worker": (0, device), _workers(workers): (workers, device)}
    if device.type == "cpu":  # what is left for the host where a GPU crops, flips and normalises
        ways[f"{_workers(workers)}, bytes for an accelerator"] = (workers, torch.device("meta"))
    return ways


def prepare(source: Path | None, scratch: Path, count: int) -> Path:
    """Return the folder of a packed dataset: ``source`` itself, what is packed of it, or drawn images."""
    if source is not None and (source / "index.json").is_file():
        return source
    if source is None:
        source = scratch / "drawn"
        generator = np.random.default_rng(0)
        for number in range(count):
            split = "train" if number % 10 else "val"
            path = source / split / f"class_{number // 10 % CLASSES}" / f"{number:06d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            colours = generator.integers(0, 256, (5, 5, 3), dtype=np.uint8)
            Image.fromarray(colours).resize((SIZE, SIZE)).save(path, quality=95)
    pack(source, scratch / "packed", progress=False)
    return scratch / "packed"


def measure(
    data: DataConfig, decoded: DecodedSplit, options: argparse.Namespace, ways: Mapping[str, tuple[int, torch.device]]
) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Images/s and CPU microseconds per image of every way and source, one pair per round."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {way: {s: [] for s in SOURCES} for way in ways}
    generator = random.Random(0)
    for number in range(-1, options.rounds):
        turns = [(way, source) for way in ways for source in SOURCES]
        generator.shuffle(turns)
        for way, source in turns:
            workers, device = ways[way]
            loader = LoaderOptions(workers=workers, device=device)
            stream = TrainStream(
                load_index(data.path), data, "train", loader, seed=0, global_batch=options.batch,
                micro_batch=options.batch, decoded=decoded if source == "memory" else None,
            )  # fmt: skip
            pair = turn(stream, workers, device, options.batch, options.seconds)
            if number >= 0:  # one round does not count
                found[way][source].append(pair)
    return found


def turn(stream: TrainStream, workers: int, device: torch.device, batch: int, seconds: float) -> tuple[float, float]:
    """Make batches for some seconds; return images/s and CPU microseconds per image, of all processes."""
    with closing(stream.batches(0, 10**9)) as batches:  # type: ignore[type-var]
        for _ in range(2 * workers + 2):  # what workers have made in advance is used up
            next(batches)
        used, began, made = cpu_seconds(), time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            next(batches)
            made += batch
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elapsed = time.perf_counter() - began
        return made / elapsed, 1e6 * (cpu_seconds() - used) / made


def cpu_seconds() -> float:
    """Processor time of this process and its children so far."""
    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children())]
    return sum(spent.user + spent.system for spent in times)


def summary(sources: Mapping[str, Sequence[tuple[float, float]]]) -> dict[str, Any]:
    """Medians and quartiles of a way, and whether memory is as much faster as it has to be."""
    rates = {source: [rate for rate, _ in pairs] for source, pairs in sources.items()}
    times = Spread.of_ratios(rates["memory"], rates["shards"])
    return {
        "images_per_second": {source: asdict(Spread.of(values)) for source, values in rates.items()},
        "cpu_us": {source: asdict(Spread.of([us for _, us in pairs])) for source, pairs in sources.items()},
        "memory_over_shards": asdict(times),
        "least": LEAST,
        "holds": times.median >= LEAST,
    }


def _workers(count: int) -> str:
    return f"{count} worker{'s' if count > 1 else ''}"


def page(result: Mapping[str, Any]) -> str:
    """The page beside the JSON file."""
    kind = "drawn images" if result["drawn"] else "images"
    rows = []
    for way, entry in result["ways"].items():
        for source in SOURCES:
            rate, used = entry["images_per_second"][source], entry["cpu_us"][source]
            times = entry["memory_over_shards"] if source == "memory" else None
            name = f"shards, {way}" if source == "shards" else "memory, in turns with them"
            rows.append((name, pages.spread(rate, 0), pages.spread(used, 1), pages.spread(times, 1)))
    table = pages.table(["batches from", "images/s", "CPU us/image", "/ shards"], rows)
    limits = "\n".join(
        f"* memory over shards with {way}: {entry['memory_over_shards']['median']:.1f}, "
        f"{'at least' if entry['holds'] else 'BELOW'} {entry['least']:g}"
        for way, entry in result["ways"].items()
    )
    decoding = result["decoding"]
    return f"""# Data in memory: {result["images"]:,} {kind} of {SIZE} pixels, padded, cropped and flipped

`{result["command"]}`

{pages.hardware(result["machine"])}

Median (quartiles) of {result["rounds"]} rounds, in each of which every way opens its stream and makes batches of
{result["batch"]} for some seconds; ratios are formed within the round. CPU time is that of the process and its workers;
memory has none.

{table}

{limits}

Decoding at the start took {decoding["seconds"]:.1f} s with {_workers(decoding["workers"])}, and the images take
{decoding["bytes"] / MIB:.0f} MiB.
"""


if __name__ == "__main__":
    sys.exit(main())
