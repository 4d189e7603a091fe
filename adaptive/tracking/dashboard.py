"""The dashboard of a run: sends its metrics, tables and pictures to Weights & Biases.

The W&B client runs in a process of its own (``wandb_client.py``), which gets them over a socket with a time limit on
every exchange. So no failure of it, be it a server that is down or hangs, or an error inside the client, can delay or
end training: the first one is logged, the process is ended, and the run goes on without W&B.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptive.config.sections import TrackingConfig
from adaptive.files import link_out_of, write_new
from adaptive.foreign_text import shell_words, visible, without_secrets
from adaptive.tracking.wandb_variables import mode_in_effect, unused_variables

LOGGER = logging.getLogger(__name__)
ENDED = "the client has ended, see client.log in the run's wandb folder"
CLIENT = Path(__file__).with_name("wandb_client.py")
_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
PREEMPTED_SECONDS = 15.0  # to finish after a run was asked to stop; Slurm kills 30 s after its SIGTERM


@dataclass(frozen=True)
class SentRecords:
    """What earlier starts of a run have sent: all records before ``step``, and those of that step with these keys."""

    step: int = -1
    records: frozenset[frozenset[str]] = frozenset()

    def has(self, record: Mapping[str, Any]) -> bool:
        """Whether the dashboard has a record, identified by its ``step`` and its keys."""
        return record["step"] < self.step or (record["step"] == self.step and frozenset(record) in self.records)


class Dashboard:
    """The interface of a dashboard; this one shows nothing, for runs without W&B."""

    shown = SentRecords()

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Send one record; ``step`` is its value on the horizontal axis."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set figures that describe the whole run, such as the best accuracy."""

    def image(self, key: str, path: str | Path) -> None:
        """Show a picture file under ``key``."""

    def table(self, key: str, columns: list[str], rows: list[list[Any]]) -> None:
        """Show a table under ``key``; a cell ``{"image": path}`` is a picture, others are plain values or None."""

    def lines(self, key: str, lines: Mapping[str, Sequence[tuple[float, float]]], title: str, x_name: str) -> None:
        """Show named lines of points (x, y) as one chart under ``key``."""

    def checkpoint(self, path: str | Path, aliases: Sequence[str], about: Mapping[str, Any]) -> None:
        """Register a checkpoint's folder as a version of the run's model, by reference; nothing of it is uploaded."""

    def alert(self, title: str, text: str, error: bool = True) -> None:
        """Notify the user as the dashboard is set up to (mail, Slack)."""

    def finish(self, exit_code: int = 0, preempted: bool = False) -> None:
        """End the run on the dashboard, 0 as finished and anything else as failed, or as ``preempted``: it goes on
        later. May be called twice.
        """


def open_dashboard(
    tracking: TrackingConfig, run_folder: Path, config: Mapping[str, Any], notes: Mapping[str, Any] | None
) -> Dashboard:
    """Open the run's dashboard, or continue it; call on rank 0 alone.

    The run's W&B id lies in ``run_folder/wandb/run_id`` before anything is sent, so that a requeued job continues the
    same W&B run. Passwords and signatures in URLs are removed. Any failure of W&B becomes one logged warning and a
    dashboard that shows nothing, never an exception. Waits at most ``tracking.init_timeout`` seconds, here and in every
    later call. The environment may switch W&B off or offline (see wandb_variables.py).

    Args:
        tracking: mode, project, names and the time limit.
        run_folder: the run's folder; the client's files go to its ``wandb`` folder.
        config: the resolved configuration, shown as the run's.
        notes: further facts about the run (versions, parameters, MACs), shown under ``notes`` in its configuration;
            None keeps those of a continued run.
    """
    mode = mode_in_effect(tracking, os.environ)
    if mode == "disabled":
        return Dashboard()
    for line in unused_variables(tracking, Path(run_folder).resolve().name, os.environ):
        LOGGER.warning("%s", line)
    dashboard = _ClientDashboard(tracking.model_copy(update={"wandb": mode}))
    shown = dict(config) if notes is None else {**config, "notes": dict(notes)}
    dashboard.start(Path(run_folder), without_secrets(shown))
    return dashboard


class _ClientError(Exception):
    """The W&B client failed, ended, or did not answer in time."""


