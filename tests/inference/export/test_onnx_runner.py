"""The runner without torch: the decisions of the plain forward pass, and no trust in a changed folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

from adaptive.commands.main import main
from adaptive.errors import DataError, ExportError, PolicyError
from adaptive.inference.drift.seen import Seen
from adaptive.inference.export import export_manifest as manifest_module
from adaptive.inference.export.export_manifest import MANIFEST, StateTensor
from adaptive.inference.export.onnx_runner import OnnxClassifier, select
from adaptive.inference.outputs import scores, simulate
from adaptive.inference.policy import EVERYBODY, FEATURES, NOBODY, Gate, Kind, NetworkIdentity, Policy
from adaptive.inference.runner import DynamicClassifier
from tests.inference.conftest import CLASSES, Exported
from tests.inference.test_runner import one_by_one

Export = Callable[[str], Exported]


def policy_for(kind: Kind, logits: Tensor) -> Policy:
    """Thresholds in the widest gap between the middle scores of the images, so that rounding decides nothing."""
    exits = len(logits)
    generator = np.random.default_rng(exits)
    gates = [
        Gate(
            weight=generator.normal(0, 2, (5, len(FEATURES))).tolist(),
            bias=generator.normal(size=5).tolist(),
            out=generator.normal(0, 2, 5).tolist(),
            out_bias=0.1,
        )
        for _ in range(exits - 1 if kind == "gate" else 0)
    ]
    temperatures = [0.5 + 0.3 * i for i in range(exits)]
    policy = Policy(kind=kind, gates=gates, temperatures=temperatures, thresholds=[0.0] * exits)
    probabilities = torch.stack([policy.probabilities(i, z) for i, z in enumerate(logits)])
    thresholds = []
    for values in scores(policy, probabilities)[:-1]:
        ordered = values.double().sort().values[len(values) // 5 : -(len(values) // 5)]
        widest = int(ordered.diff().argmax())
        assert ordered[widest + 1] - ordered[widest] > 5e-5
        thresholds.append(float(ordered[widest] + ordered[widest + 1]) / 2)
    return policy.with_thresholds([*thresholds, EVERYBODY])


@pytest.mark.parametrize("kind", get_args(Kind))
def test_runner_loop_simulation_and_export_agree_on_real_images(
    kind: Kind, exported: Export, digit_images: Tensor
) -> None:
    done = exported("resnet")
    with torch.no_grad():
        logits = torch.stack(done.network(digit_images))
    policy = policy_for(kind, logits)
    stored = simulate(policy, torch.stack([policy.probabilities(i, z) for i, z in enumerate(logits)]))
    answers = {
        "runner": [part.numpy() for part in DynamicClassifier(done.network, policy).predict(digit_images)],
        "loop": [np.array(column) for column in zip(*one_by_one(done.network, policy, digit_images), strict=True)],
    }
    classifier = OnnxClassifier(done.folder, threads=1)
    classifier.set_policy(policy)
    answers["export"] = list(classifier.predict(digit_images.numpy()))
    for name, (labels, confidences, exits) in answers.items():
        np.testing.assert_array_equal(labels, stored.labels.numpy(), err_msg=name)
        np.testing.assert_array_equal(exits, stored.exits.numpy(), err_msg=name)
        np.testing.assert_allclose(confidences, stored.confidences.numpy(), rtol=0, atol=2e-5, err_msg=name)


@pytest.mark.parametrize(
    ("family", "kind"),
    [*(("resnet", kind) for kind in get_args(Kind)), ("swin", "confidence"), ("swin", "patience"), ("msdnet", "gate")],
)
def test_images_leave_where_the_network_says(
    family: str, kind: Kind, exported: Export, digit_files: list[bytes], digit_images: Tensor
) -> None:
    done = exported(family)
    with torch.no_grad():
        logits = torch.stack(done.network(digit_images))
    policy = policy_for(kind, logits)
    probabilities = torch.stack([policy.probabilities(i, z) for i, z in enumerate(logits)])
    expected = simulate(policy, probabilities)
    assert len(expected.exits.unique()) > 1, "nothing to compare: all leave together"
    classifier = OnnxClassifier(done.folder, threads=1)
    classifier.set_policy(policy)
    images = classifier.open_images(digit_files)
    np.testing.assert_array_equal(images, digit_images.numpy())
    for batch in (40, 7, 1):
        parts = [classifier.run(images[start : start + batch]) for start in range(0, 40 if batch > 1 else 6, batch)]
        found, exits = (np.concatenate(part) for part in zip(*parts, strict=True))
        wanted = probabilities[expected.exits - 1, torch.arange(40)].numpy()[: len(found)]
        np.testing.assert_array_equal(exits, expected.exits.numpy()[: len(found)])
        np.testing.assert_array_equal(found.argmax(1), expected.labels.numpy()[: len(found)])
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
    answers = classifier.predict(images)
    np.testing.assert_array_equal(answers.labels, expected.labels.numpy())
    np.testing.assert_array_equal(answers.exits, expected.exits.numpy())
    np.testing.assert_allclose(answers.confidences, expected.confidences.numpy(), rtol=0, atol=1e-4)


class TestEconomy:
    """Blocks and decisions are counted."""

    @pytest.fixture
    def classifier(self, exported: Export) -> OnnxClassifier:
        return OnnxClassifier(exported("resnet").folder, threads=1)

    @pytest.fixture
    def ran(self, classifier: OnnxClassifier) -> list[tuple[int, int]]:
        """(block, images) of every run."""
        calls: list[tuple[int, int]] = []

        class Counting:
            def __init__(self, i: int, session: Any) -> None:
                self.i, self.session = i, session

            def run(self, outputs: list[str], inputs: dict[str, Any]) -> Any:
                calls.append((self.i, len(next(iter(inputs.values())))))
                return self.session.run(outputs, inputs)

        classifier._sessions = [Counting(i, session) for i, session in enumerate(classifier._sessions)]
        return calls

    @pytest.fixture
    def decided(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        calls: list[int] = []
        decide = Policy.decide
        monkeypatch.setattr(Policy, "decide", lambda self, i, *rest: calls.append(i) or decide(self, i, *rest))
        return calls

    def test_blocks_run_for_those_still_in(
        self, classifier: OnnxClassifier, ran: list[Any], digit_images: Tensor, exported: Export
    ) -> None:
        with torch.no_grad():
            logits = torch.stack(exported("resnet").network(digit_images))
        classifier.set_policy(policy_for("margin", logits))
        exits = classifier.predict(digit_images.numpy()).exits
        counts = np.bincount(exits, minlength=4)[1:]
        assert ran == [(0, 40), (1, 40 - counts[0]), (2, counts[2])]

    def test_nothing_runs_for_nobody(self, classifier: OnnxClassifier, ran: list[Any], digit_images: Tensor) -> None:
        classifier.set_policy(Policy(thresholds=[EVERYBODY, 0.0, 0.0]))
        assert classifier.predict(digit_images.numpy()).exits.tolist() == [1] * 40
        empty = classifier.predict(digit_images.numpy()[:0])
        assert [len(part) for part in empty] == [0, 0, 0]
        assert ran == [(0, 40)]

    @pytest.mark.parametrize("kind", ["confidence", "entropy", "patience"])
    def test_no_decision_where_nobody_can_leave(
        self, kind: Kind, classifier: OnnxClassifier, ran: list[Any], decided: list[int], digit_images: Tensor
    ) -> None:
        classifier.set_policy(Policy(kind=kind, thresholds=[NOBODY, NOBODY, EVERYBODY]))
        assert classifier.predict(digit_images.numpy()).exits.tolist() == [3] * 40
        assert (ran, decided) == ([(0, 40), (1, 40), (2, 40)], [2])

    def test_patience_remembers_exits_where_nobody_can_leave(
        self, classifier: OnnxClassifier, decided: list[int], digit_images: Tensor
    ) -> None:
        classifier.set_policy(Policy(kind="patience", thresholds=[NOBODY, 1.0, EVERYBODY]))
        answers = classifier.predict(digit_images.numpy())
        assert decided[:2] == [0, 1]
        assert 1 not in answers.exits


def test_images_of_many_entries_are_selected_whole() -> None:
    rows = np.arange(2 * 12 * 3).reshape(2, 12, 3)
    tensors = [StateTensor(name="a", batch=(1, 4)), StateTensor(name="b", batch=None)]
    found = select({"a": rows, "b": rows}, tensors, np.array([2, 0]), 3)
    np.testing.assert_array_equal(found["a"], rows[:, [8, 9, 10, 11, 0, 1, 2, 3]])
    assert found["b"] is rows


def test_torch_is_neither_imported_nor_needed(exported: Export, digit_files: list[bytes], tmp_path: Path) -> None:
    image = tmp_path / "digit.png"
    image.write_bytes(digit_files[0])
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "timm", "torchvision"):
            raise ImportError(name)
if sys.argv[1] == "refuse":
    sys.meta_path.insert(0, Refuse())
from adaptive.inference.export.onnx_runner import OnnxClassifier
classifier = OnnxClassifier({str(exported("resnet").folder)!r})
label, confidence, exit_ = classifier.predict(classifier.open_images([{str(image)!r}]))
loaded = [name for name in ("torch", "timm", "torchvision") if name in sys.modules]
print(int(label[0]), int(exit_[0]), float(confidence[0]), loaded)
"""
    classifier = OnnxClassifier(exported("resnet").folder)
    own = classifier.predict(classifier.open_images([digit_files[0]]))
    for how in ("allow", "refuse"):
        ended = subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
        label, exit_, confidence, loaded = ended.stdout.split()
        assert (int(label), int(exit_), loaded) == (own.labels[0], own.exits[0], "[]")
        assert float(confidence) == pytest.approx(float(own.confidences[0]), abs=1e-6)


