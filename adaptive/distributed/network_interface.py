"""The network interface that ranks talk over.

gloo binds to the address that the host's own name resolves to. Where that is 127.0.1.1, or nothing, one rank fails and
the others hang. So the interface is named before the ranks meet: the one that the way to the master leads over.
NCCL finds its interfaces (InfiniBand first) by itself and is left alone.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import socket
import time
from collections.abc import MutableMapping

import psutil

from adaptive.errors import MachineError, PassingError, reason_of

LOGGER = logging.getLogger(__name__)
PAUSE = 1.0  # seconds between two questions to the name server
GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"


def choose_interface(environment: MutableMapping[str, str], several_hosts: bool, nodes: str = "") -> str | None:
    """Set GLOO_SOCKET_IFNAME where the user has not, and return the interface (None where none was found).

    Args:
        environment: holds MASTER_ADDR.
        several_hosts: whether ranks run on more than this host; otherwise they talk over the loopback interface.
        nodes: Slurm's list of the hosts, to find the way from the master itself to another one.

    Raises:
        MachineError: an interface that is set does not exist here.
        PassingError: MASTER_ADDR is no host that is known here.
    """
    _check_names(environment)
    if GLOO in environment:
        return environment[GLOO]
    if not several_hosts:
        found = interface_of(["127.0.0.1"])
    else:
        found = interface_of(_ways_out(environment["MASTER_ADDR"], nodes))
    if found is not None:
        environment[GLOO] = found
    return found


def addresses(host: str, patience: float = 0.0) -> list[str]:
    """Return a host's addresses, waiting up to ``patience`` seconds for its name to be known (raises PassingError)."""
    limit, warned = time.monotonic() + patience, False
    while True:
        try:
            return list(dict.fromkeys(str(entry[4][0]).partition("%")[0] for entry in socket.getaddrinfo(host, None)))
        except UnicodeError:
            raise MachineError(
                f"MASTER_ADDR = {host!r} is no name of a host; set it to one, or to an address"
            ) from None
        except OSError as error:
            reason = error.strerror or reason_of(error)
            if time.monotonic() >= limit:
                raise PassingError(
                    f"MASTER_ADDR = {host!r} is no host that {socket.gethostname()} knows ({reason}); set "
                    "MASTER_ADDR to an address that all nodes reach, as `hostname -I` on the first node shows it"
                ) from None
        if not warned:
            LOGGER.warning(
                "MASTER_ADDR = %r is not known on %s (%s); waiting up to %.0f s for it",
                *(host, socket.gethostname(), reason, patience),
            )
            warned = True
        time.sleep(min(PAUSE, max(0.0, limit - time.monotonic())))


def interfaces() -> dict[str, list[str]]:
    """Return the addresses (IPv4 and IPv6) of every interface that is up."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    return {
        name: [a.address.partition("%")[0] for a in addresses if a.family in (socket.AF_INET, socket.AF_INET6)]
        for name, addresses in psutil.net_if_addrs().items()
        if name in up
    }


def interface_of(addresses: list[str]) -> str | None:
    """Return the interface that has the first of these addresses that any has."""
    here = interfaces()
    return next((name for address in addresses for name, own in here.items() if address in own), None)


def _ways_out(master: str, nodes: str) -> list[str]:
    """Return this host's own addresses that ranks on other hosts may reach, the best first."""
    masters = addresses(master)
    others = [name for name in re.findall(r"[^,\[\]]+(?:\[[^\]]*\])?", nodes) if name]
    others = [host for name in others for host in _two_hosts(name)]
    towards = [*masters, *others, "192.0.2.1"]  # the last is nobody's (RFC 5737): for the default route
    own = [_own_address(address) for address in towards]
    return [address for address in own if address and not ipaddress.ip_address(address).is_loopback]


def _two_hosts(name: str) -> list[str]:
    """Return the first two hosts of a bracketed name such as ``node[003-005]``: one of them is not this one."""
    match = re.match(r"([^\[]*)\[([^\]]*)\](.*)", name)
    if not match:
        return [name]
    before, numbers, after = match.groups()
    first = re.split(r"[,-]", numbers)[:2]
    return [f"{before}{number}{after}" for number in first]


def _own_address(towards: str) -> str | None:
    """Return the address that this host would send from; nothing is sent."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(towards, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError:
        return None


def _check_names(environment: MutableMapping[str, str]) -> None:
    """Refuse interfaces that are set and do not exist (NCCL's list may exclude by ^, and holds beginnings of names)."""
    known = psutil.net_if_addrs()
    for name in (GLOO, NCCL):
        value = environment.get(name, "")
        if value.startswith("^"):
            continue
        for wanted in value.lstrip("=").split(","):
            exact = name == GLOO or value.startswith("=")
            if wanted and not any(own == wanted if exact else own.startswith(wanted) for own in known):
                raise MachineError(
                    f"{name} = {value!r}: {os.uname().nodename} has no interface {wanted!r}; it has "
                    f"{', '.join(sorted(known))}. Set one of these, or unset it to have it chosen"
                )
