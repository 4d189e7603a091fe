"""The cluster that the other tests here rely on."""

from pathlib import Path

import pytest

from tests.cluster.minicluster import Cluster

pytestmark = pytest.mark.cluster


@pytest.mark.full  # of the cluster that the tests use, not of what they test
def test_nodes_are_real_and_whatever_breaks_is_mended(cluster: Cluster, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/bash\nsrun bash -c 'hostname; touch /tmp/mine'\n")
    log = tmp_path / "job.log"
    job = cluster.sbatch("-N2", "--ntasks-per-node=1", "-o", log, script, cwd=tmp_path)
    assert cluster.wait(job) == "COMPLETED"
    assert sorted(log.read_text().split()) == ["node0", "node1"]
    assert "mine" in cluster.on("node1", "ls", "/tmp").split()
    assert not Path("/tmp/mine").exists()

    sleeper = tmp_path / "sleep.sh"
    sleeper.write_text("#!/bin/bash\nsleep 1000\n")
    left = cluster.sbatch("-N2", sleeper, cwd=tmp_path)
    cluster.until(lambda: cluster.job(left)["JobState"] == "RUNNING")
    cluster.run("scontrol", "update", "NodeName=node0", "State=DRAIN", "Reason=test")
    cluster.mc("kill", "node1")
    cluster.heal()
    assert cluster.node_states() == {"node0": "idle", "node1": "idle"}
    assert cluster.job(left)["JobState"] == "CANCELLED"
