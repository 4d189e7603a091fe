import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as launcher/train.py does, before torch is imported


@pytest.fixture(autouse=True)
def _no_rank_remains() -> Iterator[None]:
    """Later tests, and what they start, would take this process for a rank."""
    yield
    assert not {"RANK", "WORLD_SIZE", "MASTER_PORT"} & set(os.environ)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scanned digits, packed once for the whole session, in several shards."""
    from adaptive.data.pack import pack

    folder = tmp_path_factory.mktemp("data") / "digits"
    pack("builtin:digits", folder, shard_bytes=600_000, workers=1, progress=False)
    return folder
