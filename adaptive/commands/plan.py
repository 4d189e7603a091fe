"""``adaptive plan CONFIG``: predict steps, memory, traffic and time of a run on many ranks, without starting it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaptive.config.sections import Config
    from adaptive.planning.data_plan import Shards
    from adaptive.planning.plan import Plan
    from adaptive.planning.simulation import Scaling
    from adaptive.planning.step_time import Hardware

GIB = 2**30
RANKS = "1,8,16,32,64,128,256,512,1024,2048,4096"
RATES = {"intra_bandwidth": 200.0, "inter_bandwidth": 50.0, "latency": 10.0, "storage_bandwidth": 20.0}
IMAGE_BYTES = 110_000  # of an ImageNet photo as published, on average
NOTES = """\
Bandwidths, latency and storage are stated, not measured; docs/scaling.md says which they are by default, what the
formulas leave out, and where scaling stops. With --dataset-images the dataset need not be there."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.epilog = NOTES
    parser.add_argument("config", help="YAML configuration, for example configs/imagenet/resnet50.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.zero_stage=2")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="machines (default 1)")
    parser.add_argument("--gpus-per-node", type=int, metavar="G", help="ranks of each (default 1; simulated: 8)")
    speed = parser.add_mutually_exclusive_group()
    speed.add_argument("--images-per-second", type=float, metavar="X", help="of one rank, for times")
    speed.add_argument(
        "--measure", action="store_true", help="train for some seconds here, on noise, and take that speed"
    )
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="of one GPU; by default the one that is here")
    parser.add_argument("--strict", action="store_true", help="let a warning (too few shards, ...) be an error")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    scaling = parser.add_argument_group("simulation of many ranks")
    scaling.add_argument("--simulate", action="store_true", help="show what happens from one rank to thousands")
    scaling.add_argument("--ranks", metavar="1,8,...", help=f"numbers of ranks (default {RANKS})")
    scaling.add_argument("--dataset-images", type=int, metavar="N", help="assume a dataset of so many training images")
    scaling.add_argument("--shards", type=int, metavar="S", help="in so many shards (default one per 1,250 images)")
    scaling.add_argument("--image-bytes", type=int, metavar="B", help=f"of so many bytes each (default {IMAGE_BYTES})")
    scaling.add_argument("--cached", action="store_true", help="nodes keep all shards after the first epoch")
    scaling.add_argument("--intra-bandwidth", type=float, metavar="GB/s", help="a rank inside its node (default 200)")
    scaling.add_argument("--inter-bandwidth", type=float, metavar="GB/s", help="a node to the others (default 50)")
    scaling.add_argument("--latency", type=float, metavar="US", help="microseconds per hop between nodes (default 10)")
    scaling.add_argument(
        "--storage-bandwidth", type=float, metavar="GB/s", help="shared storage, all in all (default 20)"
    )
    scaling.add_argument("--figure", metavar="FILE", help="draw the result as PNG")


