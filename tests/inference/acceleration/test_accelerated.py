"""The accelerated runner against the eager one: padding, bounded preparations, copying out of static memory.

Where no GPU is, a stand-in for graph capture runs the recorded function again and writes into the same outputs; all
else is what a GPU runs.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptive import create_model
from adaptive.errors import ConfigError, MachineError, ModelError
from adaptive.inference.acceleration.accelerated import Prepare
from adaptive.inference.acceleration.compilation import Compilation
from adaptive.inference.acceleration.cuda_graphs import Captured, Function, Graphs
from adaptive.inference.outputs import Predictions
from adaptive.inference.policy import EVERYBODY, NOBODY, Policy
from adaptive.inference.policy_kinds import KINDS, Kind
from adaptive.inference.runner import DynamicClassifier
from adaptive.networks.network import AdaptiveNetwork
from tests.inference.test_runner import FAMILIES, IMAGES, assert_alike, halving, images, network, stored

SIZES = (2, 8, 16)  # 40 images come in pieces; few are padded
QUICK = ["test_resnet", "msdnet_cifar_anytime", "swin_tiny_patch4_window7_224"]
FULL = [pytest.param(family, marks=pytest.mark.full) for family in FAMILIES if family not in QUICK]


class Replays:
    """Captures a function by keeping it; a replay writes what it gives into the first call's outputs."""

    def __init__(self) -> None:
        self.captured: list[list[int]] = []
        self.replayed = 0

    def __call__(self, function: Function, inputs: Sequence[Tensor]) -> Captured:
        self.captured.append([len(tensor) for tensor in inputs])
        outputs = function(*inputs)

        def replay() -> None:
            self.replayed += 1
            for place, tensor in zip(outputs, function(*inputs), strict=True):
                if place is not tensor:  # an input that is handed on
                    place.copy_(tensor)

        return Captured(replay, outputs)


class Counter:
    """A backend of torch.compile that counts, and runs the graph as it is."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.count += 1
        return graph


def every_way() -> list[Prepare]:
    """As ACCELERATIONS names them."""
    return [Compilation(Counter()), Graphs(Replays()), Graphs(Replays(), Compilation(Counter()))]


@pytest.mark.parametrize("kind", ["confidence", "patience"])
@pytest.mark.parametrize("family", [*QUICK, *FULL])
def test_graphs_give_the_eager_runners_answers(family: str, kind: Kind) -> None:
    net = network(family)
    policy = halving(kind, stored(family))
    eager = DynamicClassifier(net, policy)
    replays = Replays()
    graphs = DynamicClassifier(net, policy, accelerate=Graphs(replays), batch_sizes=SIZES)
    for count in (IMAGES, 7, 1):
        wanted, found = eager.run(images(net)[:count]), graphs.run(images(net)[:count])
        assert found[1].tolist() == wanted[1].tolist()
        torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=1e-5)
    assert len(replays.captured) <= len(SIZES) * len(net.exits)
    assert replays.replayed > len(replays.captured), "what is captured is used again"


@cache
def tiny(collaboration: bool) -> AdaptiveNetwork:
    """An MSDNet of two scales and three exits: what crosses is several tensors, some of them computed late."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"channels": 4, "growth": 2, "growth_factors": (1, 2), "bottleneck_factors": (1, 2)}
    net = create_model(
        "msdnet", 10, exits=3, collaboration=collaboration, input_size=16, stem="cifar", base=1, step=1, **shape
    )
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for _ in range(3):
            net(images(net))
    return net.eval()


@torch.no_grad()
def halved(net: AdaptiveNetwork, kind: Kind) -> Policy:
    return halving(kind, torch.stack(net(images(net))))


# What crosses without links is less, whatever decides.
WITH_AND_WITHOUT_LINKS = [
    pytest.param(kind, links, marks=() if (kind, links) == ("gate", True) else pytest.mark.full)
    for kind, links in [*((kind, True) for kind in KINDS), ("gate", False)]
]


