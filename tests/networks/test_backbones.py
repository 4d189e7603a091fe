"""All of timm: which classes there are, that models of them go the whole way, and what the rest is told."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch

from adaptive import create_model
from adaptive.errors import ModelError
from adaptive.networks.backbone import build_backbone
from benchmarks.backbones import MEASURED, PAGE
from benchmarks.shared import rank_pair
from benchmarks.shared.backbones_page import Results, page
from benchmarks.shared.families import FAMILIES, SMALL_GEMMA, Family, timm_classes
from benchmarks.shared.rank_pair import RankPair
from benchmarks.shared.whole_way import CLASSES, STEPS, Noise, build
from tests.helpers.device import DeviceRank
from tests.helpers.fake_cuda import as_on_cuda
from tests.helpers.ranks import fork_context

# Tokens, distilled; batch-free and several crossing tensors, weights used twice; convolutions; channels last.
QUICK = ("deit_tiny_distilled_patch16_224", "efficientvim_m1")
FURTHER = ("test_resnet", "test_mambaout", "pit_ti_224", "test_vit")
# timm's encoders return features, which no exit can take; their classifiers are in the list.
WRAPPED = [family for family in FAMILIES if not family.model.endswith("_enc")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every class on a GPU; on the CPU three, for `test_the_whole_way` and make backbones take the others there."""
    if "timm_class" in metafunc.fixturenames:
        quick = {*QUICK, "test_resnet"}
        whole = metafunc.config.getoption("--device") == "cuda"
        chosen = [family for family in WRAPPED if whole or family.model in quick]
        metafunc.parametrize("timm_class", chosen, ids=lambda family: family.model)


def differences(timm_class: Family, kind: str) -> dict[str, Any]:
    """Compare the last logits with the plain model's on a device, and take a gradient through all exits."""
    torch.manual_seed(0)
    net, device = build(timm_class), torch.device(kind)
    with torch.no_grad():
        for classifier in net.exits[-1].own_classifiers():  # some start at zero, which would be equal to anything
            for parameter in classifier.parameters():
                parameter.normal_(std=0.1)
    plain = build_backbone(timm_class.model, timm_class.size, num_classes=CLASSES, **timm_class.options).model
    plain.load_state_dict(net.backbone_state_dict())
    net.to(device).eval()
    plain.to(device).eval()
    x = Noise.of(net, 3, 0).images.to(device)
    net.collaboration = False
    with torch.no_grad():
        logits, expected = net(x), plain(x)
    net.train()
    net.collaboration = True
    sum(z.square().mean() for z in net(x)).backward()
    return {
        "devices": {z.device.type for z in logits},
        "largest": float(expected.abs().max()),
        "difference": float((logits[-1] - expected).abs().max()),
        "broken": [name for name, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()],
    }


@pytest.fixture(scope="module")
def compared(request: pytest.FixtureRequest, device: torch.device) -> Iterator[Callable[[Family], dict[str, Any]]]:
    """Gives a class's `differences`. A GPU takes eight at a time: on the CPU, building them takes most of the time."""
    if device.type == "cpu":
        yield lambda timm_class: differences(timm_class, "cpu")
        return
    own, processes = threading.local(), []

    def compare(timm_class: Family) -> dict[str, Any]:
        if not hasattr(own, "process"):
            own.process = DeviceRank(device.type)
            processes.append(own.process)
        return own.process(differences, timm_class, device.type, seconds=200)

    chosen = [getattr(item, "callspec", None) for item in request.session.items]
    classes = [call.params["timm_class"] for call in chosen if call is not None and "timm_class" in call.params]
    with ThreadPoolExecutor(8) as pool:
        results = {timm_class.model: pool.submit(compare, timm_class) for timm_class in classes}
        yield lambda timm_class: results[timm_class.model].result()
        pool.shutdown(cancel_futures=True)
    for process in processes:
        process.close()


@pytest.mark.device
def test_every_class_on_the_device_equals_the_plain_model_and_learns(
    timm_class: Family, device: torch.device, compared: Callable[[Family], dict[str, Any]]
) -> None:
    found = compared(timm_class)
    assert found["devices"] == {device.type}
    assert 0 < found["largest"] < float("inf")
    assert found["difference"] <= 1e-5 * found["largest"]
    assert found["broken"] == []


FAKED = [
    pytest.param(family, id=family.model, marks=[] if family.model == QUICK[1] else pytest.mark.full)
    for family in WRAPPED
    if family.model != "sequencer2d_s"  # its LSTM asks for cuDNN itself
]


@pytest.mark.parametrize("family", FAKED)
def test_no_class_brings_a_tensor_of_another_device(family: Family) -> None:
    """Without a GPU: tensors that have a device and a shape, and no content."""
    net = build(family)
    with as_on_cuda(net) as faked:
        x = torch.empty(3, net.channels, net.input_size, net.input_size, device="cuda")
        for mode in (True, False):
            assert {z.device.type for z in faked.train(mode)(x)} == {"cuda"}


