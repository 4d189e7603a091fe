"""The meeting of the ranks: the store that rank 0 serves at MASTER_ADDR and MASTER_PORT, and the wait for who is late.

torch waits without a word, and tells a port in use by a traceback. Here each wait has a bound, and says after a while
for whom, and at which address.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import psutil
import torch.distributed as dist

from adaptive.distributed.master_address import is_loopback
from adaptive.distributed.network_interface import addresses
from adaptive.errors import MachineError, PassingError, reason_of
from adaptive.passing_faults import passing

LOGGER = logging.getLogger(__name__)
PORT_WITHIN = 15.0  # seconds; what a run before this one holds is free by then
ITS_OWN_WITHIN = 120.0  # seconds for a rank 0 on this very machine, where the ranks are said to run on several
ITSELF_WITHIN = 20.0  # seconds in which rank 0 reaches its own server
QUIET = 30.0  # seconds of waiting before the first word about it
EVERY = 300.0  # seconds between two of them
PAUSE = 0.2  # seconds between attempts
MOST_NAMED = 8  # ranks
HERE = "here"


def open_store(timeout_seconds: float, prefix: str, silent: bool = False) -> dist.Store:
    """Meet the other ranks (collective) and return the store that all of them have, with keys under ``prefix``.

    Args:
        timeout_seconds: bound on the wait for other ranks, and then of the store.
        prefix: not used by another meeting of these processes.
        silent: whether to wait without a word.

    Raises:
        PassingError: the port is in use, or the others, or rank 0, did not come in time.
        MachineError: MASTER_ADDR leads to this machine alone, and rank 0 is on another.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    limit = time.monotonic() + timeout_seconds
    quiet = silent or os.environ.get("LOCAL_RANK", "0") != "0"  # one of each machine is enough
    if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        server = _serve(world)
    else:
        server = _reach(rank, limit, quiet)
    server.set_timeout(timedelta(seconds=timeout_seconds))
    store = dist.PrefixStore(prefix, server)
    store.set(f"{HERE}/{rank}", socket.gethostname())
    if rank == 0:
        _await_others(store, world, limit, quiet)
    return store


def address() -> tuple[str, int]:
    """Return where rank 0 serves."""
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def _serve(world: int) -> dist.TCPStore:
    """Serve the store; a port in use is asked for again for a while (raises PassingError)."""
    host, port = address()
    limit = time.monotonic() + PORT_WITHIN
    patience = timedelta(seconds=ITSELF_WITHIN)
    while True:
        try:
            return dist.TCPStore(
                *(host, port, world),
                is_master=True,
                timeout=patience,
                wait_for_workers=False,
                multi_tenant=True,
            )
        except dist.DistError as error:
            in_use = "EADDRINUSE" in str(error) or "in use" in str(error)
            if in_use and time.monotonic() < limit:
                time.sleep(PAUSE)
                continue
            here = socket.gethostname()
            if in_use:
                raise PassingError(
                    f"MASTER_PORT = {port} is in use on {here}{_holder(port)}; wait for its end, or choose another: "
                    "deepspeed --master_port, torchrun --master-port, or export MASTER_PORT (each start of a job of "
                    "Slurm's has its own where it is not set)"
                ) from None
            raise PassingError(
                f"rank 0 on {here} cannot serve at MASTER_ADDR = {host}, MASTER_PORT = {port} ({reason_of(error)}); "
                "look at the network and firewalls, or start again"
            ) from None


def _holder(port: int) -> str:
    """Return who listens at a port, where that can be seen."""
    with suppress(psutil.Error, OSError):
        for found in psutil.net_connections("tcp"):
            if found.status == psutil.CONN_LISTEN and found.pid and found.laddr and found.laddr.port == port:
                return f" by process {found.pid} ({psutil.Process(found.pid).name()})"
    return ""


