import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.waiting import PATIENCE

READ = """
import sys
from adaptive.config.sections import DataConfig
from adaptive.data.shards.index import load_index
from adaptive.data.reading.stream import LoaderOptions, TrainStream
from adaptive.errors import MachineError

folder, erasing = sys.argv[1], float(sys.argv[2])
data = DataConfig(path=folder, image_size=64, erasing=erasing)
loader = LoaderOptions(workers=2)
stream = TrainStream(load_index(folder), data, "train", loader, seed=0, global_batch=48, micro_batch=48)
try:
    print(sum(len(batch.images) for batch in stream.batches(0, 8)))
except MachineError as error:
    print(error)
"""


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="needs root, to mount a /dev/shm")
@pytest.mark.parametrize(
    ("room", "erasing"),  # batches of bytes, of floats
    [
        ("64k", 0.0),
        pytest.param("64m", 0.5, marks=pytest.mark.full),
        pytest.param("64k", 0.5, marks=pytest.mark.full),
        pytest.param("64m", 0.0, marks=pytest.mark.full),
    ],
)
def test_no_room_for_a_batch_is_told_at_once(digits: Path, room: str, erasing: float) -> None:
    mounted = f'mount -t tmpfs -o size={room} tmpfs /dev/shm && exec "$@"'
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", mounted, "bash", sys.executable, "-c", READ, str(digits), str(erasing)],
        capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    if room == "64m":
        assert done.stdout.strip() == "384"
    else:
        assert done.stdout.startswith("no room in /dev/shm for a batch (")
        assert "data.workers" in done.stdout
        assert len(done.stdout.splitlines()) == 1
