"""The report's numbers against computations of the tests' own, and its page against hostile and extreme input."""

import html.parser
import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from adaptive.errors import AdaptiveError, MachineError
from adaptive.inference.calibration.reliability import reliability
from adaptive.inference.in_sample import InSample
from adaptive.reporting.accuracy_curves import against_macs, against_milliseconds
from adaptive.reporting.class_statistics import class_shares, confused_pairs, confusion
from adaptive.reporting.exit_figures import leavers, stem
from adaptive.reporting.image_wall import choose as choose_images
from adaptive.reporting.image_wall import square, thumbnail
from adaptive.reporting.page import report_data
from adaptive.reporting.published import REFERENCES, choose, recognise
from tests.inference.measuring.test_time_model import model
from tests.reporting.reports import make_evaluation, make_outputs, make_run, make_tiles, write

HOSTILE = [
    "<script>alert(1)</script>",
    'a"b & c',
    "$x_1$",
    "日本語",
    "</script><b>",
    'id="x"',
    "_dot",
    "é" * 60,
    "{{ 7 * 7 }}",
    "-->",
]


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data):
        self.text += data

    @property
    def data(self):
        found = re.search(r'<script type="application/json" id="report-data">(.*?)</script>', self.source, re.DOTALL)
        assert found
        return json.loads(found[1])


def leave(outputs, thresholds, temperatures):
    """Where each image leaves, and with what: image by image."""
    found = []
    for n in range(len(outputs.labels)):
        for i, (threshold, temperature) in enumerate(zip(thresholds, temperatures, strict=True)):
            p = torch.softmax(outputs.logits[i, n] / temperature, dim=-1)
            if i == len(thresholds) - 1 or p.max() >= threshold:
                found.append((i + 1, int(p.argmax()), float(p.max())))
                break
    return found


def test_numbers_in_the_page_equal_an_independent_computation(tmp_path):
    run = make_run()
    outputs = make_outputs(3, 400, 4)
    expected = leave(outputs, run.policy.thresholds, run.policy.temperatures)
    labels = outputs.labels.tolist()
    right = [answer == label for (_, answer, _), label in zip(expected, labels, strict=True)]
    exits = [number for number, _, _ in expected]
    page = Page(write([run], tmp_path).page)
    shown = page.data["runs"][0]
    assert shown["policy"]["top1"] == pytest.approx(100 * sum(right) / 400)
    assert shown["policy"]["macs"] == pytest.approx(sum(1e6 * number for number in exits) / 400)
    assert shown["policy"]["shares"] == pytest.approx([exits.count(n) / 400 for n in (1, 2, 3)])
    for n in (1, 2, 3):
        here = [r for r, number in zip(right, exits, strict=True) if number == n]
        assert shown["policy"]["top1_of_those_that_leave"][n - 1] == pytest.approx(100 * sum(here) / len(here))
        assert f"{len(here):,} ({len(here) / 4:.1f} %)" in page.text
        full = (outputs.logits[n - 1].argmax(-1) == outputs.labels).float().mean().item() * 100
        assert shown["exits"][n - 1]["top1"] == pytest.approx(full)
        assert f"{full:.2f}" in page.text
    assert f"{100 * sum(right) / 400:.1f} %" in page.text
    assert "a machine & <b>more</b> (cpu), batch 64" in page.text
    first = [n for n, label in zip(exits, labels, strict=True) if label == 0]
    assert shown["policy"]["classes"][0] == {
        "class": "class 0",
        "shares": pytest.approx([first.count(n) / len(first) for n in (1, 2, 3)]),
    }


def test_confusion_and_pairs_count_those_that_leave():
    run = make_run()
    total = sum(confusion(run, n) for n in (1, 2, 3))
    expected = np.zeros((4, 4), dtype=int)
    for label, answer in zip(run.labels, run.given, strict=True):
        expected[label, answer] += 1
    assert (total == expected).all()
    counts = confusion(run, 3)
    pairs = confused_pairs(run, 3, most=100)
    assert sum(count for _, _, count in pairs) == counts.sum() - np.trace(counts)
    assert [count for *_, count in pairs] == sorted((count for *_, count in pairs), reverse=True)
    assert np.allclose(class_shares(run).sum(axis=1), 1)


