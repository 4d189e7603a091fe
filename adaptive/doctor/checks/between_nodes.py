"""Checks of what lies between the nodes of a job: versions, clocks, a shared folder, collectives. Rank 0 asks."""

from __future__ import annotations

import os
import platform
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from adaptive.doctor.checks.disk import scratch
from adaptive.doctor.checks.gpu import has_gpu
from adaptive.doctor.checks.network import free_port, likely_interface
from adaptive.doctor.checks.speed import compare_speed, speed
from adaptive.doctor.finding import CheckSettings, Finding, error, ok, warning
from adaptive.doctor.programs import answer, start_script
from adaptive.doctor.rendezvous import Connection, LostError, Peer
from adaptive.files import code_digest

PINGS = 15
SKEW_WARNING, SKEW_ERROR = 1.0, 60.0  # seconds
SLOW = 50e6  # bytes/s; a hundred-megabit network
COLLECTIVE_SECONDS = 60.0
VISIBLE_WITHIN = 10.0  # seconds; network file systems keep what they know of a folder for some
LIBRARIES = ("torch", "torchvision", "deepspeed", "timm", "webdataset", "numpy")


def facts() -> dict[str, str]:
    """Return what must be the same on all nodes: versions, the code's digest, the processor."""
    found = {"python": platform.python_version(), "adaptive's code": code_digest()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    return {**found, "processor": model.group(1) if model else platform.machine()}


def versions(own: str, mine: dict[str, str], peers: list[Peer]) -> Finding:
    """Check that all nodes have the same Python, libraries, code and processor."""
    seen = {own: mine, **{peer.node: peer.facts for peer in peers if peer.first}}
    for name in mine:
        values = {node: facts.get(name, "?") for node, facts in seen.items()}
        usual = Counter(values.values()).most_common(1)[0][0]
        others = [f"{value} on {node}" for node, value in values.items() if value != usual]
        if others and name == "processor":
            remedy = "export TORCH_EXTENSIONS_DIR=/tmp/torch_extensions   # DeepSpeed compiles for one processor"
            return warning(f"processors differ: {usual}, but {'; '.join(others[:4])}", remedy)
        if others:
            remedy = "git pull && pip install -c constraints.txt -e .   # on those nodes, or one environment for all"
            return error(f"{name}: {usual}, but {', '.join(others[:4])}", remedy)
    return ok(f"Python {mine['python']}, torch {mine['torch']}, deepspeed {mine['deepspeed']}, the same code")


def clocks(peers: list[Peer]) -> Finding:
    """Check the nodes' clocks against rank 0's, by the quickest of several round trips."""
    worst, where, delay = 0.0, "", 0.0
    for peer in peers:
        trips = []
        for _ in range(PINGS):
            before = time.time()
            there = float(peer.connection.ask({"do": "time"}, 10)["time"])
            after = time.time()
            trips.append((after - before, there - (before + after) / 2))
        trip, skew = min(trips)
        delay = max(delay, trip)
        if abs(skew) - trip / 2 > abs(worst):
            worst, where = skew, peer.node
    shown = f"round trips of at most {1e3 * delay:.2f} ms"
    if abs(worst) > SKEW_WARNING:
        bad = error if abs(worst) > SKEW_ERROR else warning
        return bad(f"the clock of {where} is {worst:+.1f} s off rank 0's", "timedatectl set-ntp true   # on all nodes")
    return ok(f"clocks agree to {max(abs(worst), delay / 2):.3f} s, {shown}")


def shared_folder(settings: CheckSettings, peers: list[Peer]) -> Finding:
    """Check that the nodes see what rank 0 writes into the run folder, and that its file lock holds for them."""
    token = secrets.token_hex(16)
    others = [peer for peer in peers if peer.first]
    with scratch(settings) as here:
        shown = here.parent
        (here / "token").write_text(token)
        with FileLock(here / "lock"):
            asked = {"do": "folder", "path": str(here)}
            found = {peer.node: peer.connection.ask(asked, VISIBLE_WITHIN + 20) for peer in others}
    blind = [node for node, said in found.items() if said.get("token") != token]
    if blind:
        remedy = "adaptive train CONFIG train.run_folder=/a/folder/that/all/nodes/share"
        return error(f"what rank 0 writes to {shown} is not seen by {', '.join(blind)}", remedy)
    if unlocked := [node for node, said in found.items() if not said.get("locked")]:
        found_ = f"{shown}: a lock of rank 0 does not hold for {', '.join(unlocked)}; two runs could share a folder"
        return warning(found_, "mount -o remount,local_lock=none ...   # NFS needs its lock service")
    return ok(f"all nodes see {shown}, and locks hold between them")


def look_at_folder(path: str) -> dict[str, Any]:
    """Answer `shared_folder` on another node: read the token, and try for the lock that rank 0 holds."""
    folder, limit = Path(path), time.monotonic() + VISIBLE_WITHIN
    while not (folder / "token").exists() and time.monotonic() < limit:
        time.sleep(0.2)
    try:
        token = (folder / "token").read_text()
        with FileLock(folder / "lock", timeout=0):
            return {"token": token, "locked": False}
    except Timeout:
        return {"token": token, "locked": True}
    except (OSError, NotImplementedError):
        return {"token": ""}


def collective(backend: str, master: str, port: int, rank: int, world: int, device: int) -> Callable[[], dict]:
    """Start this rank's process of an all_reduce over all nodes; return a function that waits for its result."""
    words = (backend, master, str(port), str(rank), str(world), str(device), str(COLLECTIVE_SECONDS))
    running = start_script("collective_probe", *words)
    return lambda: answer(running.wait(COLLECTIVE_SECONDS + 60))


def reduce_over_nodes(master: str, peers: list[Peer], device: int, own: str, backend: str) -> Finding:
    """Check that an all_reduce over all ranks works, and its speed."""
    world, port = len(peers) + 1, free_port()
    for peer in peers:
        peer.connection.send({"do": "reduce", "backend": backend, "address": master, "port": port, "world": world})
    found = {f"rank 0 on {own}": collective(backend, master, port, 0, world, device)()}
    for peer in peers:
        found[f"rank {peer.rank} on {peer.node}"] = peer.connection.receive(2 * COLLECTIVE_SECONDS + 60)
    failed = {who: said["error"] for who, said in found.items() if "error" in said}
    variable = "GLOO_SOCKET_IFNAME" if backend == "gloo" else "NCCL_SOCKET_IFNAME"
    if failed:
        who, reason = next(iter(failed.items()))
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        shown = os.environ.get(variable)
        found_ = f"no {backend} all_reduce over {world} ranks ({variable}={shown}): {who}{more}: {reason}"
        return error(found_, f"export {variable}={likely_interface()}   # on all nodes")
    slowest = min(said["bandwidth"] for said in found.values())
    latency = max(said["latency"] for said in found.values())
    shown = f"{world} ranks reduce over {backend} at {slowest / 1e6:.0f} MB/s, {1e6 * latency:.0f} us a number"
    if slowest < SLOW:
        return warning(f"only {shown}", f"export {variable}={likely_interface()}   # or a faster interface")
    return ok(shown)


def between_nodes(
    settings: CheckSettings,
    master: str,
    own: str,
    mine: dict[str, str],
    peers: list[Peer],
    device: int,
    all_here: bool,
) -> list[Finding]:
    """Run all checks between nodes, on rank 0; a peer that is lost on the way becomes a finding."""
    asked: dict[str, Callable[[], Finding]] = {
        "versions": lambda: versions(own, mine, peers),
        "clocks": lambda: clocks(peers),
    }
    if any(peer.first for peer in peers):
        asked["shared-folder"] = lambda: shared_folder(settings, peers)
    if all_here:
        asked["speed"] = lambda: compare_speed(peers, device, own)
        asked["all-reduce"] = lambda: reduce_over_nodes(master, peers, device, own, "gloo")
        if has_gpu() and all(peer.facts.get("gpu") == "yes" for peer in peers):
            asked["nccl-all-reduce"] = lambda: reduce_over_nodes(master, peers, device, own, "nccl")
    findings = []
    for name, ask in asked.items():
        try:
            found = ask()
        except LostError as lost:
            found = error(f"a rank went away: {lost}", "adaptive doctor   # once more, on each node alone")
        except Exception as problem:
            found = error(f"could not be checked: {type(problem).__name__}: {problem}", "adaptive doctor")
        findings.append(Finding(name, found.status, found.found, found.remedy))
    return findings


def obey(connection: Connection, rank: int, device: int, patience: float) -> int:
    """Do what rank 0 asks on another rank until it says that all is done (raises LostError)."""
    while True:
        message: Mapping[str, Any] = connection.receive(patience)
        if message["do"] == "time":
            connection.send({"time": time.time()})
        elif message["do"] == "folder":
            connection.send(look_at_folder(message["path"]))
        elif message["do"] == "reduce":
            words = message["backend"], message["address"], int(message["port"]), rank, int(message["world"])
            connection.send(collective(*words, device)())
        elif message["do"] == "speed":
            connection.send(speed(device)())
        elif message["do"] == "end":
            return 0
