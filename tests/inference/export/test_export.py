"""What is written: graphs that answer as the network for any batch, in a folder that is whole or not there."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import re
import signal
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

from adaptive.errors import ExportError, PolicyError
from adaptive.files import file_sha256
from adaptive.inference.export import export as module
from adaptive.inference.export import export_manifest as manifest_module
from adaptive.inference.export.export import OPSET, export
from adaptive.inference.export.export_manifest import MANIFEST, Manifest
from adaptive.inference.export.onnx_runner import OnnxClassifier
from adaptive.inference.export.preprocess import Preprocess
from adaptive.inference.policy import Policy
from adaptive.networks.network import AdaptiveNetwork
from adaptive.networks.weights.fingerprint import fingerprint
from tests.helpers.locations import REPOSITORY
from tests.helpers.waiting import PATIENCE
from tests.inference.conftest import CLASSES, FAMILIES, Exported, build, data_config

Export = Callable[[str], Exported]
QUICK = ("resnet", "msdnet")  # the ONNX runner's tests export these and swin as well


def build_plain() -> AdaptiveNetwork:
    """A network with links, which are switched off."""
    network = build("resnet")
    network.collaboration = False
    return network


def arguments(**changes: Any) -> dict[str, Any]:
    given = {
        "backbone": "test_resnet",
        "classes": CLASSES,
        "preprocess": Preprocess.of(data_config()),
        "policy": Policy(thresholds=[0.5, 0.5, -1.0]),
    }
    return given | changes


@cache
def load_program(file: Path) -> torch.nn.Module:
    return torch.export.load(file).module()


@pytest.mark.parametrize(
    "family", [name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in FAMILIES]
)
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_both_formats_answer_as_the_network(family: str, batch: int, exported: Export, digit_images: Tensor) -> None:
    network, folder = exported(family).network, exported(family).folder
    manifest = Manifest.read(folder)
    images = digit_images[:batch]
    with torch.no_grad():
        expected = network(images)
    for kind in ("onnx", "torch"):
        values: dict[str, Any] = {"images": images}
        for block, logits in zip(manifest.blocks, expected, strict=True):
            inputs = [values[name] for name in block.inputs]
            if kind == "onnx":
                session = onnxruntime.InferenceSession(folder / block.onnx)
                assert [i.name for i in session.get_inputs()] == block.inputs
                assert [o.name for o in session.get_outputs()] == block.outputs
                arrays = session.run(None, dict(zip(block.inputs, [t.numpy() for t in inputs], strict=True)))
                found = [torch.from_numpy(array) for array in arrays]
            else:
                program = load_program(folder / block.torch)
                previous = inputs.pop() if block.previous_logits else None
                found = program(tuple(inputs), previous)
            values = dict(zip(block.outputs, found, strict=True))
            for tensor in block.next_state:
                assert tensor.batch is None or values[tensor.name].shape[tensor.batch[0]] == batch * tensor.batch[1]
            margin = 1e-4 * float(logits.abs().max())
            torch.testing.assert_close(values[block.logits], logits, rtol=0, atol=margin)


@pytest.mark.device
@pytest.mark.full
def test_a_network_on_the_device_exports_as_its_copy_on_the_cpu(
    device: torch.device, tmp_path: Path, digit_images: Tensor
) -> None:
    formats = ("torch", "onnx") if find_spec("onnxscript") else ("torch",)
    network = build("resnet")
    expected = network(digit_images[:5])[0]
    answers: dict[str, dict[str, Tensor]] = {"cpu": {}, "device": {}}
    for name, where in (("cpu", torch.device("cpu")), ("device", device)):
        network.to(where)
        manifest = export(network, tmp_path / name, **arguments(formats=formats, images=digit_images.to(where)))
        assert next(network.parameters()).device == where
        assert manifest.fingerprint == fingerprint(build("resnet"))
        block = manifest.blocks[0]
        program = load_program(tmp_path / name / block.torch)
        answers[name]["torch"] = program((digit_images[:5],), None)[-1]
        if "onnx" in formats:
            session = onnxruntime.InferenceSession(tmp_path / name / block.onnx, providers=["CPUExecutionProvider"])
            [found] = session.run([block.logits], {"images": digit_images[:5].numpy()})
            answers[name]["onnx"] = torch.from_numpy(found)
    for kind, found in answers["device"].items():
        assert found.device.type == "cpu"
        torch.testing.assert_close(found, answers["cpu"][kind], rtol=0, atol=0)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.full
def test_what_is_special_about_the_families_is_there(exported: Export) -> None:
    entries = {family: Manifest.read(exported(family).folder).blocks for family in FAMILIES}
    assert [t.batch for t in entries["tnt"][1].state] == [(0, 1), (0, 4), (0, 1)]
    assert len(entries["msdnet"][1].state) > 1
    assert len(entries["ranet"][1].state) > 1
    assert [block.previous_logits for block in entries["resnet"]] == [None, "logits_1", "logits_2"]
    assert [block.previous_logits for block in entries["ranet"]] == [None] * 2


def test_manifest_describes_the_folder(exported: Export) -> None:
    done = exported("resnet")
    manifest = Manifest.read(done.folder)
    assert {p.name for p in done.folder.iterdir()} == {file.name for file in manifest.files} | {MANIFEST}
    for file in manifest.files:
        assert (done.folder / file.name).stat().st_size == file.bytes
        assert file_sha256(done.folder / file.name) == file.sha256
    assert manifest.classes == CLASSES
    assert manifest.policy == done.policy
    assert manifest.costs == [cost.macs for cost in done.network.costs()]
    assert manifest.exits == done.network.exit_names
    assert manifest.fingerprint == fingerprint(done.network)
    model = onnx.load(done.folder / "block_2.onnx")
    assert [entry.version for entry in model.opset_import if not entry.domain] == [OPSET]
    assert {t.data_type for t in model.graph.initializer} <= {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}


def test_fingerprint_is_of_weights_names_and_collaboration() -> None:
    network = build("resnet")
    first = fingerprint(network)
    assert first == fingerprint(copy.deepcopy(network).to(memory_format=torch.channels_last)) == fingerprint(network)
    assert first != fingerprint(copy.deepcopy(network).bfloat16())
    assert len(fingerprint(copy.deepcopy(network).bfloat16())) == 64
    network.collaboration = False
    assert fingerprint(network) != first
    network.collaboration = True
    assert fingerprint(network) == first
    for name, tensor in network.state_dict().items():
        before = tensor.clone()
        tensor.view(-1)[-1] += 1
        assert fingerprint(network) != first, name
        tensor.copy_(before)
    assert fingerprint(network) == first


def test_weights_beside_the_graph_are_listed_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST_FILE", 0)
    network = build_plain().bfloat16().to(memory_format=torch.channels_last).train()
    own = fingerprint(network)
    manifest = export(network, tmp_path / "out", **arguments(formats=("onnx",)))
    assert (network.training, fingerprint(network)) == (True, own), "the network that was given was changed"
    assert [block.previous_logits for block in manifest.blocks] == [None] * 3
    names = [file.name for file in manifest.files]
    assert names == [f"block_{i}.onnx{end}" for i in (1, 2, 3) for end in ("", ".data")]
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = network.eval().float()(images)[0].softmax(1).amax(1)
    classifier = OnnxClassifier(tmp_path / "out")
    classifier.set_policy(Policy(thresholds=[0.0, 0.0, 0.0]))
    np.testing.assert_allclose(classifier.predict(images.numpy()).confidences, expected, rtol=1e-4)
    data = tmp_path / "out" / "block_2.onnx.data"
    content = bytearray(data.read_bytes())
    content[-1] ^= 1
    data.write_bytes(content)
    with pytest.raises(ExportError, match=r"block_2\.onnx\.data was changed"):
        OnnxClassifier(tmp_path / "out")


class TestRefusals:
    """Nothing is left behind, and the message says what to do."""

    @pytest.fixture
    def network(self) -> Any:
        return build_plain()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"classes": ["a"]}, "1 classes were given, the network has 10"),
            ({"formats": ("onnx", "tf")}, "formats = 'onnx,tf'"),
            ({"formats": ()}, "formats = ''"),
            (
                {"preprocess": Preprocess.of(data_config()).model_copy(update={"crop": 30})},
                "images of 30 pixels, the network was built for 32",
            ),
        ],
    )
    def test_what_does_not_fit(self, network: Any, changes: Any, message: str, tmp_path: Path) -> None:
        with pytest.raises(ExportError, match=message):
            export(network, tmp_path / "out", **arguments(**changes))
        assert list(tmp_path.iterdir()) == []

    def test_a_policy_of_another_network(self, network: Any, exported: Export, tmp_path: Path) -> None:
        for policy, message in (
            (exported("resnet").policy, "calibrated for other weights"),
            (Policy(thresholds=[0.0]), "the policy is for 1 exits, the network has 3"),
        ):
            with pytest.raises(PolicyError, match=message):
                export(network, tmp_path / "out", **arguments(policy=policy))
            assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("opset", [17, onnx.defs.onnx_opset_version() + 1, 0, -1, 18.0, "18", True])
    def test_an_opset_that_there_is_not(self, opset: Any, network: Any, tmp_path: Path) -> None:
        newest = onnx.defs.onnx_opset_version()
        message = f"opset = {opset!r}: give a whole number from 18 to {newest}, 20 by default"
        with pytest.raises(ExportError, match=re.escape(message)):
            export(network, tmp_path / "out", **arguments(opset=opset))
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_whose_name_is_not_utf8(self, network: Any, tmp_path: Path) -> None:
        with pytest.raises(ExportError, match=r"out\\udce9 is not UTF-8; give a folder whose name is"):
            export(network, tmp_path / "out\udce9", **arguments())
        assert list(tmp_path.iterdir()) == []

    def test_a_taken_folder(self, network: Any, tmp_path: Path) -> None:
        (tmp_path / "mine.txt").write_text("x")
        with pytest.raises(ExportError, match="exists and is not empty; give another folder, or remove it"):
            export(network, tmp_path, **arguments())
        with pytest.raises(ExportError, match="exists and is not empty"):
            export(network, tmp_path / "mine.txt", **arguments())
        assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]

    def test_a_folder_that_cannot_be_written(self, network: Any, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("x")
        with pytest.raises(ExportError, match=r"file/out cannot be written \(Not a directory\)"):
            export(network, tmp_path / "file" / "out", **arguments())

    def test_a_missing_package(self, network: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
        with pytest.raises(ExportError, match=r"onnxscript .*pip install 'adaptive-training\[export\]'"):
            export(network, tmp_path / "out", **arguments())

    def test_a_block_that_cannot_be_recorded(self, network: Any, tmp_path: Path) -> None:
        run = network.blocks[1].forward
        network.blocks[1].forward = lambda x: run(x * float(x.mean() > 0))
        with pytest.raises(ExportError, match=r"block 2 of test_resnet cannot be exported to torch\.export: ") as error:
            export(network, tmp_path / "out", **arguments(formats=("onnx",)))
        assert "\n" not in str(error.value)
        assert list(tmp_path.iterdir()) == []

    def test_files_that_answer_otherwise(self, network: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "TOLERANCE", -1.0)
        with pytest.raises(ExportError, match="block 1 of test_resnet answers other as torch than in the network"):
            export(network, tmp_path / "out", **arguments(formats=("torch",)))
        assert list(tmp_path.iterdir()) == []


@pytest.mark.full
@pytest.mark.parametrize("opset", [18, 21])
def test_the_opset_is_that_which_was_asked_for(opset: int, tmp_path: Path) -> None:
    policy = Policy(thresholds=[0.5, -1.0])
    export(build("swin"), tmp_path / "out", **arguments(policy=policy, formats=("onnx",), opset=opset))
    for i in (1, 2):  # swin has GELU, which ONNX knows from 20 on
        [imported] = [i.version for i in onnx.load(tmp_path / "out" / f"block_{i}.onnx").opset_import if not i.domain]
        assert imported == opset
    OnnxClassifier(tmp_path / "out")


def test_an_opset_that_torch_does_not_reach_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch keeps its own where it cannot convert, and says so in its log alone."""
    write = torch.onnx.export
    monkeypatch.setattr(torch.onnx, "export", lambda *given, **named: write(*given, **{**named, "opset_version": 18}))
    with pytest.raises(ExportError, match="opset = 20: torch writes block 1 of test_resnet with 18 alone"):
        export(build("resnet"), tmp_path / "out", **arguments(formats=("onnx",)))
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_taken_and_one_format_is_enough(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export(build("swin"), tmp_path / "out", **arguments(policy=Policy(thresholds=[0.5, -1.0]), formats=("torch",)))
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"block_1.pt2", "block_2.pt2", MANIFEST}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(ExportError, match=r"holds no onnx files; .* --formats onnx"):
        OnnxClassifier(tmp_path / "out")


