"""Checks of Python, packages, and the operator that DeepSpeed compiles at its first start."""

from __future__ import annotations

import ast
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections import defaultdict
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from adaptive.doctor.finding import Check, CheckSettings, Finding, error, ok, warning
from adaptive.doctor.programs import answer, run_program, start_script
from adaptive.doctor.torch_versions import TRIED, install_command, known_fault, tried
from adaptive.files import code_root, installed_version
from adaptive.foreign_text import shell_words
from adaptive.requirements import DISTRIBUTION as OWN
from adaptive.requirements import other_version, reinstall
from adaptive.training.engine.operators import lock_age, lock_state

OPERATOR = "deepspeed_shm_comm"
PROBE_SECONDS = 120.0  # importing torch alone takes half a minute from a busy file server


@lru_cache(maxsize=1)
def torch_facts() -> dict[str, Any]:
    """Return what `torch_probe` finds, asked once; ``error`` says why torch does not answer."""
    return answer(start_script("torch_probe").wait(PROBE_SECONDS))


def python(_: CheckSettings) -> Finding:
    """Check the interpreter's version."""
    wanted, here = _declared("python_requires"), f"Python {platform.python_version()} in {sys.prefix}"
    try:
        wanted = wanted or metadata.metadata(OWN)["Requires-Python"]
    except metadata.PackageNotFoundError:
        return error(f"Python {platform.python_version()}, but {OWN} is not installed in it", "pip install -e .")
    if platform.python_version() not in SpecifierSet(wanted, prereleases=True):
        return error(f"{here}, needed is {wanted}", "python3.12 -m venv .venv && .venv/bin/pip install -e .")
    return ok(here)


