"""``adaptive doctor`` on several nodes: every node runs its checks, then rank 0 gathers and prints all findings."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from typing import Any

from adaptive.distributed.ranks import Ranks
from adaptive.doctor.checks.between_nodes import between_nodes, facts, obey
from adaptive.doctor.checks.gpu import has_gpu
from adaptive.doctor.checks.slurm import expected_hosts
from adaptive.doctor.finding import Check, CheckSettings, Finding, error, ok
from adaptive.doctor.rendezvous import (
    Address,
    Connection,
    LostError,
    Peer,
    connect,
    gather,
    host,
    listen,
    rendezvous_address,
)
from adaptive.doctor.run_checks import named, report, run_all
from adaptive.errors import MachineError

GRACE = 30.0  # seconds beyond the longest check before a node counts as silent


def run_many(checks: list[Check], settings: CheckSettings, ranks: Ranks, patience: float, as_json: bool) -> int:
    """Carry out the command on this rank and return its exit code; only rank 0 prints, and fails because of errors."""
    address = rendezvous_address(os.environ)
    settings = replace(settings, nodes=max(1, ranks.world // ranks.local_world), local_ranks=ranks.local_world)
    if ranks.rank == 0:
        return _rank_zero(checks, settings, ranks, address, patience, as_json)
    return _other_rank(checks, settings, ranks, address, patience)


def _device(ranks: Ranks) -> int:
    return ranks.local_rank if ranks.device is None else ranks.device


def _hello(ranks: Ranks) -> dict[str, Any]:
    said = {**facts(), "gpu": "yes" if has_gpu() else "no"}
    return {"rank": ranks.rank, "world": ranks.world, "local_rank": ranks.local_rank, "host": host(), "facts": said}


def _other_rank(checks: list[Check], settings: CheckSettings, ranks: Ranks, address: Address, patience: float) -> int:
    connection = connect(address, _hello(ranks), patience)
    try:
        if ranks.local_rank == 0:
            run_all(checks, settings, lambda finding: connection.send(asdict(finding)))
        connection.send({"done": True})
        # Rank 0 has its own checks to do, and listens to the other nodes one after another.
        return obey(connection, ranks.rank, _device(ranks), sum(check.limit for check in checks) + 600)
    except LostError as lost:
        raise MachineError(f"rank {ranks.rank} on {host()} lost rank 0 ({lost}); look at rank 0's own output") from None
    finally:
        connection.close()


def _rank_zero(
    checks: list[Check], settings: CheckSettings, ranks: Ranks, address: Address, patience: float, as_json: bool
) -> int:
    own, mine = host(), facts()
    with listen(address[1], ranks.world) as server:
        came = gather(server, ranks.world, patience)
    peers, nodes = _peers(own, came), [own]
    nodes += [peer.node for peer in peers if peer.first]
    findings = named(own, run_all(checks, settings))
    silence = max((check.limit for check in checks), default=0.0) + GRACE
    lost: dict[int, str] = {}
    for peer in peers:
        try:
            findings += named(peer.node, _receive_findings(peer.connection, silence))
        except LostError as problem:
            lost[peer.rank] = f"rank {peer.rank} on {peer.node} went away during its checks ({problem})"
    there = [peer for peer in peers if peer.rank not in lost]
    missing = sorted(set(range(1, ranks.world)) - set(came))
    findings.append(("", _meeting_finding(settings, ranks, missing, list(lost.values()), patience, address, nodes)))
    complete = len(there) == ranks.world - 1
    if there:
        between = between_nodes(settings, address[0], own, mine, there, _device(ranks), complete)
        findings += named("", between)
    for peer in there:
        try:
            peer.connection.send({"do": "end"})
        except LostError:
            continue
    # A finding without a node concerns all of them.
    return report([(node or "all nodes", finding) for node, finding in findings], nodes, as_json)


def _peers(own: str, came: dict[int, tuple[Connection, dict[str, Any]]]) -> list[Peer]:
    """Return the other ranks; nodes of one name get their rank added to it."""
    peers: list[Peer] = []
    names = {own}
    for rank, (connection, hello) in sorted(came.items()):
        name, first = str(hello.get("host")), hello.get("local_rank") == 0
        if first and name in names:
            name = f"{name} (rank {rank})"
        names.add(name)
        told = {str(key): str(value) for key, value in dict(hello.get("facts") or {}).items()}
        peers.append(Peer(rank, connection, name, first, told))
    return peers


def _receive_findings(connection: Connection, silence: float) -> list[Finding]:
    """Return the findings that a node sends one by one until it is done (raises LostError)."""
    findings = []
    while "done" not in (message := connection.receive(silence)):
        findings.append(Finding(*(str(message.get(key, "")) for key in ("name", "status", "found", "remedy"))))  # type: ignore[arg-type]
    return findings


def _meeting_finding(
    settings: CheckSettings,
    ranks: Ranks,
    missing: list[int],
    lost: list[str],
    patience: float,
    address: Address,
    nodes: list[str],
) -> Finding:
    """Return the finding about the rendezvous itself: which ranks did not come, or were lost, and on which nodes."""
    master, port = address
    if missing:
        hosts = expected_hosts(settings)
        who = [f"rank {rank}{f' on {hosts[rank]}' if rank in hosts else ''}" for rank in missing[:8]]
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        remedy = (
            f"ping {master}; nc -vz {master} {port}   # on {hosts.get(missing[0], 'that node')}: link, name, firewall"
        )
        found = error(f"did not reach {master}:{port} within {patience:g} s: {', '.join(who)}{more}", remedy)
    elif lost:
        found = error("; ".join(lost), "adaptive doctor   # on that node alone")
    else:
        machines = "1 node" if len(nodes) == 1 else f"{len(nodes)} nodes"
        found = ok(f"{ranks.world} ranks on {machines} met at {master}:{port}")
    return replace(found, name="meeting")
