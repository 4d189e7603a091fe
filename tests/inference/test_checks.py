"""What every door refuses: the same mistakes, with the same error in the same words, and the same good inputs."""

from __future__ import annotations

import copy
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from adaptive import create_model
from adaptive.errors import AdaptiveError, DataError, ModelError, PolicyError
from adaptive.inference.checks import read_policy
from adaptive.inference.export.export import export
from adaptive.inference.export.export_manifest import Manifest, file_entry
from adaptive.inference.export.onnx_runner import OnnxClassifier
from adaptive.inference.export.preprocess import Preprocess
from adaptive.inference.outputs import Predictions
from adaptive.inference.policy import EVERYBODY, FEATURES, NOBODY, Gate, NetworkIdentity, Policy
from adaptive.inference.runner import DynamicClassifier
from adaptive.networks.network import AdaptiveNetwork
from adaptive.networks.precision import PRECISION_DTYPES
from tests.inference.conftest import CLASSES, Exported, build, data_config

Export = Callable[[str], Exported]
Door = Callable[[Any], Any]
SHAPE = (4, 3, 32, 32)
BROKEN = (
    "the network's answer to image 2 (from 0) is NaN or infinite: its weights or its precision are broken; "
    "adaptive evaluate RUN counts such answers at every exit"
)
TAKES = "this network takes floats (N, 3, 32, 32), as its transform makes them"


def streamed(classifier: DynamicClassifier, images: Any) -> Predictions:
    """A stream's answers to one batch, in the order of arrival."""
    found = list(classifier.stream([images]))
    if not found:
        return classifier.predict(images)
    order = torch.cat([part.positions for part in found]).argsort()
    joined = (torch.cat([getattr(part.predictions, name) for part in found])[order] for name in Predictions._fields)
    return Predictions(*joined)


def doors_of(network: AdaptiveNetwork, policy: Policy, folder: Path) -> dict[str, Door]:
    """Every way in which a Python program hands over images, by name."""
    runner = DynamicClassifier(network, policy)
    accelerated = DynamicClassifier(network, policy, accelerate=lambda function, inputs: function)
    exported_network = OnnxClassifier(folder, threads=1)
    return {
        "runner": runner.predict,
        "run": runner.run,
        "accelerated": accelerated.predict,
        "stream": lambda images: streamed(runner, images),
        "export": exported_network.predict,
        "export's run": exported_network.run,
    }


@pytest.fixture(scope="module")
def doors(exported: Export) -> dict[str, Door]:
    done = exported("resnet")
    return doors_of(done.network, done.policy, done.folder)


def images() -> Any:
    return np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)


def with_value(value: float, number: int = 2) -> Any:
    found = images()
    found[number, 1, 5, 7] = value
    return found


