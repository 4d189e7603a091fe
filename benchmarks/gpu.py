"""Everything that a GPU machine is needed for, in one command: tests on the device, tables, a training; ten minutes.

    python3 benchmarks/gpu.py --minutes 9.5               # the most important first, every part with a time limit
    python3 benchmarks/gpu.py --minutes 5 --resume        # what is left, and what failed
    python3 benchmarks/gpu.py --rehearse                  # the same on a CPU, with tiny sizes; fills no table

It takes the Python that it is started with: no environment is made, nothing is fetched, and of the packages of setup.py
wandb may be missing. Every part writes its JSON and its page into the output folder as soon as it is done, gpu.md says
what came of the claims. benchmarks/README.md says how to read the result.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from adaptive.errors import AdaptiveError, ConfigError, MachineError
from benchmarks.gpu_run.conductor import Conductor
from benchmarks.gpu_run.parts import PARTS, Part
from benchmarks.gpu_run.summary import summary
from benchmarks.shared import pages
from benchmarks.shared.locations import REPOSITORY, RESULTS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; the exit code is 1 where one failed, 75 where some are left for ``--resume``."""
    options = parser().parse_args(arguments)
    if options.minutes is None:
        options.minutes = 60.0 if options.rehearse else 9.5
    try:
        parts = chosen(options)
        output = folder(options)
        conductor = Conductor(output, options.rehearse, options.resume)
    except AdaptiveError as error:
        print(f"gpu: {error}", file=sys.stderr)
        return 1
    if options.list:
        print("\n".join(f"{part.name:12} {part.seconds:4.0f} s at most: {part.question}" for part in parts))
        return 0
    state = conductor.run(parts, options)
    state["command"] = pages.command(parser(), options).replace(" --resume", "")
    text = summary(state, output)
    pages.write(output, "gpu", state, text)
    print(text)
    return conductor.exit_code(parts)


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    p = argparse.ArgumentParser(prog="gpu", description=(__doc__ or "").partition("\n")[0])
    p.add_argument("--minutes", type=float, help="for everything together (9.5, a rehearsal 60)")
    p.add_argument("--resume", action="store_true", help="leave out what an earlier visit to such a card has done")
    p.add_argument("--only", nargs="+", metavar="PART", help=f"some of: {', '.join(part.name for part in PARTS)}")
    p.add_argument("--rehearse", action="store_true", help="tiny sizes on a CPU: every path but CUDA's own")
    p.add_argument("--photos", type=Path, help="tar file or folder of photos for the data path; else they are drawn")
    p.add_argument("--cifar", type=Path, help="CIFAR-10 as class folders, for small images; else they are drawn")
    p.add_argument("--tests", default="", metavar="EXPRESSION", help="some device tests only, as pytest's -k takes it")
    p.add_argument("--list", action="store_true", help="print the parts and stop")
    p.add_argument(
        "--output", type=Path, help="folder of the results (benchmarks/results/gpu_CARD; runs/gpu_rehearsal)"
    )
    return p


def chosen(options: argparse.Namespace) -> list[Part]:
    """Return the parts that are asked for (raises ConfigError)."""
    if options.minutes <= 0:
        raise ConfigError(f"--minutes {options.minutes:g}: must be above 0")
    for name in ("photos", "cifar"):
        path = getattr(options, name)
        if path is not None and not path.exists():
            raise ConfigError(f"--{name} {path}: no such file or folder")
    return pages.only(options.only, PARTS, "part")


def folder(options: argparse.Namespace) -> Path:
    """Return the folder of the results, named after the card (raises ConfigError, MachineError)."""
    if options.rehearse:
        output = options.output or REPOSITORY / "runs" / "gpu_rehearsal"
        if RESULTS in (output.resolve(), *output.resolve().parents):
            raise ConfigError(f"--output {output}: a rehearsal makes no results; give a folder outside {RESULTS.name}/")
        return Path(output).resolve()
    if not (options.list or torch.cuda.is_available()):
        raise MachineError("this machine has no usable GPU; --rehearse tries every part on the CPU, with tiny sizes")
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    card = re.sub(r"[^a-z0-9]+", "_", name.lower().removeprefix("nvidia ")).strip("_")
    return Path(options.output or RESULTS / f"gpu_{card}").resolve()


if __name__ == "__main__":
    sys.exit(main())
