"""The panels of the shared W&B workspace, in sections, over the metrics that runs write.

The number of exits, blocks and nodes differs from run to run, so most panels select metrics by a regular expression.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from adaptive.tracking.record_keys import exit_key

Kind = Literal["lines", "scatter", "table chart", "media", "parallel", "comparer"]
NODE_SUMMARY = "(_(min|mean|max))?"  # which records hold in place of single values for more than 8 nodes


@dataclass(frozen=True)
class Panel:
    """A chart, table or picture of the workspace.

    Attributes:
        title: shown above it.
        kind: ``lines`` over the step; ``scatter`` of two summary values, one point a run; ``table chart`` over a logged
            table's columns; ``media``; ``parallel`` coordinates of settings and results; ``comparer`` of runs.
        regex: pattern of the metrics' keys, for ``lines``; anchored at both ends.
        keys: the keys themselves, where there is no pattern; for a scatter x and y.
        settings: configuration keys, for ``parallel``, before the results.
        chart: W&B's name of the chart, for ``table chart``.
        columns: of a ``table chart``: the chart's field -> the table's column.
        log: logarithmic vertical axis.
    """

    title: str
    kind: Kind = "lines"
    regex: str = ""
    keys: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    chart: str = ""
    columns: tuple[tuple[str, str], ...] = ()
    log: bool = False

    @property
    def shows(self) -> str:
        """Its metrics, as a text."""
        return self.regex or ", ".join((*self.settings, *self.keys)) or "all settings and results"


@dataclass(frozen=True)
class PanelSection:
    """A named section of the workspace with its panels, folded unless ``open``."""

    name: str
    panels: tuple[Panel, ...]
    open: bool = True


def _lines(title: str, pattern: str, log: bool = False) -> Panel:
    return Panel(title, regex=f"^{pattern}$", log=log)


def _per_exit(title: str, group: str, name: str) -> Panel:
    return _lines(title, exit_key(group, "[0-9]+", name))


def _node(title: str, measure: str) -> Panel:
    return _lines(title, f"system/[^/]+/{measure}{NODE_SUMMARY}")


SECTIONS = (
    PanelSection(
        "Accuracy of every exit",
        (
            _per_exit("validation, top-1 %", "val", "top1"),
            _per_exit("validation, top-5 %", "val", "top5"),
            _per_exit("moving average, top-1 %", "val_ema", "top1"),
            _per_exit("moving average, top-5 %", "val_ema", "top5"),
            _per_exit("training, top-1 %", "train", "top1"),
        ),
    ),
    PanelSection(
        "Accuracy against multiply-adds",
        (
            Panel(
                "exits and policies",
                "table chart",
                keys=("report/accuracy_against_macs_table",),
                chart="wandb/lineseries/v0",
                columns=(("step", "step"), ("lineKey", "lineKey"), ("lineVal", "lineVal")),
            ),
            Panel(
                "every exit of every run",
                "table chart",
                keys=("report/exits",),
                chart="wandb/scatter/v0",
                columns=(("x", "MACs"), ("y", "top-1 %")),
            ),
            Panel("the first exit", "scatter", keys=(exit_key("model", 1, "macs"), exit_key("val", 1, "top1"))),
            Panel("as in the report", "media", keys=("report/accuracy_macs",)),
        ),
    ),
    PanelSection(
        "Who leaves where",
        (
            Panel(
                "share that leaves",
                "table chart",
                keys=("report/exits",),
                chart="wandb/bar/v0",
                columns=(("label", "exit"), ("value", "leave here")),
            ),
            _per_exit("agreement with the last exit, %", "val", "agreement"),
            Panel("as in the report", "media", keys=("report/shares", "report/leavers")),
        ),
    ),
    PanelSection(
        "Gradient balance",
        (
            _lines("norm per block", "train/gradient_norm/block_[0-9]+", log=True),
            _lines("norm per exit", "train/gradient_norm/exit_[0-9]+", log=True),
        ),
    ),
    PanelSection(
        "Loss",
        (
            _lines("cross entropy, summed over the exits", "(train/cross_entropy|(val|val_ema)/loss)"),
            _lines("what training minimises: weighted, distilled", "train/loss"),
            _per_exit("training, per exit", "train", "loss"),
            _per_exit("validation, per exit", "val", "loss"),
            _per_exit("divergence from the teacher", "train", "divergence"),
        ),
    ),
    PanelSection(
        "Throughput",
        (
            _lines("images per second", "train/images_per_second"),
            _lines("share of waiting for data", "train/data_wait_share"),
            _lines("memory, GiB", "train/memory_gib"),
            _lines("learning rate", "train/lr"),
            _lines("skipped steps", "train/skipped_steps"),
        ),
    ),
    PanelSection(
        "Slow ranks",
        (
            _lines("slowest rank's own time over the median's", "ranks/(validation/)?slowest_ratio"),
            _lines("the slowest rank", "ranks/(validation/)?slowest"),
            _lines("own time: computing, s", "ranks/(slowest|median)_compute_seconds"),
            _lines("own time: data, records, saving, s", "ranks/(slowest|median)_(data|records|saving)_seconds"),
        ),
    ),
    PanelSection(
        "Nodes",
        (
            _node("processor, %", "cpu_percent"),
            _node("memory, %", "memory_percent"),
            _node("network, MiB/s", "(sent|received)_mib_s"),
            _node("GPUs, %", "gpu[0-9]*_percent"),
            _node("GPU memory, %", "gpu[0-9]*_memory_percent"),
            _node("GPU power, W", "gpu[0-9]*_watts"),
            _node("CPU quota used up, % of periods", "throttled_percent"),
            _node("swapping, MiB/s", "swapped_mib_s"),
        ),
        open=False,
    ),
    PanelSection(
        "Runs compared",
        (
            Panel(
                "settings and results",
                "parallel",
                settings=("optimizer.lr", "model.equilibrium", "model.collaboration", "distillation.gamma"),
                keys=("train/images_per_second", exit_key("val", 1, "top1"), "val/loss"),
            ),
            Panel("differences", "comparer"),
        ),
        open=False,
    ),
)


def described() -> list[dict[str, Any]]:
    """Return the sections as plain JSON types."""
    return [asdict(section) for section in SECTIONS]
