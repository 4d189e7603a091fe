"""The last table of a visit: each claim in a line, with what was expected beforehand and what came."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.gpu_run.parts import PARTS, TEST_GROUPS
from benchmarks.gpu_run.steps_page import EMPTY, expected, headline
from benchmarks.shared import pages

Row = tuple[str, str, str]
METHOD_LIMIT = 1.05  # time per multiply-add of the whole method over the plain backbone, and memory over the plain loop
FORK_LIMIT = 0.5  # percent of a step that Gradient Equilibrium may take
MEMORY_LIMIT = 15.0  # percent by which a plan's memory may be wrong


def summary(state: Mapping[str, Any], output: Path) -> str:
    """Return the page: at most 20 lines of claims; a rehearsal's are empty."""
    makers: list[Callable[[Path, str | None], list[Row]]] = [
        _tests,
        _steps,
        _memory_of_steps,
        _compiled,
        _zero,
        _equilibrium,
        _inference,
        _data,
        _small,
        _startup,
        _plan,
        _training,
        _promises,
    ]
    gpu = state["machine"]["gpu"]
    rows = [row for maker in makers for row in maker(output, gpu)]
    if state["rehearsal"]:
        rows = [(claim, wanted, EMPTY) for claim, wanted, _ in rows]
    parts = [(part.name, _part(state["parts"].get(part.name)), part.question) for part in PARTS]
    where = "a CPU, in rehearsal: no figure of a GPU" if state["rehearsal"] else gpu
    return f"""# GPU visit: {where}

`{state["command"]}`

{pages.hardware(state["machine"]) if "cpu" in state["machine"] else ""}

{pages.table(["claim", "expected beforehand", "measured"], rows)}

{pages.table(["part", "came to", "question"], parts)}
"""


def _part(entry: Mapping[str, Any] | None) -> str:
    return EMPTY if entry is None else f"{entry['status']}, {entry['seconds']:.0f} s"


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _cells(output: Path) -> dict[str, Any]:
    steps = _read(output / "gpu_steps.json")
    if steps is None or steps["rehearsal"]:
        return {}
    return {f"{cell['group']} {cell['trial']}": cell for cell in steps["cells"] if cell["status"] == "measured"}


def _tests(output: Path, gpu: str | None) -> list[Row]:
    suites = [next(ElementTree.parse(file).getroot().iter("testsuite")) for file in output.glob("device_tests_*.xml")]
    came = EMPTY
    if suites:
        names = ("tests", "failures", "errors", "skipped")
        count = {name: sum(int(suite.get(name, 0)) for suite in suites) for name in names}
        failed = count["failures"] + count["errors"]
        passed = count["tests"] - failed - count["skipped"]
        seconds = max(float(suite.get("time", 0)) for suite in suites)
        came = f"{passed} pass, {failed} fail, {count['skipped']} skipped, {seconds:.0f} s"
        came += f" ({len(suites)} of {len(TEST_GROUPS)} groups ended)" if len(suites) < len(TEST_GROUPS) else ""
    return [("tests on the device", "all pass, within 240 s", came)]


def _steps(output: Path, gpu: str | None) -> list[Row]:
    cells, floors, rows = _cells(output), expected(gpu), []
    steps = _read(output / "gpu_steps.json")
    whole = headline(steps) if steps else {}
    for network in ("resnet50", "vit_small", "convnext_tiny", "msdnet_cifar"):
        group = f"{network}_bf16"
        came, first = whole.get(group), cells.get(f"{group} plain")
        floor = floors.get(f"{group} collaboration_distillation", {}).get("floor_ms")
        wanted = f"above the floor{f' of {floor:.1f} ms' if floor else ''}; per MAC within {METHOD_LIMIT} of plain"
        shown = EMPTY
        if came and first:
            per_mac = came["over_first"]["median"] * first["macs"] / came["macs"]
            mfu = f", MFU {came['mfu']:.2f}" if came["mfu"] else ""
            shown = f"{came['images_per_second']:.0f} images/s, {came['step_ms']['median']:.2f} ms{mfu}"
            shown += f", per MAC {per_mac:.3f}"
        rows.append((f"{network}, bf16, everything", wanted, shown))
    return rows


def _memory_of_steps(output: Path, gpu: str | None) -> list[Row]:
    cells = _cells(output)
    ratios = []
    for network in ("resnet50", "vit_small", "convnext_tiny", "msdnet_cifar"):
        ours, loop = (cells.get(f"{network}_bf16 {key}") for key in ("collaboration_distillation", "loop"))
        if ours and loop and loop["peak_memory_bytes"]:
            ratios.append(f"{network} {ours['peak_memory_bytes'] / loop['peak_memory_bytes']:.3f}")
    return [("memory of everything over the plain loop", f"at most {METHOD_LIMIT}", "; ".join(ratios) or EMPTY)]