@pytest.mark.parametrize(("kind", "collaboration"), WITH_AND_WITHOUT_LINKS)
def test_every_policy_is_compiled_once_per_stage_and_size(kind: Kind, collaboration: bool) -> None:
    net = tiny(collaboration)
    policy = halved(net, kind)
    if kind == "gate":  # an exit where nobody leaves, which the gates behind it have seen
        policy = policy.with_thresholds([NOBODY, *policy.thresholds[1:]])
    counter, eager = Counter(), DynamicClassifier(net, policy)
    runner = DynamicClassifier(net, policy, accelerate=Compilation(counter), batch_sizes=(4, 16))
    warm = runner.warm_up()
    assert warm.prepared == counter.count == 2 * (2 if kind == "gate" else 3)
    assert warm.seconds > 0
    with torch.compiler.set_stance("fail_on_recompile"):
        for count in (IMAGES, 3):
            assert_alike(runner.predict(images(net)[:count]), eager.predict(images(net)[:count]))
        list(runner.stream(images(net).split(7), batch=5))
    assert runner.warm_up().prepared == 0
    assert counter.count == warm.prepared


def test_more_sizes_than_torch_compiles_of_one_function() -> None:
    def twice(x: Tensor) -> tuple[Tensor, ...]:
        return (2 * x,)

    counter = Counter()
    prepare = Compilation(counter)
    with torch.inference_mode():
        assert prepare(twice, [torch.ones(1).expand(3)])(torch.ones(3))[0].tolist() == [2, 2, 2]
        assert Graphs(Replays())(twice, [torch.ones(1).expand(3)])(torch.ones(3))[0].tolist() == [2, 2, 2]
        prepared = [prepare(twice, [torch.zeros(rows, 2)]) for rows in range(1, 12)]
        for rows, run in enumerate(prepared, start=1):
            assert torch.equal(run(torch.ones(2, rows).T)[0], torch.full((rows, 2), 2.0)), "in other strides"
    assert counter.count == 12


@pytest.mark.parametrize("way", [1, pytest.param(0, marks=pytest.mark.full), pytest.param(2, marks=pytest.mark.full)])
def test_a_stream_outlives_static_memory(way: int) -> None:
    net = tiny(True)
    policy = halved(net, "patience")
    prepare = every_way()[way]
    runner = DynamicClassifier(net, policy, accelerate=prepare, batch_sizes=(3, 8))
    found = []
    for part in runner.stream(images(net).split([5, 1, 20, 7, 7]), batch=8):
        found.append(part)
        runner.run(images(net)[:5].flip(-1))  # overwrites what is static between two parts
    positions = torch.cat([part.positions for part in found])
    order = positions.argsort()
    assert positions[order].tolist() == list(range(IMAGES))
    fields = (torch.cat([getattr(f.predictions, name) for f in found])[order] for name in Predictions._fields)
    assert_alike(Predictions(*fields), DynamicClassifier(net, policy).predict(images(net)))


def test_answers_are_not_overwritten_by_later_ones() -> None:
    net = network("test_resnet")
    nobody = Policy(thresholds=[NOBODY] * 3 + [EVERYBODY])
    runner = DynamicClassifier(net, nobody, accelerate=Graphs(Replays()), batch_sizes=[8])
    first, _ = runner.run(images(net)[:8])
    kept = first.clone()
    runner.run(images(net)[8:16])
    assert torch.equal(first, kept)


def test_padding_reaches_nobody() -> None:
    """What stands in the rows beyond a group's own, be it ever so large, does not change the others by a bit."""
    net = network("msdnet_cifar_anytime")
    replays = Replays()
    runner = DynamicClassifier(net, halving("gate", stored("msdnet_cifar_anytime")), accelerate=Graphs(replays))
    eager = DynamicClassifier(net, runner.policy)
    some = images(net)[:5]
    found, exits = runner.run(some)
    assert {rows[0] for rows in replays.captured} <= {1, 2, 4, 8}
    filled = torch.cat([some, torch.full_like(images(net)[:3], 1e6)])  # at the size that 5 are padded to
    beside, _ = eager.run(filled)
    alone, _ = eager.run(torch.cat([some, some[-1:].expand(3, -1, -1, -1)]))
    assert torch.equal(beside[:5], alone[:5])
    assert exits.tolist() == eager.run(some)[1].tolist()
    torch.testing.assert_close(found, alone[:5], rtol=0, atol=1e-5)


