import pytest
import torch
import torch.nn.functional as F

from adaptive.metrics import ExitMeter, exit_records


def test_counts_are_exact_and_padding_is_left_out() -> None:
    generator = torch.Generator().manual_seed(1)
    meter = ExitMeter(2, "cpu")
    all_logits, all_labels = [], []
    for size in (7, 4, 1):
        outputs = [torch.randn(size + 2, 9, generator=generator) for _ in range(2)]
        labels = torch.randint(0, 9, (size + 2,), generator=generator)
        labels[size:] = -1
        meter.add(outputs, labels)
        all_logits.append(torch.stack(outputs)[:, :size])
        all_labels.append(labels[:size])
    outputs, labels = torch.cat(all_logits, 1), torch.cat(all_labels)
    values = meter.reduce(lambda t: t)
    assert values["samples"] == [12, 12]
    for i in range(2):
        order = outputs[i].argsort(dim=-1, descending=True)
        top1 = (order[:, 0] == labels).double().mean().item() * 100
        top5 = (order[:, :5] == labels[:, None]).any(-1).double().mean().item() * 100
        agree = (order[:, 0] == outputs[1].argmax(-1)).double().mean().item() * 100
        assert values["top1"][i] == top1
        assert values["top5"][i] == top5
        assert values["agreement"][i] == agree
        assert abs(values["loss"][i] - F.cross_entropy(outputs[i], labels).item()) < 1e-6


def test_soft_labels_count_their_largest_share() -> None:
    meter = ExitMeter(1, "cpu")
    logits = torch.eye(3)
    meter.add([logits], torch.tensor([[0.9, 0.1, 0], [0.6, 0.4, 0], [0, 0.1, 0.9]]), torch.tensor([2.0]))
    values = meter.reduce(lambda t: t)
    assert values["top1"] == pytest.approx([200 / 3])
    assert values["loss"] == [2.0]


def test_fewer_classes_than_five() -> None:
    meter = ExitMeter(1, "cpu")
    meter.add([torch.eye(3)], torch.tensor([1, 1, 1]))
    assert meter.reduce(lambda t: t)["top5"] == [100.0]


def test_record_keys_name_exits_from_one() -> None:
    meter = ExitMeter(2, "cpu")
    meter.add([torch.eye(3), torch.eye(3)], torch.tensor([0, 1, 2]))
    records = exit_records(meter.reduce(lambda t: t), "val")
    assert records["val/exit_1/top1"] == records["val/exit_2/agreement"] == 100.0
    assert "val/exit_0/top1" not in records
