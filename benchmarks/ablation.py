"""Ablation of the training techniques: the same network, data, seeds and steps with one more technique each time.

    python benchmarks/ablation.py --source CIFAR10_FOLDER --jobs 2   # small: 15 minutes on two quiet cores
    python benchmarks/ablation.py --source CIFAR10_FOLDER --size gpu           # MSDNet and CIFAR-10 as published

Every run is the real training in a process of its own. A run that is finished is not trained again, so that the same
command continues an interrupted ablation, adds seeds or variants, or only writes the results anew.
benchmarks/README.md says how to read the result.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adaptive.config.loading import differences, dump_config, load_config, parse_config
from adaptive.config.sections import Config
from adaptive.data.shards.index import load_index
from adaptive.errors import AdaptiveError, ConfigError, TrainingError
from adaptive.files import write_atomically
from benchmarks.ablation_study.data import packed
from benchmarks.ablation_study.run import RESULT
from benchmarks.ablation_study.settings import DATA_SETS, DEFAULT_VARIANTS, PARTS, SIZES, Experiment, parts_of, tree
from benchmarks.shared.locations import REPOSITORY, RESULTS

PLACES = {"train.run_folder", "data.path"}  # where things lie does not make a run another one


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    options = parser().parse_args(arguments)
    try:
        check(options)
        experiment = experiment_from(options)
        folder = dataset(options)
        runs = {(v, s): options.work / f"{v}_seed{s}" for s in range(options.seeds) for v in options.variants}
        configs = {key: configure(experiment, *key, folder, place, options.set) for key, place in runs.items()}
        train_all(runs, configs, SIZES[options.size].gradient_batch, options.jobs)
        from benchmarks.ablation_study import report  # it draws, which a run that fails should not wait for

        counts = {name: split.count for name, split in load_index(folder).splits.items()}
        result = report.collect(runs, configs, counts)
        result = {"benchmark": "ablation", "command": command(options), **result}
        written = report.write(result, options.output, experiment.stem)
    except AdaptiveError as error:
        print(f"ablation: {error}", file=sys.stderr)
        return 1
    print("written: " + ", ".join(map(str, written)))
    return 0


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    p = argparse.ArgumentParser(prog="ablation", description=(__doc__ or "").partition("\n")[0])
    data = p.add_mutually_exclusive_group(required=True)
    data.add_argument("--source", type=Path, metavar="FOLDER", help="train/ and test/ (or val/) with class folders")
    data.add_argument("--packed", metavar="FOLDER", help="or a dataset that is packed already, or its URL")
    p.add_argument("--data", choices=tuple(DATA_SETS), default="cifar10", help="which one it is (%(default)s)")
    p.add_argument("--size", choices=tuple(SIZES), default="small", help="network, data and length (%(default)s)")
    p.add_argument(
        "--variants", nargs="+", default=list(DEFAULT_VARIANTS), metavar="V",
        help=f"parts joined by + (default: {' '.join(DEFAULT_VARIANTS)}); parts: {', '.join(PARTS)}",
    )  # fmt: skip
    p.add_argument("--seeds", type=int, default=3, help="number of seeds (%(default)s)")
    p.add_argument("--epochs", type=int, help="length of training; by default the size's")
    p.add_argument("--steps", type=int, help="stop after so many steps (a trial of the command)")
    p.add_argument("--images", type=int, nargs=3, metavar="N", help="images of train, val, test drawn from the source")
    p.add_argument("--gamma", type=float, default=0.1, help="weight of distillation where there is some (%(default)s)")
    p.add_argument("--temperature", type=float, default=1.0, help="of distillation (%(default)s)")
    p.add_argument("--teacher", metavar="NAME", help="timm model that teaches the variants with the part teacher")
    p.add_argument("--teacher-weights", metavar="FILE", help="its weights; without it timm's pretrained ones")
    p.add_argument("--teacher-options", type=json.loads, default={}, metavar="JSON", help="its further arguments")
    p.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="configuration keys for all variants")
    p.add_argument("--jobs", type=int, default=1, help="runs side by side (%(default)s)")
    p.add_argument("--work", type=Path, help="folder of data and runs (runs/ablation_<size>_<data>)")
    p.add_argument("--output", type=Path, default=RESULTS, help="folder of the result files (benchmarks/results)")
    return p


def check(options: argparse.Namespace) -> None:
    """Check the command line and fill in the work folder (raises ConfigError)."""
    for name in ("seeds", "epochs", "steps", "jobs"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name} {value}: must be at least 1")
    for variant in options.variants:
        if "teacher" in parts_of(variant) and not options.teacher:
            raise ConfigError(f"--variants {variant}: needs --teacher, a timm model name")
    options.variants = list(dict.fromkeys(options.variants))
    options.work = options.work or REPOSITORY / "runs" / f"ablation_{options.size}_{options.data}"


def experiment_from(options: argparse.Namespace) -> Experiment:
    """Return what all runs share."""
    teacher = {
        "teacher_model": options.teacher,
        "teacher_weights": options.teacher_weights,
        "teacher_options": options.teacher_options,
    }
    return Experiment(
        options.size, options.data, options.epochs or SIZES[options.size].epochs, options.steps,
        options.gamma, options.temperature, teacher,
    )  # fmt: skip


def dataset(options: argparse.Namespace) -> str | Path:
    """Return the packed dataset, which is packed first where that is not done."""
    if options.packed:
        return str(options.packed)
    images = tuple(options.images) if options.images else SIZES[options.size].images
    name = "data_" + ("all" if images is None else "_".join(map(str, images)))
    return packed(options.source, options.work / name, images, DATA_SETS[options.data].hold_out)


def configure(
    experiment: Experiment, variant: str, seed: int, folder: str | Path, place: Path, overrides: Sequence[str]
) -> Config:
    """Return a run's configuration, written beside its folder (ConfigError: a finished run there is another one)."""
    place.parent.mkdir(parents=True, exist_ok=True)
    file = config_file(place)
    write_atomically(file, dump_config(parse_config(tree(experiment, variant, seed, folder, place))))
    config = load_config(file, overrides)
    write_atomically(file, dump_config(config))
    if (place / RESULT).is_file():
        for key, (then, now) in differences(load_config(place / "config.yaml"), config).items():
            if key not in PLACES:
                raise ConfigError(
                    f"{place} is a finished run with {key} = {then!r}, now {now!r}; choose another --work"
                )
    return config


