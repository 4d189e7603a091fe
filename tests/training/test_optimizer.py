import math

import pytest
import timm
import torch

from adaptive.config.sections import OptimizerConfig, ScheduleConfig
from adaptive.errors import ConfigError
from adaptive.networks.create import create_model
from adaptive.training.optimizer import (
    build_optimizer,
    build_scheduler,
    check_optimizer,
    is_scale_invariant,
    parameter_groups,
)


@pytest.fixture(scope="module")
def network():
    return create_model("test_vit", num_classes=5, exits=2, img_size=32)


def rates(network, optimizer) -> dict[str, float]:
    by_id = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    return {name: by_id[id(p)] for name, p in network.named_parameters()}


def test_layer_decay_gives_every_parameter_its_rate(network) -> None:
    config = OptimizerConfig(name="adamw", layer_decay=0.5)
    optimizer = build_optimizer(network, config, lr=0.2)
    build_scheduler(optimizer, ScheduleConfig(name="constant"), 0.2, epochs=1, steps_per_epoch=4)
    plain = timm.create_model("test_vit", num_classes=5, img_size=32)
    groups = timm.optim.param_groups_layer_decay(plain, layer_decay=0.5)
    expected = {id(p): group["lr_scale"] * 0.2 for group in groups for p in group["params"]}
    expected = {name: expected[id(p)] for name, p in plain.named_parameters()}
    assert len(set(expected.values())) > 3
    for name, rate in rates(network, optimizer).items():
        _, part, rest = name.split(".", 2)
        own_end = name.startswith("exits.1.head.")
        plain_name = rest.removeprefix("head.") if own_end else rest
        added = name.startswith("exits") and not own_end
        assert rate == pytest.approx(0.2 if added else expected[plain_name], rel=1e-9), (name, part)


@pytest.mark.parametrize(
    ("backbone", "size", "options"),
    [
        ("poolformer_s12", 64, {}),
        ("pit_ti_224", 224, {"depth": [1, 1, 1]}),
        ("test_vit", 32, {"img_size": 32}),
    ],
)
def test_layers_are_timms_where_a_backbone_names_none(backbone: str, size: int, options: dict) -> None:
    plain = timm.create_model(backbone, num_classes=5, **options)
    groups = timm.optim.param_groups_layer_decay(plain, layer_decay=0.5)
    expected = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    scales = {name: expected[id(p)] for name, p in plain.named_parameters()}
    assert len(set(scales.values())) > 1
    network = create_model(backbone, num_classes=5, exits=2, input_size=size, **options)
    found = parameter_groups(network, OptimizerConfig(layer_decay=0.5))
    ours = {network.names.plain.get(name): group["lr_scale"] for group in found for name in group["names"]}
    assert {name: scale for name, scale in ours.items() if name is not None} == pytest.approx(scales)
    assert ours.get(None, 1.0) == 1.0


def test_groups_are_merged_never_empty_and_spare_norms(network) -> None:
    with_decay = parameter_groups(network, OptimizerConfig(weight_decay=0.1))
    assert len(with_decay) == 1
    groups = parameter_groups(network, OptimizerConfig(weight_decay=0.1, decay_norm_and_bias=False))
    assert sorted(group["weight_decay"] for group in groups) == [0.0, 0.1]
    for group in groups:
        assert group["params"]
        for name, p in zip(group["names"], group["params"], strict=True):
            spared = p.ndim == 1 or name in network.no_weight_decay()
            assert spared == (group["weight_decay"] == 0), name
    assert sum(len(g["params"]) for g in groups) == len(list(network.parameters()))


@pytest.mark.parametrize(
    ("backbone", "options"),
    [
        ("test_vit", {"img_size": 32}),
        ("vit_tiny_patch16_224", {"img_size": 64}),
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 2, "embed_dim": 24, "depths": (1, 1, 1, 1)}),
        ("test_convnext", {}),
        ("xcit_nano_12_p16_224", {"depth": 1, "cls_attn_layers": 1, "embed_dim": 32}),  # it names a pattern
    ],
)
def test_the_backbone_is_spared_decay_where_timm_spares_it(backbone: str, options: dict) -> None:
    plain = timm.create_model(backbone, num_classes=5, **options)
    named = plain.no_weight_decay() if hasattr(plain, "no_weight_decay") else set()
    groups = timm.optim.param_groups_weight_decay(plain, 0.1, no_weight_decay_list=named)
    spared = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    expected = {name for name, p in plain.named_parameters() if id(p) in spared}
    if backbone != "test_convnext":
        assert any(p.ndim > 1 for name, p in plain.named_parameters() if name in expected)

    network = create_model(backbone, num_classes=5, exits=2, input_size=options.get("img_size", 64), **options)
    ours = parameter_groups(network, OptimizerConfig(weight_decay=0.1, decay_norm_and_bias=False))
    found = {group["weight_decay"]: {network.names.plain.get(name) for name in group["names"]} for group in ours}
    assert found[0.0] - {None} == expected
    assert found[0.1] - {None} == {name for name, _ in plain.named_parameters()} - expected


