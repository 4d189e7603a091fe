"""Atomic writes that survive a crash or a power loss, JSON, checksums, where the code lies, installed versions."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import stat
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

_ASIDE = re.compile(r"\..+\.\d+-[0-9a-f]{8}")


def code_root() -> Path:
    """Return the folder that holds the package: a checkout, a frozen copy of one, or where a wheel was installed."""
    return Path(__file__).resolve().parent.parent


def code_sources() -> list[Path]:
    """Return the package's own Python files, sorted."""
    return sorted((code_root() / "adaptive").rglob("*.py"))


def code_digest() -> str:
    """Return a checksum of the package's own sources, as they lie on the disk now."""
    digest = hashlib.sha256()
    for path in code_sources():
        digest.update(str(path.relative_to(code_root())).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def installed_version(package: str) -> str | None:
    """Return the version of an installed package, or None: it may not be needed, or come by PYTHONPATH."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def expanded(path: str) -> Path:
    """Return a path with ``~`` replaced by the home folder; as it is for a user who has none, a container's say."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's content, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def json_text(value: Any, indent: int | None = None, ascii_only: bool = True) -> str:
    """Return JSON that any reader takes: NaN and infinities, for which it has no words, become null."""
    from pydantic_core import to_jsonable_python

    plain = to_jsonable_python(value, inf_nan_mode="null")
    return json.dumps(plain, indent=indent, allow_nan=False, ensure_ascii=ascii_only)


def aside_of(path: Path) -> Path:
    """Return a name beside ``path``, in which to write what is renamed once it is whole.

    Nobody else has it: process numbers alone repeat on other machines, and in containers are often the same.
    """
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")


def tidy_asides(folder: Path, age: float = 3600.0) -> None:
    """Remove what processes that were killed while they wrote have left in a folder; what is younger may be in use.

    ``age`` is in seconds.
    """
    for path in folder.glob(".*"):
        with suppress(OSError):
            if _ASIDE.fullmatch(path.name) and time.time() - path.lstat().st_mtime > age:
                path.unlink()


def write_new(path: Path, content: str | bytes) -> None:
    """Write a small file as `write_atomically` does, unless there is one.

    Raises:
        FileExistsError: somebody was quicker.
    """
    temporary = aside_of(path)
    try:
        write_atomically(temporary, content)
        publish_new(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def publish_new(temporary: Path, path: Path) -> None:
    """Give a file that was written aside its name, which no file has yet (raises FileExistsError)."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links, where nothing tells in time
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        temporary.rename(path)
    else:
        temporary.unlink()
    sync_folder(path.parent)


def write_atomically(path: Path, content: str | bytes, private: bool = False) -> None:
    """Write a small file so that readers, and a crash, see the old content or the new and nothing between.

    A link at ``path`` is replaced, not followed. With ``private`` its owner alone may read it; else the umask counts.
    """
    temporary = aside_of(path)
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with os.fdopen(os.open(temporary, flags, 0o600 if private else 0o666), "wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def let_umask_count(path: Path) -> None:
    """Give a file that a library made for its owner alone the mode that any new file has in its folder."""
    probe = path.with_name(f".{path.name}.mode")
    probe.unlink(missing_ok=True)
    try:
        with probe.open("xb") as stream:
            mode = stat.S_IMODE(os.fstat(stream.fileno()).st_mode)
    finally:
        probe.unlink(missing_ok=True)
    path.chmod(mode)


def link_out_of(folder: Path) -> Path | None:
    """Return an entry of a folder, or of a folder in it, that is a link to elsewhere; None where there is none.

    Who writes into a folder of somebody else's looks first: through such a link it would write elsewhere. W&B's client
    makes some to its own logs (``wandb/debug*.log``), and nothing writes through them.
    """
    home = folder.resolve()
    for path in (*folder.glob("*"), *folder.glob("*/*")):
        ours = path.parent.name != "wandb" or not path.match("debug*.log")
        if ours and path.is_symlink() and not path.resolve().is_relative_to(home):
            return path
    return None


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename in it survives a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
