"""Images per second of a core from packed shards, against torchvision's and timm's loaders with the same transform.

    python benchmarks/data.py --source imagenet-sample.tar

Every loader decodes the same photos, takes a random crop of 224 pixels, flips and normalises it. In each round every
loader makes one batch, in a process of its own, all on one core; ratios are formed within the round.
benchmarks/README.md says how to read the result.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.console import Console
from rich.markdown import Markdown

from adaptive.errors import AdaptiveError, ConfigError
from benchmarks.shared import pages
from benchmarks.shared.data_loaders import LOADERS, WITH_WORKERS, Job, in_turns, prepare
from benchmarks.shared.locations import REPOSITORY
from benchmarks.shared.results import MIB, machine
from benchmarks.shared.timing import Spread, interleaved

# What must hold: images/s of one over the other's.
LIMITS = (
    ("adaptive", "torchvision", 1.3),
    ("adaptive", "timm", 1.3),
    ("pixels", "bare", 0.9),
    ("smaller", "torchvision", 2.0),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code is 1 where a limit does not hold."""
    options = parser().parse_args(arguments)
    try:
        result = run(options)
    except AdaptiveError as error:
        print(f"data: {error}", file=sys.stderr)
        return 1
    text = page(result)
    written = pages.write(options.output, f"data_{options.interpolation}", result, text)
    Console().print(Markdown(text))
    print("written: " + ", ".join(map(str, written)))
    return 0 if all(limit["holds"] for limit in result["limits"]) else 1


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    p = argparse.ArgumentParser(prog="data", description=(__doc__ or "").partition("\n")[0])
    p.add_argument("--source", type=Path, help="tar file or folder of JPEGs, repeated; without it photos are drawn")
    p.add_argument("--images", type=int, default=2000, help="photos in the data set (%(default)s)")
    p.add_argument("--max-side", type=int, default=320, help="of the smaller images, in pixels (%(default)s)")
    p.add_argument("--interpolation", choices=("bilinear", "bicubic"), default="bicubic", help="(%(default)s)")
    p.add_argument("--batch", type=int, default=64, help="images per batch (%(default)s)")
    p.add_argument("--rounds", type=int, default=20, help="counted rounds on one core, at least 2 (%(default)s)")
    p.add_argument("--workers", type=int, default=2, help="worker processes in the second part (%(default)s)")
    p.add_argument(
        "--starts", type=int, default=3, help="processes per loader in the second part; 0 leaves it out (%(default)s)"
    )
    pages.add_output(p)
    return p


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure (raises ConfigError, DataError)."""
    for name, least in {"images": 10, "max_side": 8, "batch": 1, "rounds": 2, "workers": 1, "starts": 0}.items():
        if getattr(options, name) < least:
            value = getattr(options, name)
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    if options.images < 2 * options.batch:
        raise ConfigError(f"--images {options.images}: must hold two batches of {options.batch}")
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        cores = os.sched_getaffinity(0)
    with tempfile.TemporaryDirectory() as folder:
        sizes = prepare(options.source, Path(folder) / "photos", options.images, options.max_side)
        job = Job(str(Path(folder) / "photos"), options.interpolation, options.batch)
        seconds = one_core(job, options.rounds)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cores)
        started = with_workers(job, options)
    rate = {name: Spread.of([options.batch / s for s in values]) for name, values in seconds.items()}
    faster = {
        name: {other: asdict(Spread.of_ratios(seconds[other], seconds[name])) for other in seconds} for name in seconds
    }
    return {
        "benchmark": "data",
        "command": pages.command(parser(), options),
        "machine": machine("cpu"),
        "photos": {
            "drawn": options.source is None,
            "images": options.images,
            "mean_bytes": round(statistics.mean(sizes)),
            "max_side": options.max_side,
        },
        "batch": options.batch,
        "rounds": options.rounds,
        "workers": options.workers,
        "images_per_second": {name: asdict(value) for name, value in rate.items()},
        "rate_over": faster,
        "with_workers": started,
        "limits": [_limit(a, b, least, faster[a][b]["median"]) for a, b, least in LIMITS],
    }


def _limit(loader: str, over: str, least: float, median: float) -> dict[str, Any]:
    return {"loader": loader, "over": over, "least": least, "median": median, "holds": median >= least}


def one_core(job: Job, rounds: int) -> dict[str, list[float]]:
    """Seconds per batch of every loader, in turn within a round, each in a process of its own on the same core.

    In one process each would find the memory as the one before left it.
    """
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # the processes inherit it
    with ExitStack() as stack:
        turns = {name: partial(_turn, stack.enter_context(_process(name, job))) for name in LOADERS}
        return interleaved(turns, rounds, 2, "cpu")


@contextmanager
def _process(name: str, job: Job) -> Iterator[Connection]:
    """A loader in a copy of this process, which has made no batch yet; it makes one for whatever it is sent."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=in_turns, args=(name, job, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        process.kill()
        process.join()


