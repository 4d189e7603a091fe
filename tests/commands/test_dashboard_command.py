"""Every panel of the W&B workspace against the keys of a real run, of its report, and of GPUs and many nodes."""

import re
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from adaptive.config.keys import documented_keys
from adaptive.reporting.dashboard_report import show
from adaptive.tracking.dashboard import Dashboard
from adaptive.tracking.panels import SECTIONS, Panel
from adaptive.tracking.record import read
from adaptive.training.callbacks.rank_times import KINDS
from adaptive.training.supervision import machine_load
from adaptive.training.supervision.machine_load import MachineLoad, system_values
from adaptive.training.supervision.own_time import PARTS
from adaptive.training.supervision.slow_ranks import Window
from tests.helpers.commands import Forks
from tests.reporting.reports import make_run, write

PANELS = [panel for section in SECTIONS for panel in section.panels]
SETTINGS = {key for key, _ in documented_keys()}
MANY = 9  # nodes, too many to be recorded one by one


class Listing(Dashboard):
    """Keeps the keys of what it is to show, and the columns of tables."""

    def __init__(self) -> None:
        self.media: set[str] = set()
        self.tables: dict[str, list[str]] = {}

    def image(self, key: str, path: str | Path) -> None:
        self.media.add(key)

    def table(self, key: str, columns: list[str], rows: list[list[Any]]) -> None:
        self.tables[key] = columns

    def lines(self, key: str, lines: Mapping[str, Sequence[tuple[float, float]]], title: str, x_name: str) -> None:
        wandb = pytest.importorskip("wandb")
        [points] = [points for name, points in lines.items() if name == "policy"]
        xs, ys = zip(*points, strict=True)
        chart = wandb.plot.line_series([list(xs)], [list(ys)], keys=["policy"], title=title, xname=x_name)
        chart.set_key(key)
        self.tables[chart.spec.table_key] = chart.table.columns


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory, config_file: Path, forks: Forks) -> set[str]:
    """The keys of a run of two steps with a moving average."""
    folder = tmp_path_factory.mktemp("recorded") / "run"
    changes = ["train.max_steps=2", "train.ema_decay=0.5", "tracking.every_steps=1", "tracking.system_seconds=0.0001"]
    ended = forks.run(["train", str(config_file), f"train.run_folder={folder}", *changes])
    assert ended.code == 0, ended
    return {key for record in read(folder / "metrics.jsonl") for key in record}


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Listing:
    """What ``adaptive report --wandb`` sends."""
    made, listing = make_run(), Listing()
    written = write([made], tmp_path_factory.mktemp("report"))
    show(listing, made, [], written.figures)
    return listing


@pytest.fixture
def gpu_keys(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """The keys that a machine with a GPU, a CPU quota and little memory records: of itself, and among so many that they
    are recorded together."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**31))
    for name in ("utilization", "temperature", "power_draw"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 50)
    periods, swapped = iter(((0, 0), (10, 1))), count()
    monkeypatch.setattr(machine_load, "quota_periods", lambda: next(periods))
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(sin=2**20 * next(swapped), sout=0))
    sample = MachineLoad(torch.device("cuda", 1), whole=True).sample()
    return [set(system_values({f"node-{i}.lab": sample for i in range(nodes)})) for nodes in (1, MANY)]


@pytest.fixture(scope="module")
def rank_keys() -> set[str]:
    """The keys of ranks that are compared with each other."""
    times = dict.fromkeys(PARTS, 1.0)
    window = Window(1, "node-1", 2.0, times, times)
    return {key for prefix in KINDS.values() for key in window.record(prefix)}


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel.title)
def test_no_panel_waits_for_what_nobody_writes(
    panel: Panel, keys: set[str], reported: Listing, gpu_keys: list[set[str]], rank_keys: set[str]
) -> None:
    if panel.kind == "lines":
        kinds = [keys | gpu_keys[0], keys | gpu_keys[1]] if panel.regex.startswith("^system/") else [keys]
        for written in [rank_keys] if panel.regex.startswith("^ranks/") else kinds:
            assert any(re.search(panel.regex, key) for key in written), f"{panel.regex}: {sorted(written)}"
    elif panel.kind == "media":
        assert set(panel.keys) <= reported.media
    elif panel.kind == "table chart":
        [table] = panel.keys
        assert {column for _, column in panel.columns} <= set(reported.tables[table])
    else:
        assert set(panel.keys) <= keys
        assert set(panel.settings) <= SETTINGS


def test_the_nodes_panels_show_a_real_run(keys: set[str]) -> None:
    """Not only those with a GPU."""
    shown = [panel.title for panel in PANELS if any(re.search(panel.regex, k) for k in keys if k.startswith("system/"))]
    assert {"processor, %", "memory, %", "network, MiB/s"} <= set(shown)


def test_patterns_keep_measures_apart(gpu_keys: list[set[str]]) -> None:
    """The load of GPUs is not their memory, and of many nodes each measure is in one panel."""
    of_nodes = [panel for panel in PANELS if panel.regex.startswith("^system/")]
    for written in gpu_keys:
        for key in written:
            shown = [panel.title for panel in of_nodes if re.search(panel.regex, key)]
            assert len(shown) == (0 if "celsius" in key else 1), (key, shown)
