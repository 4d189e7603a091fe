"""What a rank's start takes for a large backbone, beside timm's own building of it, and what a plan takes.

    python benchmarks/build.py
    python benchmarks/build.py --against ANOTHER_CHECKOUT      # the same by other code, in a second pair of columns

Every number is of a fresh process with one thread. benchmarks/README.md says how to read the result.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.markdown import Markdown

from adaptive.data.packing.pack import pack
from benchmarks.shared import pages
from benchmarks.shared.locations import REPOSITORY
from benchmarks.shared.results import machine

LIMITS = {"seconds": 2.5, "memory": 1.6, "plan": 60.0}  # times timm's, times the weights, seconds
BUILD = """
import sys, time, torch, timm, adaptive.networks.create
def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
torch.set_num_threads(1)
before, began = peak(), time.process_time()
network = (timm if sys.argv[1] == "timm" else adaptive.networks.create).create_model(sys.argv[2])
seconds = time.process_time() - began
print(seconds, peak() - before, sum(t.numel() * t.element_size() for t in network.state_dict().values()))
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code is 1 where a limit does not hold."""
    options = parser().parse_args(arguments)
    result = run(options)
    text = page(result)
    written = pages.write(options.output, "build", result, text)
    Console().print(Markdown(text))
    print("written: " + ", ".join(map(str, written)))
    return 0 if all(entry["holds"] for entry in [*result["builds"], *result["plans"]]) else 1


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    p = argparse.ArgumentParser(prog="build", description=(__doc__ or "").partition("\n")[0])
    p.add_argument("--models", nargs="*", default=["vit_large_patch16_224"], help="built (%(default)s)")
    p.add_argument("--plans", nargs="*", default=["eva_giant_patch14_224"], help="planned (%(default)s)")
    p.add_argument("--against", type=Path, metavar="CHECKOUT", help="measure another checkout's code as well")
    p.add_argument("--plan-limit", type=float, default=300.0, help="seconds after which a plan is ended (%(default)s)")
    pages.add_output(p)
    return p


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure every model."""
    places = {"here": REPOSITORY} | ({"before": options.against.resolve()} if options.against else {})
    return {
        "benchmark": "build",
        "command": pages.command(parser(), options),
        "machine": machine("cpu"),
        "builds": [_build(name, places) for name in options.models],
        "plans": [_plan(name, places, options.plan_limit) for name in options.plans],
    }


def _build(name: str, places: Mapping[str, Path]) -> dict[str, Any]:
    seconds, memory, weights = _measured("timm", name, REPOSITORY)
    found: dict[str, Any] = {
        "model": name,
        "weights": weights,
        "timm": {"seconds": seconds, "memory": memory / weights},
    }
    for place, folder in places.items():
        own, taken, stored = _measured("adaptive", name, folder)
        found[place] = {"seconds": own, "ratio": own / seconds, "memory": taken / stored}
    here = found["here"]
    return found | {"holds": here["ratio"] <= LIMITS["seconds"] and here["memory"] <= LIMITS["memory"]}


def _measured(builder: str, name: str, folder: Path) -> list[float]:
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", BUILD, builder, name]
    done = subprocess.run(words, cwd=folder, env=environment, check=True, capture_output=True, text=True)
    return [float(word) for word in done.stdout.split()]


def _plan(name: str, places: Mapping[str, Path], limit: float) -> dict[str, Any]:
    found: dict[str, Any] = {"model": name}
    with tempfile.TemporaryDirectory() as data:
        pack("builtin:digits", Path(data) / "digits", workers=1, progress=False)
        config = Path(data) / "run.yaml"
        config.write_text(
            f"model: {{backbone: {name}}}\ndata: {{path: {data}/digits, image_size: 224}}\n"
            f"train: {{run_folder: {data}/run, epochs: 1, global_batch: 32}}\n",
            encoding="utf-8",
        )
        for place, folder in places.items():
            environment = os.environ | {"PYTHONPATH": str(folder)}
            words = [sys.executable, "-m", "adaptive", "plan", str(config)]
            began, used = time.perf_counter(), os.times()
            try:
                subprocess.run(words, cwd=folder, env=environment, check=True, capture_output=True, timeout=limit)
                ended = os.times()
                processor = ended.children_user + ended.children_system - used.children_user - used.children_system
                found[place] = {"seconds": time.perf_counter() - began, "processor": processor}
            except subprocess.TimeoutExpired:
                found[place] = None
    return found | {"holds": found["here"] is not None and found["here"]["processor"] <= LIMITS["plan"]}


def page(result: Mapping[str, Any]) -> str:
    """The page beside the JSON file."""
    builds, plans = [], []
    for entry in result["builds"]:
        timm, here, before = entry["timm"], entry["here"], entry.get("before")
        row = [f"`{entry['model']}`", f"{entry['weights'] / 2**20:,.0f}", f"{timm['seconds']:.1f}"]
        row += [_times(here["ratio"], LIMITS["seconds"]), _times(here["memory"], LIMITS["memory"])]
        builds.append([*row, *(["", ""] if before is None else [f"{before['ratio']:.2f}", f"{before['memory']:.2f}"])])
    for entry in result["plans"]:
        shown = [_seconds(entry[place]) if place in entry else "" for place in ("here", "before")]
        plans.append([f"`{entry['model']}`", *shown])
    columns = ["backbone", "weights, MiB", "timm, s", "build / timm", "memory / weights", "before: / timm", "/ weights"]
    return f"""# Building large networks

`{result["command"]}`

{pages.hardware(result["machine"])}

`create_model` against `timm.create_model`, in fresh processes of one thread: seconds of processor time, and the growth
of the resident set's peak over the imports. Limits: {LIMITS["seconds"]:g} times timm's, {LIMITS["memory"]:g} times the
weights. "Before" is another checkout.

{pages.table(columns, builds)}

`adaptive plan CONFIG`, the start of Python and all imports included; limit {LIMITS["plan"]:g} s of processor time.

{pages.table(["backbone", "processor, s (clock, s)", "before"], plans)}
"""


def _times(value: float, limit: float) -> str:
    return f"{value:.2f}{'' if value <= limit else ' (ABOVE)'}"


def _seconds(entry: Mapping[str, float] | None) -> str:
    return f"{entry['processor']:.1f} ({entry['seconds']:.1f})" if entry else "no answer in time"


if __name__ == "__main__":
    sys.exit(main())