def test_the_list_has_every_class_of_timm() -> None:
    classes = timm_classes()
    listed = {(family.file, family.cls): family.model for family in FAMILIES}
    assert len(listed) == len(FAMILIES)
    missing, gone = set(classes) - set(listed), set(listed) - set(classes)
    assert not missing, f"new in timm; add one small model of each to benchmarks/shared/families.py: {missing}"
    assert not gone, f"no longer in timm: {gone}"
    wrong = {model for key, model in listed.items() if model not in classes[key]}
    assert not wrong, f"not of the class that they stand for: {wrong}"
    assert sum(map(len, classes.values())) > 1000


@pytest.fixture(autouse=True)
def _forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pair's processes come from the server that has imported the libraries: each would take seconds to do so."""
    monkeypatch.setattr(rank_pair, "mp", SimpleNamespace(get_context=lambda _: fork_context()))


@pytest.mark.full  # its steps have tests of their own
@pytest.mark.ranks
@pytest.mark.parametrize("models", [QUICK, FURTHER], ids=["quick", "further"])
def test_the_whole_way(models: tuple[str, ...]) -> None:
    with RankPair() as pair:
        for family in [family for family in FAMILIES if family.model in models]:
            record = pair.call(family, seconds=200)
            assert record["failed"] is None, f"{family.model}: {record['failed']}: {record['reason']}"
            assert tuple(record["passed"]) == STEPS
            assert record["exits"] == 4


@pytest.mark.full  # of the same script
@pytest.mark.ranks
def test_a_class_that_cannot_be_wrapped_does_not_stop_the_others() -> None:
    encoder = next(family for family in FAMILIES if family.cls == "Gemma4VitEncoder")
    small = next(family for family in FAMILIES if family.model == "test_vit")
    with RankPair() as pair:
        record = pair.call(encoder, seconds=200)
        assert (record["failed"], record["passed"]) == ("wrap", [])
        assert "ModelError" in record["reason"]
        late = pair.call(small, seconds=0)
        assert late["failed"]
        assert "took longer" in late["reason"]
        assert pair.call(small, seconds=500)["failed"] is None


def test_the_page_is_made_from_the_results() -> None:
    results = Results.read(MEASURED)
    assert set(results.records) == {(family.file, family.cls) for family in FAMILIES}
    assert page(results) == PAGE.read_text(encoding="utf-8"), "run: python benchmarks/backbones.py --only-page"
    assert results.good_enough
    for family in FAMILIES:
        record = results.records[family.file, family.cls]
        assert (record["model"], record["size"], record["options"]) == (family.model, family.size, family.options)
        if record["failed"]:
            assert "ModelError" in record["reason"], f"{family.model} fails without a word to its user"
        else:
            assert tuple(record["passed"]) == STEPS


def test_results_are_continued(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    results = Results.read(file)
    results.add(FAMILIES[0], {"passed": ["wrap"], "failed": None, "reason": None})
    again = Results.read(file)
    assert again.records == results.records
    assert again.machine["timm"] == timm.__version__
    assert not again.good_enough
    assert not again.of_other_versions()
    again.machine["timm"] = "0.0"
    assert again.of_other_versions()


@pytest.mark.parametrize(
    ("name", "size", "options", "message"),
    [
        (
            "gemma4_vit_167m_enc",
            64,
            SMALL_GEMMA,
            r"Gemma4VitEncoder returns features .*; take gemma4_vit_167m",
        ),
        ("halonet_h1", 64, {}, r"does not run on images of 64 x 64 pixels: .*; it was made for 256 x 256"),
        ("crossvit_tiny_240", 64, {}, r"does not run on images of 64 x 64 pixels: .*; it was made for 240 x 240"),
        ("hrnet_w18_small", 64, {"features_only": True}, r"returns features and no logits; leave features_only out"),
    ],
)
def test_a_model_that_cannot_be_wrapped_says_why_and_what_to_do(
    name: str, size: int, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        create_model(name, 10, 4, input_size=size, **options)


def test_exits_stand_behind_whole_blocks_where_all_blocks_share_small_tensors() -> None:
    """Gemma's rotary embedding crosses every branching point: small company, no reason to go elsewhere."""
    names = create_model("gemma4_vit_167m", 10, 4, input_size=64, **SMALL_GEMMA).exit_names
    assert names == ["encoder.blocks.0", "encoder.blocks.2", "encoder.blocks.3"]


def test_no_exit_is_placed_where_it_saves_nothing() -> None:
    """CoaT shares weights over its stages and so has few branch points; its end costs what the last exit costs."""
    network = create_model("coat_tiny", 10, 4, input_size=64)
    costs = [cost.macs for cost in network.costs()]
    assert costs[-2] < 0.99 * costs[-1]
