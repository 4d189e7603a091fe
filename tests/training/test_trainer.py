"""Whole runs on one rank: resuming, phases, teachers, skipped steps, and options that must do something."""

from __future__ import annotations

import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptive.data.shards.index import load_index
from tests.helpers.device import DeviceRank, deterministically
from tests.helpers.ranks import run_ranks
from tests.training.setups import VIT, config, train_here

# Enough randomness that a resumed run goes astray if any of it is not a function of the position.
AUGMENTED = {
    "crop": "pad",
    "crop_padding": 2,
    "auto_augment": "rand-m5-n2",
    "erasing": 0.3,
    "mixup": 0.2,
    "label_smoothing": 0.1,
}


def final(folder: Path | str, name: str = "weights") -> dict[str, torch.Tensor]:
    from adaptive.training.checkpoints.store import CheckpointStore

    return CheckpointStore(Path(folder) / "checkpoints").all()[-1].tensors(name)


def records(folder: Path | str) -> list[dict]:
    from adaptive.tracking.record import read

    return read(Path(folder) / "metrics.jsonl")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def _disturbed(data: str, folder: str) -> dict[str, bool]:
    """Two phases with a frozen teacher, EMA, augmentation and dropout, stopped in either phase and continued."""
    sections = {
        "model": {"options": {"drop_path_rate": 0.1, "drop_rate": 0.1}},
        "data": AUGMENTED,
        "train": {"ema_decay": 0.9, "global_batch": 64},
        "distillation": {"gamma": 0.5, "teacher": "frozen"},
        "phases": [{"name": "one", "epochs": 1, "distillation": False}, {"name": "two", "epochs": 1, "learn": "exits"}],
        "tracking": {"every_steps": 3},
    }

    def run(name: str, **train) -> Path:
        tree = config(data, Path(folder) / name, **{**sections, "train": {**sections["train"], **train}})
        return Path(train_here(tree))

    whole = run("whole")
    for stop in (7, 27, 60):  # in phase one, in phase two (20 steps each), and to the end
        broken = run("broken", max_steps=stop)
    result = {name: equal(final(whole, name), final(broken, name)) for name in ("weights", "ema", "optimizer")}
    timed = ("images_per_second", "data_wait_share", "memory_gib")

    def lasting(folder: Path) -> list[dict]:
        """Training records made in one piece; the two restarts cut the counting of steps 9 and 27 short."""
        kept = [r for r in records(folder) if "train/lr" in r and r["step"] not in (9, 30)]
        return [{k: v for k, v in r.items() if not k.endswith(timed)} for r in kept]

    result["records"] = lasting(whole) == lasting(broken)
    return result


@pytest.mark.device
@pytest.mark.ranks
def test_a_run_stopped_in_either_phase_ends_bit_for_bit_the_same(
    digits: Path, tmp_path: Path, device_rank: DeviceRank
) -> None:
    result = device_rank(deterministically, _disturbed, str(digits), str(tmp_path))
    assert result == {"weights": True, "ema": True, "optimizer": True, "records": True}


def _phases(data: str, folder: str) -> dict[str, dict[str, torch.Tensor]]:
    """Backbone alone, then its early exits alone; returns the weights at the start and after each phase."""
    from adaptive.data.shards.index import load_index
    from adaptive.networks.from_config import build_network

    tree = config(
        data,
        Path(folder) / "run",
        train={"global_batch": 128},
        phases=[{"epochs": 1, "learn": "backbone"}, {"epochs": 1, "learn": "early_exits"}, {"epochs": 1}],
        checkpoint={"keep": 9},
    )
    train_here(tree)
    from adaptive.training.checkpoints.store import CheckpointStore

    start = build_network(tree, len(load_index(data).classes)).state_dict()
    from adaptive.runs import load

    steps = [c.step for c in CheckpointStore(Path(folder) / "run" / "checkpoints").all()]
    links = [load(Path(folder) / "run", str(step)).network.collaboration for step in steps]
    assert links == [False, True, True], links
    assert load(Path(folder) / "run").checkpoint.step == steps[-1]
    ends = [c.tensors("weights") for c in CheckpointStore(Path(folder) / "run" / "checkpoints").all()]
    return {"start": dict(start), **{f"after {i}": weights for i, weights in enumerate(ends, start=1)}}


