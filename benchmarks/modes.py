"""Which precision, memory layout and compilation make a training step fastest, against a plain fp32 loop.

    python benchmarks/modes.py --backbone msdnet_cifar_anytime --image-size 32 --batch 64

The reference is the plain multi-exit loop of `benchmarks.shared.plain_loop` in fp32 and the default memory layout, as
papers' repositories train. Each round does one step of every mode, in a new order; ratios are formed within the round.
benchmarks/README.md says how to read the result.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.console import Console
from rich.markdown import Markdown

from adaptive.errors import AdaptiveError, ConfigError
from adaptive.training.engine.group import resolve_device
from benchmarks.shared import pages
from benchmarks.shared.memory import peak_bytes
from benchmarks.shared.results import MIB, machine
from benchmarks.shared.timing import Spread, interleaved, ratios
from benchmarks.shared.variants import VARIANTS, StepSettings, Trainee

LOOP = next(variant for variant in VARIANTS if variant.loop)
WHOLE = VARIANTS[-1]
LEAST = {"cpu": 1.5, "cuda": 3.0}  # the best mode's images/s over the reference's
STEPS_ON_CUDA = 5


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code is 1 where the best mode is not fast enough."""
    options = parser().parse_args(arguments)
    try:
        result = run(options)
    except AdaptiveError as error:
        print(f"modes: {error}", file=sys.stderr)
        return 1
    text = page(result)
    written = pages.write(options.output, f"modes_{result['device']}_{options.backbone}", result, text)
    Console().print(Markdown(text))
    print("written: " + ", ".join(map(str, written)))
    return 0 if result["best"]["holds"] else 1


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    p = argparse.ArgumentParser(prog="modes", description=(__doc__ or "").partition("\n")[0])
    p.add_argument("--backbone", default="msdnet_cifar_anytime", help="any timm model or preset (%(default)s)")
    p.add_argument("--exits", type=int, default=0, help="number of exits; 0: the preset's, of a timm model 4")
    p.add_argument("--image-size", type=int, default=32, help="side in pixels (%(default)s)")
    p.add_argument("--batch", type=int, default=64, help="images per step (%(default)s)")
    p.add_argument("--classes", type=int, default=10, help="number of classes (%(default)s)")
    p.add_argument("--rounds", type=int, default=10, help="counted rounds, at least 2 (%(default)s)")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU if there is one")
    p.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's number")
    p.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes minutes to begin")
    pages.add_output(p)
    return p


def modes(options: argparse.Namespace, device: str) -> dict[str, tuple[str, StepSettings]]:
    """Title and settings of every mode by key; the reference is not among them."""
    plain = StepSettings(
        options.backbone, options.exits, options.image_size, options.batch, options.classes, device=device
    )
    found = {}
    for precision in ("fp32", "bf16"):
        for channels_last in (False, True):
            for compiled in (False, True):
                if compiled and options.no_compile:
                    continue
                words = [precision, *["channels-last"] * channels_last, *["compiled"] * compiled]
                settings = replace(plain, precision=precision, channels_last=channels_last, compile=compiled)
                found["_".join(words)] = (", ".join(words), settings)
    return found


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure (raises ConfigError, ModelError, MachineError)."""
    for name, least in {"batch": 2, "image_size": 1, "classes": 2, "rounds": 2}.items():
        if getattr(options, name) < least:
            value = getattr(options, name)
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    if options.threads > 0:
        torch.set_num_threads(options.threads)
    device = resolve_device(options.device).type
    wanted = modes(options, device)
    reference = replace(next(iter(wanted.values()))[1], precision="fp32", channels_last=False, compile=False)
    builds = {"loop": partial(Trainee, reference, LOOP)} | {
        key: partial(Trainee, settings, WHOLE) for key, (_, settings) in wanted.items()
    }
    # The profiler, which follows memory on the CPU, stands in a compiler's way.
    eager = {key: build for key, build in builds.items() if device == "cuda" or not key.endswith("compiled")}
    peaks = {key: peak_bytes(build, device) for key, build in eager.items()}
    turns = {key: build() for key, build in builds.items()}
    calls = STEPS_ON_CUDA if device == "cuda" else 1
    seconds = interleaved(turns, options.rounds, 2, device, calls)
    titles = {"loop": "plain multi-exit loop, fp32"} | {key: title for key, (title, _) in wanted.items()}
    entries = {key: _entry(titles[key], key, seconds, options.batch, peaks) for key in builds}
    best = max(wanted, key=lambda key: entries[key]["rate_over_loop"]["median"])
    return {
        "benchmark": "modes",
        "command": pages.command(parser(), options),
        "machine": machine(device),
        "device": device,
        "settings": asdict(reference),
        "rounds": options.rounds,
        "modes": entries,
        "best": {
            "mode": best,
            "least": LEAST[device],
            "holds": entries[best]["rate_over_loop"]["median"] >= LEAST[device],
        },
    }


def _entry(
    title: str, key: str, seconds: Mapping[str, list[float]], batch: int, peaks: Mapping[str, int]
) -> dict[str, Any]:
    return {
        "title": title,
        "images_per_second": asdict(Spread.of([batch / s for s in seconds[key]])),
        "rate_over_loop": asdict(ratios(seconds, "loop", key)),
        "peak_memory_bytes": peaks.get(key),
        "memory_over_loop": peaks[key] / peaks["loop"] if key in peaks else None,
    }


def page(result: Mapping[str, Any]) -> str:
    """The page beside the JSON file."""
    s, best = result["settings"], result["best"]
    rows = [
        (
            entry["title"],
            pages.spread(entry["images_per_second"], 1),
            pages.spread(entry["rate_over_loop"], 2),
            *_memory(entry),
        )
        for entry in result["modes"].values()
    ]
    entry = result["modes"][best["mode"]]
    words = "at least" if best["holds"] else "BELOW"
    return f"""# Precision, layout, compilation: {s["backbone"]}, {s["image_size"]} px, {s["device"]}

`{result["command"]}`

{pages.hardware(result["machine"])}

A training step with exits, GE, ISC and OFA, batch {s["batch"]}, against a plain multi-exit loop in fp32 (the same
blocks and exits, summed cross entropies, two-step rescaling, no ISC and no OFA). Median (quartiles) of
{result["rounds"]} rounds, every mode once in each; ratios are formed within the round. On the CPU a compiled step's
memory is not followed.

{pages.table(["mode", "images/s", "images/s / loop", "peak, MiB", "memory / loop"], rows)}

Best: {entry["title"]}, {entry["rate_over_loop"]["median"]:.2f} of the loop's images/s, {words} {best["least"]:g}.
"""


def _memory(entry: Mapping[str, Any]) -> tuple[str, str]:
    if entry["peak_memory_bytes"] is None:
        return "", ""
    return f"{entry['peak_memory_bytes'] / MIB:.1f}", f"{entry['memory_over_loop']:.3f}"


if __name__ == "__main__":
    sys.exit(main())