BAD: dict[str, tuple[Callable[[], Any], type[AdaptiveError], str]] = {
    "bytes": (lambda: (255 * images()).astype(np.uint8), DataError, f"images are uint8 of shape {SHAPE}; {TAKES}"),
    "whole numbers": (lambda: images().astype(np.int64), DataError, f"images are int64 of shape {SHAPE}; {TAKES}"),
    "truth values": (lambda: images() > 0, DataError, f"images are bool of shape {SHAPE}; {TAKES}"),
    "objects": (lambda: images().astype(object), DataError, f"images are object of shape {SHAPE}; {TAKES}"),
    "complex": (lambda: images().astype(np.complex64), DataError, f"images are complex64 of shape {SHAPE}; {TAKES}"),
    "long double": (lambda: images().astype(np.longdouble), DataError, f"images are float128 of shape {SHAPE}"),
    "too small": (lambda: images()[..., :31, :31], DataError, f"images are float32 of shape (4, 3, 31, 31); {TAKES}"),
    "too large": (lambda: np.zeros((1, 3, 64, 64), np.float32), DataError, "of shape (1, 3, 64, 64)"),
    "not square": (lambda: images()[:, :, :30], DataError, "of shape (4, 3, 30, 32)"),
    "grey": (lambda: images()[:, :1], DataError, "of shape (4, 1, 32, 32)"),
    "with alpha": (lambda: np.zeros((2, 4, 32, 32), np.float32), DataError, "of shape (2, 4, 32, 32)"),
    "channels behind": (lambda: images().transpose(0, 2, 3, 1), DataError, "of shape (4, 32, 32, 3)"),
    "one image": (lambda: images()[0], DataError, "of shape (3, 32, 32)"),
    "five dimensions": (lambda: images()[None], DataError, "of shape (1, 4, 3, 32, 32)"),
    "a number": (lambda: np.float32(1) * np.ones(()), DataError, "of shape ()"),
    "empty, of another size": (lambda: np.zeros((0, 3, 8, 8), np.float32), DataError, "of shape (0, 3, 8, 8)"),
    "empty, of bytes": (lambda: np.zeros((0, *SHAPE[1:]), np.uint8), DataError, "images are uint8"),
    "a list": (lambda: images().tolist(), DataError, f"images are a list; {TAKES}"),
    "nothing": (lambda: None, DataError, f"images are a NoneType; {TAKES}"),
    "a picture": (lambda: Image.new("RGB", (32, 32)), DataError, f"images are a Image; {TAKES}"),
    "NaN": (lambda: with_value(math.nan), DataError, "image 2 (from 0) holds NaN or infinite values; leave it out"),
    "infinity": (lambda: with_value(math.inf), DataError, "image 2 (from 0) holds NaN or infinite values"),
    "minus infinity": (lambda: with_value(-math.inf), DataError, "image 2 (from 0) holds NaN or infinite values"),
    "too large for float32": (
        lambda: images().astype(np.float64) * 1e300,
        DataError,
        "images 0, 1, 2 and 1 more (from 0) hold NaN or infinite values",
    ),
}


def refusals(door: Door, given: Any) -> list[tuple[type[BaseException], str]]:
    """What a door says to an array, and to the same as a tensor where torch has such."""
    found = []
    for kind in ("array", "tensor"):
        content = given
        if kind == "tensor":
            if not isinstance(given, np.ndarray) or given.dtype in (object, np.longdouble):
                continue
            content = torch.from_numpy(given.copy())
        with pytest.raises(AdaptiveError) as error:
            door(content)
        found.append((type(error.value), str(error.value)))
    return found


@pytest.mark.parametrize("case", BAD)
def test_every_door_refuses_the_same_images_in_the_same_words(case: str, doors: dict[str, Door]) -> None:
    make, kind, words = BAD[case]
    said = {answer for door in doors.values() for answer in refusals(door, make())}
    assert len(said) == 1, said
    [(error, line)] = said
    assert error is kind
    assert words in line


def test_every_door_refuses_answers_that_overflow_in_the_same_words(exported: Export, tmp_path: Path) -> None:
    """Only the last layers overflow: what does so further inside, onnxruntime's ReLU turns into zeros."""
    done = exported("resnet")
    network, policy = copy.deepcopy(done.network), Policy(thresholds=[NOBODY, NOBODY, EVERYBODY])
    folder, manifest = tmp_path / "export", Manifest.read(done.folder)
    file = shutil.copytree(done.folder, folder) / str(manifest.blocks[2].onnx)
    graph = onnx.load(file)
    with torch.no_grad():
        for name, parameter in network.exits[2].head.fc.named_parameters():
            parameter.mul_(1e34)
            [kept] = [tensor for tensor in graph.graph.initializer if tensor.name == f"exit.head.fc.{name}"]
            kept.CopyFrom(onnx.numpy_helper.from_array(parameter.numpy(), kept.name))
    onnx.save(graph, file)
    files = [file_entry(file, "onnx") if entry.name == file.name else entry for entry in manifest.files]
    manifest.model_copy(update={"files": files, "policy": policy}).write(folder)
    given = images()
    given[2] *= 1e9
    doors = doors_of(network, policy, folder)
    assert {answer for door in doors.values() for answer in refusals(door, given)} == {
        (
            ModelError,
            BROKEN,
        )
    }


def test_a_stream_names_the_image_by_its_number_in_the_queue(exported: Export) -> None:
    runner = DynamicClassifier(exported("resnet").network, exported("resnet").policy)
    for value, kind in ((math.nan, DataError), (3e38, ModelError)):
        given = with_value(value, number=3)
        for batch in (1, 3):
            with pytest.raises(kind, match=r"image 3 \(from 0\)"):
                list(runner.stream([given[:1], given[1:]], batch))