def run(arguments: argparse.Namespace) -> int:
    """Carry out the command."""
    _check(arguments)
    from adaptive.config.loading import load_config

    config = load_config(arguments.config, arguments.overrides)
    from adaptive.training.engine.group import resolve_device

    # Only a measurement needs the run's device; DeepSpeed, which judges its settings, is told not to look for one.
    resolve_device(config.train.device if arguments.measure else "cpu")
    from adaptive.training.starting.settings import complete

    config = complete(config)
    if arguments.simulate:
        return _simulate(arguments, config)
    from adaptive.planning.advice import warnings_about
    from adaptive.planning.checked_plan import check_plan
    from adaptive.planning.plan import make_plan
    from adaptive.planning.printing import plan_as_dict, print_plan

    checked = check_plan(config, arguments.nodes, arguments.gpus_per_node or 1)
    plan = make_plan(checked, _on_gpu(config))
    warnings = warnings_about(plan, load_config(arguments.config))
    rate, source = _speed(arguments, config, plan.checked.network, plan.checked.batch.micro_batch)
    limit = _memory_limit(arguments, plan)
    if arguments.json:
        print(json.dumps(plan_as_dict(plan, rate, source, limit, warnings)))
    else:
        print_plan(plan, rate, source, limit, warnings)
    _refuse_too_much(plan, limit)
    if arguments.strict and warnings:
        from adaptive.errors import AdaptiveError

        raise AdaptiveError(f"{warnings[0]} (--strict)")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Refuse numbers and flags that make no sense, before anything is loaded (raises AdaptiveError)."""
    from adaptive.errors import AdaptiveError

    at_least_one = ("nodes", "gpus_per_node", "dataset_images", "shards", "image_bytes")
    above_zero = ("images_per_second", "gpu_memory", "intra_bandwidth", "inter_bandwidth", "storage_bandwidth")
    for name in (*at_least_one, *above_zero, "latency"):
        value = getattr(arguments, name)
        low = name in at_least_one and value is not None and value < 1
        if low or (value is not None and not (0 < value < float("inf")) and not (name == "latency" and value == 0)):
            least = "1 or more" if name in at_least_one else "a number above 0"
            raise AdaptiveError(f"--{name.replace('_', '-')} {value} is not possible; give {least}")
    if not arguments.simulate:
        for name in ("ranks", "dataset_images", "shards", "image_bytes", "cached", "figure", *RATES):
            if getattr(arguments, name) not in (None, False):
                raise AdaptiveError(f"--{name.replace('_', '-')} belongs to a simulation; give --simulate too")
        return
    if arguments.gpu_memory is not None:
        raise AdaptiveError(f"--gpu-memory {arguments.gpu_memory:g} says nothing about a simulation; leave it out")
    if arguments.images_per_second is None and not arguments.measure:
        raise AdaptiveError("--simulate needs the speed of one rank: give --images-per-second X, or --measure")
    for name in ("shards", "image_bytes"):
        if getattr(arguments, name) is not None and arguments.dataset_images is None:
            raise AdaptiveError(f"--{name.replace('_', '-')} describes an assumed dataset; give --dataset-images too")
    if arguments.shards is not None and arguments.shards > arguments.dataset_images:
        raise AdaptiveError(f"--shards {arguments.shards} is more than --dataset-images {arguments.dataset_images}")
    _ranks(arguments)


def _ranks(arguments: argparse.Namespace) -> list[int]:
    from adaptive.errors import AdaptiveError

    text = arguments.ranks or RANKS
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdigit() and 1 <= int(word) <= 1_000_000 for word in words):
        raise AdaptiveError(f"--ranks {text!r} is no list of numbers from 1 on; for example --ranks 1,8,64")
    return sorted({int(word) for word in words})


def _on_gpu(config: Config) -> bool:
    """Say whether the run will be on GPUs: "auto" is what the cluster has, not the machine that plans."""
    return config.train.device != "cpu"


def _speed(arguments: argparse.Namespace, config: Config, network: Any, micro: int) -> tuple[float | None, str]:
    if not arguments.measure:
        return arguments.images_per_second, "given"
    from adaptive.distributed.ranks import find_ranks
    from adaptive.planning.throughput import measure_images_per_second

    find_ranks()
    return measure_images_per_second(config, network, micro), "measured here, on noise"


def _memory_limit(arguments: argparse.Namespace, plan: Plan) -> int | None:
    if arguments.gpu_memory is not None:
        return round(arguments.gpu_memory * GIB)
    import torch

    if plan.cuda and torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return None


def _refuse_too_much(plan: Plan, limit: int | None) -> None:
    """Raise MachineError where the run will not fit; the tables have been printed by then."""
    needed = plan.needed(plan.memory)
    if limit is None or needed <= limit:
        return
    from adaptive.errors import MachineError

    remedies = plan.remedies(limit)
    raise MachineError(
        f"{needed / GIB:.2f} GiB per rank do not fit into {limit / GIB:.2f} GiB "
        f"({plan.checked.batch.micro_batch} images per forward pass, train.zero_stage = {plan.settings.stage}); "
        f"try {'; or '.join(remedies)}"
    )


def _simulate(arguments: argparse.Namespace, config: Config) -> int:
    from adaptive.planning.printing import print_simulation, simulation_as_dict
    from adaptive.planning.simulation import find_stops, simulate

    scaling = _scaling(arguments, config)
    rows = simulate(scaling, _ranks(arguments))
    stops = find_stops(rows)
    if arguments.figure:
        from adaptive.planning.scaling_figure import draw_scaling

        drawing = draw_scaling(scaling, rows)
        from adaptive.files import write_atomically

        path = Path(arguments.figure)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, drawing.png)
    if arguments.json:
        print(json.dumps(simulation_as_dict(scaling, rows, stops)))
    else:
        print_simulation(scaling, rows, stops)
    return 0


def _scaling(arguments: argparse.Namespace, config: Config) -> Scaling:
    from adaptive.planning.checked_plan import check_plan
    from adaptive.planning.data_plan import Shards
    from adaptive.planning.memory import Sizes, ZeroSettings
    from adaptive.planning.simulation import Scaling
    from adaptive.training.batch import BatchSizes, batch_sizes
    from adaptive.training.checks.trial import check_phases_learn
    from adaptive.training.phases import plan_phase, prepare_phase

    per_node = arguments.gpus_per_node or 8
    if arguments.dataset_images is None:
        checked = check_plan(config, arguments.nodes, arguments.gpus_per_node or 1)
        network, batch = checked.network, checked.batch
        shards = Shards.of(checked.index.split(config.data.train_split))
    else:
        batch = batch_sizes(config, arguments.nodes * (arguments.gpus_per_node or 1))
        shards, network = _assumed(arguments, config)
    plans = [plan_phase(config, phase, len(network.exits)) for phase in config.resolved_phases()]

    def check(batch: BatchSizes) -> object:
        return check_phases_learn(config, batch, network, plans)

    check(batch)
    prepare_phase(network, plans[-1])
    rate, _ = _speed(arguments, config, network, batch.micro_batch)
    assert rate is not None
    settings = ZeroSettings.of(config, batch.world, batch.accumulation)
    return Scaling(
        config, settings, Sizes.of(network, config.optimizer), shards, rate, _hardware(arguments, per_node),
        batch, check, arguments.cached,
    )  # fmt: skip


def _hardware(arguments: argparse.Namespace, per_node: int) -> Hardware:
    from adaptive.planning.step_time import Hardware

    given = {name: getattr(arguments, name) for name in RATES}
    return Hardware(per_node, **{name: RATES[name] if value is None else value for name, value in given.items()})


def _assumed(arguments: argparse.Namespace, config: Config) -> tuple[Shards, Any]:
    """Return a dataset that is assumed to exist, and the network for as many classes as the configuration names."""
    from adaptive.data.shards.index import VERSION, DatasetIndex
    from adaptive.networks.from_config import outline_network
    from adaptive.planning.data_plan import Shards

    images = arguments.dataset_images
    shards = Shards.assumed(images, arguments.shards or max(1, images // 1250), arguments.image_bytes or IMAGE_BYTES)
    classes = [str(i) for i in range(config.model.num_classes or 1000)]
    index = DatasetIndex(version=VERSION, classes=classes, splits={}, fingerprint="0" * 64)
    return shards, outline_network(config, len(index.classes))
