"""Packages that are missing here: which one an import needs, and the command that installs it."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec

from adaptive.errors import PackageError, reason_of

DISTRIBUTION = "adaptive-training"

# What runs an export where neither torch nor timm is: the extra `onnx` of setup.py.
TORCH_FREE = (
    "array-api-compat>=1.12",
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
    if not module or module == "adaptive":
        return None
    package = _IMPORTED_AS.get(module, module.replace("_", "-"))
    if _found(module):
        return PackageError(
            f"{package} cannot be used ({reason_of(error)}); install it anew: pip install --force-reinstall {package}"
        )
    return PackageError(f"{package} is not installed; {_remedy(package)}")


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