def _turn(loader: Connection) -> None:
    """Let a loader make its next batch (raises EOFError: it ended)."""
    loader.send(None)
    loader.recv()


def with_workers(job: Job, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Time to the first batch, images/s and memory with worker processes, each loader in processes of its own."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in WITH_WORKERS if options.starts}
    batches = max(4, options.images // options.batch - 2)
    for _ in range(options.starts):
        for name in found:
            task = {"name": name, "job": asdict(job) | {"workers": options.workers}, "batches": batches}
            done = subprocess.run(
                [sys.executable, str(REPOSITORY / "benchmarks" / "shared" / "data_loaders.py"), json.dumps(task)],
                stdout=subprocess.PIPE, text=True, check=True,
            )  # fmt: skip
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    return {name: {key: asdict(Spread.of([f[key] for f in starts])) for key in starts[0]}
            for name, starts in found.items()}  # fmt: skip


def page(result: Mapping[str, Any]) -> str:
    """The page beside the JSON file."""
    photos, rate, over = result["photos"], result["images_per_second"], result["rate_over"]
    kind = "drawn photos" if photos["drawn"] else "photos"
    core = pages.table(
        ["loader", "images/s of a core", "ms/image", "/ torchvision", "/ timm", "/ bare", "/ bare, torchvision"],
        [
            (
                title,
                pages.spread(rate[name], 0),
                f"{1e3 / rate[name]['median']:.2f}",
                *(pages.spread(over[name][other], 2) for other in ("torchvision", "timm", "bare", "bare_torchvision")),
            )
            for name, (title, _) in LOADERS.items()
        ],
    )
    limits = "\n".join(
        f"* {LOADERS[x['loader']][0]} over {LOADERS[x['over']][0]}: {x['median']:.2f}, "
        f"{'at least' if x['holds'] else 'BELOW'} {x['least']:g}"
        for x in result["limits"]
    )
    return f"""# Data: {photos["images"]:,} {kind} of {photos["mean_bytes"] / 1e3:.0f} kB, crops of 224 pixels

`{result["command"]}`

{pages.hardware(result["machine"])}

One core, one thread, no worker process: median (quartiles) of {result["rounds"]} rounds, in each of which every loader
makes a batch of {result["batch"]}, in a process of its own; ratios are formed within the round. The smaller images have
sides of at most {photos["max_side"]} pixels.

{core}

{limits}

{with_workers_words(result)}"""


def with_workers_words(result: Mapping[str, Any]) -> str:
    """The second part of the page, where it was measured."""
    if not result["with_workers"]:
        return ""
    workers = pages.table(
        ["loader", "first batch, s", "images/s", "memory, MiB"],
        [
            (
                LOADERS[name][0],
                pages.spread(entry["first_batch_s"], 2),
                pages.spread(entry["images_per_second"], 0),
                f"{entry['bytes']['median'] / MIB:.0f}",
            )
            for name, entry in result["with_workers"].items()
        ],
    )
    return f"""With {result["workers"]} worker processes, each loader in fresh processes in turn. The first batch is
counted from the making of the loader (listing folders, reading the index); memory is what the loader added to this
process and its workers took.

{workers}
"""


if __name__ == "__main__":
    sys.exit(main())
