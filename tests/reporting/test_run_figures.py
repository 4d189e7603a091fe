import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from adaptive.errors import MachineError
from adaptive.reporting.run_figures import Curve, _draw_loss, accuracy_against_cost, training_curves
from adaptive.reporting.style import COLOURS

CURVES = [
    Curve("GE + ISC", [3e8, 7.5e8, 1.2e9, 1.82e9], [52.1, 61.0, 67.3, 70.2]),
    Curve("GE + ISC", [3e8, 5e8, 1e9, 1.4e9], [53.0, 61.0, 69.2, 70.4], "budgeted"),
    Curve("plain", [3e8, 7.5e8, 1.2e9, 1.82e9], [47.1, 56.0, 63.3, 69.9]),
]


def records(exits: int = 4) -> list[dict[str, float]]:
    result: list[dict[str, float]] = []
    for step in range(10, 201, 10):
        tops = {f"train/exit_{e}/top1": (50 + 5 * e) * (1 - math.exp(-step / 60)) for e in range(1, exits + 1)}
        result.append({"step": step, "train/loss": math.nan if step == 50 else 3 * math.exp(-step / 100), **tops})
        if step % 50 == 0:
            result.append({"step": step, "val/loss": 1.0, **{k.replace("train", "val"): v for k, v in tops.items()}})
    return result


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert 800 <= image.width <= 2400
        assert 500 <= image.height <= 1500
        return np.asarray(image.convert("RGB")).reshape(-1, 3)


def amount(image: np.ndarray, colour: str) -> int:
    return int((image == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).all(axis=1).sum())


def test_accuracy_against_cost_draws_every_network_in_its_colour(tmp_path):
    path = accuracy_against_cost(CURVES, tmp_path / "curves.png", "top-1 against cost")
    assert path == tmp_path / "curves.png"
    image = pixels(path)
    assert amount(image, COLOURS[0]) > 1000
    assert amount(image, COLOURS[1]) > 1000
    assert amount(image, COLOURS[2]) == 0


def test_intervals_are_drawn_beneath_their_curves(tmp_path):
    bare = [Curve("net", [1e6, 2e6], [80.0, 90.0], kind) for kind in ("anytime", "budgeted")]
    sure = [Curve("net", [1e6, 2e6], [80.0, 90.0], k, [(70.0, 85.0), (86.0, 93.0)]) for k in ("anytime", "budgeted")]
    first, second = (accuracy_against_cost(c, tmp_path / f"{i}.png").read_bytes() for i, c in enumerate((bare, sure)))
    assert first != second


def test_a_wide_range_of_costs_and_no_curves_at_all_are_drawn(tmp_path):
    wide = [*CURVES, Curve("tiny", [2e6, 3e7], [20.0, 35.0])]
    assert amount(pixels(accuracy_against_cost(wide, tmp_path / "wide.png", "wide")), COLOURS[2]) > 300
    pixels(accuracy_against_cost([], tmp_path / "none.png", "none"))


@pytest.mark.parametrize("exits", [4, 10])
def test_training_curves_draw_loss_and_every_exit(tmp_path, exits):
    image = pixels(training_curves(records(exits), tmp_path / "training.png"))
    assert amount(image, COLOURS[0]) > 300
    assert amount(image, COLOURS[1]) > 300
    assert len(np.unique(image, axis=0)) > 100


def test_training_and_validation_losses_are_of_one_kind():
    """train/loss is weighted and distilled: beside validation's plain sum stands that of the exits' cross entropies."""
    axes = Figure().subplots()
    exits = {"train/exit_1/loss": 2.0, "train/exit_2/loss": 1.5}
    _draw_loss(axes, [{"step": 1, "train/loss": 0.7, **exits}, {"step": 2, "val/loss": 3.0}])
    assert [(line.get_label(), list(line.get_ydata())) for line in axes.lines] == [
        ("training", [3.5]), ("validation", [3.0]),
    ]  # fmt: skip
    old = Figure().subplots()
    _draw_loss(old, [{"step": 1, "train/loss": 0.7}])
    assert [line.get_label() for line in old.lines] == ["training's objective"]


def test_training_curves_without_records_are_empty_axes(tmp_path):
    pixels(training_curves([], tmp_path / "training.png"))


def test_costs_and_accuracies_must_pair_up():
    with pytest.raises(ValueError, match="'odd': 2 costs for 1 accuracies"):
        Curve("odd", [1e6, 2e6], [50.0])


def test_a_figure_that_cannot_be_written_names_the_file(tmp_path):
    with pytest.raises(MachineError, match="nowhere"):
        training_curves([], tmp_path / "nowhere" / "training.png")


def test_matplotlib_is_imported_only_to_draw():
    code = "import sys, adaptive.reporting.run_figures; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
