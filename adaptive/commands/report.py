"""``adaptive report RUN...``: a self-contained HTML page about one or several runs, and every figure as a PNG."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptive.commands.run_options import (
    add_loading,
    add_weights,
    check_loading,
    left_out_words,
    load_run,
    no_policy_notice,
    split_outputs,
)
from adaptive.foreign_text import say, shell_words, shown_location

if TYPE_CHECKING:
    from adaptive.inference.policy import Policy
    from adaptive.reporting.image_wall import Tile
    from adaptive.reporting.page import ReportFiles
    from adaptive.reporting.report_data import RunReport, Timing
    from adaptive.runs import TrainedRun

TILE_PIXELS = 1 << 18  # of an image that is kept for a tile, which shows fewer; hundreds of photographs fill memory
MOST_TILES = 500  # on a page, unless --wall asks for more: thumbnails of 3 kB keep it below 3 MB
ROWS = 12  # images in a row of the wall


@dataclass(frozen=True)
class _Measured:
    """A run that was measured for the report, and notices for the user about it."""

    trained: TrainedRun
    report: RunReport
    data: str
    notices: list[str]

    def timed(self, timing: Timing) -> _Measured:
        """Return the same with another timing than its evaluation's."""
        return replace(self, report=replace(self.report, timing=timing))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        help="run folders that `adaptive train` wrote; and key=value for how their data is read here: data.pipe=true "
        "allows a command as data.path, data.cache=DIR, ...",
    )
    parser.add_argument(
        "--out", metavar="FILE", help="page to write; by default RUN/report.html, of several runs ./report.html"
    )
    parser.add_argument("--split", help="split to show; by default data.test_split of each run")
    parser.add_argument("--policy", metavar="FILE", help="who leaves where (one run); by default RUN/policy.json")
    parser.add_argument(
        "--wall", type=int, metavar="N", help="images shown per exit; by default 12 or 24, by the number of exits"
    )
    parser.add_argument(
        "--published",
        default="auto",
        metavar="NAME",
        help="published numbers beside: cifar100, imagenet, none, or auto (default), by the data set's name",
    )
    parser.add_argument(
        "--no-timing",
        action="store_true",
        help="do not time several runs together: their evaluations' milliseconds, taken apart, share no axis then",
    )
    add_weights(parser)
    add_loading(parser)
    parser.add_argument("--wandb", action="store_true", help="send tables and figures to each run's W&B run, too")
    parser.add_argument("--json", action="store_true", help="print JSON: the files written and the numbers shown")


def run(arguments: argparse.Namespace) -> int:
    """Carry out the command."""
    from adaptive.commands.report_timing import timed_together
    from adaptive.config.saved import split_overrides
    from adaptive.files import json_text
    from adaptive.reporting.page import report_data, write_report
    from adaptive.reporting.published import choose, recognise

    arguments.runs, arguments.overrides = split_overrides(arguments.runs)
    _check(arguments)
    choose(arguments.published, [])  # a misspelt name is refused before anything is measured
    page, folder = _paths(arguments)
    names = _names(arguments.runs)
    measured = [_measure(folder, name, arguments) for folder, name in zip(arguments.runs, names, strict=True)]
    if len(measured) > 1 and not arguments.no_timing:
        timings = timed_together([one.trained for one in measured], arguments)
        measured = [one.timed(timing) for one, timing in zip(measured, timings, strict=True)]
    runs = [one.report for one in measured]
    per_exit = _per_exit(arguments.wall, runs)
    walls = {i: tiles for i, one in enumerate(measured) if (tiles := _tiles(one, per_exit))}
    words = [(len(r.classes), one.data, r.name, r.backbone) for one, r in zip(measured, runs, strict=True)]
    published = choose(arguments.published, [recognise(*found) for found in words])
    written = write_report(runs, page, folder, walls, published)
    if arguments.wandb:
        for i, one in enumerate(measured):
            _send(one, walls.get(i, []), written)
    if arguments.json:
        files = {name: str(path) for name, path in {**written.figures, **_wall_names(written)}.items()}
        print(json_text({"page": str(page), "figures": files, **report_data(runs, published)}))
    else:
        _print(measured, written, folder)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    from adaptive.config.saved import check_receiver
    from adaptive.errors import AdaptiveError, UsageError
    from adaptive.runs import run_config, said_config

    if not arguments.runs:
        raise UsageError("RUN missing: adaptive report RUN draws a page; see adaptive report --help")
    check_loading(arguments)
    if arguments.wall is not None and arguments.wall < 0:
        raise AdaptiveError(f"--wall {arguments.wall} is too small; give 0 (no images) or more")
    if arguments.policy and len(arguments.runs) > 1:
        raise AdaptiveError(
            f"--policy {arguments.policy}: a policy belongs to one network, and {len(arguments.runs)} runs are given; "
            "put each one's into its folder as policy.json"
        )
    if arguments.out and Path(arguments.out).is_dir():
        raise AdaptiveError(f"--out {arguments.out} is a folder; give the file to write, such as report.html")
    for run in arguments.runs if arguments.wandb else ():
        said, config = said_config(Path(run)), run_config(Path(run), arguments.overrides)
        check_receiver(said, config, arguments.overrides)


