"""The rendezvous of a job's ranks over plain TCP sockets, which can name the ranks that do not come.

Rank 0 listens at MASTER_ADDR:MASTER_PORT; every other rank connects, says who it is, sends its findings one by one, and
then does what rank 0 asks. Messages are JSON objects, one a line.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adaptive.errors import MachineError

LONGEST = 2**20  # bytes of a message
PAUSE = 0.25  # between attempts to connect

Address = tuple[str, int]  # host and port


class LostError(Exception):
    """The other rank closed the connection, sent nothing for too long, or sent no message of this protocol."""


class Connection:
    """A TCP connection to another rank, which carries JSON messages."""

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        self.buffer = bytearray()
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A machine that loses power closes no connection: keep-alive packets notice it within half a minute.
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 4)):
            connected.setsockopt(socket.IPPROTO_TCP, option, value)

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message (raises LostError)."""
        try:
            self.socket.settimeout(30)
            self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError as problem:
            raise LostError(str(problem)) from None

    def receive(self, seconds: float) -> dict[str, Any]:
        """Wait for a message (raises LostError)."""
        limit = time.monotonic() + seconds
        try:
            while b"\n" not in self.buffer:
                self.socket.settimeout(max(0.01, limit - time.monotonic()))
                block = self.socket.recv(65536)
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
            raise LostError("no message of this protocol")
        return message

    def ask(self, message: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Send, and wait for the answer (raises LostError)."""
        self.send(message)
        return self.receive(seconds)

    def close(self) -> None:
        """End the connection."""
        self.socket.close()


def rendezvous_address(environment: Mapping[str, str]) -> Address:
    """Return where rank 0 listens: at MASTER_PORT, or the next one, for torchrun's agent listens at that itself."""
    port = int(environment["MASTER_PORT"])
    return environment["MASTER_ADDR"], port + (environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True")


@dataclass
class Peer:
    """Another rank, as rank 0 knows it: its connection, its node's name, and what it told of itself."""

    rank: int
    connection: Connection
    node: str
    first: bool  # of its node's ranks
    facts: dict[str, str]


def listen(port: int, world: int) -> socket.socket:
    """Open the socket to which the other ranks connect (raises MachineError: the port is in use)."""
    try:
        return socket.create_server(("", port), backlog=world)
    except OSError as problem:
        raise MachineError(
            f"MASTER_PORT = {port} cannot be opened: {problem.strerror}; export MASTER_PORT={port % 30000 + 20000}"
        ) from None


def gather(server: socket.socket, world: int, seconds: float) -> dict[int, tuple[Connection, dict[str, Any]]]:
    """Accept the other ranks for at most ``seconds``; return the connection and the first message of each that came."""
    came: dict[int, tuple[Connection, dict[str, Any]]] = {}
    limit = time.monotonic() + seconds
    while len(came) < world - 1 and (left := limit - time.monotonic()) > 0:
        server.settimeout(left)
        try:
            accepted, _ = server.accept()
        except TimeoutError:
            break
        connection = Connection(accepted)
        try:
            hello = connection.receive(min(10.0, max(1.0, left)))
            rank = int(hello["rank"])
        except (LostError, KeyError, ValueError, TypeError):
            connection.close()  # a scanner of ports, or another job
            continue
        if rank in came or not 0 < rank < world or hello.get("world") != world:
            connection.close()
            continue
        came[rank] = (connection, hello)
    return came


def connect(address: Address, hello: Mapping[str, Any], seconds: float) -> Connection:
    """Connect to rank 0, trying again for ``seconds``.

    Raises:
        MachineError: rank 0 was not reached; the message names the cause.
    """
    limit = time.monotonic() + seconds
    who = f"rank {hello['rank']} on {hello['host']}"
    master, port = address
    while True:
        try:
            patience = max(0.1, min(5.0, limit - time.monotonic()))
            connection = Connection(socket.create_connection(address, timeout=patience))
            connection.send(hello)
            return connection
        except (OSError, LostError) as problem:
            last = problem
        if time.monotonic() + PAUSE > limit:
            break
        time.sleep(PAUSE)
    if isinstance(last, socket.gaierror):
        raise MachineError(
            f"{who}: the name MASTER_ADDR = {master} is unknown here; export MASTER_ADDR=ADDRESS_OF_RANK_0"
        )
    reason = "nothing listens there" if isinstance(last, ConnectionRefusedError) else str(last)
    raise MachineError(
        f"{who} does not reach rank 0 at {master}:{port} within {seconds:g} s ({reason}); "
        f"ping -c 3 {master} and look at firewalls, or export MASTER_ADDR and MASTER_PORT that can be reached"
    )


def host() -> str:
    """Return this machine's name."""
    return socket.gethostname() or str(os.getpid())
