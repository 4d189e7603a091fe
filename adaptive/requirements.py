"""Packages that are missing here, or in the way: which one it is, and the command that mends it."""

from __future__ import annotations

import json
import re
import sys
from importlib.metadata import PackageNotFoundError, distribution, requires, version
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

from adaptive.errors import PackageError, reason_of
from adaptive.foreign_text import shell_words

DISTRIBUTION = "adaptive-training"
OTHER = "adaptive"  # a distribution on PyPI, whose package has the name of this one

# What runs an export where neither torch nor timm is: the extra `onnx` of setup.py.
TORCH_FREE = (
    "array-api-compat>=1.12",
    "filelock>=3.30",
    "numpy>=1.26",
    "onnxruntime>=1.20",
    "pillow>=11",
    "pydantic>=2.10,<3",
    "rich>=13.9",
)
_IMPORTED_AS = {"PIL": "pillow", "ruamel": "ruamel.yaml", "sklearn": "scikit-learn"}


def missing_package(error: ImportError) -> PackageError | None:
    """Return a failed import of somebody else's package as an error of one line; None where the fault is our own."""
    module = (error.name or "").split(".")[0]
    if module == "adaptive" and (other := other_version()):
        return PackageError(
            f"Adaptive is incomplete ({reason_of(error)}): another package of the name, adaptive {other} of PyPI, was "
            f"installed over it; {reinstall()}"
        )
    if not module or module == "adaptive":
        return None
    package = _IMPORTED_AS.get(module, module.replace("_", "-"))
    if _found(module):
        return PackageError(
            f"{package} cannot be used ({reason_of(error)}); install it anew: pip install --force-reinstall {package}"
        )
    return PackageError(f"{package} is not installed; {_remedy(package)}")


def other_version() -> str | None:
    """Return the version of PyPI's other package named ``adaptive``, or None where it is not installed."""
    try:
        return version(OTHER)
    except PackageNotFoundError:
        return None


def name_taken() -> PackageError | None:
    """Return what became of this package's ``__init__.py`` where PyPI's other package replaced or removed it."""
    package, here = sys.modules["adaptive"], Path(__file__).with_name("__init__.py")
    if "create_model" in getattr(package, "__all__", ()):
        return None
    if other := other_version():
        where = getattr(package, "__file__", None) or here
        return PackageError(
            f"{where} is not Adaptive's: another package of the name, adaptive {other} of PyPI, was installed over it; "
            f"{reinstall()}"
        )
    what = "is not Adaptive's" if here.exists() else "is missing"
    return PackageError(
        f"{here} {what}: another package of the name, adaptive of PyPI, was installed over it and removed again; "
        f"{reinstall()}"
    )


def reinstall() -> str:
    """Return the command that installs this package anew, from where it came, after PyPI's other one is removed."""
    source = DISTRIBUTION
    try:
        came = json.loads(distribution(DISTRIBUTION).read_text("direct_url.json") or "{}")
    except PackageNotFoundError:
        came = {}
    address = urlsplit(came.get("url", ""))
    if address.scheme == "file":
        editable = "-e " if came.get("dir_info", {}).get("editable") else ""
        source = editable + shell_words(unquote(address.path))
    removal = f"pip uninstall -y {OTHER} && " if other_version() else ""
    return f"{removal}pip install --force-reinstall --no-deps {source}"


def _remedy(package: str) -> str:
    """The command that installs a package; on a machine without torch with all others that it takes to run exports."""
    if any(_name(requirement) == package for requirement in TORCH_FREE):
        lacking = [each for each in TORCH_FREE if _name(each) == package or not _found(_module(_name(each)))]
        return f"pip install {' '.join(map(repr, lacking))}"
    for requirement in _declared():
        extra = re.search(r"extra == .(\S+).$", requirement)
        if _name(requirement) == package and extra and extra[1] not in ("test", "dev"):
            return f"pip install '{DISTRIBUTION}[{extra[1]}]'"
        if _name(requirement) == package and not extra:
            return f"this takes all that Adaptive needs: pip install {DISTRIBUTION}"
    return f"pip install {package}"


def _declared() -> list[str]:
    """The requirements that this project was installed with; none where it comes by PYTHONPATH."""
    try:
        return requires(DISTRIBUTION) or []
    except PackageNotFoundError:
        return []


def _name(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]


def _module(package: str) -> str:
    return next((module for module, name in _IMPORTED_AS.items() if name == package), package.replace("-", "_"))


def _found(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False
