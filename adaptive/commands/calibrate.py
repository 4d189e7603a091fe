"""``adaptive calibrate RUN --budget X``: choose on held-out images the policy by which images leave early."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptive.commands.run_options import (
    add_loading,
    add_overrides,
    add_weights,
    check_loading,
    left_out_words,
    load_run,
    one_exit_words,
    prepare_tables,
    split_outputs,
)
from adaptive.commands.timing_options import add_timing, check_timing, timed_run
from adaptive.foreign_text import say, shell_words

if TYPE_CHECKING:
    from adaptive.inference.calibration.budget_argument import Budget
    from adaptive.inference.calibration.calibrate import Target
    from adaptive.inference.measuring.time_model import TimeModel
    from adaptive.inference.outputs import Outputs
    from adaptive.inference.policy import Policy
    from adaptive.runs import TrainedRun


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    from adaptive.inference.policy_kinds import KINDS

    parser.add_argument("run_folder", metavar="RUN", help="run folder that `adaptive train` wrote")
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument(
        "--budget",
        metavar="X",
        help="mean cost of an image: a share of the full cost (0.5), multiply-adds (120M), milliseconds measured here "
        "(3.5ms); or a top-1 accuracy to reach at least cost (95%%) on half of the held-out images, while the other "
        "half says how accurate that is in truth",
    )
    wanted.add_argument(
        "--max-loss",
        type=float,
        metavar="POINTS",
        help="risk control: lose at most so many points of accuracy against the full network, with probability "
        "1 - delta, at least cost",
    )
    parser.add_argument(
        "--confidence",
        type=float,
        metavar="P",
        help="with --budget 95%%: reach that accuracy in truth with this probability, shown by a test (such as 0.95)",
    )
    parser.add_argument("--delta", type=float, metavar="P", help="with --max-loss: how often it may fail (default 0.1)")
    parser.add_argument("--kind", choices=KINDS, default="confidence", help="what to decide on (default confidence)")
    parser.add_argument(
        "--method",
        choices=("search", "geometric", "maximum"),
        default="search",
        help="search: over all thresholds, by smoothed accuracy (default); maximum: by the observed one, which fits "
        "chance too; geometric: the classic one-parameter curve",
    )
    parser.add_argument(
        "--temperature",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="scale each exit's logits by a temperature fitted on the same images (default yes)",
    )
    parser.add_argument("--split", help="held-out images to choose on; by default data.val_split of the run")
    parser.add_argument("--seed", type=int, default=0, help="of halves and gates (default 0)")
    parser.add_argument("--out", metavar="FILE", help="where the policy goes; by default RUN/policy.json")
    add_timing(parser)
    add_weights(parser)
    add_overrides(parser)
    add_loading(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Carry out the command."""
    from adaptive.errors import PolicyError
    from adaptive.files import json_text

    check_loading(arguments)
    prepare_tables(arguments)
    given, budget = _target(arguments)
    check_timing(arguments, used=budget is not None and budget.unit == "ms")
    trained = load_run(arguments.run_folder, arguments.checkpoint, arguments.weights, arguments.overrides)
    if len(trained.network.exits) == 1:
        raise PolicyError(one_exit_words(trained))
    split = arguments.split or trained.config.data.val_split
    out = Path(arguments.out) if arguments.out else trained.folder / "policy.json"
    if budget is not None and budget.unit == "ms":
        result, policy = _by_the_clock(trained, arguments, split, budget.value, out)
    else:
        costs = [float(cost.macs) for cost in trained.network.costs()]
        # one out of range is refused before the images are run
        target = _in_unit(given, budget, costs, arguments.confidence)
        outputs = _outputs(trained, arguments, split)
        policy = _fitted(trained, arguments, split, outputs, costs, target)
        _save(policy, out)
        result = _result(trained, policy, outputs, out, arguments.seed)
    if arguments.json:
        print(json_text(result))
    else:
        _print(result, policy)
    return 0


def _outputs(trained: TrainedRun, arguments: argparse.Namespace, split: str) -> Outputs:
    return split_outputs(trained, arguments, split, "--split" if arguments.split else "data.val_split")


def _fitted(
    trained: TrainedRun,
    arguments: argparse.Namespace,
    split: str,
    outputs: Outputs,
    costs: list[float] | TimeModel,
    target: Target,
) -> Policy:
    from adaptive.inference.calibration.calibrate import fit
    from adaptive.runs import named

    policy = fit(
        outputs.logits,
        outputs.labels,
        costs,
        target,
        kind=arguments.kind,
        method=arguments.method,
        temperature=arguments.temperature,
        split=split,
        seed=arguments.seed,
        collaboration=trained.network.collaboration,
    )
    return named(policy, trained, arguments.data)