class TestRefusals:
    """Whatever was done to a folder is found before anything is answered, and the file is named."""

    @pytest.fixture
    def folder(self, exported: Export, tmp_path: Path) -> Path:
        return shutil.copytree(exported("resnet").folder, tmp_path / "copy")

    @staticmethod
    def refusal(folder: Path) -> str:
        with pytest.raises(ExportError) as error:
            OnnxClassifier(folder)
        assert "\n" not in str(error.value)
        return str(error.value)

    @pytest.mark.parametrize("position", [0, 1000, -1])
    def test_a_flipped_bit(self, position: int, folder: Path) -> None:
        file = folder / "block_2.onnx"
        content = bytearray(file.read_bytes())
        content[position] ^= 4
        file.write_bytes(content)
        assert "block_2.onnx was changed after the export" in self.refusal(folder)

    def test_a_truncated_file(self, folder: Path) -> None:
        file = folder / "block_3.onnx"
        file.write_bytes(file.read_bytes()[:-1])
        assert "block_3.onnx has" in self.refusal(folder)

    def test_a_missing_file(self, folder: Path) -> None:
        (folder / "block_1.onnx").unlink()
        assert "block_1.onnx cannot be read (No such file or directory); copy it anew" in self.refusal(folder)

    def test_swapped_blocks(self, folder: Path) -> None:
        (folder / "block_1.onnx").rename(folder / "aside")
        (folder / "block_2.onnx").rename(folder / "block_1.onnx")
        (folder / "aside").rename(folder / "block_2.onnx")
        assert "block_1.onnx" in self.refusal(folder)

    def test_torch_files_are_not_needed(self, folder: Path) -> None:
        (folder / "block_1.pt2").unlink()
        OnnxClassifier(folder)

    @pytest.mark.parametrize(
        ("path", "value"),
        [
            (("policy", "thresholds", 0), 0.4),
            (("policy", "thresholds"), [0.0, -1.0]),
            (("preprocess", "mean", 1), 0.0),
            (("classes", 3), "cat"),
            (("files", 1, "sha256"), "0" * 64),
            (("blocks", 2, "onnx"), "block_1.onnx"),
            (("fingerprint",), "0" * 64),
            (("surplus",), 1),
            (("digest",), "0" * 64),
        ],
    )
    def test_a_changed_manifest(self, path: tuple[str | int, ...], value: Any, folder: Path) -> None:
        content = json.loads((folder / MANIFEST).read_text())
        place = content
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        (folder / MANIFEST).write_text(json.dumps(content))
        assert f"{folder / MANIFEST} was changed after the export" in self.refusal(folder)

    def test_reordering_and_spaces_change_nothing(self, folder: Path) -> None:
        content = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps(dict(reversed(content.items())), indent=7))
        OnnxClassifier(folder)

    @pytest.mark.parametrize("version", [2, "1", None])
    def test_another_version(self, version: Any, folder: Path) -> None:
        content = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps({**content, "version": version}))
        message = self.refusal(folder)
        assert f"{MANIFEST} has version {version!r}, this program reads 1" in message

    @pytest.mark.parametrize("text", ["", "{", "\xff\x00", "[1, 2]", '{"a": 1}', "3"])
    def test_no_manifest_at_all(self, text: str, folder: Path) -> None:
        (folder / MANIFEST).write_text(text, encoding="latin-1")
        assert MANIFEST in self.refusal(folder)

    def test_no_export_folder(self, tmp_path: Path) -> None:
        assert "manifest.json cannot be read (No such file" in self.refusal(tmp_path)
        assert "manifest.json cannot be read (No such file" in self.refusal(tmp_path / "nowhere")
        (tmp_path / "file").write_text("x")
        assert "manifest.json cannot be read (Not a directory)" in self.refusal(tmp_path / "file")

    @pytest.mark.parametrize("providers", [["MyExecutionProvider"], [("MyExecutionProvider", {"device_id": 0})]])
    def test_an_unknown_provider(self, providers: Any, folder: Path) -> None:
        with pytest.raises(ExportError, match=r"providers = MyExecutionProvider: this onnxruntime has .*CPUExec"):
            OnnxClassifier(folder, providers=providers)

    @pytest.mark.parametrize(
        "providers",
        ["CPUExecutionProvider", [3], [("CPUExecutionProvider",)], [("CPUExecutionProvider", 3)], [(1, {})]],
    )
    def test_providers_that_are_none(self, providers: Any, folder: Path) -> None:
        with pytest.raises(ExportError, match=r"providers = .*: give a list, such as \['CPUExecutionProvider'\]"):
            OnnxClassifier(folder, providers=providers)

    def test_a_provider_that_does_not_start(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """As CUDA's without its libraries, in which place onnxruntime takes the CPU and says nothing."""
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPU"])
        with pytest.raises(ExportError, match=r"CUDAExecutionProvider: onnxruntime .* cannot start it on this machine"):
            OnnxClassifier(folder, providers=["CUDAExecutionProvider"])

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"threads": 0}, "threads = 0: give 1 or more"),
            (
                {"session_options": {"intra_op_num_threads": 1}},
                "session_options is a dict; give an onnxruntime.Session",
            ),
            ({"threads": 2, "session_options": onnxruntime.SessionOptions()}, "set session_options.intra_op_num_thr"),
        ],
    )
    def test_wrong_session_options(self, settings: dict[str, Any], message: str, folder: Path) -> None:
        with pytest.raises(ExportError, match=message):
            OnnxClassifier(folder, **settings)

    def test_without_onnxruntime(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        assert "onnxruntime is not installed; pip install 'onnxruntime>=1.20'" in self.refusal(folder)


def test_onnxruntimes_own_options_are_taken(exported: Export, digit_images: Tensor, tmp_path: Path) -> None:
    folder = exported("resnet").folder
    wanted = OnnxClassifier(folder, threads=1).predict(digit_images)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")  # written by whoever reads the options
    for providers in ([("CPUExecutionProvider", {})], [["CPUExecutionProvider", {"arena": "1"}]], []):
        found = OnnxClassifier(folder, providers=providers, session_options=options).predict(digit_images)
        for part, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(part, other, atol=1e-6)
    assert (tmp_path / "optimized.onnx").is_file()


def test_policies_of_others_are_refused(exported: Export) -> None:
    done = exported("resnet")
    classifier = OnnxClassifier(done.folder)
    assert (classifier.policy, classifier.classes) == (done.policy, CLASSES)
    other = NetworkIdentity(backbone="resnet18", exits=["a", "b"], fingerprint="0" * 64)
    with pytest.raises(PolicyError, match=r"calibrated for other weights \(resnet18, fingerprint 000000000000\)"):
        classifier.set_policy(Policy(thresholds=[0.5, 0.5, 0.0], network=other))
    with pytest.raises(PolicyError, match="the policy is for 2 exits, the network has 3"):
        classifier.set_policy(Policy(thresholds=[0.5, 0.0]))
    assert classifier.policy == done.policy
    same = done.policy.with_thresholds([NOBODY, NOBODY, EVERYBODY])
    classifier.set_policy(same)
    assert classifier.policy == same


def test_images_that_do_not_fit(exported: Export, tmp_path: Path) -> None:
    classifier = OnnxClassifier(exported("resnet").folder)
    with pytest.raises(DataError, match=r"images are float32.*takes floats \(N, 3, 32, 32\)"):
        classifier.predict(np.zeros((2, 3, 30, 32), np.float32))
    assert classifier.open_images([]).shape == (0, 3, 32, 32)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(DataError, match=r"text\.png: not an image"):
        classifier.open_images([tmp_path / "text.png"])
    with pytest.raises(DataError, match=r"none\.png cannot be read \(No such file"):
        classifier.open_images([str(tmp_path / "none.png")])
    with pytest.raises(DataError, match="image 0: the file is empty"):
        classifier.open_images([b""])


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("classes", ["one", "too few"]),
        ("blocks.0.state", []),
        ("blocks.0.logits", "nothing"),
        ("blocks.1.state", [{"name": "nothing", "batch": [0, 1]}]),
        ("blocks.0.next_state", [{"name": "state_1_0", "batch": [7, 3]}]),
    ],
    ids=str,
)
def test_a_manifest_that_does_not_fit_its_files_is_one_line(
    part: str, change: Any, exported: Export, tmp_path: Path
) -> None:
    folder = tmp_path / "export"
    shutil.copytree(exported("resnet").folder, folder)
    content = json.loads((folder / MANIFEST).read_text())
    del content["digest"]
    *parents, last = part.split(".")
    node = content
    for name in parents:
        node = node[int(name) if name.isdigit() else name]
    node[last] = change
    content["digest"] = manifest_module._digest(content)
    (folder / MANIFEST).write_text(json.dumps(content))
    images = np.random.default_rng(0).normal(size=(8, 3, 32, 32)).astype(np.float32)
    sound = OnnxClassifier(exported("resnet").folder, threads=1)
    sound.set_policy(Policy(thresholds=[EVERYBODY] * 3))
    half = float(np.median(sound.predict(images).confidences))  # some leave, and some are to be picked out
    classifier = OnnxClassifier(folder)
    classifier.set_policy(Policy(thresholds=[NOBODY if part.startswith("blocks.1") else half, NOBODY, EVERYBODY]))
    with pytest.raises(ExportError, match=r"block \d does not fit the export's manifest"):
        classifier.run(images)


