"""Runtimes: the same answers, and the same account of a run to whoever observes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from adaptive.errors import ConfigError
from adaptive.inference.acceleration.cuda_graphs import Function
from adaptive.inference.export.onnx_runner import OnnxClassifier
from adaptive.inference.policy import EVERYBODY, NOBODY, Policy
from adaptive.inference.runner import DynamicClassifier
from adaptive.inference.runtime_names import RUNTIMES
from adaptive.inference.runtimes import Runner, cpu_threads, open_runner
from tests.inference.conftest import FAMILIES, Exported
from tests.inference.export.test_onnx_runner import policy_for

Events = list[tuple[str, int, int]]
KINDS = ["torch", "accelerated", "onnx"]


def as_it_is(function: Function, _: Sequence[Tensor]) -> Function:
    """An acceleration that costs no compiler's time."""
    return function


def opened(kind: str, done: Exported) -> Runner:
    if kind == "onnx":
        return OnnxClassifier(done.folder, threads=1)
    return DynamicClassifier(done.network, done.policy, accelerate=as_it_is if kind == "accelerated" else None)


def observed(runner: Runner, images: Any) -> tuple[Events, Any, Any]:
    events: Events = []
    probabilities, exits = runner.run(images, lambda *event: events.append(event))
    return events, torch.as_tensor(probabilities), torch.as_tensor(exits)


def parts(kind: str, i: int, count: int) -> Events:
    """What is told of a block whose exit decides, and of the decision itself."""
    if kind == "accelerated":
        return [("stage", i, count)]
    own: Events = [("block", i, count)] + ([("exit", i, count)] if kind == "torch" else [])
    return [*own, ("decision", i, count)]


@pytest.mark.parametrize("kind", KINDS)
class TestEvents:
    @pytest.fixture
    def done(self, exported: Callable[[str], Exported]) -> Exported:
        return exported("resnet")

    def test_parts_come_in_order_and_count_their_images(self, kind: str, done: Exported, digit_images: Tensor) -> None:
        with torch.no_grad():
            policy = policy_for("margin", torch.stack(done.network(digit_images)))
        events, _, exits = observed(opened(kind, done).with_policy(policy), digit_images)
        first, second, third = (int((exits == i).sum()) for i in (1, 2, 3))
        assert min(first, second, third) > 0, "nothing to tell apart"
        assert events == [
            *parts(kind, 0, 40),
            ("compaction", 0, 40 - first),
            *parts(kind, 1, 40 - first),
            ("compaction", 1, third),
            *parts(kind, 2, third),
            ("compaction", 2, 0),
            ("finish", 2, 40),
        ]

    def test_being_observed_changes_no_answer(self, kind: str, done: Exported, digit_images: Tensor) -> None:
        runner = opened(kind, done)
        _, probabilities, exits = observed(runner, digit_images)
        others, left_at = runner.run(digit_images)
        assert torch.equal(probabilities, torch.as_tensor(others))
        assert torch.equal(exits, torch.as_tensor(left_at))

    def test_a_decision_by_which_nobody_leaves_ends_with_all_who_stay(
        self, kind: str, done: Exported, digit_images: Tensor
    ) -> None:
        nobody = Policy(thresholds=[NOBODY, NOBODY, EVERYBODY])
        events, probabilities, exits = observed(opened(kind, done).with_policy(nobody, True), digit_images)
        told = [[*parts(kind, i, 40), ("compaction", i, 40 if i < 2 else 0)] for i in range(3)]
        assert events == [event for group in told for event in group] + [("finish", 2, 40)]
        straight, left_at = opened(kind, done).with_policy(nobody).run(digit_images)
        torch.testing.assert_close(probabilities, torch.as_tensor(straight), rtol=0, atol=1e-5)
        assert exits.tolist() == torch.as_tensor(left_at).tolist() == [3] * 40

    def test_a_run_that_everybody_leaves_ends_there(self, kind: str, done: Exported, digit_images: Tensor) -> None:
        everybody = Policy(thresholds=[EVERYBODY] * 3)
        events, _, exits = observed(opened(kind, done).with_policy(everybody), digit_images)
        assert events == [*parts(kind, 0, 40), ("compaction", 0, 0), ("finish", 0, 40)]
        assert exits.tolist() == [1] * 40

    def test_where_nobody_can_leave_nobody_is_picked_out(self, kind: str, done: Exported, digit_images: Tensor) -> None:
        policy = Policy(kind="patience", thresholds=[NOBODY, 1.0, EVERYBODY])
        events, _, _ = observed(opened(kind, done).with_policy(policy), digit_images)
        assert [i for part, i, _ in events if part == "compaction"] == [1, 2]
        if kind != "accelerated":
            assert [i for part, i, _ in events if part == "decision"] == [0, 1, 2], "patience sees every exit"

    def test_an_empty_batch_has_no_parts(self, kind: str, done: Exported, digit_images: Tensor) -> None:
        assert observed(opened(kind, done), digit_images[:0])[0] == []


class TestOpening:
    @pytest.mark.full
    def test_onnx_answers_as_torch_and_leaves_no_file(
        self,
        exported: Callable[[str], Exported],
        digit_images: Tensor,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        done = exported("resnet")
        answers = {}
        for runtime in ("torch", "onnx"):
            runner = open_runner(done.network, done.policy, runtime, threads=1, backbone=FAMILIES["resnet"][0])  # type: ignore[arg-type]
            answers[runtime] = [np.asarray(part) for part in runner.run(digit_images)]
        assert list(tmp_path.iterdir()) == []
        np.testing.assert_array_equal(answers["torch"][1], answers["onnx"][1])
        np.testing.assert_allclose(answers["torch"][0], answers["onnx"][0], rtol=0, atol=1e-4)

    def test_compile_is_the_accelerated_runner_at_the_sizes_given(self, exported: Callable[[str], Exported]) -> None:
        done = exported("resnet")
        runner = open_runner(done.network, done.policy, "compile", batch_sizes=[1, 16])
        assert isinstance(runner, DynamicClassifier)
        assert runner._accelerated is not None
        assert runner._accelerated.sizes == [1, 16]
        again = runner.with_policy(Policy(thresholds=[NOBODY, NOBODY, EVERYBODY]))
        assert again._accelerated is not None
        assert again._accelerated.sizes == [1, 16]

    def test_an_unknown_runtime_names_the_known_ones(self, exported: Callable[[str], Exported]) -> None:
        done = exported("resnet")
        with pytest.raises(ConfigError, match="runtime = 'tensorrt': use one of 'torch', 'compile', 'onnx'"):
            open_runner(done.network, done.policy, "tensorrt")  # type: ignore[arg-type]
        assert RUNTIMES == ("torch", "compile", "onnx")

    def test_threads_are_set_and_given_back(self) -> None:
        before = torch.get_num_threads()

        def fail() -> None:
            with cpu_threads(before + 1):
                assert torch.get_num_threads() == before + 1
                raise InterruptedError

        with pytest.raises(InterruptedError):
            fail()
        assert torch.get_num_threads() == before
        with cpu_threads(None):
            assert torch.get_num_threads() == before
        with pytest.raises(ConfigError, match="threads = 0: give 1 or more"), cpu_threads(0):
            pass
