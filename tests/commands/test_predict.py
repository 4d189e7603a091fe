"""What `adaptive predict` answers where one image of a call needs more than there is."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from adaptive.commands.predict import Model, answers
from adaptive.config.sections import DataConfig
from adaptive.data.images.image_files import ImageFile
from adaptive.data.images.transforms import eval_transform
from adaptive.inference.export.preprocess import Preprocess
from tests.helpers.memory import at_most


def test_a_strip_and_an_image_that_memory_cannot_hold_cost_the_others_no_answer(tmp_path: Path) -> None:
    """A file of 2 KB whose shorter side becomes 32 pixels would have 2 billion of them."""
    for name, size in (("strip", (2_000_000, 1)), ("tower", (1, 2_000_000)), ("large", (9400, 9400)), ("one", (9, 8))):
        Image.new("L", size, 200).save(tmp_path / f"{name}.png")
    images = [ImageFile(str(tmp_path / f"{name}.png")) for name in ("strip", "large", "tower", "one")]
    data = DataConfig(path="x", image_size=32)
    for transform in (eval_transform(data), Preprocess.of(data)):
        model = Model(
            ["only"],
            lambda image, transform=transform: transform(image.open()),
            lambda arrays: ([1] * len(arrays), [[1.0]] * len(arrays)),
            1,
        )
        bad: list[str] = []
        with at_most(200):
            rows = list(answers(model, images, 4, 1, 1, bad))
        assert [Path(row["image"]).stem for row in rows] == ["strip", "tower", "one"]
        [line] = bad  # for its pixels, or to prepare it: where the last of it goes differs
        assert line.startswith(f"{tmp_path}/large.png: there is not enough memory ")


def test_memory_that_preparing_lacks_is_one_line(tmp_path: Path) -> None:
    def prepare(image: ImageFile) -> None:
        raise MemoryError

    bad: list[str] = []
    assert list(answers(Model(["a"], prepare, lambda arrays: ([], []), 1), [ImageFile("x.png")], 1, 1, 1, bad)) == []
    assert bad == ["x.png: there is not enough memory to prepare it; use fewer --threads"]