GOOD: dict[str, Callable[[Any], Any]] = {
    "double precision": lambda a: a.astype(np.float64),
    "half precision": lambda a: a.astype(np.float16),
    "strided": lambda a: np.repeat(a, 2, axis=3)[..., ::2],
    "mirrored twice": lambda a: np.ascontiguousarray(a[:, ::-1, :, ::-1])[:, ::-1, :, ::-1],
    "channels-last memory": lambda a: np.ascontiguousarray(a.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),
    "Fortran's order": np.asfortranarray,
    "big-endian": lambda a: a.astype(">f4"),
    "a tensor": torch.from_numpy,
    "a tensor that learns": lambda a: torch.from_numpy(a).requires_grad_(),
    "a bfloat16 tensor": lambda a: torch.from_numpy(a).bfloat16(),
    "an empty batch": lambda a: a[:0],
}


@pytest.mark.parametrize("case", GOOD)
@pytest.mark.filterwarnings("error")
def test_every_door_takes_the_same_images_and_answers_alike(case: str, doors: dict[str, Door]) -> None:
    given = GOOD[case](images())
    if isinstance(given, np.ndarray):
        given.flags.writeable = False
    plain = torch.as_tensor(np.array(given.astype(np.float32))) if isinstance(given, np.ndarray) else given.float()
    wanted = doors["runner"](plain.detach())
    for name in ("runner", "accelerated", "stream", "export"):
        found = doors[name](given)
        for part, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(np.asarray(part), np.asarray(other), atol=2e-5, err_msg=name)


def test_images_that_lie_nowhere_are_refused(exported: Export) -> None:
    with pytest.raises(DataError, match="images lie on device meta"):
        DynamicClassifier(exported("resnet").network).predict(torch.zeros(SHAPE, device="meta"))


@pytest.mark.device
def test_on_the_device_broken_values_are_found_as_well(device: torch.device) -> None:
    network = build("resnet").to(device)
    for value, kind in ((math.nan, DataError), (3e38, ModelError)):
        with pytest.raises(kind, match=r"image 2 \(from 0\)"):
            DynamicClassifier(network).predict(torch.from_numpy(with_value(value)).to(device))
    assert len(DynamicClassifier(network).predict(images()).labels) == 4  # wherever they come from


def test_large_but_finite_images_are_no_fault() -> None:
    """Their sum overflows, they do not."""
    network = build("resnet")
    for module in network.modules():  # brings any scale back to one
        if isinstance(module, torch.nn.Conv2d):
            with torch.no_grad():
                module.weight.mul_(1e-36)
            break
    found = DynamicClassifier(network).predict(np.full(SHAPE, 3e37, np.float32))
    assert bool(found.confidences.isfinite().all())