@pytest.mark.ranks
def test_frozen_parts_stay_bit_for_bit_and_the_rest_learns(digits: Path, tmp_path: Path) -> None:
    weights = run_ranks(_phases, 1, str(digits), str(tmp_path))[0]

    def changed(before: str, after: str) -> set[str]:
        return {k for k in weights[before] if not torch.equal(weights[before][k], weights[after][k])}

    first = changed("start", "after 1")
    assert first
    assert all(name.startswith(("blocks.", "exits.2.head.")) for name in first)
    assert {name for name in weights["start"] if name.startswith("blocks.") and "running" in name} <= first
    second = changed("after 1", "after 2")
    assert {name.split(".")[1] for name in second} == {"0", "1"}
    assert all(name.startswith("exits.") for name in second)
    assert any("link" in name for name in second)
    third = changed("after 2", "after 3")
    assert {name.rsplit(".", 1)[0] for name in third} == {name.rsplit(".", 1)[0] for name in weights["start"]}


def _teachers(data: str, folder: str) -> dict[str, list[float]]:
    """First recorded divergences per exit, by teacher."""
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(3)
    external = timm.create_model("test_vit", num_classes=10, img_size=32)
    torch.nn.init.normal_(external.head.weight)  # timm starts it near zero, which would teach a uniform guess
    save_file(external.state_dict(), Path(folder) / "teacher.safetensors")
    # A frozen teacher must have learned before: all begin with a backbone that did.
    save_file(timm.create_model("test_resnet", num_classes=10).state_dict(), Path(folder) / "backbone.safetensors")
    cases: dict[str, dict] = {
        "off": {"gamma": 0.0},
        "last": {"gamma": 0.5},
        "hot": {"gamma": 0.5, "temperature": 4.0},
        "frozen": {"gamma": 0.5, "teacher": "frozen"},
        "ema": {"gamma": 0.5, "teacher": "ema"},
        "released": {"gamma": 0.5, "reduction": "mean"},
        "model": {
            "gamma": 0.5,
            "teacher": "model",
            "teacher_model": "test_vit",
            "teacher_weights": str(Path(folder) / "teacher.safetensors"),
            "teacher_options": {"img_size": 32},
        },
    }
    found = {}
    for name, distillation in cases.items():
        run = config(
            data, Path(folder) / name, distillation=distillation, train={"max_steps": 6, "ema_decay": 0.9},
            model={"weights": str(Path(folder) / "backbone.safetensors")},
            tracking={"every_steps": 6, "gradient_norms": False},
        )  # fmt: skip
        train_here(run)
        record = next(r for r in records(Path(folder) / name) if "train/loss" in r)
        found[name] = [record[f"train/exit_{i}/divergence"] for i in (1, 2, 3)]
        entropies = sum(record[f"train/exit_{i}/loss"] for i in (1, 2, 3))
        found[f"{name} loss"] = [record["train/loss"], entropies]
        found[f"{name} sum"] = [record["train/cross_entropy"], entropies]
    return found


