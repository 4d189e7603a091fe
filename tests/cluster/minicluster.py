"""The real Slurm clusters that the cluster tests run on: nodes in namespaces of their own on this machine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.helpers.locations import CLUSTER, REPOSITORY

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "sinfo", "nsenter", "unshare", "ip", "setsid", "flock")
OVER = {
    *("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE"),
    "OUT_OF_MEMORY",
}
START_WITHIN = 120  # seconds, on a machine that does much else


def why_not() -> str | None:
    """Why no cluster can run here, or None."""
    if not (CLUSTER / "up.sh").is_file():
        return f"no cluster scripts in {CLUSTER}; ADAPTIVE_CLUSTER names their folder"
    if os.getuid() != 0:
        return "a cluster of namespaces needs root"
    path = _path()
    if missing := [program for program in NEEDED if shutil.which(program, path=path) is None]:
        return f"not installed: {', '.join(missing)} (Debian: slurm-wlm munge iproute2 util-linux)"
    probe = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "ip", "link", "add", "br0", "type", "bridge"]
    tried = subprocess.run(probe, capture_output=True, text=True, env={**os.environ, "PATH": path})
    return f"no namespaces or bridges here: {tried.stderr.strip()}" if tried.returncode else None


def _path() -> str:
    programs = str(Path(sys.executable).parent)
    return os.pathsep.join([programs, os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


class Cluster:
    """Nodes, ``node0`` and so on, and ``head``, from which jobs are submitted.

    The file system is the machine's, but ``/tmp`` and ``/dev/shm`` are each node's own (what the tests need of ``/tmp``
    stays shared). Jobs get the environment that they are submitted with: this one's, and what `sbatch` is given.
    """

    def __init__(self, state: Path, shared: list[Path], nodes: int = 2) -> None:
        self.home, self.state = CLUSTER, state
        self.nodes = tuple(f"node{number}" for number in range(nodes))
        below_tmp = [str(path) for path in shared if path.is_relative_to("/tmp")]
        self.environment = {
            **os.environ,
            "PATH": f"{state / 'bin'}{os.pathsep}{_path()}",
            "MINICLUSTER_STATE": str(state),
            "MC_LOCAL": "/dev/shm /tmp",
            "MC_SHARED": ":".join(below_tmp),
            "ADAPTIVE_PYTHON": sys.executable,
            "PYTHONPATH": str(REPOSITORY),
        }

    def up(self) -> None:
        """Start it."""
        self._script("up.sh", "-n", str(len(self.nodes)), "-s", str(self.state))

    def down(self) -> None:
        """Stop it, and remove its state."""
        self._script("down.sh", "-s", str(self.state), "-r")

    def _script(self, name: str, *words: str) -> None:
        # Into a file: the daemons would hold a pipe open.
        log = self.state.with_name(f"{self.state.name}-{name}.log")
        with log.open("w") as output:
            command = [str(self.home / name), *words]
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=self.environment, timeout=180
            )
        assert done.returncode == 0, f"{name}: {log.read_text()}"

    def run(
        self, *words: str | Path, cwd: Path | None = None, check: bool = True, seconds: float = 120, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on this machine, with the cluster's ``sbatch``, ``squeue``, ``scancel`` ... on its PATH."""
        done = subprocess.run(
            [str(word) for word in words],
            cwd=cwd,
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        assert done.returncode == 0 or not check, f"{words}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def mc(self, *words: str, check: bool = True) -> str:
        """Do something to the cluster: ``kill node1``, ``start node1``, ``cut``, ``drop``, ``heal`` ... (mc's help)."""
        # Into a file: what a started node or slurmd inherits, it keeps open.
        log = self.state.with_name(f"{self.state.name}-mc.log")
        with log.open("w") as output:
            done = subprocess.run(
                [str(self.home / "mc"), *words],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                timeout=120,
            )
        assert done.returncode == 0 or not check, f"mc {words}: {log.read_text()}"
        return log.read_text()

    def power_on(self, node: str) -> None:
        """Start a node again that was killed, and let the others ask where it is.

        The restarted node's cable has another hardware address, which a real machine's has not: what the others have in
        their ARP tables would send the first packets nowhere, and with them the job's start, for half a minute.
        """
        for other in ["head", *(other for other in self.nodes if other != node)]:
            self.mc("exec", other, "ip", "neigh", "flush", "all", check=False)  # it may be dead itself
        self.mc("start", node)

    def on(self, node: str, *words: str | Path, cwd: Path | None = None, check: bool = True) -> str:
        """Run a command on a node, or on ``head``, and return what it prints."""
        return self.run(self.home / "mc", "exec", node, *words, cwd=cwd, check=check).stdout

    def processes(self, node: str, having: str) -> list[int]:
        """Ids, as the node counts them, of processes whose command line holds the pattern ``having``."""
        lines = [line.split(None, 1) for line in self.on(node, "ps", "-e", "-ww", "-o", "pid=,args=").splitlines()]
        return [int(pid) for pid, command in lines if re.search(having, command)]

    def sbatch(self, *words: str | Path, cwd: Path | None = None, **environment: str) -> int:
        """Submit a job from ``cwd`` and return its id."""
        done = self.run("sbatch", "--parsable", *words, cwd=cwd, **environment)
        return int(done.stdout.strip().split(";")[0])

    def job(self, number: int | str) -> dict[str, str]:
        """What Slurm knows of a job (``JobState``, ``Reason``, ``Restarts``, ``NodeList``, ``ExitCode`` ...)."""
        shown = self.run("scontrol", "-o", "show", "job", str(number)).stdout.splitlines()[0]
        return dict(re.findall(r"(?:^| )([A-Za-z:/_]+)=(\S*)", shown))

    def limit(self, number: int | str, minutes: int) -> None:
        """Let a running job's time limit end within so many minutes from now, and not sooner than a minute before."""
        *_, hours, run, _ = map(int, re.split("[-:]", self.job(number)["RunTime"]))
        self.run("scontrol", "update", f"JobId={number}", f"TimeLimit={60 * hours + run + minutes}")

    def wait(self, number: int | str, seconds: float = 240) -> str:
        """Wait until a job is over for good (a requeued one is not) and return its state."""
        self.until(lambda: self.job(number)["JobState"] in OVER, seconds, lambda: f"job {number}: {self.job(number)}")
        return self.job(number)["JobState"]

    def until(self, due: Callable[[], object], seconds: float = 120, explain: Callable[[], str] = lambda: "") -> None:
        """Wait until ``due`` says so; fails after ``seconds`` with the explanation."""
        limit = time.monotonic() + seconds
        while not due():
            assert time.monotonic() < limit, f"not within {seconds} s: {explain()}"
            time.sleep(0.1)

    def until_logged(self, log: Path, words: str, seconds: float = 120) -> None:
        """Wait until a file holds some words."""
        self.until(
            lambda: log.is_file() and words in log.read_text(errors="replace"),
            seconds,
            lambda: f"no {words!r} in {log}:\n{tail(log)}",
        )

    @contextmanager
    def standing_still(self, job: int, having: str, log: Path, words: str) -> Iterator[list[str]]:
        """Wait until a job's log holds some words and stop its ranks there; they go on after the block.

        However fast the machine is, a run is not done before what a test has for it. Yields the job's nodes.

        Args:
            job: its number.
            having: pattern of the ranks' command lines.
            log: the job's log.
            words: what the log will hold.
        """
        self.until(lambda: self.job(job)["JobState"] == "RUNNING", 120, lambda: str(self.job(job)))
        nodes = self.run("scontrol", "show", "hostnames", self.job(job)["NodeList"]).stdout.split()
        ranks: dict[str, list[int]] = {}

        def found() -> bool:
            ranks.update({node: self.processes(node, having) for node in nodes})
            return all(ranks.values())

        self.until(found, 240, lambda: f"no {having!r} on {nodes}: {ranks}\n{tail(log)}")
        self.until_logged(log, words, 240)
        for node in nodes:
            self.on(node, "kill", "-STOP", *map(str, ranks[node]))
        try:
            yield nodes
        finally:
            for node in nodes:
                self.mc("exec", node, "kill", "-CONT", *map(str, ranks[node]), check=False)

    def node_states(self) -> dict[str, str]:
        """Every node's state as Slurm sees it: ``idle``, ``alloc``, ``down*``, ``drain`` ..."""
        lines = self.on("head", "sinfo", "-h", "-N", "-p", "main", "-o", "%N %t").splitlines()
        return dict(line.split() for line in lines)

    def heal(self) -> None:
        """End all jobs and make all nodes whole again."""
        jobs = self.run("squeue", "-h", "-o", "%A").stdout.split()
        if jobs:
            self.run("scancel", *jobs, check=False)
            self.until(lambda: not self.run("squeue", "-h", "-o", "%A").stdout.split(), START_WITHIN)
        for node in self.nodes:
            dead = self.mc("exec", node, "true", check=False)
            if not dead and self.processes(node, "python"):  # not of a job, or out of Slurm's sight
                self.mc("kill", node)
                dead = "killed"
            if dead:
                self.power_on(node)
            self.mc("heal", node)
            if not self.processes(node, "slurmd -D"):
                self.mc("start-slurmd", node)
        self.until(self._all_idle, START_WITHIN, lambda: str(self.node_states()))

    def _all_idle(self) -> bool:
        states = self.node_states()
        for node, state in states.items():
            if state.startswith(("drain", "drng", "down")):
                self.run("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
        return set(states.values()) == {"idle"} and len(states) == len(self.nodes)


def tail(log: Path, length: int = 6000) -> str:
    """The end of a log."""
    return log.read_text(errors="replace")[-length:] if log.exists() else f"(no {log})"
