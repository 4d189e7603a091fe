"""``adaptive models``: list backbones, the modules after which exits can branch off, and what each exit costs."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from adaptive.foreign_text import say, shell_words

if TYPE_CHECKING:
    from adaptive.networks.catalogue import BranchPointEntry, ModelEntry
    from adaptive.networks.network import AdaptiveNetwork

ROWS = 20  # of a list; every row is a model that is built to count its parameters


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument(
        "pattern",
        nargs="?",
        metavar="PATTERN",
        help="a name, a family, or names with wildcards in quotes ('resnet*'); without it, the families",
    )
    parser.add_argument(
        "--exits", metavar="K|A,B,...", help="build the network with K exits, or with early exits after these modules"
    )
    parser.add_argument("--image-size", type=int, metavar="N", help="side of the images (default: the model's own)")
    parser.add_argument("--classes", type=int, metavar="N", help="number of classes (default 1000)")
    parser.add_argument("--limit", type=int, metavar="N", help=f"rows of a list (default {ROWS})")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(arguments: argparse.Namespace) -> int:
    """Carry out the command."""
    from adaptive.errors import UsageError
    from adaptive.networks.catalogue import is_one_model

    for flag in ("image_size", "classes", "limit"):
        value = getattr(arguments, flag)
        if value is not None and value < 1:
            raise UsageError(f"--{flag.replace('_', '-')} {value} is too small; give 1 or more")
    one = arguments.pattern is not None and is_one_model(arguments.pattern)
    for flag in ("limit",) if one else ("exits", "image_size", "classes"):
        if getattr(arguments, flag) is not None:
            reason = "is for lists of models" if one else "needs the name of one model, for example resnet50"
            raise UsageError(f"--{flag.replace('_', '-')} {reason}; leave it out or give another PATTERN")
    if arguments.pattern is None:
        _show_families(arguments.json)
    elif one:
        _show_model(arguments)
    else:
        _show_list(arguments.pattern, arguments.limit or ROWS, arguments.json)
    return 0


def _show_families(as_json: bool) -> None:
    import timm
    from rich.columns import Columns
    from rich.console import Console

    from adaptive.networks.catalogue import families, presets

    counts, own = families(), presets()
    if as_json:
        print(json.dumps({"timm": timm.__version__, "families": counts, "own": own}))
        return
    say(f"{sum(counts.values())} models of timm {timm.__version__} in {len(counts)} families (number of models):", "")
    console = Console()
    console.print(Columns([f"{name} ({count})" for name, count in counts.items()], padding=(0, 2)))
    say("", "with exits of their own:", "")
    console.print(Columns(own, padding=(0, 2)))
    say("", "adaptive models FAMILY or 'NAME*' lists models; adaptive models NAME shows where exits can branch off")


def _show_list(pattern: str, limit: int, as_json: bool) -> None:
    from adaptive.networks.catalogue import matching, model_entry

    names = matching(pattern)
    entries = [model_entry(name, count=i < limit) for i, name in enumerate(names if as_json else names[:limit])]
    if as_json:
        print(json.dumps({"pattern": pattern, "models": [asdict(one) for one in entries]}))
        return
    _print_list(entries)
    if len(names) > limit:
        say(f"{len(names) - limit} more: narrow the pattern, or give --limit {len(names)}")


def _print_list(entries: list[ModelEntry]) -> None:
    from rich.table import Table

    from adaptive.reporting.tables import human, print_table

    table = Table()
    table.add_column("model", overflow="fold")
    for name in ("parameters", "image size"):
        table.add_column(name, justify="right")
    for name in ("pretrained", "note")[: 1 + any(one.note for one in entries)]:
        table.add_column(name)
    for one in entries:
        parameters = "" if one.parameters is None else human(one.parameters)
        cells = [one.name, parameters, str(one.input_size or ""), "yes" if one.pretrained else "", one.note]
        table.add_row(*cells[: len(table.columns)])
    print_table(table)


def _show_model(arguments: argparse.Namespace) -> None:
    from adaptive.networks.catalogue import branch_point_entries, pretrained_entry
    from adaptive.networks.create import create_model
    from adaptive.networks.multiscale.assemble import is_multi_exit

    name, exits = arguments.pattern, _parse_exits(arguments.exits)
    own = is_multi_exit(name)
    size, points = (arguments.image_size, []) if own else branch_point_entries(name, arguments.image_size)
    network = None
    if own or exits is not None:
        network = create_model(name, arguments.classes or 1000, exits, input_size=size)
        size = network.input_size
    costs = _exit_rows(network) if network else []
    section = _section(network, name, arguments.classes) if network else ""
    pretrained = pretrained_entry(name)
    if arguments.json:
        found = {"name": name, "image_size": size, "places": [asdict(one) for one in points], "exits": costs}
        print(json.dumps({**found, "section": section, "pretrained": pretrained}))
        return
    if pretrained:
        _print_pretrained(pretrained)
    if network is None:
        _print_branch_points(name, size, points)
    else:
        _print_exits(name, size, costs, section)


def _parse_exits(text: str | None) -> int | list[str] | None:
    """Return a number of exits, or the names of the modules after which the early ones branch off."""
    from adaptive.errors import UsageError

    if text is None:
        return None
    if re.fullmatch(r"[+-]?\d+", text.strip()):
        return int(text)
    names = [name for name in re.split(r"[\s,]+", text.strip().strip("[]")) if name]
    if not names:
        raise UsageError(f"--exits {text!r} names nothing; give a number, or modules as in --exits layer1,layer3")
    return names


def _exit_rows(network: AdaptiveNetwork) -> list[dict[str, Any]]:
    """Return per exit: number, module, cumulative cost, share, and the parameters of its block and of its own."""
    costs = network.costs()
    names = [*network.exit_names, "(the end)"]
    return [
        {
            "exit": i + 1,
            "module": names[i],
            "macs": cost.macs,
            "share": cost.macs / costs[-1].macs,
            "parameters": cost.parameters,
            "block_parameters": sum(p.numel() for p in network.blocks[i].parameters()),
            "exit_parameters": sum(p.numel() for p in network.exits[i].parameters()),
        }
        for i, cost in enumerate(costs)
    ]


def _section(network: AdaptiveNetwork, name: str, classes: int | None) -> str:
    """Return the configuration's section that builds this network again."""
    from adaptive.networks.multiscale.assemble import is_multi_exit

    count = len(network.exits)
    quoted = [part if re.fullmatch(r"[A-Za-z_][\w.]*", part) else f'"{part}"' for part in network.exit_names]
    exits = str(count) if count == 1 or is_multi_exit(name) else f"[{', '.join(quoted)}]"
    lines = ["model:", f"  backbone: {name}", f"  exits: {exits}"]
    lines += [f"  num_classes: {classes}"] if classes else []
    return "\n".join([*lines, f"# with data.image_size: {network.input_size}", ""])