@pytest.mark.parametrize("name", ["../block_1.onnx", "/etc/passwd", ".hidden"])
def test_names_never_lead_out_of_the_folder(name: str, exported: Export, tmp_path: Path) -> None:
    content = json.loads((exported("resnet").folder / MANIFEST).read_text())
    content["files"][0]["name"] = name
    del content["digest"]
    content["digest"] = manifest_module._digest(content)
    (tmp_path / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(ExportError, match=r"cannot be used: files\.0\.name"):
        Manifest.read(tmp_path)


def test_files_hold_no_paths_of_this_machine(exported: Export) -> None:
    """Where the exporter's own code and packages lie is nobody else's business."""
    for path in exported("resnet").folder.iterdir():
        contents = [path.read_bytes()]
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                contents = [archive.read(name) for name in archive.namelist()]
        for root in (REPOSITORY, sys.prefix, sysconfig.get_paths()["purelib"], Path.home() / ""):
            assert not [1 for content in contents if f"{root}/".encode() in content], (path.name, root)


def test_of_two_exports_into_one_folder_one_is_refused(tmp_path: Path) -> None:
    with (
        module._written_aside(tmp_path / "out"),
        pytest.raises(ExportError, match="out is being written by another export"),
        module._written_aside(tmp_path / "out"),
    ):
        pass
    with pytest.raises(ExportError, match="new exists and is not empty"):
        fill_beside_another(tmp_path / "new")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["another's", "new", "out"]


def fill_beside_another(folder: Path) -> None:
    with module._written_aside(folder) as aside:
        folder.mkdir()
        (folder / "another's").touch()
        (aside / "mine").touch()


def test_what_a_killed_export_left_goes_with_the_next(tmp_path: Path) -> None:
    def die() -> None:
        with module._written_aside(tmp_path / "out") as aside:
            (aside / "half").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=die)
    process.start()
    process.join(PATIENCE)
    assert list(tmp_path.rglob("half"))
    with module._written_aside(tmp_path / "out") as aside:
        (aside / "whole").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["out", "whole"]