def test_sgd_is_without_nesterov_unless_asked(network) -> None:
    assert build_optimizer(network, OptimizerConfig(name="sgd"), 0.1).param_groups[0]["nesterov"] is False
    fast = OptimizerConfig(name="sgd", nesterov=True)
    assert build_optimizer(network, fast, 0.1).param_groups[0]["nesterov"] is True


def test_options_reach_the_optimizer(network) -> None:
    config = OptimizerConfig(name="adamw", options={"betas": [0.8, 0.9]})
    assert list(build_optimizer(network, config, 0.1).param_groups[0]["betas"]) == [0.8, 0.9]
    with pytest.raises(ConfigError, match=r"optimizer\.options"):
        build_optimizer(network, OptimizerConfig(name="adamw", options={"bettas": 1}), 0.1)


def schedule_values(schedule: ScheduleConfig, epochs: int, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build_scheduler(optimizer, schedule, 1.0, epochs, steps)
    values = []
    for update in range(epochs * steps):
        scheduler.step_update(update)
        values.append(optimizer.param_groups[0]["lr"])
    return values


def test_multistep_drops_where_the_paper_drops() -> None:
    values = schedule_values(ScheduleConfig(name="multistep", milestones=[0.5, 0.75], decay_rate=0.1), 4, 10)
    assert values == pytest.approx([1.0] * 20 + [0.1] * 10 + [0.01] * 10)


def test_cosine_with_fractional_warmup_is_per_step() -> None:
    values = schedule_values(ScheduleConfig(name="cosine", warmup_epochs=0.5, warmup_lr=0.0), 2, 10)
    assert values[:5] == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8])
    assert values[10] == pytest.approx(0.5 * (1 + math.cos(math.pi * 10 / 20)))
    with pytest.raises(ConfigError, match="warmup_epochs"):
        schedule_values(ScheduleConfig(warmup_epochs=3), 2, 10)


def test_zero_refuses_optimizers_that_need_whole_tensors() -> None:
    check_optimizer(OptimizerConfig(name="lamb"), zero_stage=0)
    check_optimizer(OptimizerConfig(name="adamw"), zero_stage=3)
    with pytest.raises(ConfigError, match=r"lamb.*train\.zero_stage=0"):
        check_optimizer(OptimizerConfig(name="lamb"), zero_stage=1)
    with pytest.raises(ConfigError, match=r"adamwh.*adamw"):
        check_optimizer(OptimizerConfig(name="adamwh"), zero_stage=0)


def test_elementwise_optimizers_really_are() -> None:
    """Splitting a tensor in two must not change an update, or ZeRO would."""
    from adaptive.training.optimizer import ELEMENTWISE

    for name in sorted(ELEMENTWISE):
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(12, generator=generator)
        whole = torch.nn.Parameter(start.clone())
        parts = [torch.nn.Parameter(start[:5].clone()), torch.nn.Parameter(start[5:].clone())]
        first = timm.optim.create_optimizer_v2([whole], opt=name, lr=0.01, weight_decay=0.1)
        second = timm.optim.create_optimizer_v2(parts, opt=name, lr=0.01, weight_decay=0.1)
        for _ in range(4):
            gradient = torch.randn(12, generator=generator)
            whole.grad, parts[0].grad, parts[1].grad = gradient, gradient[:5].clone(), gradient[5:].clone()
            first.step()
            second.step()
        torch.testing.assert_close(whole.data, torch.cat([p.data for p in parts]), rtol=1e-5, atol=1e-7, msg=name)


def test_scale_invariance_is_told_rightly() -> None:
    for name in ("sgd", "momentum", "adamw", "lamb", "lion", "adam"):
        steps = []
        for scale in (1.0, 0.25):
            parameter = torch.nn.Parameter(torch.ones(4, 3))
            optimizer = timm.optim.create_optimizer_v2([parameter], opt=name, lr=0.1)
            parameter.grad = torch.linspace(0.1, 1.0, 12).view(4, 3) * scale
            optimizer.step()
            steps.append(1 - parameter.data)
        same = torch.allclose(steps[0], steps[1], rtol=1e-3)
        assert same == is_scale_invariant(name), name
