"""``adaptive dashboard``: one W&B workspace for all runs of a project; ``--sync RUN...`` uploads offline runs."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from adaptive.errors import reason_of
from adaptive.foreign_text import say, shell_words, shown_location, visible

WORKSPACE_SECONDS, SYNC_SECONDS = 60.0, 3600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("--project", metavar="P", help="W&B project (default adaptive)")
    parser.add_argument(
        "--entity",
        metavar="E",
        help="W&B user or team; by default WANDB_ENTITY, or the account's own; with --sync: who gets the runs",
    )
    parser.add_argument(
        "--name", metavar="NAME", help="of the workspace; an existing one is updated (default Adaptive)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the panels; needs neither network nor login")
    parser.add_argument(
        "--sync", nargs="+", metavar="RUN", help="upload what these run folders recorded with tracking.wandb=offline"
    )
    parser.add_argument(
        "--timeout", type=float, metavar="S", help="seconds for the workspace (60), or for each run with --sync (3600)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Carry out the command."""
    _check(arguments)
    if arguments.sync:
        return _sync(arguments)
    if arguments.dry_run:
        _describe(arguments.json)
        return 0
    saved = _save(arguments)
    if arguments.json:
        print(json.dumps(saved))
    else:
        # Its query is the view, and nothing secret.
        print(visible(f"{'created' if saved['created'] else 'updated'}, {saved['panels']} panels: {saved['url']}"))
    return 0


def _check(arguments: argparse.Namespace) -> None:
    from adaptive.errors import UsageError

    workspace = {
        "--project": arguments.project,
        "--name": arguments.name,
        "--dry-run": arguments.dry_run,
    }
    given = [flag for flag, value in workspace.items() if value]
    if arguments.sync and given:
        raise UsageError(f"{given[0]} does not go with --sync, which uploads runs to where they say; leave it out")
    for flag in ("project", "name", "entity"):
        if (value := getattr(arguments, flag)) is not None and (not value.strip() or "/" in value):
            raise UsageError(f"--{flag} {value!r}: give a name, not empty and without a slash")
    if arguments.timeout is not None and not arguments.timeout > 0:
        raise UsageError(f"--timeout {arguments.timeout:g}: give seconds above 0")


def _save(arguments: argparse.Namespace) -> dict[str, Any]:
    """Create or update the workspace."""
    import importlib.util

    from adaptive.errors import MachineError
    from adaptive.tracking.wandb_server import check_login, check_reachable, run_client, server

    if importlib.util.find_spec("wandb_workspaces") is None:
        raise MachineError("the package wandb-workspaces is missing; run: pip install 'wandb-workspaces>=0.4.13,<0.5'")
    limit = arguments.timeout or WORKSPACE_SECONDS
    url, project = server(), arguments.project or "adaptive"
    check_login(url)
    check_reachable(url, limit)
    asked = {
        "entity": arguments.entity or os.environ.get("WANDB_ENTITY"),
        "project": project,
        "name": arguments.name or "Adaptive",
    }
    ended = run_client(["-m", "adaptive.tracking.workspace"], limit, json.dumps(asked))
    if ended.code is None:
        raise MachineError(
            f"the W&B server {url} was not done within {limit:g} s; try again, or give more by --timeout"
        )
    try:
        answer = json.loads(ended.out)
    except ValueError:
        answer = {"error": (ended.err.strip().splitlines() or ["no answer"])[-1]}
    if "error" in answer:
        raise MachineError(remedy(answer["error"], url, project))
    return answer


def remedy(error: str, url: str, project: str) -> str:
    """Return one line of what the client said and what to do about it."""
    words = reason_of(error)
    if error == "no entity":
        return "the W&B account has no entity of its own; give one by --entity"
    if "not found" in error and project in error:
        return f"{words} Train a run with tracking.wandb=online first, or give --project and --entity"
    if "in time" in error or "timed out" in error:
        return f"the W&B server {url} did not answer in time ({words}); try again later"
    if any(sign in error.lower() for sign in ("401", "403", "credentials", "permission", "not logged in")):
        return f"the W&B server {url} refused the login ({words}); run: wandb login --relogin, or set WANDB_API_KEY"
    return f"the W&B server {url} did not save the workspace ({words}); check --project and --entity, then try again"


def _describe(as_json: bool) -> None:
    from adaptive.tracking.panels import SECTIONS, described

    if as_json:
        print(json.dumps({"sections": described()}))
        return
    from rich.table import Table

    from adaptive.reporting.tables import print_table

    table = Table()
    for column in ("section", "panel", "kind", "shows"):
        table.add_column(column)
    for section in SECTIONS:
        for i, panel in enumerate(section.panels):
            table.add_row("" if i else section.name, panel.title, panel.kind, panel.shows)
    print_table(table)


def _sync(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from adaptive.errors import MachineError
    from adaptive.tracking.sync import entities, offline_starts, sync
    from adaptive.tracking.wandb_server import check_login, check_reachable, server

    limit = arguments.timeout or SYNC_SECONDS
    for folder in arguments.sync:
        offline_starts(folder)  # refused before anything is sent
    url = server()
    check_login(url)
    entity = os.environ.get("WANDB_ENTITY")
    for folder, named in ({} if arguments.entity else entities(arguments.sync, limit)).items():
        if others := named - {entity}:
            raise MachineError(
                f"{folder} was recorded for the W&B user or team {', '.join(sorted(others))}, and a run folder may be "
                f"anybody's; to upload it there give --entity {shell_words(min(others))}, or another one"
            )
    check_reachable(url, limit)
    results = []
    for folder in arguments.sync:
        results.append(sync(folder, limit, arguments.entity))
        if not arguments.json:
            say(results[-1].summary)
    if arguments.json:
        print(json.dumps({"server": shown_location(url), "runs": [asdict(result) for result in results]}))
    return 1 if any(result.fault for result in results) else 0
