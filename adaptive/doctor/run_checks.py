"""Choose and run the doctor's checks on this machine, and print their findings."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict

from rich.console import Console

from adaptive.doctor.checks import dataset, disk, gpu, machine, network, slurm, software, wandb_login
from adaptive.doctor.finding import Check, CheckSettings, Finding, run_check
from adaptive.doctor.findings_table import print_findings
from adaptive.errors import UsageError, nearest


def all_checks() -> list[Check]:
    """Return every check of one machine, in the order of the table."""
    modules = (software, gpu, machine, network, disk, dataset, slurm, wandb_login)
    return [check for module in modules for check in module.CHECKS]


def choose(only: str | None, quick: bool, with_data: bool) -> list[Check]:
    """Return the checks that were asked for (raises UsageError: unknown names)."""
    checks = all_checks()
    known = [*dict.fromkeys(check.group for check in checks), *(check.name for check in checks)]
    names = [name.strip() for name in only.split(",") if name.strip()] if only is not None else []
    if only is not None and not names:
        raise UsageError(f"--only {only!r} names nothing; there are {', '.join(dict.fromkeys(known))}")
    for name in names:
        if name not in known:
            remedy = nearest(name, known, f"there are {', '.join(dict.fromkeys(known))}", most=1)
            raise UsageError(f"--only {name!r} is no check; {remedy}")
    if names:
        checks = [check for check in checks if check.name in names or check.group in names]
        if not with_data and any(check.group == "data" for check in checks):
            raise UsageError("--only data needs a dataset; add --data FOLDER or --data URL")
    return [check for check in checks if (with_data or check.group != "data") and not (quick and check.slow)]


def run_all(
    checks: list[Check], settings: CheckSettings, tell: Callable[[Finding], None] | None = None
) -> list[Finding]:
    """Run checks one after another; on a terminal their names are shown meanwhile."""
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
    failed = any(finding.status == "error" for _, finding in findings)
    if as_json:
        listed = [{"node": node, **asdict(finding)} for node, finding in findings]
        print(json.dumps({"ok": not failed, "nodes": nodes, "findings": listed}))
    else:
        print_findings(findings, nodes)
    sys.stdout.flush()
    return int(failed)


def named(node: str, findings: list[Finding]) -> list[tuple[str, Finding]]:
    """Return findings with the name of their node."""
    return [(node, finding) for finding in findings]
