from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster.minicluster import REPOSITORY, Cluster, why_not


@pytest.fixture(scope="session")
def _cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One cluster for all tests of this process."""
    with running(tmp_path_factory) as cluster:
        yield cluster


@contextmanager
def running(tmp_path_factory: pytest.TempPathFactory, nodes: int = 2) -> Iterator[Cluster]:
    """Start a cluster, and stop it."""
    if reason := why_not():
        pytest.skip(reason)
    # Its state lies in a folder without white space, which pytest's are.
    state = tmp_path_factory.mktemp("cluster") / "state"
    temporary = tmp_path_factory.getbasetemp()
    operators = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home()))
    shared = [temporary.parent if temporary.name.startswith("popen-") else temporary, REPOSITORY, Path(sys.prefix)]
    cluster = Cluster(state, [path.resolve() for path in (*shared, Path(sys.base_prefix), operators)], nodes)
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()


@pytest.fixture
def cluster(_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, whole and idle; afterwards all jobs are ended and all that a test broke is mended."""
    yield _cluster
    _cluster.heal()