def _print_branch_points(name: str, size: int, points: list[BranchPointEntry]) -> None:
    from rich.table import Table

    from adaptive.reporting.tables import human, print_table

    title = f"{name}, {size} pixels: {len(points)} branch points for early exits"
    table = Table(title=title, title_justify="left")
    table.add_column("after", overflow="fold", min_width=6)
    for column in ("MACs", "share", "feature", "tensors"):
        table.add_column(column, justify="right")
    for one in points:
        shape = " x ".join(map(str, one.shape))
        table.add_row(one.name, human(one.macs), f"{100 * one.share:.1f} %", shape, str(one.tensors))
    print_table(table)
    say(f"costs of the backbone alone, up to there; with exits: adaptive models {shell_words(name)} --exits 4")


def _print_exits(name: str, size: int, costs: list[dict[str, Any]], section: str) -> None:
    from adaptive.reporting.tables import exit_table, print_table

    title = f"{name}, {size} pixels: {len(costs)} exits"
    print_table(exit_table(costs, title))
    say("costs up to there, with all heads and links on the way; in a configuration:", "", *section.splitlines())


def _print_pretrained(about: dict[str, Any]) -> None:
    keys = ("mean", "std", "interpolation", "eval_crop")
    images = " ".join(f"data.{key}={about[key]}" for key in keys if key in about)
    others = [tag for tag in about["tags"] if tag != about["tag"]]
    of = f"{about['num_classes']} classes, {about['image_size']} pixels"
    say(f"pretrained weights {about['tag']}: {of}; model.pretrained=true prepares images as for them: {images}")
    if others:
        say(f"other weights, as NAME.TAG: {', '.join(others)}")
    say("")
