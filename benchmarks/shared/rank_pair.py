"""Two processes that train together on one network after another, and are replaced when they hang or die."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
import time
import traceback
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from adaptive.doctor.checks.network import free_port
from benchmarks.shared.families import Family

WORLD = 2
START_SECONDS = 900.0  # of the first start ever, which compiles an operator of DeepSpeed's
TURNS = 20  # classes before the processes are replaced: what libraries leave behind in memory goes with them


class RankPair:
    """Takes classes the whole way on two gloo ranks; use it as a context manager."""

    def __init__(self) -> None:
        self.processes: list[Any] = []
        self.connections: list[Connection] = []
        self.turns = 0

    def __enter__(self) -> RankPair:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def call(self, family: Family, seconds: float) -> dict[str, Any]:
        """Take one class the whole way; a pair that dies or takes longer than ``seconds`` fails the step it is in."""
        if self.turns % TURNS == 0:
            self.stop()
            self._start()
        self.turns += 1
        with tempfile.TemporaryDirectory() as folder:
            for connection in self.connections:
                connection.send((family, folder))
            record = self._listen(time.monotonic() + seconds, seconds)
            # Ranks that parted in the middle of a step, or are still in one, are no ground for the next class.
            if record["failed"] not in (None, "wrap") or "seconds" not in record:
                self.stop()
        return record

    def stop(self) -> None:
        """End both processes."""
        for process in self.processes:
            process.kill()
            process.join()
        self.processes, self.connections, self.turns = [], [], 0

    def _listen(self, deadline: float, seconds: float) -> dict[str, Any]:
        steps = ["start"] * WORLD
        records: dict[int, dict[str, Any]] = {}
        while len(records) < WORLD:
            ready = wait(self.connections, max(0.0, deadline - time.monotonic()))
            if not ready:
                return _broken(steps[0], f"took longer than {seconds:.0f} s")
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = self.connections.index(connection)
                try:
                    kind, content = connection.recv()
                except (EOFError, ConnectionError):
                    self.processes[rank].join(10)
                    return _broken(steps[rank], f"rank {rank} ended with code {self.processes[rank].exitcode}")
                if kind == "step":
                    steps[rank] = content
                elif kind == "crash":
                    return _broken(steps[rank], f"rank {rank}: {content}")
                else:
                    records[rank] = content
        return records[0]

    def _start(self) -> None:
        context = mp.get_context("spawn")
        port = free_port()
        for rank in range(WORLD):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.connections.append(mine)
        for connection in self.connections:
            if not connection.poll(START_SECONDS) or connection.recv() != ("ready", None):
                self.stop()
                raise RuntimeError(f"the ranks did not meet within {START_SECONDS:.0f} s")


def _broken(step: str, reason: str) -> dict[str, Any]:
    """A record of ranks that gave none; what ranks give says how many seconds it took."""
    return {"passed": [], "failed": step, "reason": reason}


def _serve(rank: int, port: int, connection: Connection) -> None:
    """Work as one rank until the other end goes away."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ.update(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo", HF_HUB_OFFLINE="1")
    torch.set_num_threads(1)
    from adaptive.training.engine.group import init_distributed, resolve_device
    from benchmarks.shared.whole_way import whole_way

    try:
        resolve_device("cpu", rank)
        init_distributed()
        connection.send(("ready", None))
        while True:
            family, folder = connection.recv()
            record = whole_way(family, Path(folder), lambda step: connection.send(("step", step)))
            gc.collect()
            if rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
            connection.send(("done", record))
    except EOFError:
        pass
    except BaseException:
        connection.send(("crash", " ".join(traceback.format_exc().split())[-400:]))
    os._exit(0)  # gloo may abort in its destructors
