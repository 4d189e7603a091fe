"""Checks of the host's name and network interfaces, and of a real all_reduce of two processes over them."""

from __future__ import annotations

import ipaddress
import os
import random
import socket
from contextlib import suppress
from typing import Any

from adaptive.distributed.network_interface import GLOO, NCCL, choose_interface, interfaces
from adaptive.doctor.finding import Check, CheckSettings, Finding, error, ok, warning
from adaptive.doctor.programs import answer, start_script
from adaptive.errors import MachineError

MEET_SECONDS = 60.0


def likely_interface() -> str:
    """Return the interface to name in a remedy: one that is up and not the loopback, with an address."""
    usable = [name for name, found in interfaces().items() if found and name != "lo"]
    real = [name for name in usable if not name.startswith(("docker", "br-", "veth"))]
    return [*real, *usable, "lo"][0]


def hostname(settings: CheckSettings) -> Finding:
    """Check that the host's name leads to an address of this host: gloo listens there if no interface is named."""
    name = socket.gethostname()
    remedy = f"export {GLOO}={likely_interface()}   # or an entry for {name} in /etc/hosts"
    try:
        found = sorted({str(info[4][0]) for info in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)})
        problem = _what_is_wrong(found)
    except OSError as failed:
        found, problem = [], f"does not resolve ({failed.strerror})"
    shown = f"{name} is {', '.join(found)}" if found else name
    if not problem:
        return ok(shown)
    if chosen := os.environ.get(GLOO):  # set by hand, or by find_ranks
        return ok(f"{shown} {problem}; {GLOO}={chosen} is taken instead")
    return (error if settings.nodes > 1 else warning)(
        f"{shown} {problem}: gloo cannot meet other machines there", remedy
    )


def _what_is_wrong(found: list[str]) -> str:
    if any(ipaddress.ip_address(one.partition("%")[0]).is_loopback for one in found):
        return "(loopback)"
    own = {address for ones in interfaces().values() for address in ones}
    return "" if own & set(found) else "(no address of this host)"


def listed_interfaces(_: CheckSettings) -> Finding:
    """Check that the interfaces that the environment names are up."""
    up = {name: found for name, found in interfaces().items() if found}
    try:
        choose_interface({"MASTER_ADDR": "127.0.0.1", **_named()}, several_hosts=False)
    except MachineError as wrong:
        return error(str(wrong), f"export {GLOO}={likely_interface()}   # or unset {' '.join(_named())}")
    if down := [name for name in os.environ.get(GLOO, "").split(",") if name and name not in up]:
        return error(f"{GLOO}={','.join(down)} is down or has no address", f"export {GLOO}={likely_interface()}")
    return ok(", ".join(f"{name} {found[0]}" for name, found in up.items()))


def _named() -> dict[str, str]:
    return {name: os.environ[name] for name in (GLOO, NCCL) if name in os.environ}


def free_port() -> int:
    """Return a port that nobody listens on, and that no system hands out: these lie above 32767."""
    while True:
        port = random.randrange(10000, 32000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port


def reduce_here(backend: str, seconds: float = MEET_SECONDS) -> dict[str, Any]:
    """Time an all_reduce of two processes of this machine over the loopback; ``error`` says what went wrong."""
    port = str(free_port())
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1"}
    choose_interface(environment, several_hosts=False)
    words = [(backend, "127.0.0.1", port, str(i), "2", str(i), str(seconds)) for i in range(2)]
    began = [start_script("collective_probe", *ones, environment=environment) for ones in words]
    found = [answer(process.wait(seconds + 30)) for process in began]
    return next((one for one in found if "error" in one), found[0])


def gloo(_: CheckSettings) -> Finding:
    """Check that two processes can all_reduce over gloo, on the interface that training would take here."""
    remedy = f"export {GLOO}={likely_interface()}"
    try:
        chosen = choose_interface({"MASTER_ADDR": "127.0.0.1", **_named()}, several_hosts=False)
        found = reduce_here("gloo")
    except MachineError as wrong:
        return error(str(wrong), remedy)
    if "error" in found:
        return error(f"two processes cannot reduce over gloo on {chosen}: {found['error']}", remedy)
    speed = f"{1e6 * found['latency']:.0f} us a number, {found['bandwidth'] / 1e6:.0f} MB/s"
    return ok(f"2 processes reduce over gloo on {chosen}: {speed}")


CHECKS = [
    Check("hostname", "network", hostname),
    Check("interfaces", "network", listed_interfaces),
    Check("gloo", "network", gloo, slow=True, limit=2 * MEET_SECONDS + 70),
]
