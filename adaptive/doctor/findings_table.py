"""The table of findings that ``adaptive doctor`` prints, of one node or of several."""

from __future__ import annotations

from collections.abc import Sequence

from adaptive.doctor.finding import Finding
from adaptive.foreign_text import say

STYLES = {"ok": "green", "warning": "yellow", "error": "bold red", "skipped": "dim"}
MOST_NAMES = 4


def grouped(findings: Sequence[tuple[str, Finding]]) -> list[tuple[list[str], Finding]]:
    """Join the nodes' findings into rows: one for a check that is well everywhere, else one per different finding."""
    rows: list[tuple[list[str], Finding]] = []
    for name in dict.fromkeys(finding.name for _, finding in findings):
        same = [(node, finding) for node, finding in findings if finding.name == name]
        if all(finding.status in ("ok", "skipped") for _, finding in same):
            rows.append(([node for node, _ in same], same[0][1]))
            continue
        kinds: dict[tuple[str, str], list[tuple[str, Finding]]] = {}
        for node, finding in same:
            well = finding.status in ("ok", "skipped")
            kinds.setdefault((finding.status, "" if well else finding.found), []).append((node, finding))
        rows += [([node for node, _ in ones], ones[0][1]) for ones in kinds.values()]
    return rows


def print_findings(findings: Sequence[tuple[str, Finding]], nodes: Sequence[str]) -> None:
    """Print the table, and how many findings are of each status."""
    from rich.table import Table
    from rich.text import Text

    from adaptive.reporting.tables import print_table

    several = len(nodes) > 1
    table = Table(show_lines=False)
    table.add_column("check", no_wrap=True)
    table.add_column("", no_wrap=True)
    if several:
        table.add_column("node", overflow="fold")
    table.add_column("found, and -> what to do", overflow="fold")
    for where, finding in grouped(findings):
        text = Text(finding.found)
        if finding.remedy:
            text.append(f"\n-> {finding.remedy}", style="bold")
        cells: list[str | Text] = [finding.name, Text(finding.status, style=STYLES[finding.status])]
        cells += [_nodes(where, nodes)] if several else []
        table.add_row(*cells, text)
    print_table(table)
    count = {status: sum(finding.status == status for _, finding in findings) for status in STYLES}
    say(f"{count['ok']} ok, {count['warning']} warnings, {count['error']} errors")


def _nodes(where: list[str], nodes: Sequence[str]) -> str:
    if set(where) >= set(nodes):
        return "all"
    shown = ", ".join(where[:MOST_NAMES])
    return shown if len(where) <= MOST_NAMES else f"{shown} and {len(where) - MOST_NAMES} more"
