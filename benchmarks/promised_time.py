"""The clock over the promise: how long policies take, against what a model of time says of them.

    python benchmarks/promised_time.py RUN... [--output FOLDER]
    python benchmarks/promised_time.py RUN... --device cuda --precision bf16 --runtimes torch compile

Every run at every batch size and in every runtime is a row: its policy.json, or one calibrated here for half of the
full time. The model is probed on other images than those that are timed, in the same rounds. A row is written as soon
as it is known, and a second call goes on where the first one stopped. benchmarks/README.md says how to read it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.markdown import Markdown

from adaptive.errors import AdaptiveError, ConfigError
from adaptive.files import write_atomically
from adaptive.inference.calibration.calibrate import Target, fit
from adaptive.inference.measuring.promises import Bench, TimedRunner, in_turn, probe
from adaptive.inference.measuring.time_model import Asked, middle
from adaptive.inference.measuring.time_probe import measure, promise, repeats
from adaptive.inference.measuring.timing import Spread, apart
from adaptive.inference.outputs import Outputs
from adaptive.inference.policy import Policy
from adaptive.inference.runtime_names import RUNTIMES
from adaptive.inference.runtimes import Runner, cpu_threads
from adaptive.runs import TrainedRun, collect_outputs, first_images, load, load_policy
from adaptive.training.engine.group import resolve_device
from benchmarks.shared import pages
from benchmarks.shared.results import machine

LIMIT = 1.05  # of the clock over the promise, either way
NOISE = 0.03  # that the same runner may differ by within the rounds
PROBED = 256  # images that are probed on, at least a batch; as many others are timed
ROUNDS_TO_CHOOSE = 6


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    options = parser().parse_args(arguments)
    try:
        result = run(options)
    except AdaptiveError as error:
        print(f"promised_time: {error}", file=sys.stderr)
        return 1
    text = page(result)
    written = pages.write(options.output, stem(options), result, text)
    Console().print(Markdown(text))
    print("written: " + ", ".join(map(str, written)))
    return 0 if all(row["kept"] for row in result["rows"]) else 1


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    p = argparse.ArgumentParser(prog="promised_time", description=(__doc__ or "").partition("\n")[0])
    p.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folders, of several exits each")
    p.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64], help="batch sizes (1 16 64)")
    p.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=["torch", "onnx"], help="(torch onnx)")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of torch and compile (%(default)s)")
    p.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="likewise (%(default)s)")
    p.add_argument("--rounds", type=int, default=20, help="rounds of a row, at least 4 (%(default)s)")
    p.add_argument("--threads", type=int, default=1, help="of the processor (%(default)s)")
    p.add_argument("--tries", type=int, default=3, help="for a row while the machine is too noisy (%(default)s)")
    p.add_argument("--data", metavar="FOLDER", help="packed dataset; by default each run's own")
    pages.add_output(p)
    return p


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure what no earlier call has measured (raises AdaptiveError)."""
    for name, least in (("rounds", 4), ("threads", 1), ("tries", 1)):
        if getattr(options, name) < least:
            raise ConfigError(f"--{name} {getattr(options, name)}: give {least} or more")
    if min(options.batches) < 1:
        raise ConfigError(f"--batches {' '.join(map(str, options.batches))}: sizes begin at 1")
    if not options.runs:
        raise ConfigError("RUN: none given; give the folders of trained runs")
    if options.device == "cuda" and "onnx" in options.runtimes:
        raise ConfigError("--device cuda: onnx is timed on the processor; give --runtimes torch compile")
    device = resolve_device(options.device).type
    asked: dict[str, Any] = {
        "device": device,
        "precision": options.precision,
        "rounds": options.rounds,
        "threads": options.threads,
    }
    with cpu_threads(options.threads):
        asked["machine"] = machine(device)
    kept = options.output / f"{stem(options)}.rows.json"
    rows = _known(kept, asked)
    options.output.mkdir(parents=True, exist_ok=True)
    with cpu_threads(options.threads):
        for folder in options.runs:
            for row in _rows(folder, options, rows):
                rows.append(row)
                write_atomically(kept, json.dumps({**asked, "rows": rows}))
                said = f"{row['run']} {row['runtime']} {row['batch']}: {row['ratio']:.3f}"
                print(f"{said}, repeats to {row['noise']:.3f}", flush=True)
    names = {folder.name for folder in options.runs}
    wanted = [row for row in rows if row["run"] in names and row["batch"] in options.batches]
    wanted = [row for row in wanted if row["runtime"] in options.runtimes]
    order = [folder.name for folder in options.runs]
    wanted.sort(key=lambda row: (order.index(row["run"]), options.runtimes.index(row["runtime"]), row["batch"]))
    return {
        "benchmark": "promised_time",
        "command": command(options),
        **asked,
        "rows": wanted,
    }


