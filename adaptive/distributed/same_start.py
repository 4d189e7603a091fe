"""Comparison of what the ranks were started with, at their meeting: a rank that differs ends the run before it begins.

Collectives do not compare anything: ranks with another configuration or dataset train to the end as if all were well.
The comparison goes through the store by which the ranks meet, before any backend is chosen: three messages per rank.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from adaptive.errors import AdaptiveError, PassingError, StartError

MOST_SHOWN = 3  # differences of one rank
LONGEST = 80  # of a value in the message
READ_WITHIN = 10.0  # seconds
WORLD = "WORLD_SIZE"


class Store(Protocol):
    """What is used of torch's key-value stores."""

    def set(self, key: str, value: str) -> object:
        """Store a value."""

    def get(self, key: str) -> bytes:
        """Return a value, which is waited for."""

    def add(self, key: str, amount: int) -> int:
        """Add to a counter, and return its new value."""


@dataclass(frozen=True)
class Fact:
    """Something that must be the same on all ranks.

    Attributes:
        shown: its value as the message shows it, without secrets.
        remedy: what makes it the same.
        digest: of the value itself; by default of what is shown.
        number: where the values are equal if they are close: both come from arithmetic that machines round differently.
    """

    shown: str
    remedy: str
    digest: str = ""
    number: float | None = None

    def encoded(self) -> list[Any]:
        """Return what travels to the other ranks."""
        return [self.shown, self.digest or digest_of(self.shown), self.number]


def digest_of(value: str) -> str:
    """Return a short checksum of a text, which may be a secret."""
    return hashlib.sha256(value.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def check_same_start(store: Store, rank: int, world: int, node: str, facts: Mapping[str, Fact]) -> None:
    """Compare this rank's facts with the first rank's, all ranks at once (collective, through the store).

    Args:
        store: the ranks' own, under a prefix that was not used before.
        rank: of this process.
        world: how many ranks there are.
        node: this machine's name.
        facts: by name; a name that only one of two ranks has is not compared.

    Raises:
        StartError: on every rank, where any rank differs from the first, or cannot start.
        PassingError: likewise, where it cannot for a fault that may pass.
    """
    facts = {WORLD: Fact(str(world), "start all nodes with the same number of ranks"), **facts}
    if rank == 0:
        encoded = {name: fact.encoded() for name, fact in facts.items()}
        store.set("first", json.dumps({"node": node, "world": world, "facts": encoded}))
    first = json.loads(store.get("first"))
    found = [
        {"key": name, **_where_they_differ(first["facts"][name][0], fact.shown), "remedy": fact.remedy}
        for name, fact in facts.items()
        if name in first["facts"] and not _equal(first["facts"][name], fact.encoded())
    ]
    if found:
        _tell(store, {"rank": rank, "node": node, "count": len(found), "found": found[:MOST_SHOWN]})
    if verdict := _conclude(store, rank, first["world"]):
        raise verdict


def refuse_start(store: Store, rank: int, world: int, node: str, words: str, passing: bool = False) -> None:
    """Take this rank's part in the comparison although it cannot start: the others hear why, and need not wait for it.

    Args:
        store: the ranks' own, as `check_same_start` takes it on those that can start.
        rank: of this process.
        world: how many ranks there are.
        node: this machine's name.
        words: why it cannot start.
        passing: whether another start may end differently.
    """
    if rank == 0:
        store.set("first", json.dumps({"node": node, "world": world, "facts": {}}))
    _tell(store, {"rank": rank, "node": node, "refusal": words, "passing": passing})
    _conclude(store, rank, world)


def _tell(store: Store, told: Mapping[str, Any]) -> None:
    store.set(f"told/{store.add('told', 1)}", json.dumps(told))


def _conclude(store: Store, rank: int, world: int) -> AdaptiveError | None:
    """Return the verdict on all ranks' facts, which the last of them to come here finds; None where all are alike."""
    if store.add("compared", 1) == world:
        told = [json.loads(store.get(f"told/{i}")) for i in range(1, store.add("told", 0) + 1)]
        store.set("verdict", json.dumps(_verdict(json.loads(store.get("first"))["node"], told)))
    words, passing = json.loads(store.get("verdict"))
    if words:
        read, limit = store.add("read", 1), time.monotonic() + READ_WITHIN
        while rank == 0 and read < world and time.monotonic() < limit:  # the store ends with this process
            time.sleep(0.02)
            read = store.add("read", 0)
        return PassingError(words) if passing else StartError(words)
    return None


def _equal(first: Sequence[Any], own: Sequence[Any]) -> bool:
    if first[2] is not None and own[2] is not None:
        return math.isclose(first[2], own[2], rel_tol=1e-6)
    return bool(first[1] == own[1])


def _where_they_differ(first: str, own: str) -> dict[str, str]:
    """Return both values for the message; of long ones what lies around the first place in which they differ."""
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, own, strict=False)))
    begin = max(0, same - LONGEST // 4)
    if max(len(first), len(own)) <= LONGEST:
        begin = 0

    def part(value: str) -> str:
        cut = value[begin : begin + LONGEST]
        return ("..." if begin else "") + cut + ("..." if begin + LONGEST < len(value) else "")

    return {"first": part(first), "own": part(own)}


def _verdict(first_node: str, told: list[dict[str, Any]]) -> tuple[str, bool]:
    """Return one line on the lowest rank that cannot start, or else that differs, and whether that may pass.

    What does not pass comes first: another start would meet it again.
    """
    refusals = sorted((one for one in told if "refusal" in one), key=lambda one: (one["passing"], one["rank"]))
    if refusals:
        first, more = refusals[0], len(refusals) - 1
        others = f" (and {more} more of the ranks)" if more else ""
        return f"rank {first['rank']} on {first['node']} cannot start{others}: {first['refusal']}", first["passing"]
    return (_on_differences(first_node, sorted(told, key=lambda one: one["rank"])) if told else ""), False


def _on_differences(first_node: str, differing: list[dict[str, Any]]) -> str:
    told, others = differing[0], differing[1:]
    most, *further = told["found"]
    text = (
        f"the ranks were started differently: {most['key']} = {most['first']} on {first_node} (rank 0), {most['own']} "
        f"on {told['node']} (rank {told['rank']})"
    )
    if further:
        text += "; also " + ", ".join(f"{one['key']} = {one['first']} and {one['own']}" for one in further)
    if (hidden := told["count"] - len(told["found"])) > 0:
        text += f" and {hidden} more"
    if others:
        nodes = sorted({one["node"] for one in others})
        more = f" and {len(nodes) - 3} more nodes" if len(nodes) > 3 else ""
        text += f"; {len(others)} more of the ranks differ, on {', '.join(nodes[:3])}{more}"
    return f"{text}; {most['remedy']}"