@pytest.mark.parametrize("way", [1, pytest.param(0, marks=pytest.mark.full), pytest.param(2, marks=pytest.mark.full)])
def test_bf16_channels_last_and_own_type(way: int) -> None:
    turned = create_model("test_resnet", num_classes=10, **FAMILIES["test_resnet"])
    turned.load_state_dict(network("test_resnet").state_dict())
    turned.to(memory_format=torch.channels_last)
    policy = halving("confidence", stored("test_resnet"))
    prepare = every_way()[way]
    for precision in ("bf16", "fp32"):
        wanted = DynamicClassifier(turned, policy, precision).predict(images(turned)[:16])
        runner = DynamicClassifier(turned, policy, precision, accelerate=prepare, batch_sizes=(4, 16))
        found = runner.predict(images(turned)[:16])
        same = found.exits == wanted.exits  # in bf16 another batch size rounds otherwise
        assert same.float().mean() >= (0.8 if precision == "bf16" else 1)
        torch.testing.assert_close(found.confidences[same], wanted.confidences[same], rtol=0, atol=0.02)
    double = DynamicClassifier(turned.double(), policy, accelerate=prepare, batch_sizes=[4])
    assert double.run(images(turned)[:3])[0].dtype == torch.float64


def test_mistakes_name_the_remedy() -> None:
    net = network("test_resnet")
    with pytest.raises(ConfigError, match="accelerate = 'tensorrt': use one of 'compile', "):
        DynamicClassifier(net, accelerate="tensorrt")  # type: ignore[arg-type]
    with pytest.raises(MachineError, match=r"CUDA device, the network is on 'cpu'; .* use accelerate='compile'"):
        DynamicClassifier(net, accelerate="cuda_graphs")
    for sizes in ((), (0, 4)):
        with pytest.raises(ConfigError, match=r"batch_sizes = \(.*\): give at least one size, of 1 or more"):
            DynamicClassifier(net, accelerate="compile", batch_sizes=sizes)

    def refuse(function: Function, inputs: Sequence[Tensor]) -> Captured:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    with pytest.raises(ModelError, match=r"blocks 1 to 4 at batch size 4 cannot be prepared .*; use accelerate=None"):
        DynamicClassifier(net, accelerate=Graphs(refuse), batch_sizes=[4]).warm_up()
    assert DynamicClassifier(net).warm_up() == (0, 0)


@pytest.mark.full
def test_inductors_own_kernels() -> None:
    net = tiny(True)
    policy = halved(net, "confidence")
    runner = DynamicClassifier(net, policy, accelerate="compile", batch_sizes=[16])
    assert_alike(runner.predict(images(net)), DynamicClassifier(net, policy).predict(images(net)))


ON_A_GPU = [
    *[("cuda_graphs", family, "patience", "fp32") for family in FAMILIES],
    *[("cuda_graphs", "msdnet_cifar_anytime", kind, "bf16") for kind in KINDS],
    *[("cuda_graphs", "test_resnet", "confidence", precision) for precision in ("bf16", "fp16")],
    *[(way, "test_resnet", "gate", "bf16") for way in ("compile", "compile_cuda_graphs")],
    ("compile_cuda_graphs", "test_vit", "confidence", "fp32"),
]


@pytest.mark.device
@pytest.mark.parametrize(("accelerate", "family", "kind", "precision"), ON_A_GPU)
def test_on_a_gpu(accelerate: Any, family: str, kind: Kind, precision: str, device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("CUDA graphs and Triton's kernels need a GPU: pytest --device cuda")
    net: AdaptiveNetwork = create_model(family, num_classes=10, **FAMILIES[family])
    net.load_state_dict(network(family).state_dict())
    net = net.to("cuda", memory_format=torch.channels_last)
    policy = halving(kind, stored(family))
    eager = DynamicClassifier(net, policy, precision)
    sizes = SIZES if accelerate == "cuda_graphs" else (8,)  # every one is compiled, for seconds
    runner = DynamicClassifier(net, policy, precision, accelerate=accelerate, batch_sizes=sizes)
    assert runner.warm_up().prepared == len(sizes) * len(net.exits)
    for count in (IMAGES, 7, 1):
        wanted, found = eager.run(images(net)[:count]), runner.run(images(net)[:count])
        same = found[1] == wanted[1]
        assert same.float().mean() >= (1 if precision == "fp32" else 0.8)
        tolerance = 1e-3 if precision == "fp32" else 0.03  # TF32 kernels depend on the batch size
        torch.testing.assert_close(found[0][same], wanted[0][same], rtol=0, atol=tolerance)
    parts = list(runner.stream(images(net).split(7), batch=8))
    assert sorted(torch.cat([part.positions for part in parts]).tolist()) == list(range(IMAGES))
