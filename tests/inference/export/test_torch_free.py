"""A machine without torch: what it needs is documented, works, and is named where it is missing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import adaptive
from adaptive.commands.main import COMMANDS
from adaptive.requirements import TORCH_FREE
from tests.commands.test_wheel import build_wheel
from tests.helpers.locations import REPOSITORY
from tests.helpers.waiting import PATIENCE
from tests.test_requirements import documented_commands

# Words that are right for each command, as far as the parser goes.
WORDS = {
    "pack": ["builtin:digits", "out"],
    "train": ["configs/quickstart.yaml"],
    "evaluate": ["run"],
    "calibrate": ["run", "--budget", "0.5"],
    "policy": ["check", "run", "--seen", "IMAGE"],
    "predict": ["run", "IMAGE"],
    "report": ["run"],
    "dashboard": ["--dry-run"],
    "export": ["run", "out"],
    "checkpoint": ["run"],
    "submit": ["configs/quickstart.yaml", "--dry-run"],
    "models": ["resnet18"],
    "plan": ["configs/quickstart.yaml"],
    "bench": ["inference", "run"],
    "doctor": ["--quick"],
}
# Runs commands one after another as if nothing but some packages, and what they need in turn, were installed.
AS_IF = """
import contextlib, importlib.abc, io, json, sys
allowed, commands = json.load(sys.stdin)
class Only(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top in sys.stdlib_module_names or top in allowed or top.startswith("_"):
            return None
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Only())
from adaptive.commands.main import main
told = {}
for command, words in commands.items():
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([command, *words])
        except SystemExit as ended:
            code = ended.code
    told[command] = [code, out.getvalue(), err.getvalue()]
import adaptive
for name in adaptive.__all__:
    try:
        getattr(adaptive, name)
    except ImportError as error:
        told[f"adaptive.{name}"] = [None, "", str(error)]