def _by_the_clock(
    trained: TrainedRun, arguments: argparse.Namespace, split: str, milliseconds: float, out: Path
) -> tuple[dict[str, Any], Policy]:
    """Choose a policy by a model of time, and hold its promise against the runner."""
    from adaptive.inference.calibration.calibrate import Target
    from adaptive.inference.calibration.timed import Clockwork, check_milliseconds
    from adaptive.inference.measuring.promises import template

    with timed_run(trained, arguments, split, arguments.kind) as timing:
        kind = template(arguments.kind, len(trained.network.exits))
        check_milliseconds(milliseconds, Clockwork(timing.model, kind, trained.network.collaboration), "--budget")
        outputs = _outputs(trained, arguments, split)
        policy = _fitted(trained, arguments, split, outputs, timing.model, Target(budget=milliseconds))
        _save(policy, out)
        verdict = timing.verdict(policy)
    result = _result(trained, policy, outputs, out, arguments.seed)
    conditions = timing.bench.conditions
    return {**result, "timing": {**verdict.document(conditions), "words": verdict.lines(conditions)}}, policy


def _target(arguments: argparse.Namespace) -> tuple[Target | None, Budget | None]:
    """Parse --budget or --max-loss, as far as that goes without the network."""
    from adaptive.errors import PolicyError
    from adaptive.inference.calibration.budget_argument import Budget
    from adaptive.inference.calibration.calibrate import Target

    if arguments.budget is not None:
        if arguments.delta is not None:
            raise PolicyError(f"--delta {arguments.delta:g} belongs to --max-loss; leave it out with --budget")
        budget = Budget.parse(arguments.budget)
        _check_confidence(arguments.confidence, budget)
        return None, budget
    _check_confidence(arguments.confidence, None)
    if not 0 < arguments.max_loss < 100:
        raise PolicyError(f"--max-loss {arguments.max_loss:g}: give points of accuracy above 0 and below 100")
    if arguments.method != "search":
        raise PolicyError(f"--method {arguments.method} goes with a mean cost; leave it out with --max-loss")
    delta = 0.1 if arguments.delta is None else arguments.delta
    if not 0 < delta < 1:
        raise PolicyError(f"--delta {delta:g}: give a probability between 0 and 1")
    return Target(epsilon=arguments.max_loss / 100, delta=delta), None


def _check_confidence(confidence: float | None, budget: Budget | None) -> None:
    """Refuse --confidence beside anything but an accuracy, and one that is no probability (PolicyError)."""
    from adaptive.errors import PolicyError

    if confidence is None:
        return
    if budget is None:
        raise PolicyError(f"--confidence {confidence:g} belongs to --budget 95%; with --max-loss give --delta 0.1")
    if budget.unit != "top1":
        raise PolicyError(
            f"--confidence {confidence:g} belongs to an accuracy, as --budget 95%; leave it out with a mean cost"
        )
    if not 0 < confidence < 1:
        raise PolicyError(f"--confidence {confidence:g}: give a probability between 0 and 1, such as 0.95")


def _in_unit(
    target: Target | None, budget: Budget | None, costs: list[float], confidence: float | None = None
) -> Target:
    """Return the target with its budget in the unit of the costs (raises PolicyError if it is out of range)."""
    from adaptive.errors import PolicyError
    from adaptive.inference.calibration.calibrate import Target
    from adaptive.reporting.tables import human

    if budget is None:
        assert target is not None
        return target
    if budget.unit == "top1":
        return Target(top1=budget.value, confidence=confidence)
    value = budget.value * costs[-1] if budget.unit == "share" else budget.value
    edge = 1e-9 * costs[-1]
    if not costs[0] - edge <= value <= costs[-1] + edge:
        where = "below the first exit's cost" if value < costs[0] else "above the last exit's"

        def shown(cost: float) -> str:
            if budget.unit == "share":
                return f"{cost / costs[-1]:.3g}"
            return human(cost)

        raise PolicyError(
            f"--budget {shown(value)} is {where}; give something from {shown(costs[0])} to {shown(costs[-1])}"
        )
    return Target(budget=min(max(value, costs[0]), costs[-1]))


def _save(policy: Policy, path: Path) -> None:
    from adaptive.errors import PolicyError

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        policy.save(path)
    except OSError as error:
        raise PolicyError(f"--out {path} cannot be written: {error.strerror}; choose another file") from None