def test_calibration_error_by_hand():
    found = reliability(np.array([0.95, 0.97, 0.1, 0.1]), np.array([True, False, False, False]), bins=2)
    assert found.confidence == pytest.approx([0.1, 0.96])
    assert found.accuracy == pytest.approx([0, 0.5])
    assert found.ece == pytest.approx(100 * (0.5 * 0.1 + 0.5 * 0.46))
    run = make_run(temperatures=False)
    plain = torch.softmax(make_outputs(3, 400, 4).logits[0], dim=-1).amax(-1).numpy()
    assert np.allclose(run.confidences[0], plain, atol=1e-6)
    assert run.calibrated is None


def test_wall_goes_from_the_surest_to_the_least_sure_of_each_exit():
    run = make_run()
    chosen = choose_images(run, 5)
    for n in (1, 2, 3):
        own = [i for i in chosen if run.exits[i] == n]
        sure = run.leaving[own]
        everybody = run.leaving[run.exits == n]
        assert len(own) == 5
        assert (np.diff(sure) <= 0).all()
        assert (sure[0], sure[-1]) == (everybody.max(), everybody.min())
    assert [run.exits[i] for i in chosen] == sorted(run.exits[i] for i in chosen)


def test_names_are_escaped_and_shown(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = Page(write([make_run(names=HOSTILE, name="<i>run</i> & co", dataset="<u>")], tmp_path).page)
    assert page.tags.count("script") == 2
    assert not {"i", "u"} & set(page.tags)
    assert page.tags.count("b") == 3  # the headline's
    assert "<i>run</i> & co" in page.text
    assert page.data["runs"][0]["policy"]["classes"][3]["class"] == "日本語"
    assert "49" not in [word.strip() for word in page.text.split("}}")]
    assert any("<script>alert(1)</script>" in value for _, name, value in page.attributes if name == "alt")


def test_page_needs_nothing_else(tmp_path):
    page = Page(write([make_run(name=f"run {i}", exits=2) for i in range(3)], tmp_path, published="imagenet").page)
    for tag, name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "action", "srcset", "poster", "data"):
            assert value.startswith(("data:", "#")), (tag, name, value)
    assert not re.findall(r"https?:|@import|url\((?!#)", page.source)
    assert not {"iframe", "object", "base", "form"} & set(page.tags)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for reference in re.findall(r"url\(#([^)]+)\)", page.source):
        assert reference in ids
    assert all(value for tag, name, value in page.attributes if tag == "img" and name == "alt")
    assert page.tags.count("caption") >= 3


@pytest.mark.parametrize(
    ("exits", "classes", "settings"),
    [
        (1, 2, {}),
        (1, 2, {"policy": False, "evaluation": False}),
        pytest.param(10, 1000, {"images": 3000}, marks=pytest.mark.full),
        (3, 15, {"temperatures": False}),
        (2, 10, {"policy": False}),
        (2, 3, {"evaluation": False}),
        (4, 30, {"images": 12}),
    ],
)
def test_every_shape_of_run(tmp_path, exits, classes, settings):
    run = make_run(exits=exits, classes=classes, **settings)
    written = write([run], tmp_path)
    page = Page(written.page)
    assert ("adaptive calibrate runs/digits --budget 0.5" in page.text) == (run.policy is None and exits > 1)
    right = 100 * float(np.mean(run.right if run.policy else run.answers[-1] == run.labels))
    low, high = (float(number) for number in re.search(r"([\d.]+) to ([\d.]+)\)", page.text).groups())
    assert 0 <= low < right < high <= 100, "the first interval is that of the card"
    lacking = not run.timing or (not run.budgeted and exits > 1)  # of one exit neither can be had
    assert ("adaptive evaluate runs/digits" in page.text) == lacking
    assert ("accuracy_ms" in written.figures) == (run.timing is not None)
    assert ("shares" in written.figures) == (run.policy is not None)
    assert {"accuracy_macs", "calibration_exit1"} <= set(written.figures)
    for path in [*written.figures.values(), *written.walls.values()]:
        with Image.open(path) as picture:
            assert min(picture.size) > 200
    assert written.page.stat().st_size < 3e6


def test_runs_of_different_kinds_stand_side_by_side(tmp_path):
    runs = [
        make_run(exits=2),
        make_run(exits=3, name="a/b", policy=False),
        make_run(classes=40, name="a b", evaluation=False),
    ]
    written = write(runs, tmp_path)
    assert len(Page(written.page).data["runs"]) == 3
    assert len({path.name for path in written.figures.values()}) == len(written.figures)
    assert stem(runs[1], runs, "classes") == "2_a-b_classes"


