"""Missing packages: one line that names the package and the command; setup.py and the pages name the same ones."""

from __future__ import annotations

import ast
import re

from adaptive.requirements import TORCH_FREE, missing_package
from tests.helpers.locations import REPOSITORY


def test_faults_of_our_own_are_no_missing_packages() -> None:
    assert missing_package(ImportError("cannot import name 'x'", name="adaptive.files")) is None
    assert missing_package(ImportError("who knows")) is None
    damaged = missing_package(ImportError("libcudart.so.13: cannot open shared object file", name="torch._C"))
    assert str(damaged) == (
        "torch cannot be used (libcudart.so.13: cannot open shared object file); install it anew: "
        "pip install --force-reinstall torch"
    )
    assert str(missing_package(ModuleNotFoundError("no", name="flatbuffers_x.y"))).endswith("pip install flatbuffers-x")


def documented_commands() -> list[str]:
    """The pip commands of docs/inference.md for a machine that only predicts, in order."""
    text = (REPOSITORY / "docs/inference.md").read_text()
    return re.findall(r"^pip install .*$", text[text.index("a machine that only predicts") :], re.MULTILINE)[:2]


def test_setup_and_pages_name_the_same_packages() -> None:
    tree = ast.parse((REPOSITORY / "setup.py").read_text())
    [call] = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "setup"]
    given = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg in ("install_requires", "extras_require")}
    assert tuple(given["extras_require"]["onnx"]) == TORCH_FREE
    assert set(TORCH_FREE) - {"onnxruntime>=1.20"} <= set(given["install_requires"])
    assert documented_commands() == [
        "pip install --no-deps adaptive-training",
        "pip install " + " ".join(f"'{each}'" for each in TORCH_FREE),
    ]
