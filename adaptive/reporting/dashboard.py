"""The window on a run: its records in Weights & Biases, as far as W&B lives.

The W&B client runs in a process of its own (``wandb_client.py``), fed over a socket with a time limit on every
exchange. So nothing that happens to it, a dead server, one that never answers, an error inside the client, can hold
up or end training: the first trouble is reported once, the process is ended, and the run goes on without W&B.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import select
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaptive.config import TrackingConfig

LOGGER = logging.getLogger(__name__)
ENDED = "the client has ended, see client.log in the run's wandb folder"
CLIENT = Path(__file__).with_name("wandb_client.py")


class Dashboard:
    """A dashboard that shows nothing: what a run without W&B gets, and what every dashboard offers."""

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Send one record; ``step`` becomes its position on the horizontal axis."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set figures that describe the whole run, such as the best accuracy."""

    def image(self, key: str, path: str | Path) -> None:
        """Show a picture file under ``key``."""

    def finish(self, exit_code: int = 0) -> None:
        """End the run on the dashboard, 0 as finished and anything else as failed; may be called twice."""


def open_dashboard(
    tracking: TrackingConfig, run_folder: Path, config: Mapping[str, Any], notes: Mapping[str, Any]
) -> Dashboard:
    """Open the run's dashboard, or continue it; call on rank 0 alone.

    The run's W&B id lies in ``run_folder/wandb/run_id`` before anything is sent, so that a requeued job continues the
    same W&B run. Never raises for W&B's sake: whatever goes wrong becomes one logged warning and a dashboard that
    shows nothing. Waits at most ``tracking.init_timeout`` seconds, here and in every later call.

    Args:
        tracking: mode, project, names and the time limit.
        run_folder: the run's folder; the client's files go to its ``wandb`` folder.
        config: the resolved configuration, shown as the run's.
        notes: what else describes the run (versions, parameters, MACs), shown under ``notes`` in its configuration.
    """
    if tracking.wandb == "disabled":
        return Dashboard()
    dashboard = _ClientDashboard(tracking.init_timeout)
    dashboard.start(tracking, Path(run_folder), {**config, "notes": dict(notes)})
    return dashboard


class _ClientError(Exception):
    """The W&B client failed, ended, or did not answer in time."""


class _ClientDashboard(Dashboard):
    """A dashboard fed through the client's process; after the first trouble it shows nothing more."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._process: subprocess.Popen[bytes] | None = None
        self._link: socket.socket | None = None
        self._received = b""
        self._folder = ""
        self._offline = False

    def start(self, tracking: TrackingConfig, run_folder: Path, config: Mapping[str, Any]) -> None:
        """Start the client and wait until it has opened the run."""
        self._offline = tracking.wandb == "offline"
        with self._watched("start"):
            folder = run_folder.resolve()
            self._launch(folder)
            self._send("init", _init_command(tracking, folder, config, self._limit))
            self._folder = self._wait_for("ready")

    def log(self, values: Mapping[str, Any], step: int) -> None:
        if self._link is not None:
            with self._watched("log"):
                self._check()
                self._send("log", {**values, "step": step})

    def summary(self, values: Mapping[str, Any]) -> None:
        if self._link is not None:
            with self._watched("log"):
                self._check()
                self._send("summary", dict(values))

    def image(self, key: str, path: str | Path) -> None:
        if self._link is not None:
            with self._watched("log"):
                self._check()
                self._send("image", {"key": key, "path": str(Path(path).resolve())})

    def finish(self, exit_code: int = 0) -> None:
        if self._link is None:
            return
        with self._watched("finish"):
            self._send("finish", exit_code)
            self._wait_for("finished")
            if self._offline:
                LOGGER.warning("W&B was offline; to upload this run: %s", self._sync_command())
            self._stop(grace=min(self._limit, 5.0))

    @contextlib.contextmanager
    def _watched(self, action: str) -> Iterator[None]:
        """Turn any trouble into the one warning, and end the client."""
        try:
            yield
        except Exception as error:
            self._stop()
            kept = f"; what was logged so far can be uploaded later: {self._sync_command()}" if self._folder else ""
            LOGGER.warning("W&B is switched off, the run goes on without it (%s: %s)%s", action, error, kept)

    def _launch(self, folder: Path) -> None:
        ours, theirs = socket.socketpair()
        self._link = ours
        ours.settimeout(self._limit)
        (folder / "wandb").mkdir(parents=True, exist_ok=True)
        with theirs, (folder / "wandb" / "client.log").open("ab") as log:
            # A process group of its own keeps the terminal's Ctrl+C and the scheduler's signals away from the client.
            self._process = subprocess.Popen(
                [sys.executable, str(CLIENT)], stdin=theirs.fileno(), stdout=log, stderr=log, start_new_session=True
            )

    def _send(self, command: str, content: Any) -> None:
        if self._link is None:
            raise _ClientError("the client has ended")
        try:
            self._link.sendall((json.dumps({command: content}, default=_scalar) + "\n").encode())
        except TimeoutError:
            raise _ClientError(f"the client took nothing for {self._limit:g} s") from None
        except OSError:
            self._wait_for("nothing")  # raises with the cause, if the client left one

    def _check(self) -> None:
        """Raise if the client has reported an error or ended since the last call."""
        if self._link is not None and select.select([self._link], [], [], 0)[0]:
            self._wait_for("nothing")

    def _wait_for(self, kind: str) -> Any:
        """Return the content of the client's next answer, which must be of this kind."""
        deadline = time.monotonic() + self._limit
        while b"\n" not in self._received:
            left = deadline - time.monotonic()
            if self._link is None or not select.select([self._link], [], [], max(left, 0))[0]:
                raise _ClientError(f"no answer within {self._limit:g} s")
            try:
                received = self._link.recv(65536)
            except ConnectionError:
                received = b""
            if not received:
                raise _ClientError(ENDED)
            self._received += received
        line, self._received = self._received.split(b"\n", 1)
        [(answer, content)] = json.loads(line).items()
        if answer != kind:
            raise _ClientError(str(content))
        return content

    def _sync_command(self) -> str:
        # All starts of a requeued run are one W&B run: the pattern takes them together, in order.
        folder = Path(self._folder)
        return f"wandb sync {shlex.quote(str(folder.parent))}/*run-*-{folder.name.rpartition('-')[2]}"

    def _stop(self, grace: float = 0.5) -> None:
        """End the client's process, whatever state it is in, after ``grace`` seconds to leave by itself."""
        if self._link is not None:
            self._link.close()
            self._link = None
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=grace)
            self._process.kill()
            self._process.wait()
            self._process = None


def _init_command(tracking: TrackingConfig, folder: Path, config: Mapping[str, Any], limit: float) -> dict[str, Any]:
    run = {
        "id": _run_id(folder / "wandb" / "run_id"),
        "resume": "allow",
        "dir": str(folder),
        "mode": tracking.wandb,
        "project": tracking.project,
        "entity": tracking.entity,
        "name": tracking.name or folder.name,
        "group": tracking.group,
        "tags": tracking.tags,
        "config": dict(config),
    }
    return {"run": run, "limit": limit, "program": sys.argv[0], "pid": os.getpid()}


def _run_id(path: Path) -> str:
    """Return the run's stored W&B id, or store a new one: a requeued job must find it, however early it was killed."""
    if not path.exists():
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        temporary.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
        temporary.replace(path)
    return path.read_text(encoding="utf-8").strip()


def _scalar(value: Any) -> Any:
    """Return a scalar of numpy or torch, or anything else JSON does not know, in a form that it does."""
    return value.item() if hasattr(value, "item") else str(value)
