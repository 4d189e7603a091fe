"""The doctor on two real nodes: what is wrong between them is named, and nothing hangs."""

import json
import re
import sys

import pytest

from tests.cluster.minicluster import REPOSITORY, Cluster

pytestmark = pytest.mark.cluster


def doctor(cluster: Cluster, *words: str) -> tuple[int, dict, str]:
    command = [
        sys.executable,
        "-m",
        "adaptive.commands.main",
        "doctor",
        "--only",
        "hostname,slurm,partitions,job",
        "--json",
    ]
    tasks = ["srun", "-N2", "--ntasks-per-node=1", f"--chdir={REPOSITORY}"]
    done = cluster.run(*tasks, *command, *words, check=False, seconds=240)
    return done.returncode, json.loads(done.stdout), done.stderr


def test_what_is_between_nodes_is_measured_and_a_folder_of_one_node_is_named(cluster: Cluster) -> None:
    code, found, errors = doctor(cluster, "--run-folder", "/tmp", "--patience", "120")  # /tmp is each node's own
    assert code == 1, errors
    assert found["nodes"] == ["node0", "node1"]
    by_name = {(one["name"], one["node"]): one for one in found["findings"]}
    assert by_name["slurm", "node1"]["status"] == "ok"
    assert "main*: 2 nodes" in by_name["partitions", "node0"]["found"]
    for name in ("meeting", "versions", "clocks", "all-reduce"):
        assert by_name[name, "all nodes"]["status"] == "ok", by_name[name, "all nodes"]
    assert re.search(
        r"node[01] [0-9.]+ [GT]FLOP/s, node[01] [0-9.]+ [GT]FLOP/s", by_name["speed", "all nodes"]["found"]
    )
    assert by_name["meeting", "all nodes"]["found"].startswith("2 ranks on 2 nodes met at node0:")
    shared = by_name["shared-folder", "all nodes"]
    assert (shared["status"], shared["found"]) == ("error", "what rank 0 writes to /tmp is not seen by node1")


def test_a_node_out_of_reach_is_named(cluster: Cluster) -> None:
    address = cluster.on("node0", "hostname", "-I").split()[0]
    cluster.on("node1", "ip", "route", "add", "blackhole", f"{address}/32")
    try:
        code, found, errors = doctor(cluster, "--patience", "5")
    finally:
        cluster.on("node1", "ip", "route", "del", "blackhole", f"{address}/32")
    [meeting] = [one for one in found["findings"] if one["name"] == "meeting"]
    assert code == 1
    assert (meeting["status"], "rank 1 on node1" in meeting["found"]) == ("error", True)
    assert "rank 1 on node1 does not reach rank 0 at node0:" in errors
