"""Real early exit against the clock: is the time saved that the multiply-adds promise?

Takes a trained run's network (at another image size, after a few steps there), calibrates a policy on validation images
and measures the dynamic runner on test images: against the full network, and against the ideal, the sum over the blocks
of the share of images still in times that block's own time at the full batch.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from adaptive.inference.calibration.calibrate import Target, fit
from adaptive.inference.measuring.profile import InferenceProfile, profile
from adaptive.inference.measuring.timing import Spread
from adaptive.inference.outputs import simulate
from benchmarks.shared.inference_network import network_at, split_outputs
from benchmarks.shared.locations import RESULTS
from benchmarks.shared.results import machine, to_json

OVERHEAD, SAVING, IDLE = 1.10, 0.62, 1.03  # limits of what is measured


def parser() -> argparse.ArgumentParser:
    """Declare the command line."""
    found = argparse.ArgumentParser(description=__doc__)
    found.add_argument("run", type=Path, metavar="RUN", help="run folder with a trained network")
    found.add_argument("--image-size", type=int, default=224, help="side of the images in pixels")
    found.add_argument("--adapt", type=int, default=50, metavar="STEPS", help="steps of 16 images at that size")
    found.add_argument("--budget", type=float, default=0.5, help="share of the full cost")
    found.add_argument("--batch", type=int, default=64, help="images at a time")
    found.add_argument("--images", type=int, default=512, help="images to calibrate on, and to measure accuracy on")
    found.add_argument("--rounds", type=int, default=9, help="rounds at the full batch")
    found.add_argument("--single-rounds", type=int, default=150, help="rounds at batch 1")
    found.add_argument("--threads", type=int, default=2, help="CPU threads")
    found.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run")
    found.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="by autocast")
    found.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    return found


def main() -> int:
    """Measure and write; 1 if a limit is passed."""
    options = parser().parse_args()
    torch.set_num_threads(options.threads)
    trained, network, config = network_at(options.run, options.image_size, options.adapt, batch=16)
    network = network.to(options.device)
    macs = [float(cost.macs) for cost in network.costs(options.image_size)]
    held_out, _ = split_outputs(network, config, config.data.val_split, options.images)
    test, images = split_outputs(network, config, config.data.test_split, options.images)
    runs = {}
    for method in ("search", "geometric"):  # the search may reach its accuracy for less, the other spends its budget
        target = Target(budget=options.budget * macs[-1])
        policy = fit(held_out.logits, held_out.labels, macs, target, method=method, temperature=True)
        found = simulate(policy, test.probabilities(policy))
        whole = profile(network, policy, images, options.rounds, options.precision, batch=options.batch)
        runs[method] = Run(found.top1(test.labels), whole)
    each = images[: options.single_rounds]  # another one in every round
    single = profile(network, policy, each, options.single_rounds, options.precision, batch=1)
    result: dict[str, Any] = {
        "command": command(options),
        "machine": machine(options.device),
        "settings": {
            "backbone": trained.config.model.backbone,
            "exits": network.exit_names,
            "image_size": options.image_size,
            "batch": options.batch,
            "device": options.device,
            "precision": options.precision,
            "budget": options.budget,
            "rounds": options.rounds,
            "single_rounds": options.single_rounds,
        },
        "macs": macs,
        "images": len(test.labels),
        "top1": [100 * (z.argmax(1) == test.labels).double().mean().item() for z in test.logits],
        "policies": {name: asdict(run) | {"macs_share": run.macs_share(macs)} for name, run in runs.items()},
        "single": asdict(single),
    }
    stem = options.output / f"inference_{options.device}_{trained.config.model.backbone}"
    stem.parent.mkdir(parents=True, exist_ok=True)
    text = page(result, runs, single)
    Path(f"{stem}.json").write_text(to_json(result), encoding="utf-8")
    Path(f"{stem}.md").write_text(text, encoding="utf-8")
    print(text)
    return 0 if all(value <= limit for value, limit in limits(runs, single).values()) else 1


@dataclass(frozen=True)
class Run:
    """A policy: its accuracy on all test images, and what a batch of them takes."""

    top1: float
    batch: InferenceProfile

    def macs_share(self, macs: list[float]) -> float:
        """Multiply-adds that the batch needed, as a share of the full network's."""
        steps = [macs[0], *(b - a for a, b in itertools.pairwise(macs))]
        return sum(share * step for share, step in zip(self.batch.still_in, steps, strict=True)) / macs[-1]


