"""``adaptive doctor``: check what training needs of this machine, or of all nodes of a job, with remedies to type.

Alone it checks this machine. Under srun, deepspeed or torchrun every node does so, and then what lies between them is
checked.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

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
    from adaptive.distributed.launchers import one_of_several
    from adaptive.distributed.ranks import find_ranks
    from adaptive.doctor.finding import CheckSettings
    from adaptive.doctor.run_checks import choose, report, run_all
    from adaptive.errors import UsageError

    if not 0 < arguments.patience < 1e6:
        raise UsageError(f"--patience {arguments.patience:g} is out of range; give seconds, for example 60")
    checks = choose(arguments.only, arguments.quick, arguments.data is not None)
    settings = CheckSettings(Path(arguments.run_folder), arguments.data)
    if one_of_several(os.environ):
        ranks = find_ranks()
        if ranks.world > 1:
            from adaptive.doctor.several_nodes import run_many

            return run_many(checks, settings, ranks, arguments.patience, arguments.json)
    findings = [("", finding) for finding in run_all(checks, settings)]
    return report(findings, [""], arguments.json)
