"""The visit to a GPU machine: its parts keep their time and are continued, a rehearsal fills no table."""

from __future__ import annotations

import argparse
import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptive.errors import ConfigError
from benchmarks import gpu, gpu_steps, roofline
from benchmarks.gpu_run.cells import GROUPS, NETWORKS, REHEARSED
from benchmarks.gpu_run.conductor import LEFT, Conductor
from benchmarks.gpu_run.parts import PARTS, Part, Visit
from benchmarks.gpu_run.steps_page import page
from benchmarks.gpu_run.summary import summary
from benchmarks.shared.cards import CARDS, find_card
from benchmarks.shared.roofline import trace_step
from benchmarks.shared.variants import VARIANTS, StepSettings, Trainee

TINY = StepSettings("test_resnet", 2, 32, 2, 10)
SHORT = ["--rehearse", "--rounds", "2", "--seconds", "0.1"]


def options(**given: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"minutes": 5.0, "photos": None, "cifar": None, "tests": ""} | given)


def part(name: str, *scripts: str, seconds: float = 100.0) -> Part:
    return Part(name, seconds, lambda visit: [["-c", script] for script in scripts], "does it run?")


@pytest.mark.parametrize("rehearsal", [False, True])
@pytest.mark.parametrize("entry", PARTS, ids=lambda entry: entry.name)
def test_every_part_is_commands_that_are_taken(entry: Part, rehearsal: bool, tmp_path: Path) -> None:
    for words in entry.commands(Visit(tmp_path, rehearsal, 60.0, resume=True, photos=tmp_path, cifar=tmp_path)):
        if words[0].endswith(".py"):
            module = importlib.import_module(words[0].removesuffix(".py").replace("/", "."))
            assert module.parser().parse_args(words[1:]).output == tmp_path
        else:
            assert words[:2] in (["-m", "adaptive"], ["-m", "pytest"])


def test_a_visit_is_in_the_order_that_matters_and_fits_ten_minutes_twice() -> None:
    assert [entry.name for entry in PARTS][:3] == ["doctor", "tests", "steps"]
    assert 40 <= sum(len(group.trials) for group in GROUPS) <= 50
    assert set(NETWORKS) == set(REHEARSED) == {group.network for group in GROUPS}


def test_parts_end_in_time_and_the_next_visit_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sign = tmp_path / "sign"
    hangs = "import os, time; os.fork(); time.sleep(1000)"
    counts = f"open({str(sign)!r}, 'a').write('x')"
    parts = [
        part("well", counts),
        part("hangs", hangs, counts, seconds=1.0),
        part("broken", "raise SystemExit('no such kernel')"),
        part("partly", f"raise SystemExit({LEFT})"),
    ]
    conductor = Conductor(tmp_path, rehearsal=False, resume=False)
    found = conductor.run(parts, options())["parts"]
    assert {name: entry["status"] for name, entry in found.items()} == {
        "well": "passed",
        "hangs": "stopped",
        "broken": "failed",
        "partly": "partly",
    }
    assert found["hangs"]["codes"] == [None, None]  # what follows in the part is not begun
    assert conductor.exit_code(parts) == 1
    assert "no such kernel" in capsys.readouterr().out
    assert (tmp_path / "logs" / "hangs_1.log").exists()
    assert not (tmp_path / "logs" / "hangs_2.log").exists()
    again = Conductor(tmp_path, rehearsal=False, resume=True)
    mended = [parts[0], part("hangs", counts), part("broken", counts), part("partly", counts)]
    again.run(mended, options())
    assert again.exit_code(mended) == 0
    assert sign.read_text() == "xxxx"  # what had passed was not run again


def test_commands_side_by_side_wait_for_each_other(tmp_path: Path) -> None:
    meets = "import os, time; open({0!r}, 'w'); [time.sleep(0.01) for _ in iter(lambda: os.path.exists({1!r}), True)]"
    files = [str(tmp_path / "a"), str(tmp_path / "b")]
    scripts = [
        meets.format(*files),
        meets.format(*reversed(files)),
        "raise SystemExit(3)",
        "import time; time.sleep(1e3)",
    ]
    conductor = Conductor(tmp_path, rehearsal=False, resume=False)
    found = conductor.run([replace(part("both", *scripts, seconds=8.0), together=True)], options())
    assert found["parts"]["both"]["codes"] == [0, 0, 3, None]


@pytest.mark.parametrize(("codes", "status"), [([5, 0], "passed"), ([5, 5], "failed"), ([5, 1], "failed")])
def test_chosen_tests_need_not_be_in_every_group(tmp_path: Path, codes: list[int], status: str) -> None:
    conductor = Conductor(tmp_path, rehearsal=False, resume=False)
    groups = replace(part("groups", *(f"raise SystemExit({code})" for code in codes)), idle=5)
    assert conductor.run([groups], options())["parts"]["groups"]["status"] == status


