"""``adaptive doctor``: what training needs of this machine, or of all machines of a job, and how to get it.

Alone it checks this machine. Under srun, deepspeed or torchrun every node checks itself, and then the ranks meet.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # started as a script by the deepspeed launcher
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

if TYPE_CHECKING:
    from launcher.checks.finding import Check, Finding, Settings

PATIENCE = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("--only", metavar="NAME,...", help="these checks, or groups of checks, alone")
    parser.add_argument("--quick", action="store_true", help="leave out what takes more than a second")
    parser.add_argument("--data", metavar="FOLDER|URL", help="a packed dataset: shards, speed of reading and decoding")
    parser.add_argument(
        "--run-folder", metavar="DIR", default="runs", help="where runs are to be written (default runs)"
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=PATIENCE,
        metavar="SECONDS",
        help=f"how long the ranks of several nodes wait for each other (default {PATIENCE:g})",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher


def run(arguments: argparse.Namespace) -> int:
    """Carry out the command."""
    from adaptive.errors import UsageError
    from launcher.checks.finding import Settings

    if not 0 < arguments.patience < 1e6:
        raise UsageError(f"--patience {arguments.patience:g} is out of range; give seconds, for example 60")
    checks = choose(arguments.only, arguments.quick, arguments.data is not None)
    settings = Settings(Path(arguments.run_folder), arguments.data)
    if one_of_several(os.environ):  # else nothing of torch is imported here, which may be what is broken
        from launcher.environment import find_ranks

        ranks = find_ranks()
        if ranks.world > 1:
            from launcher.doctor_nodes import run_many

            return run_many(checks, settings, ranks, arguments.patience, arguments.json)
    findings = [("", finding) for finding in run_all(checks, settings)]
    return report(findings, [""], arguments.json)


def one_of_several(environment: Mapping[str, str]) -> bool:
    """Whether a launcher has started this process among others; in a batch script Slurm only speaks of tasks."""
    sizes = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    return any(environment.get(name, "1") != "1" for name in sizes)


def all_checks() -> list[Check]:
    """Every check of one machine, in the order of the table."""
    from launcher.checks import dataset, disk, gpu, machine, network, slurm, software, wandb_login

    modules = (software, gpu, machine, network, disk, dataset, slurm, wandb_login)
    return [check for module in modules for check in module.CHECKS]


def choose(only: str | None, quick: bool, with_data: bool) -> list[Check]:
    """Return the checks that were asked for (raises UsageError: unknown names)."""
    from adaptive.errors import UsageError

    checks = all_checks()
    known = [*dict.fromkeys(check.group for check in checks), *(check.name for check in checks)]
    names = [name.strip() for name in only.split(",") if name.strip()] if only is not None else []
    if only is not None and not names:
        raise UsageError(f"--only {only!r} names nothing; there are {', '.join(dict.fromkeys(known))}")
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            remedy = f"did you mean {close[0]}?" if close else f"there are {', '.join(dict.fromkeys(known))}"
            raise UsageError(f"--only {name!r} is no check; {remedy}")
    if names:
        checks = [check for check in checks if check.name in names or check.group in names]
        if not with_data and any(check.group == "data" for check in checks):
            raise UsageError("--only data needs a dataset; add --data FOLDER or --data URL")
    return [check for check in checks if (with_data or check.group != "data") and not (quick and check.slow)]


def run_all(checks: list[Check], settings: Settings, tell: Callable[[Finding], None] | None = None) -> list[Finding]:
    """Run checks one after another; on a terminal their names are shown meanwhile."""
    from rich.console import Console

    from launcher.checks.finding import run_check

    findings = []
    console = Console(stderr=True)
    with console.status("") as shown:
        for check in checks:
            shown.update(f"checking {check.name}")
            findings.append(run_check(check, settings))
            if tell is not None:
                tell(findings[-1])
    return findings


def report(findings: list[tuple[str, Finding]], nodes: list[str], as_json: bool) -> int:
    """Print the findings of all nodes, and return the exit code."""
    from launcher.checks.table import print_findings

    failed = any(finding.status == "error" for _, finding in findings)
    if as_json:
        listed = [{"node": node, **asdict(finding)} for node, finding in findings]
        print(json.dumps({"ok": not failed, "nodes": nodes, "findings": listed}))
    else:
        print_findings(findings, nodes)
    sys.stdout.flush()
    return int(failed)


def named(node: str, findings: list[Finding]) -> list[tuple[str, Finding]]:
    """Findings with the name of their node."""
    return [(node, finding) for finding in findings]


if __name__ == "__main__":
    from launcher.main import main

    main(["doctor", *sys.argv[1:]])