def test_it_counts_what_it_has_seen_as_the_dynamic_runner_does(exported: Export, digit_images: Tensor) -> None:
    one = exported("resnet")
    runner, export = DynamicClassifier(one.network, one.policy, seen=True), OnnxClassifier(one.folder, seen=True)
    for classifier in (runner, export):
        classifier.predict(digit_images.numpy())
    assert runner.seen == export.seen
    assert export.seen.images == len(digit_images)
    assert OnnxClassifier(one.folder, seen=export.seen).seen == export.seen
    with pytest.raises(PolicyError, match="counts of another policy"):
        OnnxClassifier(one.folder, seen=Seen.of(Policy(thresholds=[0.9, 0.0])))
    export.set_policy(Policy(thresholds=[0.3] * (one.policy.exits - 1) + [0.0]))
    assert export.seen.images == 0
    with pytest.raises(PolicyError, match="keeps no counts"):
        _ = OnnxClassifier(one.folder).seen


def test_predict_adds_to_a_file_of_counts(
    exported: Export, digit_files: list[bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every answered image once: the one that warms up is not counted twice, a broken one not at all."""
    for number, content in enumerate([*digit_files[:5], b"no image"]):
        (tmp_path / f"{number}.png").write_bytes(content)
    file, one = tmp_path / "seen.json", exported("resnet")
    words = ["predict", str(one.folder), *map(str, sorted(tmp_path.glob("*.png"))), "--seen", str(file), "--batch", "3"]
    for times in (1, 2):
        with pytest.raises(SystemExit) as ended:
            main([*words, "--json"])
        assert ended.value.code == 1
        shown = capsys.readouterr()
        assert f"counted 5 images: {file} holds {5 * times}" in shown.err
        exits = [json.loads(line)["exit"] for line in shown.out.splitlines()]
        seen = Seen.load(file)
        assert seen.counts.leaving == [times * exits.count(i + 1) for i in range(one.policy.exits)]
    seen.check(one.policy)
    for more, told in (
        (["--policy", "none"], f"--seen {file}: counts of another policy "),
        (["--seen", str(tmp_path / "no" / "x")], "no/x: there is no such folder; make it"),
    ):
        with pytest.raises(SystemExit):
            main([*words, *more])
        shown = capsys.readouterr()
        assert told in shown.err
        assert shown.out == ""  # before anything is answered
    assert Seen.load(file) == seen
