"""The results of all classes: a file of JSON lines that can be continued, and the page made from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from adaptive.files import write_atomically
from benchmarks.shared.families import FAMILIES, Family
from benchmarks.shared.results import machine

COMMAND = "python benchmarks/backbones.py"
SHARE_WANTED = 0.95
TITLES = {
    "wrap": "wraps",
    "train": "trains",
    "agree": "ranks agree",
    "save": "saves",
    "load": "loads",
    "evaluate": "evaluates",
    "stages": "stage by stage",
}
HOW_TO_READ = """\
`adaptive models` lists all backbones, `adaptive models NAME` the modules after which exits can branch off with their
costs, and `adaptive models NAME --exits 4` the exits chosen, as a section for a configuration.

What passing means, in the order of the steps, with 10 classes and random weights:

1. **wraps**: `adaptive.create_model(model, 10, exits=4)`, which itself compares the last exit with the plain timm
   model while samples are taken out of the batch, to 1e-5 of the largest logit.
2. **trains**: one step of SGD under DeepSpeed ZeRO 2 on two ranks, with Gradient Equilibrium and collaboration. The
   loss and every gradient are finite, and a gradient reaches every parameter.
3. **ranks agree**: both ranks hold the same weights, bit for bit, and not those they began with.
4. **saves, loads**: a run folder with configuration and checkpoint becomes a network again (`adaptive.runs.load`),
   drawn from another seed; its logits in eval mode equal the trained network's to 1e-6 of the largest.
5. **evaluates**: every exit is measured over batches of both ranks, every image counted once.
6. **stage by stage**: block after block on a batch that shrinks at every exit. Each exit's logits equal the full run's
   of the same samples to 1e-5 of the largest.

Columns: *side* of the images in pixels, small on purpose, for speed; *exits after* names the modules after which the
early exits branch off, the last exit being the model's own end; *parameters* and *GMACs* (multiply-adds) are the whole
network's at that side, heads and links included; *shares* are the early exits' costs as shares of the last one's, and
*off* is their largest distance from equal shares; *tensors* counts what crosses each branch point; *differs* is the
largest difference in step 6 as a share of the largest logit; *s* are the seconds of all steps. A file with a * is
shrunk by arguments that stand below the table.
"""


@dataclass
class Results:
    """The results file: what it ran on in the first line, then a line per class."""

    path: Path
    machine: dict[str, Any] = field(default_factory=dict)
    records: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read a results file; without one, start an empty one."""
        if not path.is_file():
            return cls(path)
        first, *lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return cls(path, first, {(record["file"], record["cls"]): record for record in lines})

    def of_other_versions(self) -> bool:
        """Whether what is here was made with another timm, torch or deepspeed than is installed now."""
        now = machine("cpu")
        return bool(self.machine) and any(self.machine[name] != now[name] for name in ("timm", "torch", "deepspeed"))

    def add(self, family: Family, record: Mapping[str, Any]) -> None:
        """Keep a class's result, and write the file."""
        self.machine = machine("cpu") | {"date": datetime.now(UTC).date().isoformat()}
        self.records[family.file, family.cls] = {**asdict(family), **record}
        lines = [self.machine, *(self.records[key] for key in sorted(self.records))]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in lines))

    @property
    def passed(self) -> int:
        """Number of classes that went the whole way."""
        return sum(record["failed"] is None for record in self.records.values())

    @property
    def good_enough(self) -> bool:
        """Whether the promised share of all of timm's classes goes the whole way."""
        return self.passed >= SHARE_WANTED * len(FAMILIES)


def page(results: Results) -> str:
    """Write docs/reference/backbones.md."""
    records = [results.records[key] for key in sorted(results.records)]
    good = [record for record in records if record["failed"] is None]
    lines = [
        "# Backbones",
        "",
        _summary(len(good), results.machine["timm"]),
        "",
        _machine(results.machine),
        "",
        HOW_TO_READ,
        "## Classes that pass every step",
        "",
        *_table(good),
        "",
        *_failures([record for record in records if record["failed"] is not None]),
        *_notes(good),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _summary(passed: int, version: str) -> str:
    share = passed / len(FAMILIES)
    return (
        f"One small model of every architecture class of timm {version}, taken the whole way. "
        f"**{passed} of {len(FAMILIES)} classes ({share:.1%}) pass every step.** "
        f"Made by `{COMMAND}` (`make backbones`) from `benchmarks/results/backbones.jsonl`."
    )


def _machine(found: Mapping[str, Any]) -> str:
    return (
        f"{found['cpu']}, two ranks (gloo) of one thread each; torch {found['torch']}, timm {found['timm']}, "
        f"deepspeed {found['deepspeed']}, Python {found['python']}; {found['date']}."
    )


def _table(records: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| file | class | model | side | exits after | parameters, M | GMACs | shares | off | tensors | differs | s |",
        "|---|---|---|---:|---|---:|---:|---|---:|---|---:|---:|",
    ]
    for record in records:
        cells = [
            record["file"] + ("\\*" if record["options"] else ""),
            record["cls"],
            f"`{record['model']}`",
            str(record["size"]),
            ", ".join(f"`{name}`" for name in record["exit_names"]),
            f"{record['parameters'] / 1e6:.2f}",
            f"{record['gmacs']:.3f}",
            " ".join(f"{share:.2f}" for share in record["shares"][:-1]),
            f"{record['deviation']:.2f}",
            " ".join(map(str, record["crossing"])),
            f"{record['stage_difference']:.0e}" if record["stage_difference"] else "0",
            f"{record['seconds']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    shrunk = [record for record in records if record["options"]]
    if shrunk:
        lines += ["", "Shrunk by arguments of `timm.create_model`:", ""]
        lines += [
            f"* `{record['model']}`: {', '.join(f'{k}={v}' for k, v in record['options'].items())}" for record in shrunk
        ]
    return lines


def _failures(records: list[dict[str, Any]]) -> list[str]:
    if not records:
        return []
    lines = [
        "## Classes that do not, and why",
        "",
        "| file | class | model | stops at | reason |",
        "|---|---|---|---|---|",
    ]
    for record in records:
        reason = str(record["reason"]).replace("|", "\\|").replace("<", "&lt;")
        step = TITLES.get(record["failed"], record["failed"])
        lines.append(f"| {record['file']} | {record['cls']} | `{record['model']}` | {step} | {reason} |")
    return [*lines, ""]


def _notes(records: list[dict[str, Any]]) -> list[str]:
    """What passes and still deserves a word."""
    lines = ["## Notes", ""]
    fewer = [f"`{record['model']}` ({record['exits']})" for record in records if record["exits"] < 4]
    lines.append(f"* Fewer than four exits, for lack of places: {', '.join(fewer) or 'none'}.")
    uneven = [f"`{record['model']}` ({record['deviation']:.2f})" for record in records if record["deviation"] > 0.15]
    lines.append(f"* Exit costs further than 0.15 from equal shares: {', '.join(uneven) or 'none'}.")
    return lines
