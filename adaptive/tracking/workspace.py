"""Saves the shared W&B workspace, in a process of its own: one JSON object on standard input, one answer.

The library and its client may wait for a server without limit, and leave a service behind; ``wandb_server.run_client``
limits the time of this process and kills all of it. The request holds ``entity`` (or None: the account's own),
``project`` and ``name``; the answer ``url``, ``created`` and the number of ``panels``, or ``error``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from adaptive.tracking.panels import SECTIONS, Panel

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Section, Workspace


def view_key(name: str) -> str:
    """Return the id of a workspace (``nw=`` in its URL), a hash of its name: updates from any machine find it."""
    return base64.b32encode(hashlib.sha256(f"adaptive {name}".encode()).digest()).decode().lower()[:11]


def build(entity: str, project: str, name: str) -> Workspace:
    """Return the workspace, not yet saved."""
    from wandb_workspaces.workspaces import Workspace, WorkspaceSettings

    settings = WorkspaceSettings(x_axis="step", max_runs=20)
    workspace = Workspace(entity=entity, project=project, name=name, sections=sections(), settings=settings)
    # The key of the view in W&B's table of views; left empty, the library would draw a random one.
    workspace._internal_name = f"nw-{view_key(name)}-v"
    return workspace


def sections() -> list[Section]:
    """Return the sections of panels in the library's own types."""
    from wandb_workspaces.workspaces import Section

    return [
        Section(name=section.name, panels=[_panel(panel) for panel in section.panels], is_open=section.open)
        for section in SECTIONS
    ]


def save(entity: str, project: str, name: str) -> dict[str, Any]:
    """Create the workspace in the project, or give the existing one these sections; its filters stay as they are."""
    from wandb_workspaces.workspaces import Workspace

    workspace = build(entity, project, name)
    try:
        found = Workspace.from_url(workspace.url)
    except ValueError as error:
        if not str(error).startswith("Workspace "):  # the project is missing; the library has no kinds of errors
            raise
        found = None
    if found is not None:
        found.sections = workspace.sections
        workspace = found
    workspace.save()
    return {
        "url": workspace.url,
        "created": found is None,
        "panels": sum(len(section.panels) for section in workspace.sections),
    }


def own_entity() -> str | None:
    """Return the account's own entity."""
    from wandb_workspaces.reports.v2 import Report

    return Report(project="").entity  # type: ignore[call-arg]  # its default asks the server


def _panel(panel: Panel) -> Any:
    import wandb_workspaces.reports.v2 as v2

    if panel.kind == "lines":
        return v2.LinePlot(title=panel.title, x="step", metric_regex=panel.regex, log_y=panel.log or None)
    if panel.kind == "scatter":
        x, y = (v2.SummaryMetric(key) for key in panel.keys)
        return v2.ScatterPlot(title=panel.title, x=x, y=y)
    if panel.kind == "table chart":
        [table] = panel.keys
        chart = v2.CustomChart.from_table(table, dict(panel.columns), {"title": panel.title})
        chart.chart_name = panel.chart
        return chart
    if panel.kind == "media":
        return v2.MediaBrowser(title=panel.title, media_keys=list(panel.keys))
    if panel.kind == "parallel":
        metrics: list[Any] = [*map(v2.Config, panel.settings), *map(v2.SummaryMetric, panel.keys)]
        columns = [v2.ParallelCoordinatesPlotColumn(metric=metric) for metric in metrics]
        return v2.ParallelCoordinatesPlot(title=panel.title, columns=columns)
    return v2.RunComparer(diff_only="split")


def main() -> None:
    """Run as a process: ``python -m adaptive.tracking.workspace``."""
    asked = json.load(sys.stdin)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever the client prints is not the answer
    try:
        entity = asked["entity"] or own_entity()
        answer = save(entity, asked["project"], asked["name"]) if entity else {"error": "no entity"}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    with answers:
        json.dump(answer, answers)


if __name__ == "__main__":
    main()