def test_without_time_nothing_begins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    conductor = Conductor(tmp_path, rehearsal=False, resume=False)
    parts = [part("late", "raise SystemExit('begun')")]
    assert conductor.run(parts, options(minutes=0.01))["parts"] == {}
    assert conductor.exit_code(parts) == LEFT
    assert "late: left for --resume" in capsys.readouterr().out


def test_a_limit_that_does_not_hold_is_no_failure(tmp_path: Path) -> None:
    writes = f"open({str(tmp_path / 'page.md')!r}, 'w').write('# figures'); raise SystemExit(1)"
    for rehearsal, code in ((True, 0), (False, 1)):
        conductor = Conductor(tmp_path, rehearsal, resume=False)
        parts = [part("slow", writes)]
        assert conductor.run(parts, options())["parts"]["slow"]["status"] == "a limit does not hold"
        assert conductor.exit_code(parts) == code


def test_figures_of_a_rehearsal_and_of_a_card_are_kept_apart(tmp_path: Path) -> None:
    Conductor(tmp_path, rehearsal=True, resume=False).run([part("one", "pass")], options())
    with pytest.raises(ConfigError, match=r"--resume: .*visit.json is of a rehearsal"):
        Conductor(tmp_path, rehearsal=False, resume=True)
    (tmp_path / "gpu_steps.json").write_text(json.dumps({"rehearsal": False, "machine": {"gpu": "NVIDIA H100"}}))
    with pytest.raises(ConfigError, match=r"--resume: .*gpu_steps.json is of NVIDIA H100, this is a rehearsal"):
        gpu_steps.run(gpu_steps.parser().parse_args([*SHORT, "--resume", "--output", str(tmp_path)]))


def test_steps_are_measured_group_by_group_and_a_rehearsal_leaves_the_table_empty(tmp_path: Path) -> None:
    words = [*SHORT, "--only", "resnet50_bf16", "resnet50_fp32", "--output", str(tmp_path)]
    assert gpu_steps.main([*words, "--minutes", "0"]) == LEFT
    assert gpu_steps.main(words) == 0
    result = json.loads((tmp_path / "gpu_steps.json").read_text())
    assert [cell["trial"] for cell in result["cells"][:6]] == [variant.key for variant in VARIANTS]
    assert len(result["cells"]) == 8
    for cell in result["cells"]:
        assert cell["status"] == "measured"
        assert cell["step_ms"]["q1"] <= cell["step_ms"]["median"] <= cell["step_ms"]["q3"]
        assert cell["mfu"] is cell["peak_memory_bytes"] is None  # a CPU has neither
    assert "added_ms" in result["cells"][0]["forks"]
    rows = [line for line in (tmp_path / "gpu_steps.md").read_text().splitlines() if line.startswith("| resnet50,")]
    assert rows
    assert all(set(row.split("|")[2:-1]) == {" - "} for row in rows)
    # The same figures of a card fill them.
    there = result | {"rehearsal": False, "machine": result["machine"] | {"gpu": "NVIDIA H100 80GB HBM3"}}
    filled = [line for line in page(there).splitlines() if line.startswith("| resnet50, plain backbone")]
    assert f"{result['cells'][0]['images_per_second']:.0f}" in filled[0]
    before = (tmp_path / "gpu_steps.json").read_text()
    assert gpu_steps.main([*words, "--resume"]) == 0
    assert json.loads((tmp_path / "gpu_steps.json").read_text())["cells"] == json.loads(before)["cells"]


def test_a_cell_that_fails_says_why_and_the_others_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainee.__call__

    def full(self: Trainee) -> torch.Tensor:
        if self.variant.key == "plain":
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")
        return step(self)

    words = [*SHORT, "--only", "resnet50_fp32", "--output", str(tmp_path)]
    monkeypatch.setattr(Trainee, "__call__", full)
    assert gpu_steps.main(words) == 2
    cells = json.loads((tmp_path / "gpu_steps.json").read_text())["cells"]
    assert [cell["status"] for cell in cells] == ["out of memory", "measured"]
    assert "out of memory: tried to allocate 20 GiB" in " ".join((tmp_path / "gpu_steps.md").read_text().split())
    monkeypatch.setattr(Trainee, "__call__", step)
    assert gpu_steps.main([*words, "--resume", "--retry"]) == 0