@pytest.mark.ranks
def test_every_teacher_teaches_and_the_last_exit_is_spared(digits: Path, tmp_path: Path) -> None:
    found = run_ranks(_teachers, 1, str(digits), str(tmp_path))[0]
    assert found["off"] == [0.0, 0.0, 0.0]
    assert found["off loss"][0] == pytest.approx(found["off loss"][1], rel=1e-5)
    for name in ("last", "hot", "frozen", "ema", "released"):
        assert found[f"{name} sum"][0] == pytest.approx(found[f"{name} sum"][1]), name
        assert found[name][0] > 0, name
        assert found[name][1] > 0, name
        assert found[name][2] == 0, name
        assert found[f"{name} loss"][0] != pytest.approx(found[f"{name} loss"][1], rel=1e-3), name
    assert min(found["model"]) > 0  # for another model the last exit is a student like the others
    values = [found[name][0] for name in ("last", "hot", "frozen", "ema", "released", "model")]
    assert len(set(values)) == len(values)


def _skipping(data: str, folder: str) -> dict[str, object]:
    from adaptive.errors import TrainingError
    from adaptive.training import trainer as module
    from adaptive.training.trainer import Callback

    class Poison(Callback):
        """Spoils one rank's gradient at chosen steps, as a diverging network would."""

        def __init__(self, steps: set[int]):
            self.steps = steps
            self.rates: list[float] = []

        def on_gradients(self, trainer) -> None:
            if trainer.progress.step in self.steps:
                next(trainer.active.network.parameters()).grad.fill_(math.inf)

        def on_step(self, trainer) -> None:
            self.rates.append(trainer.active.optimizer.param_groups[0]["lr"])

    result: dict[str, object] = {}
    original = module.Trainer.__init__
    for name, steps in (("some", {2, 3, 6}), ("many", set(range(4, 40)))):
        poison = Poison(steps)

        def patched(self, *arguments, _poison=poison, **keywords) -> None:
            original(self, *arguments, **keywords)
            self.callbacks.append(_poison)

        module.Trainer.__init__ = patched
        tree = config(
            data, Path(folder) / name, train={"max_steps": 12, "max_skipped": 4}, schedule={"name": "cosine"},
            checkpoint={"every_steps": 3}, tracking={"every_steps": 4, "gradient_norms": False},
        )  # fmt: skip
        try:
            train_here(tree)
        except TrainingError as error:
            result["error"] = str(error)
        result[name] = poison.rates
        result[f"{name} skipped"] = records(Path(folder) / name)[-1].get("train/skipped_steps")
    module.Trainer.__init__ = original
    return result


@pytest.mark.ranks
def test_steps_that_are_not_finite_are_skipped_and_the_schedule_waits(digits: Path, tmp_path: Path) -> None:
    result = run_ranks(_skipping, 1, str(digits), str(tmp_path))[0]
    rates = result["some"]
    assert rates[2] == rates[1] == rates[3]
    assert rates[6] == rates[5]
    assert len(set(rates)) == 12 - 3
    assert "4 steps in a row" in str(result["error"])
    assert "step-00000006" in str(result["error"])  # skipped steps left its weights as they were
    assert len(result["many"]) == 7


def _validated(data: str, folder: str) -> list[float]:
    tree = config(data, folder, data={"max_bad": 1}, train={"max_steps": 2}, tracking={"gradient_norms": False})
    train_here(tree)
    return [record["val/images"] for record in records(folder) if "val/images" in record]


@pytest.mark.ranks
def test_validation_leaves_a_bad_image_out(digits: Path, tmp_path: Path) -> None:
    data = shutil.copytree(digits, tmp_path / "digits")
    shard = next(data.glob("val-*.tar"))
    content = bytearray(shard.read_bytes())
    image = content.index(b"\x89PNG")
    content[image : image + 50] = bytes(50)
    shard.write_bytes(content)
    expected = load_index(data).split("val").count - 1
    assert run_ranks(_validated, 1, str(data), str(tmp_path / "run"))[0] == [expected]


