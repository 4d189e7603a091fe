"""``adaptive bench inference TARGET...``: runs and exports side by side here, or one run's blocks one by one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from adaptive.commands.run_options import add_device, add_weights, choose_device, prepare_tables
from adaptive.foreign_text import say, visible

if TYPE_CHECKING:
    from rich.table import Table

    from adaptive.inference.measuring.side_by_side import Row
    from adaptive.inference.measuring.timing import Spread

KINDS = ("inference",)
IMAGES = 256
ROUNDS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    from adaptive.inference.runtime_names import RUNTIMES

    parser.add_argument("kind", choices=KINDS, help="what to measure")
    parser.add_argument(
        "targets",
        metavar="TARGET",
        nargs="+",
        help="run folders, plain ones (model.exits=1) as well, and folders that `adaptive export` wrote; and key=value "
        "for how data is read here: data.pipe=true allows a command as data.path, data.cache=DIR, ...",
    )
    parser.add_argument(
        "--runtime",
        nargs="+",
        choices=RUNTIMES,
        default=["torch"],
        help="what runs the run folders (default torch); onnx exports them for the moment, compile takes minutes; "
        "an export is always run by onnx",
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64], help="batch sizes (default 1 64)")
    parser.add_argument(
        "--images", type=int, default=IMAGES, metavar="N", help=f"different images that are timed (default {IMAGES})"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=ROUNDS,
        help=f"rounds, in each of which everything is measured twice in another order (default {ROUNDS})",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads on the CPU (default: as torch chooses)")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="by default each run's; exports: fp32")
    parser.add_argument("--policy", metavar="FILE", help="who leaves where (one target); by default TARGET's own")
    parser.add_argument(
        "--data", metavar="FOLDER", help="packed dataset or its URL; by default each run's, an export takes a run's"
    )
    parser.add_argument("--split", help="split the images come from; by default data.test_split of each run")
    parser.add_argument(
        "--blocks",
        action="store_true",
        help="instead, of one run: the time of each block and exit, of decisions, and the distance from the ideal",
    )
    parser.add_argument(
        "--accelerate",
        nargs="+",
        choices=("compile", "cuda_graphs", "compile_cuda_graphs"),
        default=[],
        help="with --blocks: measure the accelerated runner as well, against the network as accelerated",
    )
    add_weights(parser)
    add_device(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(arguments: argparse.Namespace) -> int:
    """Carry out the command."""
    from adaptive.commands.bench_blocks import measure_blocks
    from adaptive.config.saved import split_overrides

    prepare_tables(arguments)
    arguments.targets, overrides = split_overrides(arguments.targets)
    _check(arguments)
    from adaptive.inference.runtimes import cpu_threads

    with cpu_threads(arguments.threads):
        return measure_blocks(arguments, overrides) if arguments.blocks else _side_by_side(arguments, overrides)


def _check(arguments: argparse.Namespace) -> None:
    """Refuse what makes no sense, before anything is loaded (raises AdaptiveError)."""
    from adaptive.commands.bench_targets import is_export
    from adaptive.errors import AdaptiveError, UsageError

    targets = arguments.targets
    if not targets:
        raise UsageError("TARGET missing: adaptive bench inference TARGET measures it; see adaptive bench --help")
    for name in ("batch", "images", "rounds", "threads"):
        values = getattr(arguments, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and value < 1:
                raise AdaptiveError(f"--{name} {value} is too small; give 1 or more")
    if arguments.policy and len(targets) > 1:
        raise AdaptiveError(
            f"--policy {arguments.policy}: a policy belongs to one network, and {len(targets)} targets are given; put "
            "each one's into its folder as policy.json"
        )
    exports = [target for target in targets if is_export(target)]
    if arguments.blocks:
        if len(targets) > 1 or exports:
            raise AdaptiveError("--blocks takes one run folder; leave it out to measure several, or an export")
        if arguments.runtime != ["torch"]:
            raise AdaptiveError(
                f"--runtime {' '.join(arguments.runtime)} goes without --blocks, which measures torch; "
                "compiled blocks are measured by --accelerate compile"
            )
        return
    if arguments.accelerate:
        ways = " ".join(arguments.accelerate)
        raise AdaptiveError(f"--accelerate {ways} goes with --blocks; whole networks are compared by --runtime compile")
    if len(exports) == len(targets) and set(arguments.runtime) != {"onnx"} and arguments.runtime != ["torch"]:
        raise AdaptiveError(
            f"--runtime {' '.join(arguments.runtime)}: {exports[0]} is an export, which onnxruntime runs; give its run "
            "folder instead"
        )
    if arguments.precision not in (None, "fp32") and (
        len(exports) == len(targets) or set(arguments.runtime) == {"onnx"}
    ):
        raise AdaptiveError(f"--precision {arguments.precision}: onnxruntime computes in fp32 here; leave it out")


def _side_by_side(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    import sys

    import torch

    from adaptive.commands.bench_targets import Images, open_contenders, open_targets
    from adaptive.files import json_text
    from adaptive.inference.intervals import LEVEL
    from adaptive.inference.measuring.profile import machine_name
    from adaptive.inference.measuring.side_by_side import measure

    threads = torch.get_num_threads()
    device = choose_device(arguments.device)
    targets = open_targets(arguments, overrides, threads)
    images = Images(max(arguments.images, *arguments.batch))
    contenders = open_contenders(targets, images, arguments)
    rows = [row for batch in arguments.batch for row in measure(contenders, batch, arguments.rounds)]
    if len({tuple(target.classes) for target in targets}) > 1:
        images.notices.append("the targets have different classes: they were shown different images")
    notices = images.notices + _noise(rows)
    result = {
        "machine": machine_name(device),
        "device": device.type,
        "threads": threads,
        "rounds": arguments.rounds,
        "splits": {target.name: target.split for target in targets},
        "level": LEVEL,
        "rows": [asdict(row) | {"noisy": row.noisy} for row in rows],
        "notices": notices,
    }
    if arguments.json:
        print(json_text(result))
    else:
        for batch in arguments.batch:
            _print(batch, [row for row in rows if row.batch == batch], result)
        for notice in notices:
            say(notice)
    for target in targets:
        if target.notice:
            say(f"adaptive bench: {target.notice}", file=sys.stderr)
    return 0


def _noise(rows: Sequence[Row]) -> list[str]:
    """Words on contenders that differ from themselves by more than comparisons may be read to."""
    worst = max(rows, key=lambda row: row.repeats)
    if not worst.noisy:
        return []
    where = f"{visible(worst.target)}, {_label(worst)}, batch {worst.batch}"
    words = (
        f"this machine was too noisy for comparisons finer than {worst.repeats:.0%}: measured twice in the same "
        f"rounds, {where} differs from itself by that much; end what else runs here, or give more --rounds"
    )
    return [words]


def _label(row: Row) -> str:
    return f"{row.runtime}{'' if row.precision == 'fp32' else ' ' + row.precision}, {row.part}"


def _ratio(spread: Spread | None) -> str:
    return "" if spread is None else f"{spread.median:.3f} ({spread.q1:.3f} to {spread.q3:.3f})"


def _print(batch: int, rows: Sequence[Row], result: dict[str, Any]) -> None:
    """Print a table of times and one of what they are compared with: together they are too wide for a terminal."""
    from adaptive.reporting.tables import percent_range, print_table

    counts, splits = sorted({row.images for row in rows}), dict.fromkeys(result["splits"].values())
    shown = f"{' and '.join(f'{count:,}' for count in counts)} images of {' and '.join(splits)}"
    title = f"batch {batch}: {shown}, {result['rounds']} rounds on {result['machine']} ({result['device']})"
    times = _table(title, "ms a call", "p50", "p95", "p99", "ms/image", "images/s", "noise")
    names = ("of the full network", "of the first row", "top-1 % (95 % interval)", "leave at exits, %")
    compared = _table(f"batch {batch}: times as ratios, answers", *names)
    for row in rows:
        whose = visible(row.target), _label(row)
        spent = (row.mean, row.p50, row.p95, row.p99, row.milliseconds, row.images_per_second)
        times.add_row(*whose, *(f"{value:.4g}" for value in spent), f"{row.repeats:.1%}")
        compared.add_row(
            *whose,
            _ratio(row.of_full) if row.part == "policy" else "",
            _ratio(row.of_first) if row is not rows[0] else "",
            f"{row.top1:.2f} ({percent_range(row.top1_interval)})",
            " ".join(f"{100 * share:.0f}" for share in row.shares),
        )
    print_table(times)
    print_table(compared)


def _table(title: str, *names: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("target", overflow="fold", min_width=6)
    table.add_column("run by, as", min_width=6)
    for name in names:
        table.add_column(name, justify="right")
    return table