print(json.dumps(told))
"""
# Import names of the extra `onnx` and of what its packages bring along.
ONNX = ["adaptive", "array_api_compat", "filelock", "numpy", "onnxruntime", "PIL", "pydantic", "rich"]
BROUGHT = ["annotated_types", "flatbuffers", "google", "markdown_it", "mdurl", "packaging", "pydantic_core", "pygments"]
BROUGHT += ["typing_extensions", "typing_inspection"]


def as_if(allowed: list[str], commands: dict[str, list[str]], cwd: Path) -> dict[str, tuple[int, str, str]]:
    given = json.dumps([[*allowed, *BROUGHT], commands])
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    ended = subprocess.run(
        [sys.executable, "-c", AS_IF],
        cwd=cwd,
        env=environment,
        input=given,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the commands are told of: a run's and a configuration, and an image."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("places")
    (folder / "run").mkdir()
    shutil.copytree(REPOSITORY / "configs", folder / "configs")
    shutil.copy(REPOSITORY / "configs/quickstart.yaml", folder / "run/config.yaml")
    Image.new("RGB", (32, 32)).save(folder / "IMAGE", "PNG")
    return folder


def test_without_torch_every_command_names_what_it_lacks(places: Path) -> None:
    assert set(WORDS) == set(COMMANDS)
    told = as_if(ONNX, WORDS, places)
    # What runs without torch is there: nothing else may be missing of what an export takes.
    names = {n: told.pop(f"adaptive.{n}")[2] for n in adaptive.__all__ if f"adaptive.{n}" in told}
    assert set(adaptive.__all__) - set(names) == {"OnnxClassifier", "Policy", "Seen"}
    assert set(names.values()) == {
        "torch is not installed; this takes all that Adaptive needs: pip install adaptive-training"
    }
    code, _, err = told.pop("policy")  # it needs the packages once there is something to compare
    assert (code, err.startswith("adaptive policy: error: policy run/policy.json cannot be read")) == (1, True)
    for command, (code, _, err) in told.items():
        if code == 0:
            continue
        assert "Traceback" not in err, (command, err)
        [line] = err.splitlines()
        assert line.startswith(f"adaptive {command}: error: "), line
        assert re.search(r"[\w.-]+ is not installed; this takes all .*: pip install adaptive-training$", line), line
    needy = {"train", "evaluate", "calibrate", "predict", "report", "export", "models", "bench"}
    assert needy <= {command for command, (code, _, _) in told.items() if code == 1}


@pytest.mark.parametrize(
    "lacking",
    [
        "rich",
        *(
            pytest.param(n, marks=pytest.mark.full)
            for n in ("onnxruntime", "pydantic", "PIL", "array_api_compat", "numpy")
        ),
    ],
)
def test_without_one_package_predict_names_it_before_it_answers(
    lacking: str, places: Path, exported: Callable[[str], Any]
) -> None:
    package = {"PIL": "pillow", "array_api_compat": "array-api-compat"}.get(lacking, lacking)
    words = {"predict": [str(exported("resnet").folder), "IMAGE"]}
    code, out, err = as_if([name for name in ONNX if name != lacking], words, places)["predict"]
    [requirement] = [each for each in TORCH_FREE if each.startswith(package)]
    assert (code, out) == (1, "")
    assert err == f"adaptive predict: error: {package} is not installed; pip install '{requirement}'\n"


def test_all_that_an_export_lacks_is_named_at_once(places: Path, exported: Callable[[str], Any]) -> None:
    words = {"predict": [str(exported("resnet").folder), "IMAGE"]}
    _, _, err = as_if(["adaptive", "PIL", "pydantic"], words, places)["predict"]
    lacking = [f"'{each}'" for each in TORCH_FREE if not each.startswith(("pillow", "pydantic"))]
    assert err.endswith(f"; pip install {' '.join(lacking)}\n")


@pytest.mark.full
def test_the_documented_environment_predicts(
    exported: Callable[[str], Any], digit_files: list[bytes], tmp_path: Path
) -> None:
    """A fresh environment, exactly as the page makes it, the wheel of this checkout instead of the index's."""
    venv.create(tmp_path / "env", with_pip=True)
    binaries = tmp_path / "env/bin"
    wheel = build_wheel(tmp_path / "code")
    for command in documented_commands():
        words = command.replace("adaptive-training", str(wheel)).replace("'", "").split()
        done = subprocess.run(
            [binaries / words[0], *words[1:], "--quiet"], capture_output=True, text=True, timeout=PATIENCE, check=False
        )
        if "Failed to establish a new connection" in done.stderr:
            pytest.skip("no package index within reach")
        assert done.returncode == 0, done.stderr
    images = tmp_path / "photos"
    images.mkdir()
    for i, content in enumerate(digit_files[:3]):
        (images / f"{i}.png").write_bytes(content)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [binaries / words[0], *words[1:]],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    folder = exported("resnet").folder
    table = run("adaptive", "predict", folder, images / "0.png")
    assert (table.returncode, table.stderr) == (0, "")
    assert "digit" in table.stdout
    lines = run("adaptive", "predict", folder, images, "--json")
    assert (lines.returncode, lines.stderr) == (0, "")
    rows = [json.loads(line) for line in lines.stdout.splitlines()]
    code = f"""
import sys
from adaptive import OnnxClassifier
classifier = OnnxClassifier({str(folder)!r}, providers=[("CPUExecutionProvider", {{}})])
found = classifier.predict(classifier.open_images([f"photos/{{i}}.png" for i in range(3)]))
print([classifier.classes[label] for label in found.labels], found.exits.tolist(), "torch" in sys.modules)
"""
    python = run("python", "-c", code)
    assert python.returncode == 0, python.stderr
    assert python.stdout.strip() == f"{[row['label'] for row in rows]} {[row['exit'] for row in rows]} False"
    for command, words in WORDS.items():
        ended = run("adaptive", command, *words)
        assert "Traceback" not in ended.stderr, (command, ended.stderr)
    train = run("adaptive", "train", "x.yaml")
    assert (train.returncode, train.stdout) == (1, "")
    assert re.fullmatch(
        r"adaptive train: error: \S+ is not installed; this takes all .*: pip install adaptive-training\n", train.stderr
    )