def _reach(rank: int, limit: float, quiet: bool) -> dist.TCPStore:
    """Connect to rank 0's store, which may come later (raises PassingError)."""
    host, port = address()
    itself = _only_itself(host)
    if itself:
        limit = min(limit, time.monotonic() + ITS_OWN_WITHIN)
    speak, last = time.monotonic() + QUIET, ""
    client: list[Any] = []
    attempt: threading.Thread | None = None
    while time.monotonic() < limit:
        if attempt is None or not attempt.is_alive():
            if client and isinstance(client[0], dist.TCPStore):
                return client[0]
            if client:
                if not isinstance(client[0], dist.DistError) and not passing(client[0]):
                    raise client[0]
                last, client = reason_of(client[0], 120), []
                time.sleep(PAUSE)
            try:
                with socket.create_connection((host, port), timeout=5):
                    last = "something answers there, but not as rank 0 does"
            except OSError as error:
                last = error.strerror or reason_of(error)
            else:
                # In a thread: torch waits for ever for the answer of a foreign program.
                attempt = threading.Thread(target=_connect, args=(client, limit), name="meeting", daemon=True)
                attempt.start()
                attempt.join(PAUSE)
                continue
        if time.monotonic() > speak and not quiet:
            LOGGER.warning("%s; waiting up to %.0f s", _late(rank, last), limit - time.monotonic())
            speak = time.monotonic() + EVERY
        if attempt is None:
            time.sleep(PAUSE)
        else:
            attempt.join(PAUSE)
    if itself:
        raise MachineError(
            f"MASTER_ADDR = {host} is this machine itself, {socket.gethostname()}, where no rank 0 serves, and the "
            "ranks run on several; set MASTER_ADDR to an address of rank 0's machine, as `hostname -I` there shows it"
        )
    raise PassingError(_late(rank, last))


def _only_itself(host: str) -> bool:
    """Tell whether ranks run on several machines, and the address leads to none but this."""
    several = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])) < int(os.environ["WORLD_SIZE"])
    with suppress(PassingError, MachineError):
        return several and is_loopback(addresses(host))
    return False


def _connect(client: list[Any], limit: float) -> None:
    patience = timedelta(seconds=max(1.0, limit - time.monotonic()))
    try:
        client.append(dist.TCPStore(*address(), is_master=False, timeout=patience, wait_for_workers=False))
    except Exception as error:  # judged by whoever waits
        client.append(error)


def _late(rank: int, reason: str) -> str:
    host, port = address()
    return (
        f"rank {rank} on {socket.gethostname()} does not reach rank 0 at MASTER_ADDR = {host}, MASTER_PORT = {port} "
        f"({reason}): it comes late or has ended, its log says why, or a firewall is between (nc -vz {host} {port})"
    )


def _await_others(store: dist.PrefixStore, world: int, limit: float, quiet: bool) -> None:
    """Wait for all ranks (raises PassingError)."""
    missing, speak = list(range(1, world)), time.monotonic() + QUIET
    while missing:
        left = min(limit, speak) - time.monotonic()
        try:
            store.wait([f"{HERE}/{rank}" for rank in missing], timedelta(seconds=max(0.1, left)))
            return
        except dist.DistStoreError:
            missing = [rank for rank in missing if not store.check([f"{HERE}/{rank}"])]
        if missing and time.monotonic() >= limit:
            raise PassingError(_missing(missing, world))
        if missing and time.monotonic() >= speak:
            if not quiet:
                LOGGER.warning("%s; waiting up to %.0f s", _missing(missing, world), limit - time.monotonic())
            speak = time.monotonic() + EVERY


def _missing(ranks: list[int], world: int) -> str:
    host, port = address()
    named = ", ".join(map(str, ranks[:MOST_NAMED])) + (", ..." if len(ranks) > MOST_NAMED else "")
    return (
        f"{len(ranks)} of {world} ranks ({named}) have not reached rank 0 at MASTER_ADDR = {host}, MASTER_PORT = "
        f"{port}: their nodes come late, or their logs say why, or the address cannot be reached from there"
    )