def _options(data: str, folder: str) -> dict[str, list[float]]:
    """Losses of short runs that differ in one option; what must not change them, does not, and what must, does."""
    from adaptive.training.trainer import Trainer

    layouts: dict[str, bool] = {}
    runs = []
    original = Trainer._step

    def spy(self, batches):
        weight = next(p for p in self.active.network.parameters() if p.ndim == 4 and p.shape[1] > 1)
        layouts[runs[-1]] = weight.is_contiguous(memory_format=torch.channels_last)
        return original(self, batches)

    Trainer._step = spy
    cases: dict[str, dict] = {
        "plain": {},
        "channels_last": {"train": {"channels_last": True}},
        "checkpointing": {"train": {"checkpointing": True}},
        "clipped": {"train": {"clip_norm": 0.05}},
        "clipped_zero": {"train": {"clip_norm": 0.05, "zero_stage": 2}},
        "weights": {"train": {"exit_weights": [0.0, 0.0, 1.0]}},
        "no_ge": {"model": {"equilibrium": False}},
        "no_isc": {"model": {"collaboration": False}},
        "nesterov": {"optimizer": {"nesterov": True}},
        "stage_option": {"train": {"zero_stage": 2}, "deepspeed": {"zero_optimization": {"reduce_bucket_size": 1000}}},
    }
    losses = {}
    for name, sections in cases.items():
        runs.append(name)
        train = {"max_steps": 6, "global_batch": 32, **sections.pop("train", {})}
        run = config(data, Path(folder) / name, train=train, tracking={"every_steps": 1}, **sections)
        train_here(run)
        losses[name] = [r["train/loss"] for r in records(Path(folder) / name) if "train/loss" in r]
    Trainer._step = original
    losses["layouts"] = [layouts["plain"], layouts["channels_last"]]
    return losses


@pytest.mark.device
@pytest.mark.ranks
def test_options_change_what_they_should(digits: Path, tmp_path: Path, device_rank: DeviceRank) -> None:
    losses = device_rank(deterministically, _options, str(digits), str(tmp_path))
    plain = losses["plain"]
    for same in ("checkpointing", "stage_option"):
        assert losses[same] == pytest.approx(plain, rel=1e-4), same
    # Other kernels round otherwise, and behind ReLU and max pooling that grows within a few steps.
    assert losses["channels_last"][:2] == pytest.approx(plain[:2], rel=1e-3)
    assert losses["layouts"] == [False, True]
    assert losses["clipped"] == pytest.approx(losses["clipped_zero"], rel=1e-4)
    for other in ("clipped", "weights", "no_ge", "no_isc", "nesterov"):
        assert losses[other] != pytest.approx(plain, rel=1e-3), other
    # A step of at most lr * clip hardly moves: the clipped run learns slower than the plain one.
    assert losses["clipped"][-1] > plain[-1]