def packages(_: CheckSettings) -> Finding:
    """Check installed versions against setup.py, and that no package is installed twice."""
    needed = [Requirement(line) for line in _requirements()]
    needed = [one for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    wrong, names = [], {canonicalize_name(one.name): one for one in needed}
    without = _without_dashboard()
    for one in needed:
        try:
            version = metadata.version(one.name)
        except metadata.PackageNotFoundError:
            if one.name != without:
                wrong.append((one, f"{one.name} is missing"))
            continue
        if not one.specifier.contains(version, prereleases=True):
            wrong.append((one, f"{one.name} {version}, needed {one.specifier}"))
    if wrong:
        words = " ".join(f"'{one.name}{_extras(one)}{one.specifier}'" for one, _ in wrong)
        return error("; ".join(text for _, text in wrong), f"pip install {words}")
    if without:
        return warning(f"{without} is missing: training needs tracking.wandb=disabled", f"pip install {without}")
    if twice := _twice(names):
        name, places = next(iter(twice.items()))
        return warning(
            f"{name} is installed {len(places)} times: {', '.join(places)}; which one is used depends on sys.path",
            f"pip uninstall -y {name} && pip install '{names[name]}'",
        )
    return ok(f"{len(needed)} packages as setup.py asks for: torch {metadata.version('torch')}, "
              f"deepspeed {metadata.version('deepspeed')}, timm {metadata.version('timm')}")  # fmt: skip


def name(_: CheckSettings) -> Finding:
    """Check that no other package has this one's name, and that none has replaced or removed its files."""
    try:
        own = metadata.distribution(OWN)
    except metadata.PackageNotFoundError:
        own = None
    listed = (own.files or []) if own is not None and Path(str(own.locate_file(""))).resolve() == code_root() else []
    missing = [str(file) for file in listed if file.suffix == ".py" and not Path(str(file.locate())).exists()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        return error(f"{missing[0]}{more} of {OWN} is missing in {code_root()}", reinstall())
    if other := other_version():
        found = f"adaptive {other} of PyPI, another package of the same name, is installed too"
        return warning(f"{found}: updated or removed, it takes adaptive/__init__.py along", reinstall())
    return ok(f"adaptive is {OWN}'s, in {code_root()}")


def _without_dashboard() -> str:
    """Return the dashboard's package where it is missing and, by WANDB_MODE, not wanted; else an empty string."""
    return "wandb" if os.environ.get("WANDB_MODE") == "disabled" and installed_version("wandb") is None else ""


def _requirements() -> list[str]:
    """Return the packages that setup.py asks for."""
    return _declared("install_requires") or metadata.requires(OWN) or []


def _declared(name: str) -> Any:
    """Return an argument of the checkout's setup.py, which may be newer than the installation's metadata, or None."""
    setup = code_root() / "setup.py"
    if setup.is_file():
        for node in ast.walk(ast.parse(setup.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == name:
                return ast.literal_eval(node.value)
    return None


def _extras(one: Requirement) -> str:
    return f"[{','.join(sorted(one.extras))}]" if one.extras else ""


def _twice(names: dict[Any, Requirement]) -> dict[Any, list[str]]:
    """Return the needed packages with more than one installation on the path, and where these are."""
    places = defaultdict(set)
    for found in metadata.distributions():
        name = canonicalize_name(found.metadata["Name"] or "")
        where = Path(str(found.locate_file(""))).resolve()
        if name in names and where.name != "_vendor":  # setuptools puts its own copies on the path, at its end
            places[name].add(f"{found.version} in {where}")
    return {name: sorted(where) for name, where in places.items() if len(where) > 1}


def torchvision(_: CheckSettings) -> Finding:
    """Check an operator of torchvision, which fails if it was built for another torch, and that the pair was tried."""
    facts = torch_facts()
    if "error" in facts:
        return error(f"torch cannot be imported: {facts['error']}", install_command())
    torch, vision = facts["torch"], facts.get("torchvision", installed_version("torchvision") or "0")
    fault, remedy = known_fault(torch, vision), install_command(torch)
    if "torchvision_error" in facts:
        return error(f"torchvision does not fit torch {torch}: {fault or facts['torchvision_error']}", remedy)
    if not tried(torch, vision):
        pairs = ", ".join(dict.fromkeys(f"{pair.torch} with {pair.torchvision}" for pair in TRIED))
        return warning(f"torch {torch} with torchvision {vision} is no pair that was tried ({pairs})", remedy)
    return ok(f"torch {torch} and torchvision {vision} work together")


def deepspeed(_: CheckSettings) -> Finding:
    """Check that DeepSpeed can be imported, in a process of its own, and which accelerator it finds."""
    script = (
        "import deepspeed; from deepspeed.accelerator import get_accelerator as a; "
        "print(deepspeed.__version__, a()._name)"
    )
    ended = run_program([sys.executable, "-P", "-c", script], PROBE_SECONDS)
    if ended.code != 0:
        return error(f"deepspeed cannot be imported: {ended.reason}", "pip install 'deepspeed>=0.19.8,<0.20'")
    version, accelerator = ended.out.split()[-2:]
    forced = os.environ.get("DS_ACCELERATOR")
    return ok(f"deepspeed {version} on {accelerator}{f' (DS_ACCELERATOR={forced})' if forced else ''}")


def compiler(_: CheckSettings) -> Finding:
    """Check that ninja and a C++ compiler are on PATH."""
    if shutil.which("ninja") is None:
        beside = Path(sys.prefix) / "bin"
        there = (beside / "ninja").exists()
        remedy = f'export PATH="{beside}:$PATH"' if there else "pip install ninja"
        return error("ninja is not on PATH; DeepSpeed needs it at every start on CPUs", remedy)
    name = os.environ.get("CXX", "c++")
    found = shutil.which(name)
    if found is None:
        bad = warning if _compiled() else error
        where = "CXX names it" if "CXX" in os.environ else "DeepSpeed compiles an operator at its first start on CPUs"
        return bad(f"no C++ compiler {name} on PATH; {where}", "apt-get install -y g++   # and unset CXX")
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return warning("Python's headers are missing; torch.compile needs them", "apt-get install -y python3-dev")
    version = subprocess.run([found, "-dumpfullversion"], capture_output=True, text=True, timeout=10).stdout.strip()
    return ok(f"ninja {shutil.which('ninja')}, {name} {version}")


def extensions_folders() -> list[Path]:
    """Return where torch keeps compiled operators; without TORCH_EXTENSIONS_DIR one folder per Python and CUDA."""
    if root := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return [Path(root)]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "torch_extensions"
    version = f"py{sys.version_info.major}{sys.version_info.minor}"
    return sorted(cache.glob(f"{version}*_*")) or [cache]


def _compiled() -> bool:
    return any(path for folder in extensions_folders() for path in folder.glob(f"{OPERATOR}*/{OPERATOR}*.so"))


def extensions(_: CheckSettings) -> Finding:
    """Check that the folder of compiled operators can be written and holds no lock that a killed process left."""
    remedy = f"export TORCH_EXTENSIONS_DIR={shell_words(Path.cwd() / 'torch_extensions')}   # or another of your own"
    try:
        folders = extensions_folders()
    except RuntimeError:
        return error("this user has no home folder, and DeepSpeed compiles an operator into a folder there", remedy)
    for folder in folders:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            return error(
                f"{folder} cannot be written; DeepSpeed compiles an operator into it",
                remedy,
            )
        for path in (path for name in ("", "lock", "build.ninja") for path in folder.glob(f"{OPERATOR}/{name}")):
            if not os.access(path, os.W_OK):
                return error(f"{path} cannot be written, which torch does at every start on CPUs", remedy)
        for lock in folder.glob(f"{OPERATOR}*/lock"):
            if problem := _lock_problem(lock):
                return problem
    shown = ", ".join(map(str, extensions_folders()))
    if _compiled():
        return ok(f"{shown}: DeepSpeed's operator is compiled")
    return ok(f"{shown}: DeepSpeed's operator is not compiled yet; the first start on CPUs takes one to two minutes")


def _lock_problem(lock: Path) -> Finding | None:
    """Return the warning about a lock that is held or was left by a killed process, or None."""
    state, age = lock_state(lock), lock_age(lock) or 0.0
    if state == "held":
        return warning(
            f"{lock} is held: another process compiles", f"fuser -v {shell_words(lock)}   # who; wait for its end"
        )
    if state == "left":
        left = f"{lock} was left {age / 3600:.1f} h ago by a compilation that was killed"
        return warning(
            f"{left}; the next training removes it, other programs wait for it for ever", f"rm {shell_words(lock)}"
        )
    if state == "young":
        return warning(
            f"{lock} is {age:.0f} s old: another process compiles, or was killed",
            f"rm {shell_words(lock)}   # if none does",
        )
    return None


CHECKS = [
    Check("python", "software", python),
    Check("packages", "software", packages),
    Check("name", "software", name),
    Check("torchvision", "software", torchvision, slow=True, limit=PROBE_SECONDS + 5),
    Check("deepspeed", "software", deepspeed, slow=True, limit=PROBE_SECONDS + 5),
    Check("compiler", "software", compiler),
    Check("extensions", "software", extensions),
]
