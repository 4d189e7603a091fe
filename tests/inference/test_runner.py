"""The dynamic runner against a loop over single images and against stored outputs, on several families."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaptive import create_model
from adaptive.errors import PolicyError
from adaptive.inference.outputs import Predictions, scores, simulate
from adaptive.inference.policy import EVERYBODY, NOBODY, Policy
from adaptive.inference.policy_kinds import KINDS, Kind
from adaptive.inference.runner import DynamicClassifier
from adaptive.networks.network import AdaptiveNetwork
from tests.inference.test_policy import gates

FAMILIES: dict[str, dict[str, Any]] = {
    "test_resnet": {"exits": 4, "input_size": 64},
    "test_convnext": {"exits": 4, "input_size": 64},
    "test_vit": {"exits": 4},
    "swin_tiny_patch4_window7_224": {"exits": 4, "img_size": 56, "embed_dim": 24, "depths": (1, 1, 2, 1)},
    "msdnet_cifar_anytime": {"exits": 4},
    "ranet": {"input_size": 32, "stem": "cifar"},
}
IMAGES = 40


CPU = torch.device("cpu")


@cache
def network(
    family: str, collaboration: bool = True, device: torch.device = CPU, dtype: torch.dtype = torch.float32
) -> AdaptiveNetwork:
    torch.manual_seed(0)
    found = create_model(family, num_classes=10, collaboration=collaboration, **FAMILIES[family])
    with torch.no_grad():
        for parameter in found.parameters():  # links and scales that start at zero would hide what they do
            parameter.add_(0.02 * torch.randn_like(parameter))
        for _ in range(3):  # statistics of its own
            found(images(found))
    return found.eval().to(device, dtype)


def images(of: AdaptiveNetwork, count: int = IMAGES) -> Tensor:
    side = of.input_size
    made = torch.randn(count, of.channels, side, side, generator=torch.Generator().manual_seed(1))
    return made.to(next(of.parameters()))


@cache
def stored(
    family: str, collaboration: bool = True, device: torch.device = CPU, dtype: torch.dtype = torch.float32
) -> Tensor:
    net = network(family, collaboration, device, dtype)
    with torch.no_grad():
        return torch.stack(net(images(net)))


def halving(kind: Kind, logits: Tensor) -> Policy:
    """A policy by which about a third of those who are still in leave at every exit, in the gaps between scores."""
    exits = len(logits)
    policy = Policy(
        kind=kind,
        thresholds=[NOBODY] * (exits - 1) + [EVERYBODY],
        temperatures=[1.0 + 0.1 * i for i in range(exits)],
        gates=(gates() * 3)[: exits - 1] if kind == "gate" else [],
    )
    found = scores(policy, torch.stack([policy.probabilities(i, z) for i, z in enumerate(logits)]))
    here, thresholds = torch.ones(found.shape[1], dtype=torch.bool, device=found.device), []
    for row in found[:-1]:
        left = row[here].sort().values
        gaps = left.diff()[len(left) // 2 : 4 * len(left) // 5]
        place = int(gaps.argmax()) + len(left) // 2
        thresholds.append(float((left[place] + left[place + 1]) / 2))
        here &= row < thresholds[-1]
    return policy.with_thresholds([*thresholds, EVERYBODY])


def expected(policy: Policy, logits: Tensor) -> Predictions:
    return simulate(policy, torch.stack([policy.probabilities(i, z) for i, z in enumerate(logits)]))


@torch.no_grad()
def one_by_one(net: AdaptiveNetwork, policy: Policy, batch: Tensor) -> list[tuple[int, float, int]]:
    """Label, confidence and exit, by the plainest loop there is."""
    found = []
    for image in batch:
        state, previous, memory = net.start(image[None]), None, None
        for i in range(len(net.blocks)):
            state = net.run_block(i, state)
            previous = net.run_exit(i, state, previous)
            decision = policy.decide(i, policy.probabilities(i, previous), memory)
            memory = decision.memory
            if bool(decision.leaves) or i == len(net.blocks) - 1:
                found.append((int(decision.labels), float(decision.confidences), i + 1))
                break
    return found


def assert_alike(found: Predictions, wanted: Predictions, tolerance: float = 1e-5) -> None:
    assert found.exits.tolist() == wanted.exits.tolist()
    assert found.labels.tolist() == wanted.labels.tolist()
    torch.testing.assert_close(found.confidences, wanted.confidences, rtol=0, atol=tolerance)


@pytest.mark.device
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_runner_loop_and_simulation_agree(family: str, kind: Kind, device: torch.device) -> None:
    # A GPU has other kernels for every batch size. In fp32 they differ by as much as scores from a threshold.
    dtype = torch.float32 if device.type == "cpu" else torch.float64
    net, logits = network(family, device=device, dtype=dtype), stored(family, device=device, dtype=dtype)
    policy = halving(kind, logits)
    wanted = expected(policy, logits)
    assert sum(count > 0 for count in wanted.counts(len(net.exits))) >= 3, "the images have to part"
    found = DynamicClassifier(net, policy).predict(images(net))
    assert {part.device for part in found} == {logits.device}
    assert_alike(found, wanted)
    labels, confidences, exits = zip(*one_by_one(net, policy, images(net)), strict=True)
    alone = (
        torch.tensor(labels, device=device),
        torch.tensor(confidences, dtype=dtype, device=device),
        torch.tensor(exits, device=device),
    )
    assert_alike(Predictions(*alone), wanted, tolerance=2e-5)


@pytest.mark.device
@pytest.mark.parametrize("family", FAMILIES)
def test_runner_in_single_precision_on_the_device(family: str, device: torch.device) -> None:
    """Rounding may move an image whose score is all but a threshold; everybody else leaves where they should."""
    net, logits = network(family, device=device), stored(family, device=device)
    policy = halving("confidence", logits)
    wanted, found = expected(policy, logits), DynamicClassifier(net, policy).predict(images(net))
    same = found.exits == wanted.exits
    assert float(same.float().mean()) >= 0.9
    assert found.labels[same].tolist() == wanted.labels[same].tolist()
    torch.testing.assert_close(found.confidences[same], wanted.confidences[same], rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", ["confidence", "patience", "gate"])
@pytest.mark.parametrize("family", [*list(FAMILIES)[:-1], pytest.param("ranet", marks=pytest.mark.full)])
def test_without_links_exits_that_nobody_needs_are_not_asked(family: str, kind: Kind) -> None:
    net, logits = network(family, False), stored(family, False)
    policy = halving(kind, logits)
    closed = policy.with_thresholds([NOBODY, *policy.thresholds[1:]])
    counts = count_calls(
        net, lambda: assert_alike(DynamicClassifier(net, closed).predict(images(net)), expected(closed, logits))
    )
    assert counts["exit", 0] == ([IMAGES] if kind != "confidence" else [])
    assert counts["block", 0] == [IMAGES]


def count_calls(net: AdaptiveNetwork, call: Callable[[], object]) -> dict[tuple[str, int], list[int]]:
    """The batch sizes that every block and exit was given while ``call`` ran."""
    counts: dict[tuple[str, int], list[int]] = {}
    hooks = []
    original = net.run_block

    def run_block(i: int, state: Any, lazy: bool = False) -> Any:
        result = original(i, state, lazy=lazy)
        tensor, where = next((t, d) for t, d in zip(result, result.batch_dims, strict=True) if d is not None)
        counts["block", i].append(tensor.shape[where[0]] // where[1])
        return result

    for i, exit_ in enumerate(net.exits):
        counts["block", i], counts["exit", i] = [], []

        def note(module: nn.Module, inputs: Any, output: Tensor, i: int = i) -> None:
            counts["exit", i].append(len(output))

        hooks.append(exit_.register_forward_hook(note))
    net.run_block = run_block  # type: ignore[method-assign]
    try:
        call()
    finally:
        del net.run_block
        for hook in hooks:
            hook.remove()
    return counts


@pytest.mark.parametrize("family", ["test_resnet", "test_vit", "msdnet_cifar_anytime"])
def test_every_block_runs_for_those_still_in_and_never_for_nobody(family: str) -> None:
    net, logits = network(family), stored(family)
    policy = halving("confidence", logits)
    left = expected(policy, logits).counts(len(net.exits))
    counts = count_calls(net, lambda: DynamicClassifier(net, policy).predict(images(net)))
    still_in = [IMAGES - sum(left[:i]) for i in range(len(left))]
    assert [counts["block", i] for i in range(len(left))] == [[n] if n else [] for n in still_in]
    everybody = policy.with_thresholds([EVERYBODY] * len(left))
    counts = count_calls(net, lambda: DynamicClassifier(net, everybody).predict(images(net)))
    assert counts["block", 0] == counts["exit", 0] == [IMAGES]
    assert not any(counts[part, i] for part in ("block", "exit") for i in range(1, len(left)))


@pytest.mark.parametrize("collaboration", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_that_never_fires_is_the_plain_forward_pass(kind: Kind, collaboration: bool) -> None:
    net = network("test_resnet", collaboration)
    policy = halving(kind, stored("test_resnet", collaboration)).with_thresholds([NOBODY] * 3 + [EVERYBODY])
    decided = []
    runner = DynamicClassifier(net, policy)
    probabilities, exits = runner.run(images(net), lambda part, i, n: decided.append(i) if part == "decision" else None)
    assert decided == [3]
    assert exits.unique().tolist() == [4]
    with torch.no_grad():
        torch.testing.assert_close(probabilities, policy.probabilities(3, net(images(net))[-1]), rtol=0, atol=1e-6)
    counts = count_calls(net, lambda: runner.predict(images(net)))
    assert [counts["exit", i] for i in range(3)] == ([[IMAGES]] * 3 if collaboration else [[]] * 3)


@pytest.mark.parametrize("batch", [1, 3, 16, 64])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_stream_gives_every_image_its_own_answer_once(family: str, batch: int) -> None:
    net, logits = network(family), stored(family)
    policy = halving("patience", logits)
    parts = images(net).split([5, 1, 20, 7, 7])
    found = list(DynamicClassifier(net, policy).stream(parts, batch=batch))
    positions = torch.cat([part.positions for part in found])
    assert sorted(positions.tolist()) == list(range(IMAGES))
    order = positions.argsort()
    joined = Predictions(
        *(torch.cat([getattr(f.predictions, name) for f in found])[order] for name in Predictions._fields)
    )
    assert_alike(joined, expected(policy, logits))


def test_a_stream_keeps_late_blocks_full() -> None:
    net = network("test_resnet")
    policy = halving("confidence", stored("test_resnet"))
    runner = DynamicClassifier(net, policy)
    many = [images(net, 8) for _ in range(40)]
    counts = count_calls(net, lambda: list(runner.stream(many, batch=8)))
    for i in range(4):
        sizes = counts["block", i]
        assert sum(size < 8 for size in sizes) <= 2, f"block {i + 1} ran with {sizes}"
    singles = count_calls(net, lambda: [runner.predict(part) for part in many])
    assert len(counts["block", 3]) < len(singles["block", 3])


def test_a_stream_holds_a_bounded_number_of_images() -> None:
    net = network("test_resnet")
    policy = halving("confidence", stored("test_resnet"))
    arrived = 0

    def arrive() -> Any:
        nonlocal arrived
        for _ in range(50):
            arrived += 8
            yield images(net, 8)

    gone = 0
    for part in DynamicClassifier(net, policy).stream(arrive(), batch=8):
        gone += len(part.positions)
        assert arrived - gone <= 2 * 8 * 4
    assert gone == arrived == 400


def test_empty_batches_and_queues() -> None:
    net = network("test_resnet")
    runner = DynamicClassifier(net, halving("confidence", stored("test_resnet")))
    found = runner.predict(images(net)[:0])
    assert [len(part) for part in found] == [0, 0, 0]
    assert list(runner.stream([], batch=4)) == []
    assert list(runner.stream([images(net)[:0]], batch=4)) == []
    with pytest.raises(ValueError, match="batch = 0"):
        next(runner.stream([], batch=0))


@pytest.mark.parametrize("family", ["test_resnet", "test_vit"])
def test_bf16_by_autocast_and_by_conversion(family: str) -> None:
    net, logits = network(family), stored(family)
    policy = halving("confidence", logits)
    wanted = expected(policy, logits)
    casted = DynamicClassifier(net, policy, precision="bf16").predict(images(net))
    converted = create_model(family, num_classes=10, **FAMILIES[family])
    converted.load_state_dict(net.state_dict())
    own_type = DynamicClassifier(converted.bfloat16(), policy).predict(images(net))
    for found in (casted, own_type):
        assert found.confidences.dtype == torch.float32
        assert (found.exits == wanted.exits).float().mean() >= 0.7, "rounding moves a few"
        same = found.exits == wanted.exits
        assert (found.confidences - wanted.confidences)[same].abs().max() < 0.05
        assert not torch.equal(found.confidences, wanted.confidences), "nothing was rounded"


def test_channels_last_stays_so_on_the_way() -> None:
    net, logits = network("test_resnet"), stored("test_resnet")
    policy = halving("confidence", logits)
    turned = create_model("test_resnet", num_classes=10, **FAMILIES["test_resnet"])
    turned.load_state_dict(net.state_dict())
    turned.to(memory_format=torch.channels_last)
    layouts = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        layouts.append(inputs[0].is_contiguous(memory_format=torch.channels_last))

    for block in turned.blocks:
        block.register_forward_pre_hook(note)
    assert_alike(DynamicClassifier(turned, policy).predict(images(net)), expected(policy, logits), tolerance=1e-4)
    assert layouts == [True] * 4


def test_double_precision_networks_run() -> None:
    net = create_model("test_resnet", num_classes=10, **FAMILIES["test_resnet"]).double().eval()
    found = DynamicClassifier(net, Policy(thresholds=[0.105, 0.108, 0.11, EVERYBODY])).predict(images(net))
    assert found.confidences.dtype == torch.float64


def test_a_policy_for_another_number_of_exits_is_refused() -> None:
    with pytest.raises(PolicyError, match="for 2 exits, the network has 4"):
        DynamicClassifier(network("test_resnet"), Policy(thresholds=[0.5, EVERYBODY]))
