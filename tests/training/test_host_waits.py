"""A step reads nothing back from the device: on a GPU the host would stand still until all queued work is done."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.ranks import run_ranks
from tests.training.setups import config

pytestmark = pytest.mark.ranks

METHOD = {"equilibrium": True, "collaboration": True}
PLAIN = {"equilibrium": False, "collaboration": False}


READS = {
    torch.ops.aten._local_scalar_dense,
    torch.ops.aten.nonzero,
    torch.ops.aten.is_nonzero,
    torch.ops.aten.equal,
    torch.ops.aten.masked_select,
    torch.ops.aten._unique2,
}


class Reads(TorchDispatchMode):
    """Counts the operations that hand a tensor's values to the host, or whose result's shape depends on them."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function._overloadpacket in READS
        return function(*args, **(kwargs or {}))


def reads_per_step(data, folder, stage, model, gamma):
    """Train; returns how often each step read from the device, from its batch's arrival to its end."""
    from adaptive.distributed.ranks import find_ranks
    from adaptive.training import run
    from adaptive.training.trainer import Callback

    reads, found = Reads(), []

    class Watch(Callback):
        def on_batch(self, trainer, batch):
            self.before = reads.count

        def on_step(self, trainer):
            found.append(reads.count - self.before)

    tree = config(
        data, folder, model={"backbone": "test_resnet", "exits": 3, "options": {}} | model,
        train={"global_batch": 32, "zero_stage": stage, "max_steps": 6, "epochs": 1, "clip_norm": 1.0},
        distillation={"gamma": gamma}, tracking={"every_steps": 100},
    )  # fmt: skip
    run.Validation = lambda _: Callback()
    run.Checkpointing = lambda _: Watch()
    prepared = run.prepare(tree, find_ranks())
    with reads:
        run.train(prepared)
    return found


@pytest.mark.parametrize("stage", [0, *(pytest.param(stage, marks=pytest.mark.full) for stage in (1, 2, 3))])
def test_the_method_reads_nothing_from_the_device(digits, tmp_path, stage):
    counts = {}
    for name, model, gamma in (("plain", PLAIN, 0.0), ("method", METHOD, 0.1)):
        [counts[name]] = run_ranks(reads_per_step, 1, digits, tmp_path / name, stage, model, gamma)
    assert len(counts["plain"]) == 6
    settled = slice(2, None)  # ZeRO 3 notes in its second step which parameters come when
    assert counts["method"][settled] == counts["plain"][settled]
    assert len(set(counts["plain"][settled])) == 1
    if stage == 0:  # one number: whether the gradient is finite, and the step may be taken
        assert counts["plain"][settled] == [1] * 4
