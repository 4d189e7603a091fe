"""Memory that `adaptive plan` predicts, against what a real training rank takes.

    python benchmarks/plan_memory.py

Every case is a pair of fresh processes that train over gloo (on a GPU: over NCCL on as many as there are, else one) by
the library's own path: phase, learner, task, engine. On the CPU the figure is the growth of the resident set's peak
over an "empty" process, which has imported everything, joined the group and trained a tiny network; on a GPU it is the
allocator's own peak. benchmarks/README.md says how to read the result.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.multiprocessing as mp

from adaptive.config.loading import parse_config
from adaptive.config.sections import Config
from adaptive.doctor.checks.network import free_port
from adaptive.networks.create import create_model
from adaptive.planning.memory import RankMemory, ZeroSettings
from adaptive.planning.plan import cost_phases
from benchmarks.shared import pages, results

BACKBONES = ("resnet50", "vit_small_patch16_224")
STAGES = (0, 1, 2, 3)
WORLD = 2
LIMIT_PERCENT = 15.0
STEPS = 3
MIB = 2**20
# glibc gives every block of 64 KiB or more memory of its own, which goes back to the system when it is freed: else the
# resident set would hold what malloc keeps for later. (mallopt's M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_MMAP_MAX.)
MALLOC = ((-3, 64 * 1024), (-1, 64 * 1024), (-4, 1 << 20))


def case_config(backbone: str, stage: int, micro_batch: int, world: int, image_size: int, device: str) -> Config:
    """Four exits with Gradient Equilibrium and collaboration, one-for-all distillation, SGD with momentum."""
    return parse_config(
        {
            "model": {"backbone": backbone, "exits": 4, "equilibrium": True, "collaboration": True},
            "data": {"path": "noise", "image_size": image_size},
            "optimizer": {"name": "sgd", "lr": 1e-3, "momentum": 0.9},
            "train": {"global_batch": micro_batch * world, "zero_stage": stage, "device": device, "epochs": 1},
            "distillation": {"gamma": 0.1},
        }
    )


def build(config: Config, world: int) -> Any:
    """Build what a rank trains, as a run does: a template, a copy of it in the phase's learner, and the task."""
    import copy

    from adaptive.training.batch import batch_sizes
    from adaptive.training.engine.group import resolve_device
    from adaptive.training.learner import build_learner, build_task
    from adaptive.training.phases import plan_phase, set_modes
    from adaptive.training.prepared_run import Setup

    device = resolve_device(config.train.device, int(os.environ["LOCAL_RANK"]))
    batch = batch_sizes(config, world)
    torch.manual_seed(0)
    template = create_model(
        config.model.backbone,
        1000,
        config.model.exits,
        input_size=config.data.image_size,
        **config.model.options,
    )
    plan = plan_phase(config, config.resolved_phases()[0], len(template.exits))
    setup = Setup(config, batch, device)
    learner = build_learner(setup, plan, copy.deepcopy(template))
    set_modes(learner.network, plan)
    task = build_task(setup, plan, learner, plan.weights_from(0, 1, 0))
    return template, learner, task, device, batch


def train(config: Config, world: int, steps: int, note: Any = lambda name: None) -> Any:
    """Take steps on noise; returns what was built, so that the caller decides when it goes."""
    built = build(config, world)
    _, learner, task, device, batch = built
    size = config.data.image_size
    note("built")
    for step in range(steps):
        images = torch.randn(batch.micro_batch, 3, size, size).to(device)
        labels = torch.randint(1000, (batch.micro_batch,)).to(device)
        loss = task.loss(images, labels, (step, 0, 0))
        note("forward")
        learner.engine.backward(loss)
        note("backward")
        del loss
        learner.engine.step()
        note("step")
    return built


class ResidentPeak:
    """The peak of this process's resident set, from Linux's own counters."""

    def start(self) -> None:
        """Forget the peak so far; remember what is resident now."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        self.base = self.read("VmRSS")

    def read(self, name: str = "VmHWM") -> int:
        """Return a counter in bytes."""
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
        raise RuntimeError(f"no {name}")

    def growth(self) -> int:
        """Return the peak's growth since the start, in bytes."""
        return self.read() - self.base


def measure(config: Config, world: int, verbose: bool = False) -> int:
    """Return the bytes that this rank took at its peak, over the empty process."""
    tiny = config.model_copy(
        update={"model": config.model.model_copy(update={"backbone": "test_resnet", "exits": 2}),
                "data": config.data.model_copy(update={"image_size": 64})}
    )  # fmt: skip
    warm = train(tiny, world, 2)
    warm[1].engine.destroy()
    del warm
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        train(config, world, STEPS)
        return torch.cuda.max_memory_allocated() - base
    peak = ResidentPeak()
    peak.start()

    def note(name: str) -> None:
        if verbose and os.environ["RANK"] == "0":
            print(
                f"    {name:9} resident {(peak.read('VmRSS') - peak.base) / MIB:8.1f} peak {peak.growth() / MIB:8.1f}",
                flush=True,
            )

    train(config, world, STEPS, note)
    return peak.growth()


