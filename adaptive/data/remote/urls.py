"""Datasets at a URL: http, https, s3, gs, or any other protocol that fsspec knows."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit, urlunsplit

import fsspec
from fsspec.asyn import get_loop
from fsspec.spec import AbstractFileSystem

from adaptive.config.sections import DataConfig
from adaptive.data.remote.pipes import PipeFolder
from adaptive.data.remote.transfer import ByteCounter, RemoteFolder, StartedTransfer, in_thread, status
from adaptive.errors import ConfigError, DataError, MachineError
from adaptive.foreign_text import PIPE, is_struck_out, shown_location, without_secrets_of

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_CLOSE_SECONDS = 2.0
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}


def is_remote(path: str | Path) -> bool:
    """Say whether a dataset's path is a URL or a command rather than a folder."""
    return isinstance(path, str) and (path.startswith(PIPE) or _URL.match(path) is not None)


def open_remote(path: str, settings: DataConfig) -> RemoteFolder:
    """Return the folder at a URL or behind a command, without reading anything of it yet.

    Raises:
        ConfigError: a command, and data.pipe does not allow it; or a location that was written without its secrets.
        DataError: an unknown kind of URL.
        MachineError: the package for this kind of URL is not installed.
    """
    where = shown_location(path)
    if is_struck_out(path):
        raise ConfigError(
            f"data.path = {where!r} was written without its secrets, which config.private.yaml beside it holds for its "
            "owner; give the location again, with data.path=LOCATION, or --data LOCATION for a finished run"
        )
    if path.startswith(PIPE):
        if not settings.pipe:
            raise ConfigError(
                f"data.path = {where!r} would run a command in a shell, as you and with your rights, for every file; "
                "if you wrote that command yourself, allow it with data.pipe=true on this command line"
            )
        return PipeFolder(path, settings.attempts, settings.timeout)
    protocol = _split(path).scheme.lower()
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError:
        package = _PACKAGES.get(protocol, f"what fsspec needs for {protocol}")
        raise MachineError(f"data.path = {where!r} needs {package}; install it with: pip install {package}") from None
    except ValueError:
        raise DataError(
            f"data.path = {where!r}: {protocol} is no kind of URL that fsspec knows; use http, s3 or gs"
        ) from (None)
    return UrlFolder(path, settings.attempts, settings.timeout)


def shown_file(location: str, name: str) -> str:
    """Return a file of a dataset at a URL or behind a command, for messages: without user, password and query."""
    if location.startswith(PIPE):
        return f"{name} of {shown_location(location)}"
    parts = _split(_file_url(location, name))
    bare = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))
    return shown_location(bare)


def _file_url(location: str, name: str) -> str:
    parts = _split(location)
    if parts.scheme.lower() in ("http", "https"):
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))
    return f"{location.rstrip('/')}/{name}"


def _split(location: str) -> SplitResult:
    """Return the parts of a URL (raises ConfigError where it is none, such as an unclosed address in brackets)."""
    try:
        return urlsplit(location)
    except ValueError as error:
        raise ConfigError(f"data.path = {shown_location(location)!r} is no URL: {error}; mend it") from None


@dataclass(frozen=True)
class UrlFolder(RemoteFolder):
    """A folder at a URL; each process has its own connection pool, also after a fork."""

    _pool: dict[int, Any] = field(default_factory=dict, compare=False)
    _opening: threading.Lock = field(default_factory=threading.Lock, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {"location": self.location, "attempts": self.attempts, "timeout": self.timeout}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def url(self, name: str) -> str:
        """Return the URL of a file; a query, such as a signature, stays at the end."""
        return _file_url(self.location, name)

    def shown(self, name: str) -> str:
        """Return the URL without user, password and query."""
        return shown_file(self.location, name)

    def reason(self, error: BaseException) -> str:
        """Return why an attempt failed, without passwords."""
        if (code := status(error)) is not None and hasattr(error, "request_info"):  # aiohttp's, which shows all the URL
            return f"HTTP {code} {getattr(error, 'message', '')}".strip()
        if isinstance(error, TimeoutError) and not str(error):
            return f"no answer within {self.timeout:g} s"
        return without_secrets_of(self.location, super().reason(error))

    def start(self, name: str, path: Path, received: ByteCounter) -> StartedTransfer[Any]:
        """Start writing a file's content to ``path``, by one request and in sequence."""
        if self._protocol() == "file":  # its own get_file reports no progress
            files = self._filesystem()
            copy = AbstractFileSystem.get_file
            return StartedTransfer(in_thread(lambda: copy(files, self.url(name), str(path), callback=received)))
        one_stream = {"concurrency": 1} if self._protocol() in ("gs", "gcs") else {}
        return self._call("get_file", self.url(name), str(path), callback=received, **one_stream)

    def start_size(self, name: str) -> StartedTransfer[int | None]:
        """Start a request for a file's size."""
        return self._call("size", self.url(name))

    def close(self) -> None:
        """Close this process's connections; the next use opens new ones."""
        with self._opening:
            files = self._pool.pop(os.getpid(), None)
        for name in ("_session", "_s3"):
            session = getattr(files, name, None)
            if session is not None and asyncio.iscoroutinefunction(getattr(session, "close", None)):
                with suppress(Exception):
                    asyncio.run_coroutine_threadsafe(session.close(), get_loop()).result(_CLOSE_SECONDS)

    def _protocol(self) -> str:
        return urlsplit(self.location).scheme.lower()

    def _call(self, method: str, *words: Any, **options: Any) -> StartedTransfer[Any]:
        files = self._filesystem()
        if not files.async_impl:
            return StartedTransfer(in_thread(lambda: getattr(files, method)(*words, **options)))
        future = asyncio.run_coroutine_threadsafe(getattr(files, f"_{method}")(*words, **options), get_loop())
        return StartedTransfer(future, future.cancel)

    def _filesystem(self) -> Any:
        with self._opening:
            if os.getpid() not in self._pool:
                self._pool.clear()
                self._pool[os.getpid()] = self._open()
            return self._pool[os.getpid()]

    def _open(self) -> Any:
        """Open the store with our time-out, and without its library's own retries as far as possible."""
        import aiohttp  # slow to import, and not needed for folders

        protocol = self._protocol()
        waiting = aiohttp.ClientTimeout(total=None, sock_connect=self.timeout, sock_read=self.timeout)
        options: dict[str, Any] = {}
        if protocol in ("http", "https"):
            options = {"client_kwargs": {"timeout": waiting, "trust_env": True}}
        elif protocol in ("s3", "s3a"):
            times = {"connect_timeout": self.timeout, "read_timeout": self.timeout}
            options = {"config_kwargs": {**times, "retries": {"max_attempts": 1}}, "max_concurrency": 1}
        elif protocol in ("gs", "gcs"):
            options = {"requests_timeout": waiting}
            logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs tracebacks of errors that we report
        # We run its coroutines in fsspec's thread ourselves. With asynchronous=False it would close its connections in
        # its finalizer, which in a forked process waits for ever: that process has no such thread.
        if fsspec.get_filesystem_class(protocol).async_impl:
            options["asynchronous"] = True
        files = fsspec.filesystem(protocol, skip_instance_cache=True, use_listings_cache=False, **options)
        if protocol in ("s3", "s3a"):
            files.retries = 1
        return files
