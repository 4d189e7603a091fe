"""MASTER_ADDR, the address of the first rank's machine: that its name is known, and that it leads there.

The first rank listens on all addresses of its machine, so an address that is another machine's is no error anywhere:
the ranks wait for each other until a time limit. It is looked at before they wait.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import secrets
import socket
import time
from collections.abc import Iterable, Mapping

from adaptive.distributed.network_interface import addresses, interfaces
from adaptive.errors import MachineError

LOGGER = logging.getLogger(__name__)
LOOPBACK = ("127.0.0.1", "localhost", "::1")
ANSWER_WITHIN = 2.0  # seconds for a connection of this machine to itself
DEEPSPEED = (
    "deepspeed starts the ranks of a single host where it is called: call it there, or add --force_multi to go by ssh"
)


def check_master(
    environment: Mapping[str, str], launcher: str, rank: int, local_rank: int, several_hosts: bool, patience: float
) -> None:
    """Check MASTER_ADDR on this rank.

    Args:
        environment: holds MASTER_ADDR and MASTER_PORT.
        launcher: that started this process; where torchrun's agent serves the store, the address is the agent's.
        rank: of this process.
        local_rank: of this process, among those of its machine.
        several_hosts: whether ranks run on more than this machine.
        patience: seconds to wait for its name to be known.

    Raises:
        MachineError: it is no address of the machine of rank 0.
        PassingError: the name was not known in time.
    """
    master, here = environment["MASTER_ADDR"], socket.gethostname()
    agent = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not several_hosts and (rank or agent):
        return
    found = addresses(master, patience)
    shown = master if found == [master] else f"{master} ({', '.join(found)})"
    literal = master in LOOPBACK or master == found[0]  # its own name may be Debian's alias, which others know better
    if several_hosts and is_loopback(found) and (literal if rank == 0 else local_rank == 0):
        # No refusal: those who try out several machines on one do so. Elsewhere the wait for rank 0 is a short one.
        LOGGER.warning(
            "MASTER_ADDR = %s is this machine itself, %s, and on every other one that other; where the ranks run on "
            "several, set MASTER_ADDR to an address of rank 0's machine, as `hostname -I` there shows it",
            *(shown, here),
        )
    if rank or agent or any(map(_can_be_bound, found)):
        return
    port = environment["MASTER_PORT"]
    if any(_leads_here(address, int(port) if port.isdecimal() else 0) for address in found):  # translated on the way
        return
    own = [address for listed in interfaces().values() for address in listed]
    reachable = [address for address in own if not ipaddress.ip_address(address).is_loopback]
    remedy = DEEPSPEED if launcher == "deepspeed" and not several_hosts else f"set MASTER_ADDR to an address of {here}"
    raise MachineError(
        f"MASTER_ADDR = {shown} is no address of {here}, where rank 0 runs (it has {', '.join(reachable or own)}), and "
        f"the ranks would wait for each other; {remedy}"
    )


def is_loopback(found: Iterable[str]) -> bool:
    """Tell whether addresses lead to no other machine."""
    return all(ipaddress.ip_address(address).is_loopback for address in found)


def _can_be_bound(address: str) -> bool:
    """Tell whether this machine has the address: whoever may not ask counts as having it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.bind((address, 0))
    except OSError as error:
        return error.errno != errno.EADDRNOTAVAIL
    return True


def _leads_here(address: str, port: int) -> bool:
    """Tell whether who connects to the address comes out here, as with the translated addresses of containers."""
    token = secrets.token_bytes(16)
    try:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        server = socket.create_server(("", port), family=family)
    except OSError:
        return True  # its port is in use, of which the meeting tells
    with server:
        try:
            client = socket.create_connection((address, port), timeout=ANSWER_WITHIN)
        except OSError:
            return False
        limit = time.monotonic() + ANSWER_WITHIN
        with client:
            client.sendall(token)
            while (left := limit - time.monotonic()) > 0:
                try:
                    server.settimeout(left)
                    accepted, _ = server.accept()
                    with accepted:
                        accepted.settimeout(0.5)
                        if accepted.recv(len(token)) == token:
                            return True
                except OSError:
                    continue
    return False