def _compiled(output: Path, gpu: str | None) -> list[Row]:
    cells, found = _cells(output), []
    for network in ("resnet50", "vit_small", "convnext_tiny", "msdnet_cifar"):
        eager, fast = (cells.get(f"{network}_{mode} collaboration_distillation") for mode in ("bf16", "compiled"))
        if eager and fast:
            found.append(f"{network} {eager['step_ms']['median'] / fast['step_ms']['median']:.2f}")
    return [("compiled, times as fast as eager", "above 1; most on MSDNet", "; ".join(found) or EMPTY)]


def _zero(output: Path, gpu: str | None) -> list[Row]:
    cells = _cells(output)
    found = [
        f"{s}: {cells[k]['over_first']['median']:.3f}" for s in range(4) if (k := f"resnet50_zero zero_{s}") in cells
    ]
    return [("resnet50 under DeepSpeed, ZeRO 0 to 3 over a torch loop", "0: within 1.1", "; ".join(found) or EMPTY)]


def _equilibrium(output: Path, gpu: str | None) -> list[Row]:
    rows = []
    for backbone in ("resnet50", "msdnet_cifar_anytime"):
        found = {
            mode: _read(output / f"equilibrium_cuda_{backbone}{end}.json")
            for mode, end in (("eager", ""), ("compiled", "_compiled"))
        }
        shown = [f"{mode} {_share(result)}" for mode, result in found.items() if result]
        rows.append((f"GE's share of a step, {backbone}", f"at most {FORK_LIMIT} %", "; ".join(shown) or EMPTY))
    return rows


def _share(result: Mapping[str, Any]) -> str:
    return f"forks {pages.spread(result['forks_percent'], 3)} %, steps {result['steps_percent']['median']:.2f} %"


def _inference(output: Path, gpu: str | None) -> list[Row]:
    rows = []
    for backbone in ("msdnet_cifar_anytime", "resnet50"):
        result = _read(output / f"inference_batches_cuda_{backbone}.json")
        shown = []
        for entry in (result or {"batches": []})["batches"]:
            if entry["batch"] in (1, 64, 256):
                ways = [f"eager {entry['saving']['median']:.2f}"]
                ways += [f"{way['accelerate']} {way['over_straight']['median']:.2f}" for way in entry["accelerated"]]
                shown.append(f"batch {entry['batch']}: {', '.join(ways)}")
        claim = f"early exit at half of the MACs over the full network, {backbone}"
        rows.append((claim, "0.6 where blocks fill the card, nearer 1 below", "; ".join(shown) or EMPTY))
    return rows


def _data(output: Path, gpu: str | None) -> list[Row]:
    result = _read(output / "data_to_device_cuda.json")
    rates = result["rates"]["packed"] if result else {}
    shown = "; ".join(f"{n} workers {rate['images_per_second']:.0f}" for n, rate in rates.items())
    return [("images/s from shards to the waiting device", "250 to 450 per worker", shown or EMPTY)]


def _small(output: Path, gpu: str | None) -> list[Row]:
    result = _read(output / "data_in_memory_cuda.json")
    shown = []
    for name, way in (result or {"ways": {}})["ways"].items():
        rate, times = way["images_per_second"]["memory"]["median"], way["memory_over_shards"]["median"]
        shown.append(f"{rate:.0f} images/s, {times:.1f} times shards with {name}")
    return [("small images from memory", "above 100,000 images/s", "; ".join(shown) or EMPTY)]


def _startup(output: Path, gpu: str | None) -> list[Row]:
    result = _read(output / "startup_cuda.json")
    shown = f"{result['commands']['first_step']['seconds']['median']:.1f} s" if result else EMPTY
    return [("from the start to the first step's record", "within 20 s", shown)]


def _plan(output: Path, gpu: str | None) -> list[Row]:
    result = _read(output / "plan_memory_cuda.json")
    errors = [abs(case["error_percent"]) for case in result["cases"]] if result else []
    shown = f"{max(errors):.1f} % at most in {len(errors)} cases" if errors else EMPTY
    return [("error of the planned memory", f"within {MEMORY_LIMIT:g} %", shown)]


def _training(output: Path, gpu: str | None) -> list[Row]:
    result = _read(output / "run" / "evaluation_test.json")
    shown = EMPTY
    if result:
        best = max(row["top1"] for row in result["exits"])
        shown = f"{best:.2f} % at the best exit"
    return [("digits: train, evaluate, calibrate, report in bf16", "97 % and more", shown)]


def _promises(output: Path, gpu: str | None) -> list[Row]:
    result = _read(output / "promised_time_cuda.json")
    found = [
        f"{row['runtime']} batch {row['batch']}: {row['ratio']:.3f}{' (noisy)' if row['noisy'] else ''}"
        for row in (result or {"rows": []})["rows"]
    ]
    return [("the clock over the promised milliseconds", "within 1.05 either way", "; ".join(found) or EMPTY)]