def test_milliseconds_of_a_policy_are_the_shares_of_the_measured_ones():
    run = make_run()
    assert run.mean_milliseconds([0.5, 0.25, 0.25]) == pytest.approx(0.5 * 0.5 + 0.25 * 1.0 + 0.25 * 1.5)


def test_milliseconds_of_a_policy_come_from_the_model_of_time():
    of = model()
    evaluation = make_evaluation(3)
    evaluation["milliseconds"] |= {"batch": 16, "exits": of.exits, "model": of.model_dump()}
    shares = [0.9, 0.08, 0.02]
    run = make_run(evaluation=evaluation)
    assert run.mean_milliseconds(shares) == pytest.approx(of.mean(shares))
    assert run.mean_milliseconds(shares) > 1.15 * np.dot(shares, of.exits)  # what was promised before
    drawing = against_milliseconds([run])
    assert drawing is not None
    assert "model of time" in drawing.caption
    old = against_milliseconds([make_run()])
    assert old is not None
    assert "Policies of digits are computed from full-batch times, and too cheap" in old.caption


def test_large_outputs_are_taken_in_pieces():
    run = make_run(images=5000, classes=50)
    outputs = make_outputs(3, 5000, 50)
    assert (run.answers == outputs.logits.argmax(-1).numpy()).all()
    assert run.top5[0] > run.top1[0]


def test_what_does_not_fit_is_refused_in_one_line(tmp_path):
    with pytest.raises(AdaptiveError, match="2 costs for 3"):
        make_run(macs=[1, 2])
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="--out"):
        write([make_run()], tmp_path / "file")


def test_published_numbers_are_shown_where_they_belong(tmp_path):
    assert recognise(100, "/data/CIFAR-100") == "cifar100"
    assert recognise(1000, "x", "runs/ImageNet_1k") == "imagenet"
    assert recognise(10, "data/cifar100") is None
    assert recognise(200, "tiny-imagenet") is None
    assert recognise(100, "imagenet") is None
    assert choose("auto", ["cifar100", "cifar100"]) == "cifar100"
    assert choose("auto", ["cifar100", None]) is None
    assert choose("none", ["cifar100"]) is None
    assert choose("imagenet", [None]) == "imagenet"
    with pytest.raises(AdaptiveError, match="--published cifar10: "):
        choose("cifar10", [])
    page = Page(write([make_run(exits=1)], tmp_path, published="imagenet").page)
    assert "about 0.2 points" in page.text
    assert "Dynamic Perceiver" in page.text
    for references in REFERENCES.values():
        for r in references:
            assert len(r.macs) == len(r.top1)
            assert list(r.macs) == sorted(r.macs)


def test_pictures_keep_their_look():
    digit = Image.fromarray(np.kron(np.eye(2, dtype=np.uint8) * 255, np.ones((4, 4), dtype=np.uint8)))
    assert set(np.asarray(square(digit, 112)).ravel().tolist()) == {0, 255}
    assert square(Image.new("RGB", (300, 200)), 112).size == (112, 112)
    noise = np.random.default_rng(0).integers(0, 256, (400, 300, 3), dtype=np.uint8)
    assert thumbnail(Image.fromarray(noise)).startswith("data:image/jpeg;base64,")
    assert thumbnail(digit).startswith("data:image/png;base64,")
    tile = next(tile for tile in make_tiles(make_run(), 20) if not tile.right)
    assert "wrong, it is" in tile.description


def test_a_page_of_images_that_chose_says_so_in_its_headlines(tmp_path):
    headline = InSample(checkpoint=True, policy=True).headline
    own = make_run(exits=2, images=60, split="val", in_sample=InSample(checkpoint=True, policy=True))
    written = write([own], tmp_path)
    page = written.page.read_text()
    assert f"<h2>digits <mark>{headline}</mark></h2>" in page
    assert f"every exit on 60 images of val ({headline})" in page
    assert "measure on images that chose nothing: split test" in page
    for drawing in (against_macs([own], None), against_milliseconds([own]), leavers([own])):
        assert drawing.caption.startswith(f"I{headline[1:]}. ")
    [run] = report_data([own], None)["runs"]
    assert (run["in_sample"], run["chose"]) == (True, ["checkpoint", "policy"])


def test_other_images_have_no_mark():
    other = make_run(exits=2, images=60)
    caption = against_macs([other], None).caption
    assert caption.startswith("Accuracy against")
    assert "chosen on other images" in caption
    assert report_data([other], None)["runs"][0]["in_sample"] is False