class _ClientDashboard(Dashboard):
    """A dashboard behind the client's process; after its first failure it shows nothing more."""

    def __init__(self, tracking: TrackingConfig) -> None:
        self._tracking, self._limit = tracking, tracking.init_timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._received = b""
        self._folder = ""
        self._offline = False

    def start(self, run_folder: Path, config: Mapping[str, Any]) -> None:
        """Start the client and wait until it has opened the run."""
        tracking = self._tracking
        self._offline = tracking.wandb == "offline"
        with self._watched("start"):
            folder = run_folder.resolve()
            if (link := link_out_of(folder)) is not None:
                raise _ClientError(f"{link} is a link to {link.resolve()}, outside of the run folder; remove it")
            self._launch(folder)
            self._send("init", _init_command(tracking, folder, config, self._limit))
            ready = self._wait_for("ready")
            self._folder = ready["folder"]
            self.shown = SentRecords(ready["step"], frozenset(map(frozenset, ready["records"])))

    def log(self, values: Mapping[str, Any], step: int) -> None:
        if self._socket is not None:
            with self._watched("log"):
                self._check()
                self._send("log", {**values, "step": step})

    def summary(self, values: Mapping[str, Any]) -> None:
        if self._socket is not None:
            with self._watched("log"):
                self._check()
                self._send("summary", dict(values))

    def image(self, key: str, path: str | Path) -> None:
        if self._socket is not None:
            with self._watched("log"):
                self._check()
                self._send("image", {"key": key, "path": str(Path(path).resolve())})

    def table(self, key: str, columns: list[str], rows: list[list[Any]]) -> None:
        if self._socket is not None:
            with self._watched("log"):
                self._check()
                self._send(
                    "table", {"key": key, "columns": columns, "rows": [[_cell(cell) for cell in row] for row in rows]}
                )

    def lines(self, key: str, lines: Mapping[str, Sequence[tuple[float, float]]], title: str, x_name: str) -> None:
        if self._socket is not None:
            with self._watched("log"):
                self._check()
                self._send("lines", {"key": key, "lines": dict(lines), "title": title, "x_name": x_name})

    def checkpoint(self, path: str | Path, aliases: Sequence[str], about: Mapping[str, Any]) -> None:
        if self._socket is not None and self._tracking.checkpoints:
            with self._watched("log"):
                self._check()
                where = Path(path).resolve()
                self._send("checkpoint", {"path": str(where), "aliases": list(aliases), "about": dict(about)})

    def alert(self, title: str, text: str, error: bool = True) -> None:
        if self._socket is not None and self._tracking.alerts:
            with self._watched("alert"):
                self._send("alert", {"title": title, "text": text, "level": "ERROR" if error else "WARN"})

    def finish(self, exit_code: int = 0, preempted: bool = False) -> None:
        if self._socket is None:
            return
        if preempted:
            self._limit = min(self._limit, PREEMPTED_SECONDS)
            self._socket.settimeout(self._limit)
        with self._watched("finish"):
            self._send("finish", {"exit_code": exit_code, "preempted": preempted})
            self._wait_for("finished")
            if self._offline:
                LOGGER.warning("W&B was offline; to upload this run: %s", self._sync_command())
            self._stop(grace=min(self._limit, 5.0))

    @contextlib.contextmanager
    def _watched(self, action: str) -> Iterator[None]:
        """Turn any failure into one warning, and end the client."""
        try:
            yield
        except Exception as error:
            self._stop()
            kept = f"; what was logged so far can be uploaded later: {self._sync_command()}" if self._folder else ""
            LOGGER.warning("W&B is switched off, the run goes on without it (%s: %s)%s", action, error, kept)

    def _launch(self, folder: Path) -> None:
        ours, theirs = socket.socketpair()
        self._socket = ours
        ours.settimeout(self._limit)
        (folder / "wandb").mkdir(parents=True, exist_ok=True)
        with theirs, (folder / "wandb" / "client.log").open("ab") as log:
            # A process group of its own keeps the terminal's Ctrl+C and the scheduler's signals away from the client.
            self._process = subprocess.Popen(
                [sys.executable, str(CLIENT)], stdin=theirs.fileno(), stdout=log, stderr=log, start_new_session=True
            )

    def _send(self, command: str, content: Any) -> None:
        if self._socket is None:
            raise _ClientError("the client has ended")
        try:
            self._socket.sendall((json.dumps({command: content}, default=_scalar) + "\n").encode())
        except TimeoutError:
            raise _ClientError(f"the client took nothing for {self._limit:g} s") from None
        except OSError:
            self._wait_for("nothing")  # raises with the cause, if the client left one

    def _check(self) -> None:
        """Raise if the client has reported an error or ended since the last call."""
        if self._socket is not None and select.select([self._socket], [], [], 0)[0]:
            self._wait_for("nothing")

    def _wait_for(self, kind: str) -> Any:
        """Return the content of the client's next answer, which must be of this kind."""
        deadline = time.monotonic() + self._limit
        while b"\n" not in self._received:
            left = deadline - time.monotonic()
            if self._socket is None or not select.select([self._socket], [], [], max(left, 0))[0]:
                raise _ClientError(f"no answer within {self._limit:g} s")
            try:
                received = self._socket.recv(65536)
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
        folder = Path(self._folder)  # RUN/wandb/run-..., of this start
        if self._offline:
            return f"adaptive dashboard --sync {shell_words(folder.parent.parent)}"
        return f"wandb sync --include-online {shell_words(folder)}"

    def _stop(self, grace: float = 0.5) -> None:
        """Kill the client's process unless it ends by itself within ``grace`` seconds."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
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
        "name": visible(tracking.name or folder.name),
        "group": tracking.group,
        "job_type": tracking.job_type,
        "tags": tracking.tags,
        "config": dict(config),
    }
    return {"run": run, "limit": limit, "program": sys.argv[0], "pid": os.getpid(), "alerts": tracking.alerts}


def _run_id(path: Path) -> str:
    """Return the run's stored W&B id, or store a new one, which later starts of the run find; a sweep gives its own."""
    if not path.exists():
        chosen = os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None
        with contextlib.suppress(FileExistsError):  # another was quicker, whose id it is then
            write_new(path, (chosen or secrets.token_hex(4)) + "\n")
    found = path.read_text(encoding="utf-8", errors="replace").strip()
    if not _ID.fullmatch(found):  # it becomes a part of a folder's name
        raise _ClientError(f"{path} holds no id of a W&B run: {found[:40]!r}; remove it")
    return found


def _cell(value: Any) -> Any:
    """Return a table's cell, a picture's path made absolute: the client has another working folder."""
    return {"image": str(Path(value["image"]).resolve())} if isinstance(value, dict) else value


def _scalar(value: Any) -> Any:
    """Return a scalar of numpy or torch as a number, and anything else that JSON lacks as text."""
    return value.item() if hasattr(value, "item") else str(value)
