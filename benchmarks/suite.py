"""All benchmarks that need nothing but this machine, one after another, and which of their limits hold.

    python benchmarks/suite.py                       # everything, with the defaults of this machine's device
    python benchmarks/suite.py --only data startup   # some parts
    python benchmarks/suite.py --list                # what would be run

Every part writes its own tables and JSON; this writes results/suite_<device>.md. Each part's exit code is 1 where a
limit does not hold. benchmarks/README.md says how to read the results.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adaptive.errors import AdaptiveError, ConfigError
from adaptive.training.engine.group import resolve_device
from benchmarks.shared import pages
from benchmarks.shared.locations import REPOSITORY
from benchmarks.shared.results import machine

MSDNET = "--backbone msdnet_cifar_anytime --exits 0 --image-size 32 --batch 64 --classes 10"
STEP4 = "--backbone msdnet_imagenet_step4 --exits 0 --image-size 224 --batch 128"
ACCELERATED = "--precision bf16 --accelerate eager compile cuda_graphs compile_cuda_graphs"
# Command lines of the parts, by device.
PARTS: dict[str, dict[str, list[str]]] = {
    "training": {
        "cpu": [
            "train_step --batch 32",
            "train_step --backbone vit_tiny_patch16_224",
            f"train_step {MSDNET}",
        ],
        "cuda": [
            "train_step --backbone resnet50 --batch 256 --precision bf16 --channels-last --rounds 30",
            "train_step --backbone vit_small_patch16_224 --batch 256 --precision bf16 --rounds 30",
            f"train_step {STEP4} --precision bf16 --channels-last --rounds 30",
            f"equilibrium {MSDNET} --compile --rounds 300",
            f"equilibrium {STEP4} --precision bf16 --channels-last --compile --rounds 300",
            f"train_step {MSDNET} --rounds 30",
        ],
    },
    "modes": {
        "cpu": ["modes"],
        "cuda": [
            "modes --rounds 30",
            "modes --backbone resnet50 --exits 4 --image-size 224 --batch 128 --classes 1000",
        ],
    },
    "ranks": {
        "cpu": ["ranks"],
        "cuda": ["ranks --backbone resnet50 --image-size 224 --batch 128 --precision bf16 --worlds 1"],
    },
    "full": {
        "cpu": ["full_run --backbone resnet18 --image-size 128 --batch 8 --steps 10"],
        "cuda": [
            "full_run --backbone resnet50 --batch 256 --precision bf16 --channels-last",
            "full_run --backbone resnet50 --batch 256 --precision bf16 --channels-last --compile",
            "full_run --backbone msdnet_imagenet_step4 --batch 128 --precision bf16 --channels-last",
        ],
    },
    "data": {"cpu": ["data", "data_in_memory"], "cuda": ["data --workers 8", "data_in_memory --workers 8"]},
    "inference": {
        "cpu": ["inference_batches"],
        "cuda": [
            f"inference_batches {ACCELERATED}",
            f"inference_batches --backbone resnet50 --image-size 224 --classes 1000 {ACCELERATED}",
        ],
    },
    "calibration": {"cpu": ["calibration_size"], "cuda": ["calibration_size"]},
    "saving": {"cpu": ["checkpoint", "resume"], "cuda": ["checkpoint", "resume"]},
    "memory": {"cpu": ["plan_memory"], "cuda": ["plan_memory"]},
    "startup": {"cpu": ["startup", "build"], "cuda": ["startup"]},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; the exit code is 1 where a limit does not hold or a part failed."""
    options = parser().parse_args(arguments)
    try:
        device, lines = chosen(options)
    except AdaptiveError as error:
        print(f"suite: {error}", file=sys.stderr)
        return 1
    if options.list:
        print("\n".join(shlex.join(["python", *words[1:]]) for words in lines))
        return 0
    rows, codes = [], []
    for words in lines:
        title = shlex.join(words[2:]) if len(words) > 2 else ""
        print(f"== {Path(words[1]).stem} {title}", flush=True)
        began = time.perf_counter()
        codes.append(subprocess.run([*words, "--output", str(options.output)], cwd=REPOSITORY, check=False).returncode)
        minutes = (time.perf_counter() - began) / 60
        outcome = {0: "holds", 1: "DOES NOT HOLD, or failed"}.get(codes[-1], f"ended with {codes[-1]}")
        rows.append((f"`{Path(words[1]).stem} {title}`".replace(" `", "`"), outcome, f"{minutes:.1f}"))
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"suite_{device}.md").write_text(page(device, rows), encoding="utf-8")
    print(page(device, rows))
    return int(any(codes))


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    p = argparse.ArgumentParser(prog="suite", description=(__doc__ or "").partition("\n")[0])
    p.add_argument("--only", nargs="+", default=list(PARTS), metavar="PART", help=f"some of: {', '.join(PARTS)}")
    p.add_argument("--source", type=Path, help="tar file or folder of photos for data.py; else they are drawn")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU if there is one")
    p.add_argument("--list", action="store_true", help="print the command lines and stop")
    pages.add_output(p)
    return p


def chosen(options: argparse.Namespace) -> tuple[str, list[list[str]]]:
    """Return the device and the command lines of the chosen parts (raises ConfigError, MachineError)."""
    unknown = [part for part in options.only if part not in PARTS]
    if unknown:
        raise ConfigError(f"--only {unknown[0]}: no such part; take some of {', '.join(PARTS)}")
    if options.source is not None and not options.source.exists():
        raise ConfigError(f"--source {options.source}: no such file or folder; give a tar file or folder of photos")
    device = resolve_device(options.device).type
    lines = []
    for part in options.only:
        for line in PARTS[part][device]:
            name, *words = line.split()
            if name == "data" and options.source is not None:
                words += ["--source", str(options.source.resolve())]
            lines.append([sys.executable, f"benchmarks/{name}.py", *words])
    return device, lines


def page(device: str, rows: Sequence[tuple[str, str, str]]) -> str:
    """The table of the parts."""
    return f"""# All benchmarks on {device}

{pages.hardware(machine(device))}

{pages.table(["part", "limits", "minutes"], rows)}
"""


if __name__ == "__main__":
    sys.exit(main())