def _result(trained: TrainedRun, policy: Policy, outputs: Outputs, out: Path, seed: int) -> dict[str, Any]:
    """Return accuracy and cost of the policy on the held-out images: on those of its test, where it had one."""
    from adaptive.inference.calibration.guarantees.judged import images_of_the_test
    from adaptive.inference.intervals import LEVEL, compared, mean_cost
    from adaptive.inference.outputs import simulate

    macs = [float(cost.macs) for cost in trained.network.costs()]
    assert policy.calibration is not None
    images, evidence = len(outputs.labels), policy.calibration.evidence
    left_out = outputs.left_out
    if evidence:
        outputs = outputs.subset(images_of_the_test(images, seed))
    found = simulate(policy, outputs.probabilities(policy))
    counts, judged = found.counts(len(macs)), len(outputs.labels)
    full = outputs.logits[-1].argmax(1) == outputs.labels
    return {
        "policy": str(out),
        "run": str(trained.folder),
        "checkpoint": trained.checkpoint.path.name,
        "images": images,
        "in_sample": evidence is None,
        "left_out": dict(left_out),
        "split": policy.calibration.split,
        "tested": evidence.images if evidence else None,
        "level": LEVEL,
        "top1": found.top1(outputs.labels),
        "top1_full": 100 * full.double().mean().item(),
        **compared(found.labels == outputs.labels, full),
        "macs": sum(count * cost for count, cost in zip(counts, macs, strict=True)) / judged,
        "macs_interval": list(mean_cost(counts, macs)),
        "macs_full": macs[-1],
        "shares": [count / judged for count in counts],
        "promise": evidence.words if evidence and evidence.shown else None,
        "no_promise": evidence.words if evidence and not evidence.shown else None,
        "images_needed": evidence.needed if evidence else None,
        "calibration": policy.calibration.model_dump(),
        "thresholds": policy.thresholds,
        "temperatures": policy.temperatures,
    }


def _print(result: dict[str, Any], policy: Policy) -> None:
    from rich.table import Table

    from adaptive.inference.calibration.temperature import HIGHEST, LOWEST
    from adaptive.inference.in_sample import InSample
    from adaptive.inference.policy import NOBODY
    from adaptive.reporting.intervals_text import policy_lines
    from adaptive.reporting.tables import human, print_table

    asked = ", ".join(f"{name} {value:.6g}" for name, value in result["calibration"]["target"].items())
    unit = f" {result['calibration']['unit']}" if "budget" in result["calibration"]["target"] else ""
    title = f"{policy.kind}, {result['calibration']['method']} ({asked}{unit}) on {result['images']:,} images of "
    tested = f"figures of the {result['tested']:,} that only tested it" if result.get("tested") else ""
    headline = tested or InSample(policy=True).headline
    table = Table(title=f"{title}{result['split']} ({headline})", title_justify="left")
    for name in ("exit", "threshold", "temperature", "leave here"):
        table.add_column(name, justify="right")
    small = ".3g"  # a gate's scores may all be
    for i, share in enumerate(result["shares"]):
        threshold = policy.thresholds[i]
        closed = i == policy.exits - 1 or abs(threshold) >= NOBODY
        words = (
            ("everybody" if threshold < 0 else "nobody")
            if closed
            else f"{threshold:{small if 0 < abs(threshold) < 1e-3 else '.4f'}}"
        )
        temperature = f"{policy.temperatures[i]:.3f}" if policy.temperatures else "1"
        table.add_row(str(i + 1), words, temperature, f"{100 * share:.1f} %")
    print_table(table)
    bounds = [i + 1 for i, t in enumerate(policy.temperatures) if not 1.001 * LOWEST < t < HIGHEST / 1.001]
    if bounds:
        print(
            f"temperature of exit {', '.join(map(str, bounds))} at its bound ({LOWEST:g} to {HIGHEST:g}): the images "
            "say too little about how sure that exit may be; give more of them, or --no-temperature"
        )
    if result["left_out"]:
        say(f"{result['images']:,} images{left_out_words(result['left_out'])}")
    share = result["macs"] / result["macs_full"]
    say(
        f"top-1 {result['top1']:.2f} % (full network {result['top1_full']:.2f} %) for {human(result['macs'])} MACs an "
        f"image, {100 * share:.1f} % of the full cost"
    )
    for line in (*policy_lines(result), *result.get("timing", {}).get("words", ())):
        say(line)
    say(f"written: {result['policy']}")
    run = shell_words(result["run"])
    say(f"next, what it brings on images that chose nothing: adaptive report {run}")
    say(f"then: adaptive predict {run} IMAGE...")
