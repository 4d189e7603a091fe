"""How long a user waits: `adaptive --help`, `import adaptive`, and a training's first step.

    python benchmarks/startup.py

Every round starts each of them once in a fresh process, in a new order, beside the interpreter alone and the import of
torch, which are the least that anything here can take. benchmarks/README.md says how to read the result.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.markdown import Markdown

from adaptive.data.packing.pack import pack
from benchmarks.shared import pages
from benchmarks.shared.locations import REPOSITORY
from benchmarks.shared.results import machine
from benchmarks.shared.timing import Spread, interleaved, ratios

# Seconds that it may take on a machine whose disk cache holds the libraries.
LIMITS = {"help": 0.5, "import": 0.3, "first_step": 20.0}
ADAPTIVE = [sys.executable, "-m", "adaptive"]
TITLES = {
    "python": "python -c pass",
    "help": "adaptive --help",
    "train_help": "adaptive train --help",
    "torch": "python -c 'import torch'",
    "import": "python -c 'import adaptive'",
    "create_model": "python -c 'from adaptive import create_model'",
    "models": "adaptive models",
    "plan": "adaptive plan CONFIG",
    "first_step": "adaptive train CONFIG, to the record of its first step",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code is 1 where something takes longer than it may."""
    options = parser().parse_args(arguments)
    result = run(options)
    text = page(result)
    stem = "startup" if options.device == "cpu" else f"startup_{options.device}"
    written = pages.write(options.output, stem, result, text)
    Console().print(Markdown(text))
    print("written: " + ", ".join(map(str, written)))
    return 0 if all(entry.get("holds", True) for entry in result["commands"].values()) else 1


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    p = argparse.ArgumentParser(prog="startup", description=(__doc__ or "").partition("\n")[0])
    p.add_argument("--backbone", default="resnet18", help="of the training (%(default)s)")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the training (%(default)s)")
    p.add_argument("--rounds", type=int, default=7, help="starts of each command, at least 2 (%(default)s)")
    pages.add_output(p)
    return p


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure every command."""
    with tempfile.TemporaryDirectory() as folder:
        pack("builtin:digits", Path(folder) / "digits", workers=1, progress=False)
        training = _Training(
            _training_words(Path(folder), options.backbone, options.device), Path(folder), options.device
        )
        turns: dict[str, Callable[[], None]] = {**commands(Path(folder)), "first_step": training}
        seconds = interleaved(turns, options.rounds, 1, "cpu")
        seconds["first_step"] = training.seconds[-options.rounds :]
    found: dict[str, dict[str, Any]] = {}
    for name, title in TITLES.items():
        found[name] = {"title": title, "seconds": asdict(Spread.of(seconds[name]))}
        found[name] |= {"over_torch": asdict(ratios(seconds, name, "torch"))}
        if name in LIMITS:
            found[name] |= {"limit": LIMITS[name], "holds": found[name]["seconds"]["median"] <= LIMITS[name]}
    return {
        "benchmark": "startup",
        "command": pages.command(parser(), options),
        "machine": machine(options.device),
        "rounds": options.rounds,
        "commands": found,
    }


def _training_words(folder: Path, backbone: str, device: str = "cpu") -> list[str]:
    config = folder / "run.yaml"
    config.write_text(
        f"model: {{backbone: {backbone}, exits: 4}}\n"
        f"data: {{path: {folder / 'digits'}, image_size: 64, workers: 1}}\n"
        f"train: {{epochs: 1, max_steps: 1, global_batch: 32, device: {device}}}\n"
        "tracking: {every_steps: 1, wandb: disabled}\n",
        encoding="utf-8",
    )
    return [*ADAPTIVE, "train", str(config)]


def commands(folder: Path) -> dict[str, Callable[[], None]]:
    """What is started besides the training, by name."""
    return {
        "python": partial(_call, [sys.executable, "-c", "pass"]),
        "help": partial(_call, [*ADAPTIVE, "--help"]),
        "train_help": partial(_call, [*ADAPTIVE, "train", "--help"]),
        "torch": partial(_call, [sys.executable, "-c", "import torch"]),
        "import": partial(_call, [sys.executable, "-c", "import adaptive"]),
        "create_model": partial(_call, [sys.executable, "-c", "from adaptive import create_model"]),
        "models": partial(_call, [*ADAPTIVE, "models", "vit_tiny*"]),
        "plan": partial(_call, [*ADAPTIVE, "plan", str(folder / "run.yaml")]),
    }


def _call(words: list[str]) -> None:
    subprocess.run(words, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


class _Training:
    """Starts a training, and notes how long it took to its first record; then waits for its end."""

    def __init__(self, words: list[str], folder: Path, device: str = "cpu") -> None:
        self.words, self.folder = words, folder
        self.environment = os.environ | ({"DS_ACCELERATOR": "cpu"} if device == "cpu" else {})
        self.seconds: list[float] = []

    def __call__(self) -> None:
        run = self.folder / f"run{len(self.seconds)}"
        began = time.perf_counter()
        process = subprocess.Popen(
            [*self.words, f"train.run_folder={run}"], cwd=REPOSITORY, env=self.environment,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        while process.poll() is None and not _recorded(run / "metrics.jsonl"):
            time.sleep(0.01)
        self.seconds.append(time.perf_counter() - began)
        _, said = process.communicate()
        if process.returncode:
            raise SystemExit(f"startup: the training ended with {process.returncode}: {said}")


def _recorded(file: Path) -> bool:
    return file.exists() and '"train/loss"' in file.read_text(encoding="utf-8")


def page(result: Mapping[str, Any]) -> str:
    """The page beside the JSON file."""
    rows = [
        (
            f"`{entry['title']}`",
            pages.spread(entry["seconds"], 2),
            pages.spread(entry["over_torch"], 2),
            f"{entry['limit']:g}{'' if entry['holds'] else ' (ABOVE)'}" if "limit" in entry else "",
        )
        for entry in result["commands"].values()
    ]
    return f"""# Start-up

`{result["command"]}`

{pages.hardware(result["machine"])}

Median (quartiles) of {result["rounds"]} fresh processes each, in turn within a round; ratios are formed within the
round. The libraries' files were in memory already. The training has one step, on one rank.

{pages.table(["command", "s", "/ import torch", "limit, s"], rows)}
"""


if __name__ == "__main__":
    sys.exit(main())