def stem(options: argparse.Namespace) -> str:
    """Name of the files: a processor's rows and a GPU's lie side by side."""
    return "promised_time" if options.device == "cpu" else f"promised_time_{options.device}"


def command(options: argparse.Namespace) -> str:
    """The command line that repeats this, without paths."""
    words = [*pages.command(parser(), argparse.Namespace(**{**vars(options), "runs": []})).split(), "RUN..."]
    return " ".join(words)


def _known(path: Path, asked: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows that were measured already, in the same way on the same machine."""
    if not path.is_file():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    return list(found["rows"]) if {key: found.get(key) for key in asked} == dict(asked) else []


def _rows(folder: Path, options: argparse.Namespace, known: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Measure those rows of a run that are not known yet."""
    places = [(runtime, batch) for runtime in options.runtimes for batch in options.batches]
    done = {(row["runtime"], row["batch"]) for row in known if row["run"] == folder.name}
    left = [place for place in places if place not in done]
    if not left:
        return
    trained = load(folder)
    if len(trained.network.exits) == 1:
        raise ConfigError(f"{folder} has one exit, where everybody leaves: there is nothing to promise")
    subject = _Subject(trained, options)
    for runtime, batch in left:
        yield subject.row(runtime, batch)


class _Subject:
    """A run whose promises are tested."""

    def __init__(self, trained: TrainedRun, options: argparse.Namespace) -> None:
        trained.network.to(resolve_device(options.device)).eval()
        self._trained, self._options = trained, options
        self._split = trained.config.data.test_split
        self._outputs: Outputs | None = None
        images = first_images(trained, self._split, options.data, 2 * max(PROBED, *options.batches))
        half = len(images) // 2
        self._probed, self._timed = images[:half], images[half:]

    def row(self, runtime: Any, batch: int) -> dict[str, Any]:
        """Measure until the machine repeats itself, or the tries are over."""
        bench = Bench.of(self._trained.network, runtime, self._options.precision, batch, self._options.threads)
        plain = Policy(thresholds=[0.5] * (len(self._trained.network.exits) - 1) + [0.0])
        runner = bench.runner(plain)
        policy = self._policy(bench, runner)
        found, tries = self._measured(bench, runner, policy), 1
        while found["noise"] > NOISE and tries < self._options.tries:
            found, tries = self._measured(bench, runner, policy), tries + 1
        kept = 1 / LIMIT <= found["ratio"] <= LIMIT
        return {
            "run": self._trained.folder.name,
            "backbone": self._trained.config.model.backbone,
            "runtime": runtime,
            "batch": batch,
            "kind": policy.kind,
            **found,
            "tries": tries,
            "noisy": found["noise"] > NOISE,
            "kept": kept,
        }

    def _measured(self, bench: Bench, runner: Runner, policy: Policy) -> dict[str, Any]:
        """Rounds of the probe, of the runner, and of the runner again, in turn."""
        batch, images = bench.conditions.batch, bench.images(self._timed)
        twins = [TimedRunner(runner.with_policy(policy), images, batch, policy.exits) for _ in range(2)]
        for one in twins:
            one.warm_up()
        asked = Asked.of_policy(policy, bench.network.collaboration)

        rounds, probed, beside = self._options.rounds, bench.images(self._probed), partial(in_turn, twins)
        [models] = measure([bench.contender(runner, policy, asked.fires)], probed, batch, rounds, beside=beside)
        clock = statistics.median(time for one in twins for time in one.rounds)
        shares = [sum(pair) / 2 for pair in zip(*(one.shares for one in twins), strict=True)]
        promised = promise(models, shares, asked)
        both = [statistics.fmean(pair) for pair in zip(*(one.rounds for one in twins), strict=True)]
        return {
            "shares": shares,
            "promised": promised,
            "clock": clock,
            "ratio": clock / promised,
            "by_round": asdict(Spread.of_ratios(both, [model.mean(shares, asked) for model in models])),
            "noise": max(
                apart(*(one.rounds for one in twins)),
                apart(*(twins[0].rounds[half::2] + twins[1].rounds[half::2] for half in (0, 1))),
                repeats(models, shares, asked),
            ),
            "of_full_batches": clock / sum(s * t for s, t in zip(shares, middle(models).exits, strict=True)),
        }

    def _policy(self, bench: Bench, runner: Runner) -> Policy:
        """The run's own, or one for half of the full time."""
        path = self._trained.folder / "policy.json"
        if path.is_file():
            return load_policy(str(path), self._trained)
        if self._outputs is None:
            split = self._trained.config.data.val_split
            device = resolve_device(self._options.device)
            self._outputs = collect_outputs(self._trained, split, self._options.data, device=device)
        kind = Policy(thresholds=[0.5] * (len(self._trained.network.exits) - 1) + [0.0])
        model = middle(probe(bench, runner, kind, self._probed, ROUNDS_TO_CHOOSE))
        budget = max(model.exits[0] * 1.01, model.exits[-1] / 2)
        return fit(
            self._outputs.logits,
            self._outputs.labels,
            model,
            Target(budget=budget),
            collaboration=bench.network.collaboration,
        )


def page(result: Mapping[str, Any]) -> str:
    """The page beside the JSON file."""
    rows = [
        (
            f"{row['run']} ({row['backbone']})",
            row["runtime"],
            str(row["batch"]),
            " / ".join(f"{100 * share:.0f}" for share in row["shares"]),
            f"{row['promised']:.3f}",
            f"{row['clock']:.3f}",
            f"{row['ratio']:.3f}",
            f"{row['of_full_batches']:.2f}",
            f"{100 * row['noise']:.1f} %" + (_noisy(row) if row["noisy"] else ""),
        )
        for row in result["rows"]
    ]
    columns = ["run", "runtime", "batch", "leave at, %", "promised, ms", "clock, ms", "clock / promise"]
    lost = [row for row in result["rows"] if not row["kept"]]
    said = "The limit holds in every row." if not lost else f"The limit does not hold in {len(lost)} rows."
    return f"""# The clock over the promise

`{result["command"]}`

{pages.hardware(result["machine"])}; {result["precision"]}

Milliseconds of an image. Medians of {result["rounds"]} rounds, in each of which the model of time is probed and the
runner is timed twice, on other images. */ shares* is what milliseconds were once: the clock over the shares of what
full batches take. *Repeats* is how far the two timings are apart, or halves of the rounds, of the runner or of the
probe, whichever is the most; above {100 * NOISE:.0f} % the machine was too noisy, and the row is measured again. There,
clock / promise within each round and its quartiles over the rounds are given as well: what lasts longer than a round
takes no part in them. Limit: clock / promise within {LIMIT} either way. {said}

{pages.table([*columns, "/ shares", "repeats"], rows)}
"""


def _noisy(row: Mapping[str, Any]) -> str:
    """What is said of a row whose times do not repeat."""
    spread = row["by_round"]
    within = f"{spread['median']:.3f} ({spread['q1']:.3f} to {spread['q3']:.3f}) within rounds"
    tries = "1 try" if row["tries"] == 1 else f"{row['tries']} tries"
    return f", too noisy after {tries}; {within}"


if __name__ == "__main__":
    sys.exit(main())
