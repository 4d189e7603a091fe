"""Early exit against the clock at batch sizes from 1 to 256: against the full network, and against the ideal.

    python benchmarks/inference_batches.py --backbone msdnet_cifar_anytime --image-size 32

The network is not trained: who leaves where is what counts here, not who is right. Thresholds are chosen so that the
average image of noise costs ``--budget`` of the full network. benchmarks/README.md says how to read the result.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.console import Console
from rich.markdown import Markdown

from adaptive import create_model
from adaptive.errors import AdaptiveError, ConfigError
from adaptive.inference.acceleration.accelerated import ACCELERATIONS
from adaptive.inference.calibration.calibrate import calibrate
from adaptive.inference.measuring.profile import profile
from adaptive.inference.policy import Policy
from adaptive.networks.network import AdaptiveNetwork
from adaptive.training.engine.group import resolve_device
from benchmarks.shared import pages
from benchmarks.shared.results import machine

POOL = 256  # images that thresholds are chosen on, and that batches are made of


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    options = parser().parse_args(arguments)
    try:
        result = run(options)
    except AdaptiveError as error:
        print(f"inference_batches: {error}", file=sys.stderr)
        return 1
    text = page(result)
    written = pages.write(options.output, f"inference_batches_{result['device']}_{options.backbone}", result, text)
    Console().print(Markdown(text))
    print("written: " + ", ".join(map(str, written)))
    return 0


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    p = argparse.ArgumentParser(prog="inference_batches", description=(__doc__ or "").partition("\n")[0])
    p.add_argument("--backbone", default="msdnet_cifar_anytime", help="any timm model or preset (%(default)s)")
    p.add_argument("--image-size", type=int, default=32, help="side in pixels (%(default)s)")
    p.add_argument("--classes", type=int, default=10, help="number of classes (%(default)s)")
    p.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64, 256], help="batch sizes (1 4 16 64 256)")
    p.add_argument("--budget", type=float, default=0.5, help="mean cost, as a share of the full one (%(default)s)")
    p.add_argument("--rounds", type=int, default=20, help="rounds per batch size, at least 2 (%(default)s)")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU if there is one")
    p.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 is autocast (%(default)s)")
    p.add_argument(
        "--accelerate",
        choices=("eager", *ACCELERATIONS),
        nargs="+",
        default=["eager"],
        help="runners measured in the same rounds; the eager one always is (eager)",
    )
    pages.add_output(p)
    return p


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure (raises ConfigError, ModelError, PolicyError, MachineError)."""
    if options.rounds < 2:
        raise ConfigError(f"--rounds {options.rounds}: must be at least 2")
    if not options.batches or min(options.batches) < 1:
        raise ConfigError(f"--batches {' '.join(map(str, options.batches))}: sizes begin at 1")
    if not 0 < options.budget <= 1:
        raise ConfigError(f"--budget {options.budget:g}: give a share of the full cost, above 0 and up to 1")
    device = resolve_device(options.device)
    torch.manual_seed(0)
    network = create_model(options.backbone, options.classes, input_size=options.image_size)
    network = network.to(device, memory_format=torch.channels_last).eval()
    images = torch.randn(POOL, 3, options.image_size, options.image_size).to(device)
    images = images.contiguous(memory_format=torch.channels_last)
    policy = half_leave(network, images, options.budget)
    rows = []
    for batch in options.batches:
        torch.compiler.reset()  # what the last batch size compiled
        ways = {way: way for way in options.accelerate if way != "eager"}
        shown = images[: batch * options.rounds]  # other ones in every round, as far as there are
        found = profile(network, policy, shown, options.rounds, options.precision, ways, batch)
        rows.append(asdict(found) | {"milliseconds_per_image": found.dynamic / batch})
    return {
        "benchmark": "inference_batches",
        "command": pages.command(parser(), options),
        "machine": machine(device.type),
        "device": device.type,
        "backbone": options.backbone,
        "image_size": options.image_size,
        "precision": options.precision,
        "budget": options.budget,
        "rounds": options.rounds,
        "batches": rows,
    }


@torch.inference_mode()
def half_leave(network: AdaptiveNetwork, images: torch.Tensor, budget: float) -> Policy:
    """Choose thresholds for a mean of ``budget`` of the full multiply-adds; the last exit's answers count as right."""
    pieces = [torch.stack(network(piece)).float().softmax(-1).cpu() for piece in images.split(32)]
    probabilities = torch.cat(pieces, dim=1)
    costs = [float(cost.macs) for cost in network.costs()]
    mean = max(costs[0], budget * costs[-1])
    return calibrate(probabilities, probabilities[-1].argmax(-1), costs, mean, "geometric")


def page(result: Mapping[str, Any]) -> str:
    """The page beside the JSON file."""
    rows = [
        (
            str(entry["batch"]),
            f"{entry['full']:.2f}",
            f"{entry['dynamic']:.2f}",
            f"{entry['milliseconds_per_image']:.3f}",
            pages.spread(entry["saving"], 3),
            pages.spread(entry["overhead"], 3),
            pages.spread(entry["idle_overhead"], 3),
        )
        for entry in result["batches"]
    ]
    columns = ["batch", "full, ms", "with the policy, ms", "ms/image", "/ full", "/ ideal", "nobody leaves, / full"]
    return f"""# Early exit by batch size: {result["backbone"]}, {result["image_size"]} px, {result["precision"]}

`{result["command"]}`

{pages.hardware(result["machine"])}

Images of noise, channels-last; thresholds for a mean of {result["budget"]:g} of the full multiply-adds over {POOL} of
them. Median (quartiles) of {result["rounds"]} rounds, everything in turn within a round; ratios are formed there. The
ideal is each block's own time at the full batch for the share of the images still in.

{pages.table(columns, rows)}
{_accelerated(result["batches"])}"""


def _accelerated(batches: Sequence[Mapping[str, Any]]) -> str:
    """The part about accelerated runners, empty if none was measured."""
    rows = [
        (
            str(entry["batch"]),
            way["accelerate"],
            f"{way['straight']:.2f}",
            f"{way['dynamic']:.2f}",
            pages.spread(way["over_straight"], 3),
            pages.spread(way["over_eager"], 3),
            pages.spread(way["over_full"], 3),
            str(way["prepared"]),
            f"{way['seconds']:.1f}",
        )
        for entry in batches
        for way in entry["accelerated"]
    ]
    if not rows:
        return ""
    columns = ["batch", "accelerated by", "to the end, ms", "with the policy, ms", "/ to the end", "/ eager runner"]
    return f"""
## Accelerated

The same runner compiled or captured, beside itself without decisions (to the end: the full network, as accelerated),
beside the eager runner, and beside the eager full network. Seconds are those of the first call, which prepares what
this batch needs: a function per stage that some image reaches.

{pages.table([*columns, "/ eager full", "prepared", "s"], rows)}
"""


if __name__ == "__main__":
    sys.exit(main())
