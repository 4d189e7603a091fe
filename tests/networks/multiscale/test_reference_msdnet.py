"""MSDNet against numbers measured on its authors' code: shapes, costs, outputs, losses, gradients, collaboration."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from adaptive.networks.multiscale.layers import ConvExit
from adaptive.networks.network import AdaptiveNetwork
from adaptive.training.losses.objective import ExitObjective
from tests.networks.reference import (
    build_msdnet,
    close,
    configurations,
    fill_parameters,
    first_and_norm,
    gradient_norm,
    images,
    reset_statistics,
    values,
)

ENTRIES = configurations("msdnet.json")
entries = pytest.mark.parametrize("entry", ENTRIES)
# ImageNet's network has another stem, which its shapes and costs show; photos in double precision take a minute.
computed = pytest.mark.parametrize("entry", configurations("msdnet.json", full=("imagenet-s4",)))


def fill_of(holder: dict[str, Any]) -> str:
    return "quad" if "quad" in holder else next(iter(holder))


@cache
def _filled(key: str, fill: str) -> AdaptiveNetwork:
    entry = next(p.values[0] for p in ENTRIES if p.id == key)
    network = build_msdnet(entry).double()
    fill_parameters([*network.blocks, *network.exits], fill)
    return network


@pytest.fixture
def filled(entry: dict[str, Any]) -> AdaptiveNetwork:
    """The entry's network with the reference's values, in double precision and training mode."""
    network = _filled(next(p.id for p in ENTRIES if p.values[0] == entry), fill_of(entry["golden"]))
    network.equilibrium = False
    network.zero_grad(set_to_none=True)
    reset_statistics(network)
    return network.train()


@entries
def test_reference_parameters(entry: dict[str, Any]) -> None:
    network = build_msdnet(entry)
    shapes = [[list(p.shape) for p in part.parameters()] for part in network.blocks]
    assert shapes == entry["param_shapes_block"]
    shapes = [[list(p.shape) for p in part.parameters()] for part in network.exits]
    assert shapes == entry["param_shapes_classifier"]
    assert sum(p.numel() for p in network.parameters()) == entry["params_total"]


@entries
def test_reference_costs(entry: dict[str, Any]) -> None:
    network = build_msdnet(entry)
    costs = network.costs(entry["image_size"])
    assert [c.macs for c in costs] == entry["FlopCounterMode_MACs_cumulative_incl_previous_classifiers"]
    assert [c.parameters for c in costs] == entry["official_params_per_exit_MSDNet_op_counter"]


@entries
def test_reference_costs_of_collaboration(entry: dict[str, Any]) -> None:
    network = build_msdnet(entry, collaboration=True)
    extra, macs = entry["imta"]["extra_head_MACs"], 0
    expected, plain = [], entry["FlopCounterMode_MACs_cumulative_incl_previous_classifiers"]
    for i, exit_ in enumerate(network.exits):
        macs += extra["classifier"][i] - exit_.classifier.weight.numel() + (extra["isc"][i - 1] if i else 0)
        expected.append(plain[i] + macs)
    assert [c.macs for c in network.costs(entry["image_size"])] == expected
    added = sum(p.numel() for e in network.exits for p in (e.link.parameters() if e.link else ()))
    assert added + sum(e.classifier.weight.numel() + e.classifier.out_features for e in network.exits) == sum(
        entry["imta"]["params_classifier"]
    ) + sum(entry["imta"]["params_isc"])
    for exit_, shapes in zip(list(network.exits)[1:], entry["imta"]["param_shapes_isc"], strict=True):
        own = [*exit_.link.linear.parameters(), *exit_.link.norm.parameters()]
        assert [list(p.shape) for p in own] == shapes


@computed
def test_reference_outputs_and_losses(entry: dict[str, Any], filled: AdaptiveNetwork) -> None:
    golden = entry["golden"][fill_of(entry["golden"])]
    x = images(entry["image_size"])
    with torch.no_grad():
        check_logits(filled.eval()(x), golden["eval_default_buffers_logits"])
        filled.train()
        state, logits = (x,), []
        for i, (block, exit_) in enumerate(zip(filled.blocks, filled.exits, strict=True)):
            state = block(*state)
            close([float(t.norm()) for t in reversed(state)], golden["block_output_l2_train"][i])
            reset_statistics(exit_)
            close(float(exit_.pooled(state[0]).norm()), golden["classifier_feature_l2_train"][i])
            logits.append(exit_(*state))
    check_logits(logits, golden["train_logits"])
    close([float(z.sum()) for z in logits], golden["logit_tensor_sum"])
    targets = torch.arange(4) % filled.num_classes
    close([float(F.cross_entropy(z, targets)) for z in logits], golden["ce_per_exit"])


@computed
@pytest.mark.parametrize(("variant", "scope"), [("ge_off", False), ("ge_last", "tap"), ("ge_all", "crossing")])
def test_reference_gradients(entry: dict[str, Any], filled: AdaptiveNetwork, variant: str, scope: str | bool) -> None:
    golden = entry["golden"][fill_of(entry["golden"])][variant]
    filled.equilibrium = scope  # type: ignore[assignment]
    logits = filled(images(entry["image_size"]))
    targets = torch.arange(4) % filled.num_classes
    loss = sum((F.cross_entropy(z, targets) for z in logits), torch.zeros((), dtype=torch.float64))
    loss.backward()
    close(loss.item(), golden["loss"])
    close([gradient_norm(block.parameters()) for block in filled.blocks], golden["block_grad_l2"])
    close([gradient_norm(exit_.parameters()) for exit_ in filled.exits], golden["classifier_grad_l2"])


@computed
@pytest.mark.parametrize("mode", ["official_train_mode", "backbone_eval"])
def test_reference_collaboration_and_distillation(entry: dict[str, Any], mode: str) -> None:
    holder = entry["imta"]["golden"]
    fill = fill_of(holder)
    x, targets = images(entry["image_size"]), torch.arange(4) % entry["full_args"]["num_classes"]
    network = build_msdnet(entry, collaboration="attached").double()
    parts = [*network.blocks, *[m for e in network.exits for m in (e.tower, e.classifier)]]
    number = fill_parameters(parts, fill)
    network.requires_grad_(False)
    set_mode(network, mode)
    with torch.no_grad():
        network.collaboration = False
        teacher = network(x)[-1]
        network.collaboration = True
        first, norm = first_and_norm(teacher)
        close(first, holder[fill][mode]["soft_target_logits_net_last_exit"]["first5"])
        close(norm, holder[fill][mode]["soft_target_logits_net_last_exit"]["l2"])
    fill_heads(network, entry, number, fill)
    if mode == "official_train_mode":
        reset_statistics(network)
        with torch.no_grad():
            check_logits(network.eval()(x), holder[fill]["eval_default_buffers_logits"])
        set_mode(network, mode)
    reset_statistics(network)
    logits = network(x)
    golden = holder[fill][mode]
    check_logits(logits, golden["logits"])
    close([F.cross_entropy(z, targets).item() for z in logits], golden["ce_per_exit"])
    if mode == "official_train_mode":  # a frozen network that is left in training mode: its statistics drift
        means = [b for n, b in network.named_buffers() if n.endswith("running_mean") and ".link." not in n]
        drift = torch.cat(means).norm().item()
        close(drift, holder[fill]["frozen_backbone_BN_running_mean_l2_after_one_train_forward"])
    for key, expected in golden.items():
        if match := re.fullmatch(r"gamma=([\d.]+),T=([\d.]+)", key):
            check_distillation(network, logits, targets, teacher, float(match[1]), float(match[2]), expected)


def check_distillation(
    network: AdaptiveNetwork,
    logits: list[Tensor],
    targets: Tensor,
    teacher: Tensor,
    gamma: float,
    temperature: float,
    expected: dict[str, Any],
) -> None:
    losses: dict[str, Tensor] = {}
    for reduction in ("mean", "batchmean"):
        objective = ExitObjective(len(logits), gamma=gamma, temperature=temperature, reduction=reduction)
        losses[reduction] = objective(logits, targets, teacher).total
    close(losses["mean"].item(), expected["kdloss"])
    close(losses["batchmean"].item(), expected["kdloss_if_batchmean_instead_of_mean"])
    network.zero_grad(set_to_none=True)
    losses["mean"].backward(retain_graph=True)
    heads = [
        [e.classifier.weight, e.classifier.bias] + ([e.link.projection.weight] if e.link else [])
        for e in exits(network)
    ]
    close([gradient_norm(h) for h in heads], expected["classifier_grad_l2"])
    links = [[*e.link.linear.parameters(), *e.link.norm.parameters()] for e in exits(network)[1:]]
    close([gradient_norm(link) for link in links], expected["isc_grad_l2"])


def exits(network: AdaptiveNetwork) -> list[ConvExit]:
    return list(network.exits)  # type: ignore[arg-type]


def check_logits(logits: list[Tensor], expected: list[dict[str, Any]]) -> None:
    for z, wanted in zip(logits, expected, strict=True):
        first, norm = first_and_norm(z.detach())
        close(first, wanted["first5"])
        close(norm, wanted["l2"])


def set_mode(network: AdaptiveNetwork, mode: str) -> None:
    network.train()
    if mode == "backbone_eval":
        for block, exit_ in zip(network.blocks, exits(network), strict=True):
            block.eval()
            exit_.tower.eval()


@torch.no_grad()
def fill_heads(network: AdaptiveNetwork, entry: dict[str, Any], number: int, fill: str) -> None:
    """Heads 1..k, then the links; a head on a concatenation is one linear map per part of it here."""
    for exit_, (weight, bias) in zip(exits(network), entry["imta"]["param_shapes_classifier"], strict=True):
        whole = values(weight, number, "lin_w", fill)
        exit_.classifier.weight.copy_(whole[:, : exit_.classifier.in_features])
        if exit_.link is not None:
            exit_.link.projection.weight.copy_(whole[:, exit_.classifier.in_features :])
            exit_.link.projection.requires_grad_(True)
        exit_.classifier.bias.copy_(values(bias, number + 1, "lin_b", fill))
        exit_.classifier.requires_grad_(True)
        number += 2
    for exit_ in exits(network)[1:]:
        number = fill_parameters([exit_.link.linear, exit_.link.norm], fill, number)
        exit_.link.requires_grad_(True)