def limits(runs: dict[str, Run], single: InferenceProfile) -> dict[str, tuple[float, float]]:
    """What must hold: measured value and its limit."""
    found = {f"time / ideal, {name}": (run.batch.overhead.median, OVERHEAD) for name, run in runs.items()}
    found["time / full network, search"] = (runs["search"].batch.saving.median, SAVING)
    found["batch 1, nobody leaves, time / full network"] = (single.idle_overhead.median, IDLE)
    return found


def command(options: argparse.Namespace) -> str:
    """The command line that repeats this, with the run by its name."""
    words = ["python", "benchmarks/inference.py", options.run.name]
    for name, value in vars(options).items():
        if name not in ("run", "output") and value != parser().get_default(name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)


def page(result: dict[str, Any], runs: dict[str, Run], single: InferenceProfile) -> str:
    """The result as Markdown."""
    m, s = result["machine"], result["settings"]
    title = f"{s['backbone']}, {len(result['macs'])} exits, batch {s['batch']}, {s['image_size']} px, {s['precision']}"
    full, first = "of the full network", runs["search"].batch
    hardware = f"{m['gpu'] or m['cpu']}, {m['threads']} CPU threads; torch {m['torch']}, timm {m['timm']}"
    method = (
        f"Policies for {s['budget']:g} of the full cost in multiply-adds, by search (which may stay below its budget "
        "where more brings nothing) and by the geometric calibration (which spends it), on validation images; "
        f"accuracies on {result['images']} test images. Median (quartiles) of {s['rounds']} rounds, everything in a "
        "new order in each round and ratios formed there; absolute times are this machine's, with whatever else ran on "
        "it. The ideal is each block's own time at the full batch for the share of the images still in."
    )
    lines = [
        f"# Adaptive inference: {title}, {s['device']}",
        "",
        f"`{result['command']}`",
        "",
        f"{hardware}, Python {m['python']}",
        "",
        method,
        "",
        "| block | MACs up to here | share | top-1 % | block, ms | exit, ms | time up to here, share |",
        "|---:|---:|---:|---:|---:|---:|---:|",
        *(
            f"| {i + 1} | {result['macs'][i] / 1e9:.3f} G | {result['macs'][i] / result['macs'][-1]:.1%} | "
            f"{result['top1'][i]:.1f} | {part.block:.1f} | {part.exit:.2f} | "
            f"{first.milliseconds[i] / first.milliseconds[-1]:.1%} |"
            for i, part in enumerate(first.blocks)
        ),
        "",
        f"| batch {s['batch']} | search | geometric |",
        "|---|---:|---:|",
        *(
            f"| {name} | {cells[0]} | {cells[1]} |"
            for name, cells in {
                "batch still in at each block": [
                    ", ".join(f"{share:.0%}" for share in run.batch.still_in) for run in runs.values()
                ],
                "multiply-adds / full": [f"{run.macs_share(result['macs']):.3f}" for run in runs.values()],
                "top-1 %": [f"{run.top1:.1f}" for run in runs.values()],
                "full network, ms": [f"{run.batch.full:.0f}" for run in runs.values()],
                "with the policy, ms": [f"{run.batch.dynamic:.0f}" for run in runs.values()],
                "**time / full network**": [spread(run.batch.saving) for run in runs.values()],
                "ideal, ms": [f"{run.batch.ideal:.0f}" for run in runs.values()],
                "**time / ideal**": [spread(run.batch.overhead) for run in runs.values()],
                "decisions and taking images out, ms": [f"{run.batch.decisions:.1f}" for run in runs.values()],
                "every exit decides, nobody leaves: time / full": [
                    spread(run.batch.idle_overhead) for run in runs.values()
                ],
            }.items()
        ),
        "",
        f"| batch 1, {s['single_rounds']} rounds | ms | |",
        "|---|---:|---|",
        f"| full network | {single.full:.2f} | |",
        f"| every exit decides, nobody leaves | {single.idle:.2f} | {spread(single.idle_overhead)} {full} |",
        "",
        "| what must hold | measured | limit | |",
        "|---|---:|---:|---|",
        *(
            f"| {name} | {value:.3f} | {limit:.2f} | {'kept' if value <= limit else 'NOT KEPT'} |"
            for name, (value, limit) in limits(runs, single).items()
        ),
    ]
    return "\n".join(lines) + "\n"


def spread(value: Spread) -> str:
    """Median with quartiles."""
    return f"{value.median:.3f} ({value.q1:.3f} - {value.q3:.3f})"


if __name__ == "__main__":
    sys.exit(main())