def _names(folders: list[str]) -> list[str]:
    """Name runs by their folders, with the parents' names where these are the same."""
    paths = [Path(folder).resolve() for folder in folders]
    short = [path.name for path in paths]
    return [n if short.count(n) == 1 else f"{p.parent.name}/{n}" for p, n in zip(paths, short, strict=True)]


def _paths(arguments: argparse.Namespace) -> tuple[Path, Path]:
    """Return the paths of the page and of the folder of PNG files (raises MachineError for one that leads away)."""
    from adaptive.errors import MachineError

    if arguments.out:
        page = Path(arguments.out)
    else:
        page = Path(arguments.runs[0] if len(arguments.runs) == 1 else ".") / "report.html"
    own = not arguments.out and len(arguments.runs) == 1
    folder = page.with_name("figures" if own else f"{page.stem}_figures")
    if own and folder.is_symlink():
        raise MachineError(
            f"{folder} is a link to {folder.resolve()}, and nothing is written outside of the run folder; remove it, "
            "or give another place with --out"
        )
    return page, folder


def _measure(folder: str, name: str, arguments: argparse.Namespace) -> _Measured:
    from adaptive.inference.in_sample import REMEDY
    from adaptive.reporting.report_data import RunFacts, build_run
    from adaptive.runs import in_sample

    trained = load_run(folder, arguments.checkpoint, arguments.weights, arguments.overrides)
    split = arguments.split or trained.config.data.test_split
    policy = _policy(trained, arguments.policy)
    together = len(arguments.runs) > 1 and not arguments.no_timing
    evaluation, notices = _evaluation(trained, split, together)
    data = arguments.data or trained.config.data.path
    chose = in_sample(trained, split, arguments.data, policy, arguments.checkpoint)
    outputs = split_outputs(trained, arguments, split, "--split" if arguments.split else "data.test_split")
    costs = trained.network.costs()
    facts = RunFacts(
        name=name,
        backbone=trained.config.model.backbone,
        checkpoint=f"{trained.checkpoint.path.name}{', moving average' if trained.averaged else ''}",
        dataset=_dataset_name(str(data)),
        split=split,
        classes=trained.classes,
        exit_names=[*trained.network.exit_names, "end of backbone"],
        macs=[cost.macs for cost in costs],
        parameters=[cost.parameters for cost in costs],
        policy=policy,
        folder=shell_words(folder),
        in_sample=chose,
        split_option=_split_option(trained, split),
    )
    report = build_run(outputs, facts, evaluation)
    if chose:
        notices.append(f"{chose.headline}; {REMEDY}")
    if outputs.left_out:
        notices.append(f"{report.images:,} images{left_out_words(outputs.left_out)}")
    if policy is None and (notice := no_policy_notice(trained, "so nobody leaves early")):
        notices.append(notice)
    return _Measured(trained, report, str(data), notices)


def _dataset_name(location: str) -> str:
    """Return the last part of where a dataset lies, without secrets."""
    from adaptive.data.remote.urls import is_remote

    shown = shown_location(location)
    if not is_remote(location):
        return Path(location).absolute().name
    return re.split("[?#]", shown)[0].rstrip("/").rpartition("/")[2]


def _policy(trained: TrainedRun, given: str | None) -> Policy | None:
    from adaptive.runs import load_policy

    path = Path(given) if given else trained.folder / "policy.json"
    return load_policy(str(path), trained) if given or path.is_file() else None