def config_file(place: Path) -> Path:
    """Where a run's configuration lies."""
    return place.with_name(f"{place.name}.yaml")


def train_all(
    runs: dict[tuple[str, int], Path], configs: dict[tuple[str, int], Config], gradient_batch: int, jobs: int
) -> None:
    """Train and measure what is not finished, ``jobs`` at a time (TrainingError: a run failed)."""
    waiting = [key for key, place in runs.items() if not (place / RESULT).is_file()]
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))

    def one(key: tuple[str, int]) -> None:
        place = runs[key]
        words = [sys.executable, str(REPOSITORY / "benchmarks" / "ablation_study" / "run.py"), str(config_file(place))]
        log = place.with_name(f"{place.name}.log")
        with log.open("w") as output:
            code = subprocess.run(
                [*words, str(gradient_batch)], stdout=output, stderr=subprocess.STDOUT, env=environment
            ).returncode
        if code:
            last = log.read_text(errors="replace").strip().splitlines()[-1:]
            raise TrainingError(f"the run {place.name} failed ({' '.join(last)}); see {log}, then start again")
        seconds = json.loads((place / RESULT).read_text())["train_seconds"]
        print(f"{place.name}: trained in {seconds:.0f} s, {_left(runs)} to go", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(one, key) for key in waiting]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _left(runs: dict[tuple[str, int], Path]) -> int:
    return sum(not (place / RESULT).is_file() for place in runs.values())


def command(options: argparse.Namespace) -> str:
    """Return the command line that repeats this run, without the names of its folders."""
    words: list[Any] = ["python", "benchmarks/ablation.py", "--source" if options.source else "--packed", "FOLDER"]
    defaults = vars(parser().parse_args(["--packed", "FOLDER"]))
    for name, value in vars(options).items():
        if name in ("source", "packed", "work", "output", "teacher_weights") or value == defaults[name]:
            continue
        words.append(f"--{name.replace('_', '-')}")
        words += value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
    return shlex.join(map(str, words))


if __name__ == "__main__":
    sys.exit(main())
