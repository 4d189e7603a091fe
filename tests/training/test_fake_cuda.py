"""A training step and a prediction with tensors that claim to be on a GPU: nothing is left on another device.

Backward passes are left out, for they ask for CUDA itself; `pytest -m device --device cuda` takes them.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from adaptive.config.sections import DataConfig
from adaptive.data.images.normalize import Normalize
from adaptive.data.images.transforms import Mixer
from adaptive.inference.outputs import simulate
from adaptive.inference.policy import EVERYBODY, Policy
from adaptive.inference.policy_kinds import KINDS, Kind
from adaptive.metrics import ExitMeter
from adaptive.networks.create import create_model
from adaptive.networks.network import AdaptiveNetwork
from adaptive.training.checkpoints.snapshot import averaged_statistics
from adaptive.training.ema import ExponentialAverage
from adaptive.training.losses.distillation import NetworkTeacher, Teacher, last_exit, next_exit
from adaptive.training.losses.exit_weights import StepWeights
from adaptive.training.losses.gradient_surgery import lay_out, project_conflicts, projection_orders, whole_gradients
from adaptive.training.losses.objective import ExitObjective
from adaptive.training.task import ClassificationTask
from tests.helpers.fake_cuda import as_on_cuda
from tests.inference.test_policy import gates

CLASSES, EXITS, BATCH = 5, 3, 8


@pytest.fixture(scope="module")
def network() -> AdaptiveNetwork:
    return create_model("test_resnet", num_classes=CLASSES, exits=EXITS, input_size=32)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    pixels = torch.empty(BATCH, 3, 32, 32, dtype=torch.uint8, device="cuda")
    normalize = Normalize([0.5] * 3, [0.2] * 3, torch.device("cuda"), torch.channels_last)
    return normalize(pixels), torch.empty(BATCH, dtype=torch.long, device="cuda")


@pytest.mark.parametrize("teacher", ["last", "next", "ema"])
@pytest.mark.parametrize("mixing", [{}, {"mixup": 0.2, "cutmix": 1.0, "label_smoothing": 0.1}], ids=["plain", "mixed"])
def test_forward_pass_loss_and_average(network: AdaptiveNetwork, mixing: dict[str, float], teacher: str) -> None:
    average = ExponentialAverage(network, 0.9)
    with as_on_cuda(nn.ModuleList([network, average.network])) as (net, average.network):
        net.train()
        taught: Teacher = {"last": last_exit, "next": next_exit}.get(teacher) or NetworkTeacher(
            average.network, torch.autocast("cpu", enabled=False)
        )
        task = ClassificationTask(
            net, ExitObjective(EXITS, gamma=0.1), taught,
            Mixer(DataConfig.model_validate({"path": "x", **mixing}), CLASSES, BATCH),
            ExitMeter(EXITS, "cuda"), 0, StepWeights((1.0,) * EXITS),
        )  # fmt: skip
        for micro in range(2):
            loss = task.loss(*batch(), (0, 0, micro))
            assert (loss.device.type, loss.shape, loss.requires_grad) == ("cuda", (), True)
        average.update(net.parameters(), net.buffers())
        task.reset()
        assert {value.device.type for value in averaged_statistics(net).values()} == {"cuda"}


def test_gradient_surgery(network: AdaptiveNetwork) -> None:
    with as_on_cuda(network) as net:
        parameters = list(net.parameters())
        gradients = [[torch.empty_like(p) for p in parameters] for _ in range(EXITS)]
        regions = lay_out(gradients)
        project_conflicts(regions.flat, projection_orders(EXITS, 0, 0))
        assert {g.device.type for g in whole_gradients(regions, parameters)} == {"cuda"}


@pytest.mark.parametrize("kind", KINDS)
def test_policies_decide_where_the_probabilities_are(network: AdaptiveNetwork, kind: Kind) -> None:
    policy = Policy(
        kind=kind, thresholds=[0.5, 0.5, EVERYBODY], temperatures=[1.0, 1.1, 1.2],
        gates=gates()[: EXITS - 1] if kind == "gate" else [],
    )  # fmt: skip
    with as_on_cuda(network.eval()) as net, torch.no_grad():
        state, previous, memory, probabilities = net.start(batch()[0]), None, None, []
        for i in range(EXITS):
            state = net.run_block(i, state)
            previous = net.run_exit(i, state, previous)
            probabilities.append(policy.probabilities(i, previous))
            decision = policy.decide(i, probabilities[-1], memory)
            memory = decision.memory
            assert {part.device.type for part in decision if part is not None} == {"cuda"}
            state = state.select(torch.arange(BATCH, device="cuda"), BATCH)
        assert {part.device.type for part in simulate(policy, torch.stack(probabilities))} == {"cuda"}
