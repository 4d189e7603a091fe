"""Check between the nodes of a job of how fast each computes: a slow one makes all others wait at every step."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable

from adaptive.doctor.checks.gpu import has_gpu
from adaptive.doctor.finding import Finding, error, ok, warning
from adaptive.doctor.programs import answer, start_script
from adaptive.doctor.rendezvous import Peer

SPEED_SECONDS = 60.0  # until the probe has answered
SLOW = 1.5  # times slower than the median rank
MOST_NAMED = 8


def speed(device: int) -> Callable[[], dict]:
    """Start this rank's process that measures; return a function that waits for its result."""
    running = start_script("speed_probe", str(device) if has_gpu() else "cpu")
    return lambda: answer(running.wait(SPEED_SECONDS))


def compare_speed(peers: list[Peer], device: int, own: str) -> Finding:
    """Let all ranks compute at the same time, as in training, and name those that are slower than the others."""
    for peer in peers:
        peer.connection.send({"do": "speed"})
    found = {(0, own): speed(device)()}
    for peer in peers:
        found[peer.rank, peer.node] = peer.connection.receive(2 * SPEED_SECONDS)
    for (rank, node), said in found.items():
        if "error" in said:
            return error(f"rank {rank} on {node} cannot compute: {said['error']}", "adaptive doctor   # on that node")
    speeds = {who: float(said["speed"]) for who, said in found.items()}
    usual = statistics.median_high(speeds.values())
    shown = f"{_listed(speeds)} per rank, in float32"
    slowest = min(speeds, key=speeds.__getitem__)
    ratio = usual / max(speeds[slowest], 1.0)
    if ratio < SLOW:
        return ok(shown)
    count = sum(usual / max(each, 1.0) >= SLOW for each in speeds.values())
    more = f" (and {count - 1} more)" if count > 1 else ""
    return warning(
        f"rank {slowest[0]} on {slowest[1]}{more} computes {ratio:.1f} x slower than the median rank: {shown}",
        "top; nvidia-smi -q -d PERFORMANCE; cat /sys/fs/cgroup/cpu.stat   # on that node: other jobs, heat, a quota",
    )


def _listed(speeds: dict[tuple[int, str], float]) -> str:
    """Every node with the speed of its slowest rank, the slowest nodes first."""
    nodes: dict[str, float] = defaultdict(lambda: float("inf"))
    for (_, node), each in speeds.items():
        nodes[node] = min(nodes[node], each)
    ordered = sorted(nodes.items(), key=lambda item: item[1])
    more = f" and {len(ordered) - MOST_NAMED} faster nodes" if len(ordered) > MOST_NAMED else ""
    return ", ".join(f"{node} {_operations(each)}" for node, each in ordered[:MOST_NAMED]) + more


def _operations(number: float) -> str:
    return f"{number / 1e12:.1f} TFLOP/s" if number >= 1e12 else f"{number / 1e9:.1f} GFLOP/s"
