"""The W&B server: its URL, the login for it, whether it answers, and its client run within a time limit."""

from __future__ import annotations

import configparser
import contextlib
import netrc
import os
import signal
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from urllib.parse import urlsplit

from adaptive.errors import MachineError
from adaptive.files import code_root, expanded
from adaptive.foreign_text import shell_words

PUBLIC = "https://api.wandb.ai"
LOGIN = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
PROBE_SECONDS = 10.0


@dataclass(frozen=True)
class ClientResult:
    """The outcome of a client's process: its exit code, None if its time ran out, and what it printed."""

    code: int | None
    out: str
    err: str


def server() -> str:
    """Return the server's URL, as W&B's client finds it: WANDB_BASE_URL, then the one that ``wandb login`` stored."""
    if url := os.environ.get("WANDB_BASE_URL"):
        return url.rstrip("/")
    folder = os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb"
    settings = configparser.ConfigParser(interpolation=None)
    with contextlib.suppress(configparser.Error, OSError):
        settings.read(expanded(folder) / "settings")
    return settings.get("default", "base_url", fallback=PUBLIC).rstrip("/")


def find_key(url: str) -> tuple[str, str]:
    """Return the key for a server and where it was found (a variable or a file); both empty without one."""
    for name in LOGIN:
        if key := os.environ.get(name, "").strip():
            return key, name
    path = expanded(os.environ.get("NETRC") or "~/.netrc")
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        if (entry := netrc.netrc(path).authenticators(urlsplit(url).netloc)) and entry[2]:
            return entry[2], str(path)
    return "", ""


def check_login(url: str) -> None:
    """Check that a key for this server is set or stored (raises MachineError)."""
    if not find_key(url)[0]:
        host = "" if url == PUBLIC else f" --host {shell_words(url)}"
        name = urlsplit(url).netloc.rpartition("@")[2]
        raise MachineError(f"no W&B login for {name}; run: wandb login{host}, or set WANDB_API_KEY")


def check_reachable(url: str, limit: float) -> None:
    """Check that the server answers within 10 seconds, or ``limit`` if less (raises MachineError)."""
    try:
        urllib.request.urlopen(url, timeout=min(limit, PROBE_SECONDS)).close()
    except urllib.error.HTTPError:
        return  # an error is an answer too
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):
            return  # the server is there; whether its certificate is accepted is up to the client
        raise MachineError(
            f"the W&B server {url} does not answer ({reason}); check the network and WANDB_BASE_URL"
        ) from None


def run_client(words: list[str], limit: float, stdin: str = "", folder: str | None = None) -> ClientResult:
    """Run ``python WORDS...`` for at most ``limit`` seconds, and kill it with all processes that it started.

    It works in ``folder``, by default the current one. No module is taken from there (``-P``): a run folder that
    somebody else made may hold a ``wandb`` of its own.
    """
    known = [str(code_root()), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [sys.executable, "-P", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(known)} | ({"WANDB_DIR": folder} if folder else {}),
        start_new_session=True,
    )
    try:
        out, err = process.communicate(stdin, timeout=limit)
        return ClientResult(process.returncode, out, err)
    except subprocess.TimeoutExpired:
        return ClientResult(None, "", "")
    finally:
        # The process group holds the client's service too, which would go on waiting for the server.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None and not stream.closed:
                stream.close()
