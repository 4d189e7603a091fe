import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adaptive.doctor.checks import between_nodes, speed
from adaptive.doctor.checks.network import free_port
from adaptive.doctor.finding import CheckSettings
from adaptive.doctor.programs import answer, start_script
from adaptive.doctor.rendezvous import Connection, LostError, connect, gather, listen
from adaptive.errors import MachineError
from tests.helpers.commands import Fork, Forks

HELLO = {"world": 3, "host": "there", "local_rank": 0, "facts": {}}


def test_who_comes_is_known_and_strangers_are_sent_away() -> None:
    port = free_port()
    with listen(port, 3) as server:
        stranger = socket.create_connection(("127.0.0.1", port))
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        other_job = Connection(socket.create_connection(("127.0.0.1", port)))
        other_job.send({**HELLO, "rank": 2, "world": 5})
        connection = connect(("127.0.0.1", port), {**HELLO, "rank": 2}, 10)
        came = gather(server, 3, 1.0)
        with pytest.raises(MachineError, match=rf"MASTER_PORT = {port} cannot be opened"):
            listen(port, 3)
    assert list(came) == [2]
    stranger.close()
    other_job.close()
    connection.send({"said": 1})
    assert came[2][0].receive(10) == {"said": 1}
    with pytest.raises(LostError, match=r"silent for 0.1 s"):
        came[2][0].receive(0.1)
    connection.close()
    with pytest.raises(LostError, match="closed"):
        came[2][0].receive(10)


def test_a_rank_that_reaches_nobody_says_what_stands_in_the_way() -> None:
    hello = {**HELLO, "rank": 1}
    with pytest.raises(MachineError, match=r"rank 1 on there does not reach rank 0 .*nothing listens there"):
        connect(("127.0.0.1", free_port()), hello, 0.5)
    with pytest.raises(MachineError, match=r"MASTER_ADDR = nowhere.invalid is unknown here; export MASTER_ADDR"):
        connect(("nowhere.invalid", 1), hello, 0.5)


@contextmanager
def peer(
    node: str, answer: Callable[[dict[str, Any]], dict[str, Any]], facts: dict[str, str]
) -> Iterator[between_nodes.Peer]:
    """Another rank that answers what it likes."""
    here, there = socket.socketpair()
    connection = Connection.__new__(Connection)
    connection.socket, connection.buffer = there, bytearray()
    own = Connection.__new__(Connection)
    own.socket, own.buffer = here, bytearray()

    def serve() -> None:
        try:
            while True:
                connection.send(answer(connection.receive(30)))
        except LostError:
            pass

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield between_nodes.Peer(1, own, node, True, facts)
    finally:
        here.close()
        thread.join(10)
        there.close()


@pytest.mark.parametrize(("skew", "status"), [(0.0, "ok"), (5.0, "warning"), (-500.0, "error")])
def test_clocks(skew: float, status: str) -> None:
    with peer("b", lambda _: {"time": time.time() + skew}, {}) as other:
        found = between_nodes.clocks([other])
    assert found.status == status
    assert skew == 0 or f"the clock of b is {skew:+.1f} s off" in found.found


def test_versions_that_differ() -> None:
    mine = between_nodes.facts()
    with peer("b", dict, mine) as b, peer("c", dict, {**mine, "torch": "1.0"}) as c:
        assert between_nodes.versions("a", mine, [b]).status == "ok"
        found = between_nodes.versions("a", mine, [b, c])
        assert (found.status, found.found) == ("error", f"torch: {mine['torch']}, but 1.0 on c")
    with peer("b", dict, {**mine, "processor": "another"}) as b:
        found = between_nodes.versions("a", mine, [b])
        assert (found.status, "TORCH_EXTENSIONS_DIR" in found.remedy) == ("warning", True)