@pytest.mark.parametrize("backbone", ["test_resnet", "test_convnext"])
def test_a_traced_step_has_three_times_the_forward_passs_operations(backbone: str) -> None:
    settings = replace(TINY, backbone=backbone, exits=2, image_size=64)
    for variant in (VARIANTS[0], VARIANTS[-1]):
        cost = trace_step(settings, variant)
        images = 6 * Trainee(settings, variant).macs() * settings.batch
        # The images need no gradient: that of the first convolution is left out, and torch counts bias-free products.
        assert 0.85 * images < cost.flops <= 1.001 * images
        assert cost.bytes > 3 * 4 * sum(p.numel() for p in Trainee(settings, variant).network.parameters())
    card = CARDS[0]
    assert 0 < cost.fused_floor(card, "bf16") < cost.eager_floor(card, "bf16") < cost.eager_floor(card, "fp32") + 1


def test_floors_of_the_cells_are_written(tmp_path: Path) -> None:
    assert roofline.main(["--rehearse", "--only", "resnet50_fp32", "--output", str(tmp_path)]) == 0
    cells = json.loads((tmp_path / "roofline.json").read_text())["cells"]
    assert [cell["trial"] for cell in cells] == ["plain", "collaboration_distillation"]
    assert set(cells[0]["cards"]) == {card.name for card in CARDS}


def test_committed_floors_are_of_the_cells_that_are_measured() -> None:
    file = Path(roofline.__file__).parent / "results" / "roofline.json"
    entries = {(cell["group"], cell["trial"]) for cell in json.loads(file.read_text())["cells"]}
    assert entries == {(group.name, trial.key) for group in GROUPS for trial in group.trials}


def test_cards_are_known_by_their_names() -> None:
    assert find_card("NVIDIA H100 80GB HBM3").bandwidth == 3.35e12
    assert find_card("NVIDIA A100-SXM4-40GB").tflops["bf16"] == 312
    assert find_card("NVIDIA GeForce GTX 1080") is None


def test_the_summary_has_twenty_lines_at_most_and_a_rehearsal_none_of_its_figures(tmp_path: Path) -> None:
    (tmp_path / "startup_cuda.json").write_text(json.dumps({"commands": {"first_step": {"seconds": {"median": 7.5}}}}))
    way = {"images_per_second": {"memory": {"median": 2e5}}, "memory_over_shards": {"median": 24.66}}
    (tmp_path / "data_in_memory_cuda.json").write_text(json.dumps({"ways": {"no worker": way, "4 workers": way}}))
    rows = [{"runtime": "torch", "batch": 1, "ratio": 1.0125, "noisy": True}]
    (tmp_path / "promised_time_cuda.json").write_text(json.dumps({"rows": rows}))
    suite = '<testsuites><testsuite tests="9" failures="1" errors="1" skipped="2" time="100"/></testsuites>'
    for number in (1, 2):
        (tmp_path / f"device_tests_{number}.xml").write_text(suite)
    state = {"rehearsal": False, "machine": {"gpu": "NVIDIA H200"}, "parts": {}, "command": "python benchmarks/gpu.py"}
    text = summary(state, tmp_path)
    claims = text.split("| part |")[0].splitlines()
    assert len([line for line in claims if line.startswith("|")]) - 2 <= 20
    assert "7.5 s" in text
    assert "200000 images/s, 24.7 times shards with no worker; 200000 images/s" in text
    assert "torch batch 1: 1.012 (noisy)" in text
    assert "10 pass, 4 fail, 4 skipped, 100 s (2 of 4 groups ended)" in text
    rehearsed = summary(state | {"rehearsal": True}, tmp_path)
    assert "7.5 s" not in rehearsed
    assert "no figure of a GPU" in rehearsed


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--rehearse", "--only", "speed"], "--only speed"),
        (["--rehearse", "--minutes", "0"], "--minutes 0"),
        (["--rehearse", "--photos", "/no/such"], "--photos /no/such"),
        (["--rehearse", "--output", str(Path(gpu.__file__).parent / "results" / "x")], "a rehearsal makes no results"),
        pytest.param(
            [], "no usable GPU", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
        ),
    ],
)
def test_mistakes_are_one_line(words: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(words) == 1
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_a_rehearsal_of_the_commands_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The other parts' scripts have tests of their own. Of the device's tests, a quick one each.
    parts = ["doctor", "tests", "steps", "data", "equilibrium", "training"]
    tests = "finite_differences or pixels_on_the_device or waits_for_nothing"
    words = ["--rehearse", "--output", str(tmp_path), "--tests", tests, "--only", *parts]
    code = gpu.main(words)
    assert code == 0, capsys.readouterr().out
    assert set(json.loads((tmp_path / "visit.json").read_text())["parts"]) == set(parts)
