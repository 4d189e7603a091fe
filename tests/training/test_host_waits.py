"""A step reads nothing back from the device: on a GPU the host would stand still until all queued work is done."""

import warnings
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.device import DeviceRank
from tests.training.engines import BATCH, CLASSES, SIDE, SmallRun, global_batch
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
    """Train; returns how often each step read from the device, from its batch's arrival to its end; how often DeepSpeed
    waited for all of it; and on a GPU how often CUDA says that the host waited (those reads, and blocking copies).
    """
    from deepspeed.accelerator import get_accelerator

    from adaptive.distributed.ranks import find_ranks
    from adaptive.training import run
    from adaptive.training.trainer import Callback

    reads, found, waited, synchronised = Reads(), [], [], []
    accelerator = get_accelerator()
    synchronize = accelerator.synchronize

    def counted(*arguments):
        synchronised[-1] += 1
        return synchronize(*arguments)

    class Watch(Callback):
        def on_batch(self, trainer, batch):
            self.before, self.waits = reads.count, len(said)
            synchronised.append(0)
            if trainer.device.type == "cuda":
                torch.cuda.set_sync_debug_mode("warn")

        def on_step(self, trainer):
            if trainer.device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
            found.append(reads.count - self.before)
            waited.append(sum("synchronizing" in str(w.message) for w in said[self.waits :]))

    tree = config(
        data, folder, model={"backbone": "test_resnet", "exits": 3, "options": {}} | model,
        train={"global_batch": 32, "zero_stage": stage, "max_steps": 6, "epochs": 1, "clip_norm": 1.0},
        distillation={"gamma": gamma}, tracking={"every_steps": 100},
    )  # fmt: skip
    prepared = run.prepare(tree, find_ranks())
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as said, reads:
        warnings.simplefilter("always")
        patch.setattr(run, "Validation", lambda _: Callback())
        patch.setattr(run, "Checkpointing", lambda _: Watch())
        patch.setattr(accelerator, "synchronize", counted)
        synchronised.append(0)
        run.train(prepared)
    return found, synchronised[1:], waited


@pytest.mark.device
@pytest.mark.parametrize("stage", [0, *(pytest.param(stage, marks=pytest.mark.full) for stage in (1, 2, 3))])
def test_the_method_reads_nothing_from_the_device(digits, tmp_path, stage, device_rank: DeviceRank):
    counts, synchronised, waits = {}, {}, {}
    for name, model, gamma in (("plain", PLAIN, 0.0), ("method", METHOD, 0.1)):
        found = device_rank(reads_per_step, digits, tmp_path / name, stage, model, gamma)
        counts[name], synchronised[name], waits[name] = found
    assert len(counts["plain"]) == 6
    settled = slice(2, None)  # ZeRO 3 notes in its second step which parameters come when
    assert counts["method"][settled] == counts["plain"][settled]
    assert waits["method"][settled] == waits["plain"][settled]
    assert synchronised["method"] == synchronised["plain"]
    if stage == 0:
        assert synchronised["plain"] == [0] * 6
    assert len(set(counts["plain"][settled])) == 1
    if stage == 0:  # one number: whether the gradient is finite, and the step may be taken
        assert counts["plain"][settled] == [1] * 4


def reads_of_a_loss(mixing):
    """The task's forward pass and loss on batches that are on the device; a GPU refuses whatever the host waits for."""
    from adaptive.networks.create import create_model

    torch.manual_seed(0)
    network = create_model("test_resnet", num_classes=CLASSES, exits=3, input_size=SIDE)
    tree = config(
        "unused", model={"backbone": "test_resnet", "exits": 3} | METHOD, distillation={"gamma": 0.1}, data=mixing,
        train={"global_batch": BATCH, "precision": "bf16"},
    )  # fmt: skip
    running = SmallRun(tree, network)
    device = running.engine.device
    counts = []
    for step in range(3):
        images, labels = (tensor.to(device) for tensor in global_batch(step))
        # The first step starts libraries, which may wait.
        with Reads() as reads, refused_waits(device) if step else nullcontext():
            loss = running.task.loss(images, labels, (step, 0, 0))
        counts.append(reads.count)
        running.engine.backward(loss)
        assert running.engine.step()
        assert loss.isfinite()
    running.engine.destroy()
    return counts


@contextmanager
def refused_waits(device):
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.device
def test_forward_pass_and_loss_wait_for_nothing(device_rank: DeviceRank):
    mixing = {"mixup": 0.2, "cutmix": 1.0, "label_smoothing": 0.1}
    assert device_rank(reads_of_a_loss, mixing) == [0, 0, 0]
