import math

import pytest
import torch
import torch.nn.functional as F

from adaptive.errors import ConfigError
from adaptive.training.losses.distillation import distillation_divergence, next_exit
from adaptive.training.losses.objective import ExitObjective


def logits(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def kl_by_hand(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> float:
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        ps = [math.exp(v / temperature) for v in s]
        pt = [math.exp(v / temperature) for v in t]
        total += sum(
            b / sum(pt) * math.log((b / sum(pt)) / (a / sum(ps))) for a, b in zip(ps, pt, strict=True)
        )  # fmt: skip
    return total / len(student)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_divergence_follows_the_formula(temperature: float) -> None:
    student, teacher = logits(6, 5), logits(6, 5) * 2 - 1
    expected = temperature**2 * kl_by_hand(student, teacher, temperature)
    assert distillation_divergence(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-12)
    per_class = distillation_divergence(student, teacher, temperature, "mean").item()
    assert per_class == pytest.approx(expected / 5, rel=1e-12)


def test_last_exit_learns_from_labels_alone() -> None:
    outputs = [logits(4, 3).requires_grad_(), (logits(4, 3) + 1).requires_grad_()]
    labels = torch.tensor([0, 1, 2, 1])
    losses = ExitObjective(2, gamma=0.3)(outputs, labels, outputs[-1].detach())
    first = 0.7 * F.cross_entropy(outputs[0], labels) + 0.3 * kl_by_hand(outputs[0], outputs[1], 1.0)
    expected = first + F.cross_entropy(outputs[1], labels)
    assert losses.total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert losses.divergence[1] == 0
    losses.total.backward()
    plain = outputs[1].detach().clone().requires_grad_()
    F.cross_entropy(plain, labels).backward()
    torch.testing.assert_close(outputs[1].grad, plain.grad, rtol=1e-6, atol=1e-9)


def test_no_gradient_reaches_the_teacher() -> None:
    teacher = logits(4, 3).requires_grad_()
    student = (logits(4, 3) + 0.5).requires_grad_()
    distillation_divergence(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


def test_an_external_teacher_teaches_the_last_exit_too() -> None:
    outputs = [logits(4, 3), logits(4, 3) + 1]
    labels = torch.tensor([0, 1, 2, 1])
    losses = ExitObjective(2, gamma=0.5, teach_last=True)(outputs, labels, logits(4, 3) * 2)
    assert (losses.divergence > 0).all()


def test_exit_weights_scale_each_exit() -> None:
    outputs, labels = [logits(4, 3), logits(4, 3) * 2], torch.tensor([0, 1, 2, 1])
    entropies = [F.cross_entropy(z, labels).item() for z in outputs]
    total = ExitObjective(2, weights=[0.5, 2.0])(outputs, labels).total.item()
    assert total == pytest.approx(0.5 * entropies[0] + 2 * entropies[1], rel=1e-6)
    with pytest.raises(ConfigError, match="3 values for 2 exits"):
        ExitObjective(2, weights=[1, 1, 1])


def test_soft_labels_go_through_the_same_loss() -> None:
    output, soft = logits(4, 3), torch.softmax(logits(4, 3), -1)
    expected = -(soft * torch.log_softmax(output, -1)).sum(-1).mean()
    assert ExitObjective(1)([output], soft).total.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("soft", [False, True])
def test_each_exit_is_taught_by_its_successor_and_the_last_by_labels(soft: bool) -> None:
    outputs = [(logits(4, 3) * scale + scale).requires_grad_() for scale in (1, 2, -1)]
    labels = torch.softmax(logits(4, 3), -1) if soft else torch.tensor([0, 1, 2, 1])
    losses = ExitObjective(3, gamma=0.4, temperature=2.0)(outputs, labels, next_exit(torch.empty(0), outputs))
    entropies = [F.cross_entropy(z, labels) for z in outputs]
    divergences = [4 * kl_by_hand(outputs[i], outputs[i + 1], 2.0) for i in (0, 1)]
    expected = sum(0.6 * entropies[i] + 0.4 * divergences[i] for i in (0, 1)) + entropies[2]
    assert losses.total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert losses.divergence.tolist() == pytest.approx([*divergences, 0.0], rel=1e-6)
    losses.weighted[0].backward()  # the first exit's share reaches neither of the exits behind it
    assert outputs[0].grad is not None
    assert outputs[1].grad is None
    assert outputs[2].grad is None


def test_shares_add_up_and_a_step_may_bring_its_own_weights() -> None:
    outputs, labels = [logits(4, 3), logits(4, 3) * 2], torch.tensor([0, 1, 2, 1])
    objective = ExitObjective(2, weights=[0.5, 2.0])
    for weights, wanted in ((None, [0.5, 2.0]), ([0.0, 3.0], [0.0, 3.0])):
        losses = objective(outputs, labels, weights=weights)
        shares = [w * F.cross_entropy(z, labels).item() for w, z in zip(wanted, outputs, strict=True)]
        assert [share.item() for share in losses.weighted] == pytest.approx(shares, rel=1e-6)
        assert losses.total.item() == pytest.approx(sum(shares), rel=1e-6)