def _rank(rank: int, world: int, port: int, config: dict[str, Any], folder: str, verbose: bool) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ.update(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo", HF_HUB_OFFLINE="1")
    torch.set_num_threads(1)
    library = ctypes.CDLL(None)
    for option, value in MALLOC:
        library.mallopt(option, value)
    from adaptive.training.engine.group import init_distributed, resolve_device

    typed = parse_config(config)
    resolve_device(typed.train.device, rank)
    init_distributed()
    Path(folder, str(rank)).write_text(str(measure(typed, world, verbose)))
    os._exit(0)  # gloo may abort in its destructors


def measure_case(config: Config, world: int, verbose: bool = False) -> int:
    """Train in ``world`` fresh processes and return the first rank's bytes."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world, port, config.model_dump(), folder, verbose)
        context = mp.get_context("spawn")
        ranks = [context.Process(target=_rank, args=(rank, *arguments)) for rank in range(world)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        return int(Path(folder, "0").read_text())


def predict_cases(backbone: str, micro_batch: int, world: int, image_size: int, device: str) -> dict[int, RankMemory]:
    """Return the prediction of `adaptive plan` for all ZeRO stages."""
    config = case_config(backbone, 0, micro_batch, world, image_size, device)
    network = create_model(backbone, 1000, config.model.exits, input_size=image_size)
    settings = ZeroSettings.of(config, world, 1)
    cuda = device == "cuda"
    (phase,) = cost_phases(config, network, settings, micro_batch, 1, cuda)
    return {s: phase.memory(config, replace(settings, stage=s), micro_batch, cuda) for s in STAGES}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Predict and measure every case."""
    device = "cuda" if torch.cuda.is_available() and options.device != "cpu" else "cpu"
    world = WORLD if device == "cpu" else min(WORLD, torch.cuda.device_count())
    cases = []
    for backbone in options.backbones:
        predicted = predict_cases(backbone, options.micro_batch, world, options.image_size, device)
        for stage in options.stages:
            # Training alone is measured: no validation.
            moment = max((m for m in predicted[stage].moments if m.name != "validation"), key=lambda m: m.total)
            config = case_config(backbone, stage, options.micro_batch, world, options.image_size, device)
            measured = measure_case(config, world, options.verbose)
            case = {
                "backbone": backbone,
                "zero_stage": stage,
                "moment": moment.name,
                "kinds": moment.kinds,
                "predicted_bytes": moment.total,
                "measured_bytes": measured,
                "error_percent": 100 * (moment.total / measured - 1),
            }
            cases.append(case)
            found = f"predicted {moment.total / MIB:.1f} MiB, measured {measured / MIB:.1f} MiB"
            print(f"{backbone} ZeRO {stage}: {found}, {case['error_percent']:+.1f} %", flush=True)
    return {
        "benchmark": "plan_memory",
        "settings": {"micro_batch": options.micro_batch, "image_size": options.image_size, "ranks": world},
        "device": device,
        "machine": results.machine(device),
        "cases": cases,
    }


def markdown(result: dict[str, Any]) -> str:
    """Return the page that stands beside the JSON file."""
    m, s = result["machine"], result["settings"]
    how = "growth of the resident set's peak over an empty process" if result["device"] == "cpu" else "allocator's peak"
    hardware = f"{m['gpu'] or m['cpu']}, one thread; torch {m['torch']}, timm {m['timm']}, deepspeed {m['deepspeed']}, "
    settings = (
        f"{s['ranks']} rank(s), micro batch {s['micro_batch']}, {s['image_size']} px, fp32, 4 exits, GE, ISC, OFA, SGD "
        f"with momentum. Measured: {how}, {STEPS} steps, validation not among them. It has to be within "
        f"{LIMIT_PERCENT:g} %."
    )
    lines = [
        "# Memory per rank: predicted by `adaptive plan`, and measured",
        "",
        f"`{result['command']}`",
        "",
        f"{hardware}Python {m['python']}",
        "",
        settings,
        "",
        "| network | ZeRO | predicted, MiB | measured, MiB | error | peak in | of which (MiB) |",
        "|---|---:|---:|---:|---:|---|---|",
    ]
    for case in result["cases"]:
        kinds = ", ".join(f"{kind} {size / MIB:.0f}" for kind, size in case["kinds"].items())
        lines.append(
            f"| {case['backbone']} | {case['zero_stage']} | {case['predicted_bytes'] / MIB:.1f} | "
            f"{case['measured_bytes'] / MIB:.1f} | {case['error_percent']:+.1f} % | {case['moment']} | {kinds} |"
        )
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    p = argparse.ArgumentParser(prog="plan_memory", description=(__doc__ or "").partition("\n")[0])
    p.add_argument("--backbones", nargs="+", default=list(BACKBONES), help="timm models (%(default)s)")
    p.add_argument("--stages", type=int, nargs="+", default=list(STAGES), choices=STAGES, help="of ZeRO (%(default)s)")
    p.add_argument("--micro-batch", type=int, default=8, help="images per rank (%(default)s)")
    p.add_argument("--image-size", type=int, default=224, help="side in pixels (%(default)s)")
    p.add_argument("--device", choices=("auto", "cpu"), default="auto", help="auto takes a GPU if there is one")
    p.add_argument("--verbose", action="store_true", help="print the resident set after every part of a step")
    pages.add_output(p)
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns 1 where a prediction is further off than it may be."""
    options = parser().parse_args(arguments)
    result = {"command": pages.command(parser(), options), **run(options)}
    stem = "plan_memory" if result["device"] == "cpu" else f"plan_memory_{result['device']}"
    pages.write(options.output, stem, result, markdown(result))
    return int(any(abs(case["error_percent"]) > LIMIT_PERCENT for case in result["cases"]))


if __name__ == "__main__":
    sys.exit(main())