def test_a_run_folder_that_others_see_and_one_that_they_do_not(tmp_path: Path) -> None:
    settings = CheckSettings(tmp_path / "runs")
    with peer("b", lambda asked: between_nodes.look_at_folder(asked["path"]), {}) as other:
        found = between_nodes.shared_folder(settings, [other])
    assert (found.status, found.found) == ("ok", f"all nodes see {tmp_path}, and locks hold between them")
    with peer("b", lambda _: {"token": ""}, {}) as other:
        found = between_nodes.shared_folder(settings, [other])
    assert (found.status, found.found) == ("error", f"what rank 0 writes to {tmp_path} is not seen by b")
    assert "train.run_folder=" in found.remedy
    with peer("b", lambda asked: {**between_nodes.look_at_folder(asked["path"]), "locked": False}, {}) as other:
        assert between_nodes.shared_folder(settings, [other]).status == "warning"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("speeds", "status", "words"),
    [
        ((9e10, 1.1e11), "ok", "c 90.0 GFLOP/s, a 100.0 GFLOP/s, b 110.0 GFLOP/s per rank, in float32"),
        (
            (2e10, 1.2e12),
            "warning",
            "rank 1 on c computes 5.0 x slower than the median rank: c 20.0 GFLOP/s, a 100.0 GFLOP/s, b 1.2 TFLOP/s",
        ),
    ],
)
def test_a_node_that_computes_slowly_is_named(
    speeds: tuple[float, float], status: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "speed", lambda device: lambda: {"speed": 1e11})
    with (
        peer("c", lambda asked: {"speed": speeds[0], "asked": asked}, {}) as c,
        peer("b", lambda asked: {"speed": speeds[1]}, {}) as b,
    ):
        found = speed.compare_speed([c, replace(b, rank=2)], 0, "a")
    assert found.status == status
    assert words in found.found
    assert bool(found.remedy) == (status == "warning")


def test_a_node_that_cannot_compute_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "speed", lambda device: lambda: {"speed": 1e11})
    with peer("b", lambda _: {"error": "RuntimeError: no kernel image"}, {}) as b:
        found = speed.compare_speed([b], 0, "a")
    assert (found.status, found.found) == ("error", "rank 1 on b cannot compute: RuntimeError: no kernel image")


@pytest.mark.full
def test_who_is_held_back_measures_less() -> None:
    free = answer(start_script("speed_probe", "cpu").wait(60))["speed"]
    held = start_script("speed_probe", "cpu")
    while held.process.poll() is None:
        os.kill(held.process.pid, signal.SIGSTOP)
        time.sleep(0.16)
        os.kill(held.process.pid, signal.SIGCONT)
        time.sleep(0.04)
    assert answer(held.wait(60))["speed"] < free / 1.5


def start(forks: Forks, rank: int, port: int, *words: str) -> Fork:
    return forks.start(
        ["doctor", "--only", "hostname", "--json", *words],
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
    )


@pytest.mark.ranks
def test_two_ranks_meet_and_the_first_tells_of_both(tmp_path: Path, forks: Forks) -> None:
    port = free_port()
    ranks = [start(forks, rank, port, "--patience", "120", "--run-folder", str(tmp_path)) for rank in range(2)]
    first, second = (rank.wait() for rank in ranks)
    assert (first.code, second.code) == (0, 0), (first, second)
    assert second.out == ""
    found = {one["name"]: one for one in json.loads(first.out)["findings"]}
    assert list(found) == ["hostname", "meeting", "versions", "clocks", "speed", "all-reduce"]
    assert {one["status"] for name, one in found.items() if name != "speed"} == {"ok"}
    assert re.fullmatch(r".*\S+ [0-9.]+ [GT]FLOP/s per rank, in float32", found["speed"]["found"])  # of a busy machine
    assert "2 ranks reduce over gloo" in found["all-reduce"]["found"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ranks
def test_ranks_that_do_not_come_are_named(forks: Forks) -> None:
    waiting = start(forks, 0, free_port(), "--patience", "1")
    lost = start(forks, 1, free_port(), "--patience", "1").wait()
    alone = waiting.wait()
    assert (alone.code, alone.err) == (1, "")
    [meeting] = [one for one in json.loads(alone.out)["findings"] if one["name"] == "meeting"]
    assert meeting["status"] == "error"
    assert "within 1 s: rank 1" in meeting["found"]
    assert (lost.code, lost.out) == (1, "")
    assert "adaptive doctor: error: rank 1 on " in lost.err
    assert "nothing listens there" in lost.err