class TestPolicies:
    """Every door that takes a policy."""

    OTHER = NetworkIdentity(backbone="resnet18", exits=["a", "b"], fingerprint="0" * 64)
    AGAIN = "calibrate: adaptive calibrate RUN --budget 0.5"

    @classmethod
    def bad(cls) -> dict[str, tuple[Any, str]]:
        gate = Gate(weight=[[0.0] * len(FEATURES)], bias=[0.0], out=[0.0], out_bias=0.0)
        return {
            "fewer exits": (
                Policy(thresholds=[0.5, 0.0]),
                f"the policy is for 2 exits, the network has 3; {cls.AGAIN}",
            ),
            "gates for more exits": (
                Policy(kind="gate", thresholds=[0.5] * 3 + [0.0], gates=[gate] * 3),
                f"the policy is for 4 exits, the network has 3; {cls.AGAIN}",
            ),
            "another network": (
                Policy(thresholds=[0.5, 0.5, 0.0], network=cls.OTHER),
                "for other weights (resnet18, fingerprint 000000000000) than those of the network (fingerprint ",
            ),
            "a path": ("policy.json", "the policy is a str; give what adaptive.Policy.load returns"),
            "a dictionary": ({"thresholds": [0.5, 0.5, 0.0]}, "the policy is a dict; give what adaptive.Policy.load"),
        }

    @pytest.fixture(scope="class")
    def doors(self, exported: Export, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Door]:
        done = exported("resnet")
        folder = tmp_path_factory.mktemp("refused") / "export"

        class Run:
            network = done.network

        def write(policy: Any) -> None:
            preprocess = Preprocess.of(data_config())
            export(
                done.network,
                folder,
                backbone="x",
                classes=CLASSES,
                preprocess=preprocess,
                policy=policy,
                formats=["torch"],
            )

        return {
            "runner": lambda policy: DynamicClassifier(done.network, policy),
            "runner of a run": lambda policy: DynamicClassifier(Run(), policy),
            "accelerated": lambda policy: DynamicClassifier(done.network, policy, accelerate=lambda f, _: f),
            "export": OnnxClassifier(done.folder, threads=1).set_policy,
            "exporting": write,
        }

    @pytest.mark.parametrize(
        "case", ["fewer exits", "gates for more exits", "another network", "a path", "a dictionary"]
    )
    def test_every_door_refuses_the_same_policies_in_the_same_words(self, case: str, doors: dict[str, Door]) -> None:
        policy, words = self.bad()[case]
        said = set()
        for door in doors.values():
            with pytest.raises(PolicyError) as error:
                door(policy)
            said.add(str(error.value))
        assert len(said) == 1, said
        assert words in said.pop()

    def test_its_own_policy_goes_with_every_form_of_the_network(self, exported: Export) -> None:
        done = exported("resnet")
        for form in (lambda n: n, lambda n: n.to(memory_format=torch.channels_last)):
            DynamicClassifier(form(build("resnet")), done.policy)
        # Converted weights have other bytes: exits still say whose the policy is.
        for dtype in (*PRECISION_DTYPES.values(), torch.float64):
            DynamicClassifier(build("resnet").to(dtype), done.policy)
        other = NetworkIdentity(backbone="x", exits=["layer3", "layer4"], fingerprint="0" * 64)
        with pytest.raises(PolicyError, match="other weights"):
            DynamicClassifier(build("resnet").bfloat16(), done.policy.model_copy(update={"network": other}))
        network: AdaptiveNetwork = build("resnet")
        network.collaboration = False  # other answers
        with pytest.raises(PolicyError, match="other weights"):
            DynamicClassifier(network, done.policy)

    def test_a_run_remembers_its_weights_when_they_are_converted(self, exported: Export) -> None:
        done = exported("resnet")

        class Run:
            network = build("resnet").bfloat16()
            identity = done.policy.network

        DynamicClassifier(Run(), done.policy)
        other = Run.identity.model_copy(update={"fingerprint": "1" * 64})  # type: ignore[union-attr]
        with pytest.raises(PolicyError, match="other weights"):
            DynamicClassifier(Run(), done.policy.model_copy(update={"network": other}))


def test_a_network_of_one_exit_is_told_that_it_needs_no_policy() -> None:
    network = create_model("test_resnet", 10, 1, input_size=32)
    other = NetworkIdentity(backbone="test_resnet", exits=[], fingerprint="1" * 64)
    for policy in (Policy(thresholds=[NOBODY, EVERYBODY]), Policy(thresholds=[EVERYBODY], network=other)):
        with pytest.raises(PolicyError, match="nobody can leave early: leave the policy out") as error:
            DynamicClassifier(network, policy)
        assert "adaptive calibrate" not in str(error.value), "which refuses such a network"


def test_an_unreadable_policy_is_made_anew_only_where_one_can_be_made(tmp_path: Path) -> None:
    damaged = tmp_path / "policy.json"
    damaged.write_text("{}")
    for path, problem in ((damaged, "is no policy"), (tmp_path / "none", "cannot be read")):
        with pytest.raises(PolicyError, match=f"{problem}.*calibrate"):
            read_policy(path, 3)
        with pytest.raises(PolicyError, match=f"{problem}.*leave the policy out") as error:
            read_policy(path, 1)
        assert "calibrat" not in str(error.value)


def test_the_checks_need_no_torch() -> None:
    code = "import sys, adaptive.inference.checks; print({'torch', 'timm'} & set(sys.modules))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert ended.stdout.strip() == "set()"