def _evaluation(trained: TrainedRun, split: str, together: bool) -> tuple[dict[str, Any] | None, list[str]]:
    """Read what ``adaptive evaluate`` wrote about these weights on this split; a notice says why it is of no use.

    If the runs are timed ``together`` its own milliseconds are left out.
    """
    from adaptive.reporting.report_data import Evaluation

    path = trained.folder / f"evaluation_{split}.json"
    again = f"run: adaptive evaluate {shell_words(trained.folder)}{_split_option(trained, split)}"
    if not path.is_file():
        missing = [] if together else ["no milliseconds"]
        missing += ["no budgeted curve"] if len(trained.network.exits) > 1 else []  # one exit has none
        return None, [f"no {path.name}, so {' and '.join(missing)}; {again}"] if missing else []
    try:
        found = Evaluation.model_validate_json(path.read_bytes())
        weights = (found.checkpoint, found.weights)
    except (OSError, ValueError):  # pydantic's errors are ValueErrors
        return None, [f"{path} cannot be read; {again}"]
    if weights != (trained.checkpoint.path.name, "ema" if trained.averaged else "plain"):
        return None, [f"{path.name} is of other weights ({' '.join(weights)}) and was left out; {again}"]
    return found.model_dump(exclude={"milliseconds"} if together else None), []


def _split_option(trained: TrainedRun, split: str) -> str:
    """Return what `adaptive evaluate` has to be told besides the run to measure a split."""
    return "" if split == trained.config.data.test_split else f" --split {shell_words(split)}"


def _per_exit(asked: int | None, runs: list[RunReport]) -> int:
    if asked is not None:
        return asked
    most = max(len(report.macs) for report in runs)
    usual = 2 * ROWS if most <= 5 else ROWS
    return max(1, min(usual, MOST_TILES // sum(len(report.macs) for report in runs)))


def _tiles(one: _Measured, per_exit: int) -> list[Tile]:
    from adaptive.data.reading.images_by_id import read_images
    from adaptive.data.shards.index import load_index
    from adaptive.reporting.image_wall import choose, tiles

    if one.report.policy is None or not per_exit:
        return []
    chosen = choose(one.report, per_exit)
    ids = one.report.ids[chosen].tolist()
    settings = one.trained.config.data
    images = read_images(one.data, load_index(one.data, settings), one.report.split, ids, settings, TILE_PIXELS)
    return tiles(one.report, chosen, images)


def _wall_names(written: ReportFiles) -> dict[str, Path]:
    return {path.stem: path for path in written.walls.values()}


def _print(measured: list[_Measured], written: ReportFiles, folder: Path) -> None:
    from adaptive.reporting.milliseconds_figures import APART, timed_apart
    from adaptive.reporting.run_intervals import policy_range
    from adaptive.reporting.tables import percent_range

    for one in measured:
        report = one.report
        line = f"{report.name}: {report.images:,} images of {report.split}, last exit {report.top1[-1]:.2f} %"
        if report.policy:
            share = 100 * report.policy_macs / report.macs[-1]
            line += f"; by its policy {report.policy_top1:.2f} % at {share:.1f} % of the full cost"
            line += f" (95 % interval {percent_range(policy_range(report))} %)"
        say(line)
        for notice in one.notices:
            say(f"  {notice}")
    if timed_apart([one.report for one in measured]):
        say(f"{APART} Leave out --no-timing to time them together")
    pictures = len(written.figures) + len(written.walls)
    say(f"written: {written.page} ({written.page.stat().st_size / 1e6:.1f} MB), {pictures} figures in {folder}")


def _send(one: _Measured, tiles: list[Tile], written: ReportFiles) -> None:
    """Show the report on the run's W&B run; explicitly asked for, so also where training did not use W&B."""
    from adaptive.reporting.dashboard_report import show
    from adaptive.tracking.dashboard import open_dashboard

    config = one.trained.config
    tracking = config.tracking
    if tracking.wandb == "disabled":
        tracking = tracking.model_copy(update={"wandb": "online"})
    dashboard = open_dashboard(tracking, one.trained.folder, config.model_dump(), None)
    show(dashboard, one.report, tiles, {**written.figures, **_wall_names(written)})
