from __future__ import annotations

import torch

from adaptive.metrics import ExitMeter
from adaptive.tracking.record_keys import exit_key, exit_records, per_exit


def test_record_keys_name_exits_from_one() -> None:
    meter = ExitMeter(2, "cpu")
    meter.add([torch.eye(3), torch.eye(3)], torch.tensor([0, 1, 2]))
    records = exit_records(meter.reduce(lambda t: t), "val")
    assert records["val/exit_1/top1"] == records["val/exit_2/agreement"] == 100.0
    assert "val/exit_0/top1" not in records


def test_values_are_read_back_in_the_order_of_the_exits() -> None:
    record = {exit_key("train", i, "top1"): 40.0 + i for i in (10, 1, 2)}
    record |= {"train/exit_1/top1_more": 0.0, "train/exit_1/top5": 0.0, "train/top1": 0.0}
    assert list(per_exit(record, "train", "top1").items()) == [(1, 41.0), (2, 42.0), (10, 50.0)]
    assert per_exit(record, "val", "top1") == {}
    assert per_exit(exit_records({"top1": [1.0, 2.0]}, "val_ema"), "val_ema", "top1") == {1: 1.0, 2: 2.0}
