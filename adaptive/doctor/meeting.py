"""How the ranks of several machines meet: plain sockets, so that whoever does not come can be named.

Rank 0 listens at MASTER_ADDR:MASTER_PORT; every other rank connects, says who it is, sends its findings one by one, and
then does what rank 0 asks. Messages are JSON objects, one a line.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from typing import Any

from adaptive.errors import MachineError

LONGEST = 2**20  # bytes of a message
PAUSE = 0.25  # between attempts to connect


class LostError(Exception):
    """The other side went away, was silent for too long, or does not speak this language."""


class Link:
    """One side of a connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.buffer = bytearray()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A machine that loses its power says no goodbye: notice it within half a minute.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 4)):
            connection.setsockopt(socket.IPPROTO_TCP, option, value)

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message (raises LostError)."""
        try:
            self.connection.settimeout(30)
            self.connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError as problem:
            raise LostError(str(problem)) from None

    def receive(self, seconds: float) -> dict[str, Any]:
        """Wait for a message (raises LostError)."""
        limit = time.monotonic() + seconds
        try:
            while b"\n" not in self.buffer:
                self.connection.settimeout(max(0.01, limit - time.monotonic()))
                block = self.connection.recv(65536)
                if not block or len(self.buffer) > LONGEST:
                    raise LostError("the connection was closed")
                self.buffer += block
            line, _, rest = self.buffer.partition(b"\n")
            self.buffer = rest
            message = json.loads(line)
        except TimeoutError:
            raise LostError(f"silent for {seconds:g} s") from None
        except (OSError, ValueError) as problem:
            raise LostError(str(problem)) from None
        if not isinstance(message, dict):
            raise LostError("no message of ours")
        return message

    def ask(self, message: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Send, and wait for the answer (raises LostError)."""
        self.send(message)
        return self.receive(seconds)

    def close(self) -> None:
        """End the connection."""
        self.connection.close()


def meeting_point(environment: Mapping[str, str]) -> tuple[str, int]:
    """Address and port; torchrun's agent listens at MASTER_PORT itself, then it is the next one."""
    port = int(environment["MASTER_PORT"])
    return environment["MASTER_ADDR"], port + (environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True")


def listen(port: int, world: int) -> socket.socket:
    """Open rank 0's side (raises MachineError: the port is in use)."""
    try:
        return socket.create_server(("", port), backlog=world)
    except OSError as problem:
        raise MachineError(
            f"MASTER_PORT = {port} cannot be opened: {problem.strerror}; export MASTER_PORT={port % 30000 + 20000}"
        ) from None


def gather(server: socket.socket, world: int, seconds: float) -> dict[int, tuple[Link, dict[str, Any]]]:
    """Wait for all other ranks, at most so long; return who came, with what they said of themselves."""
    came: dict[int, tuple[Link, dict[str, Any]]] = {}
    limit = time.monotonic() + seconds
    while len(came) < world - 1 and (left := limit - time.monotonic()) > 0:
        server.settimeout(left)
        try:
            connection, _ = server.accept()
        except TimeoutError:
            break
        link = Link(connection)
        try:
            hello = link.receive(min(10.0, max(1.0, left)))
            rank = int(hello["rank"])
        except (LostError, KeyError, ValueError, TypeError):
            link.close()  # a scanner of ports, or another job
            continue
        if rank in came or not 0 < rank < world or hello.get("world") != world:
            link.close()
            continue
        came[rank] = (link, hello)
    return came


def connect(address: str, port: int, hello: Mapping[str, Any], seconds: float) -> Link:
    """Reach rank 0, trying again until the time is over.

    Raises:
        MachineError: with what stands in the way.
    """
    limit = time.monotonic() + seconds
    who = f"rank {hello['rank']} on {hello['host']}"
    while True:
        try:
            link = Link(socket.create_connection((address, port), timeout=max(0.1, min(5.0, limit - time.monotonic()))))
            link.send(hello)
            return link
        except (OSError, LostError) as problem:
            last = problem
        if time.monotonic() + PAUSE > limit:
            break
        time.sleep(PAUSE)
    if isinstance(last, socket.gaierror):
        raise MachineError(
            f"{who}: the name MASTER_ADDR = {address} is unknown here; export MASTER_ADDR=ADDRESS_OF_RANK_0"
        )
    reason = "nothing listens there" if isinstance(last, ConnectionRefusedError) else str(last)
    raise MachineError(
        f"{who} does not reach rank 0 at {address}:{port} within {seconds:g} s ({reason}); "
        f"ping -c 3 {address} and look at firewalls, or export MASTER_ADDR and MASTER_PORT that can be reached"
    )


def host() -> str:
    """This machine's name."""
    return socket.gethostname() or str(os.getpid())
