import json
from pathlib import Path

import pytest
import timm
from ruamel.yaml import YAML

import adaptive
import adaptive.config.loading
from adaptive.networks.cutting.cut import branch_points
from tests.helpers.commands import Forks


def test_alone_it_names_families_and_own_networks(forks: Forks) -> None:
    ended = forks.run(["models", "--json"])
    assert (ended.code, ended.err) == (0, "")
    found = json.loads(ended.out)
    assert found["families"]["vision_transformer"] == len(timm.list_models(module="vision_transformer"))
    assert {"msdnet_cifar_anytime", "ranet_imagenet"} <= set(found["own"])
    assert not set(found["own"]) & set(found["families"])
    ended = forks.run(["models"])
    assert (ended.code, ended.err) == (0, "")
    assert f"vision_transformer ({found['families']['vision_transformer']})" in ended.out
    assert "msdnet_cifar_anytime" in ended.out


def test_a_pattern_lists_models_and_says_how_many_more(forks: Forks) -> None:
    names = timm.list_models("resnet1*")
    ended = forks.run(["models", "resnet1*", "--limit", "3"])
    assert (ended.code, ended.err) == (0, "")
    for name in names[:3]:
        assert f" {name} " in ended.out
    assert names[3] not in ended.out
    assert f"{len(names) - 3} more" in ended.out
    assert f"--limit {len(names)}" in ended.out


def test_a_list_has_parameters_and_sizes(forks: Forks) -> None:
    ended = forks.run(["models", "resnet18*", "--limit", "2", "--json"])
    assert (ended.code, ended.err) == (0, "")
    entries = json.loads(ended.out)["models"]
    assert [entry["name"] for entry in entries] == timm.list_models("resnet18*")
    wanted = {"name": "resnet18", "parameters": 11_689_512, "input_size": 224, "pretrained": True, "note": ""}
    assert entries[0] == wanted
    counted = [entry["parameters"] is not None for entry in entries]
    assert counted == [i < 2 for i in range(len(entries))]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("starnet", timm.list_models(module="starnet")),  # a family
        ("resnet50.a1*", ["resnet50.a1_in1k", "resnet50.a1h_in1k"]),  # tags of pretrained weights
        ("ranet_cifar*", ["ranet_cifar", "ranet_cifar_even"]),
        ("resnet[13]4", ["resnet34"]),
    ],
)
def test_what_a_pattern_stands_for(pattern: str, expected: list[str]) -> None:
    from adaptive.networks.catalogue import matching

    assert matching(pattern) == expected


def test_a_model_without_a_classifier_says_what_to_take_instead(forks: Forks) -> None:
    ended = forks.run(["models", "qwen3_vit_88m_*"])
    assert (ended.code, ended.err) == (0, "")
    assert "no logits; take qwen3_vit_88m" in ended.out


def test_a_name_shows_where_exits_can_branch_off(forks: Forks) -> None:
    ended = forks.run(["models", "test_resnet", "--image-size", "64", "--json"])
    assert (ended.code, ended.err) == (0, "")
    found = json.loads(ended.out)
    assert found["image_size"] == 64
    assert [(one["name"], one["share"], tuple(one["shape"])) for one in found["places"]] == branch_points(
        "test_resnet", 64
    )
    whole = adaptive.create_model("test_resnet", exits=1, input_size=64).costs()[0].macs
    head = 1000 * 160
    assert found["places"][-1]["macs"] / found["places"][-1]["share"] == pytest.approx(whole, abs=head)
    ended = forks.run(["models", "test_resnet", "--image-size", "64"])
    assert ended.code == 0
    for one in found["places"]:
        assert f" {one['name']} " in ended.out
    assert "adaptive models test_resnet --exits" in ended.out


@pytest.mark.parametrize(
    ("words", "exits"),
    [(["--exits", "3"], 3), (["--exits", "layer1,layer2.0"], ["layer1", "layer2.0"]), (["--exits", "1"], 1)],
)
def test_exits_are_built_and_the_section_builds_them_again(
    words: list[str], exits: int | list[str], tmp_path: Path, forks: Forks
) -> None:
    ended = forks.run(["models", "test_resnet", *words, "--image-size", "64", "--classes", "10", "--json"])
    assert (ended.code, ended.err) == (0, "")
    found = json.loads(ended.out)
    network = adaptive.create_model("test_resnet", 10, exits, input_size=64)
    assert [(one["macs"], one["parameters"]) for one in found["exits"]] == [
        (cost.macs, cost.parameters) for cost in network.costs()
    ]
    sums = [one["block_parameters"] + one["exit_parameters"] for one in found["exits"]]
    assert sum(sums) == sum(p.numel() for p in network.parameters()) == found["exits"][-1]["parameters"]
    file = tmp_path / "run.yaml"
    file.write_text(found["section"] + "data: {path: anywhere, image_size: 64}\n")
    model = adaptive.config.loading.load_config(file).model
    again = adaptive.create_model(model.backbone, model.num_classes or 0, model.exits, input_size=64)
    assert again.exit_names == network.exit_names
    shown = forks.run(["models", "test_resnet", *words, "--image-size", "64", "--classes", "10"])
    assert shown.code == 0
    assert shown.out.endswith(found["section"])


def test_networks_with_exits_of_their_own(forks: Forks) -> None:
    ended = forks.run(["models", "msdnet_cifar_budgeted", "--json"])
    assert (ended.code, ended.err) == (0, "")
    found = json.loads(ended.out)
    assert found["image_size"] == 32
    assert len(found["exits"]) == 5
    section = YAML(typ="safe").load(found["section"])
    assert section == {"model": {"backbone": "msdnet_cifar_budgeted", "exits": 5}}


@pytest.mark.parametrize(
    ("words", "code", "parts"),
    [
        (["resnt50"], 1, ["'resnt50'", "did you mean resnet50"]),
        (["zzz*"], 1, ["'zzz*'", "adaptive models lists"]),
        (["resnet*", "--exits", "3"], 2, ["--exits", "one model"]),
        (["--classes", "3"], 2, ["--classes", "one model"]),
        (["resnet18", "--limit", "3"], 2, ["--limit", "lists"]),
        (["resnet18", "--image-size", "0"], 2, ["--image-size 0", "1 or more"]),
        (["test_resnet", "--exits", "layr1"], 1, ["'layr1'", "did you mean layer1"]),
        (["test_resnet", "--exits", "0"], 1, ["exits = 0"]),
        (["test_resnet", "--exits", "99"], 1, ["exits = 99", "at most"]),
        (["test_resnet", "--exits", ","], 2, ["--exits ','", "names nothing"]),
        (["vit_tiny_patch16_224", "--image-size", "7"], 1, ["7 x 7 pixels", "made for 224"]),
    ],
)
def test_wrong_input_is_one_line(words: list[str], code: int, parts: list[str], forks: Forks) -> None:
    ended = forks.run(["models", *words])
    assert ended.code == code
    assert ended.out == ""
    assert len(ended.err.splitlines()) == 1
    for part in ["adaptive models: error: ", *parts]:
        assert part in ended.err