def test_arranging_converts_batchnorm_and_switches_checkpointing() -> None:
    from adaptive.networks.create import create_model
    from adaptive.training.learner import arrange

    tree = config("x", model={"sync_batchnorm": True}, train={"device": "auto", "checkpointing": True})
    network = arrange(create_model("test_resnet", num_classes=4, exits=2, input_size=32), tree, torch.device("cpu"))
    norms = [m for m in network.blocks.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(isinstance(m, torch.nn.SyncBatchNorm) for m in norms)
    assert network.checkpointing


def test_equilibrium_with_a_scale_invariant_optimizer_is_told_once() -> None:
    from adaptive.training.learner import warn_about_scale_invariance

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert "adamw" in str(warn_about_scale_invariance(config("x", optimizer={"name": "adamw"})))
        assert warn_about_scale_invariance(config("x")) is None
        silent = config("x", optimizer={"name": "adamw"}, model={"equilibrium": False})
        assert warn_about_scale_invariance(silent) is None
    assert len(caught) == 1


def _compiled(data: str, folder: str) -> dict[str, Any]:
    """Losses of a plain and a compiled run; of the latter also the graphs that there were after every step."""
    import torch._dynamo

    from adaptive.training.trainer import Trainer

    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    found: dict[str, Any] = {"graphs": []}
    original = Trainer._step

    def counted(self, batches):
        applied = original(self, batches)
        found["graphs"].append(counters["stats"]["unique_graphs"])
        return applied

    for name in ("plain", "compiled"):
        run = config(
            data, Path(folder) / name, model=VIT, train={"max_steps": 5, "compile": name == "compiled"},
            tracking={"every_steps": 1},
        )  # fmt: skip
        if name == "compiled":
            Trainer._step = counted
        try:
            train_here(run)
        finally:
            Trainer._step = original
        found[name] = [r["train/loss"] for r in records(Path(folder) / name) if "train/loss" in r]
    return found | {"frames": counters["frames"]["ok"], "breaks": dict(counters["graph_break"])}


@pytest.mark.device
@pytest.mark.ranks
def test_a_compiled_run_is_one_graph_and_equals_the_plain_one(
    digits: Path, tmp_path: Path, device_rank: DeviceRank
) -> None:
    found = device_rank(_compiled, str(digits), str(tmp_path), seconds=400)
    assert found["frames"] >= 1
    assert found["breaks"] == {}
    assert len(found["graphs"]) == 5
    assert len(set(found["graphs"][1:])) == 1, "compiled again after the second step"
    assert found["compiled"] == pytest.approx(found["plain"], rel=1e-3)


def test_moving_average_follows_the_formula() -> None:
    from adaptive.training.ema import ExponentialAverage

    network = torch.nn.BatchNorm1d(2)
    average = ExponentialAverage(network, decay=0.9)
    weight, mean = torch.ones(2), torch.zeros(2)
    for n in range(40):
        with torch.no_grad():
            network.weight.add_(1.0)
            network.running_mean.add_(0.5)
        decay = min(0.9, (1 + n) / (10 + n))
        weight = decay * weight + (1 - decay) * network.weight.detach()
        mean = decay * mean + (1 - decay) * network.running_mean
        average.update(network.parameters(), network.buffers())
    torch.testing.assert_close(average.network.weight, weight)
    torch.testing.assert_close(average.network.running_mean, mean)
    assert not average.network.weight.requires_grad


def _moving(data: str, folder: str, stages: list[int], name: str, epochs: list[int]) -> list[float]:
    """One run, continued epoch by epoch at another ZeRO stage; returns the losses."""
    for stage, steps in zip(stages, epochs, strict=True):
        tree = config(
            data,
            Path(folder) / name,
            model=VIT,
            optimizer={"name": "adamw", "lr": 0.002, "layer_decay": 0.9, "decay_norm_and_bias": False},
            train={"zero_stage": stage, "max_steps": steps, "ema_decay": 0.9, "epochs": 2, "global_batch": 128},
            tracking={"every_steps": 1},
        )
        train_here(tree)
    return [r["train/loss"] for r in records(Path(folder) / name) if "train/loss" in r]


@pytest.mark.ranks
@pytest.mark.full  # a checkpoint that does so, with its optimizer, is in checkpoints/test_saver.py
def test_a_run_moves_between_stages_and_numbers_of_ranks(digits: Path, tmp_path: Path) -> None:
    """Checkpoints hold whole tensors: 1 and 2 ranks, ZeRO 0 to 3, one after another, are one run."""
    whole = run_ranks(_moving, 1, str(digits), str(tmp_path), [0], "whole", [14])[0]
    moves = [(2, [3, 1], [3, 6]), (1, [2], [9]), (2, [0, 3], [12, 14])]
    for world, stages, steps in moves:
        moved = run_ranks(_moving, world, str(digits), str(tmp_path), stages, "moved", steps)[0]
    assert len(moved) == 14
    assert moved == pytest.approx(whole, abs=2e-3)
    for name in ("weights", "ema"):
        one, other = final(tmp_path / "whole", name), final(tmp_path / "moved", name)
        for key in one:
            torch.testing.assert_close(one[key], other[key], rtol=2e-2, atol=2e-3, msg=f"{name} {key}")
