import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from adaptive.data.packing.pack import pack
from adaptive.errors import DataError
from tests.data.conftest import content, make_photos
from tests.helpers.waiting import PATIENCE, wait_until

SLOW_PACK = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started with it ignored
from adaptive.data.packing import pack as module, writer
original = writer.check_image
def slow(data, count=[0]):
    count[0] += 1
    time.sleep(0.04 if count[0] < int(sys.argv[3]) else 100)
    return original(data)
writer.check_image = slow
module.pack(sys.argv[1], sys.argv[2], shard_count=8, workers=2, progress=False)
"""


def start_slow_pack(source, destination, records=2, stuck_after=1000):
    """Start packing in another process and wait until some shards are finished.

    After ``stuck_after`` images each worker takes longer than any test.
    """
    words = [sys.executable, "-c", SLOW_PACK, str(source), str(destination), str(stuck_after)]
    process = subprocess.Popen(words, stderr=subprocess.PIPE)
    finished = destination.with_name(f"{destination.name}.packing") / "records"
    wait_until(lambda: process.poll() is not None or len(list(finished.glob("*.tar.json"))) >= records)
    assert process.poll() is None
    return process


def test_a_killed_packing_continues_to_the_same_bytes(tmp_path):
    source = make_photos(tmp_path / "photos", classes=4, each=25)
    pack(source, tmp_path / "clean", shard_count=8, progress=False)
    process = start_slow_pack(source, tmp_path / "packed")
    workers = psutil.Process(process.pid).children()
    with pytest.raises(DataError, match="in use by another adaptive pack"):
        pack(source, tmp_path / "packed", shard_count=8, progress=False)
    process.kill()
    process.communicate()
    assert not (tmp_path / "packed").exists()
    _, alive = psutil.wait_procs(workers, timeout=PATIENCE)
    assert not alive  # workers end with a parent that was killed
    records = tmp_path / "packed.packing" / "records"
    kept = {path.name: path.stat().st_mtime_ns for path in records.iterdir() if not path.name.startswith(".")}
    assert 2 <= len(kept) < 13
    shards = tmp_path / "packed.packing" / "dataset"
    before = {path.name: path.stat().st_ino for path in shards.glob("*.tar")}
    pack(source, tmp_path / "packed", shard_count=8, progress=False)
    written = [p.name for p in (tmp_path / "packed").glob("*.tar") if before.get(p.name) != p.stat().st_ino]
    assert len(written) <= 13 - len(kept)
    assert content(tmp_path / "packed") == content(tmp_path / "clean")


def test_a_changed_plan_starts_clean(tmp_path):
    source = make_photos(tmp_path / "photos", classes=4, each=25)
    process = start_slow_pack(source, tmp_path / "packed")
    process.kill()
    process.communicate()
    (source / "class0" / "0.png").unlink()
    pack(source, tmp_path / "packed", shard_count=8, progress=False)
    pack(source, tmp_path / "clean", shard_count=8, progress=False)
    assert content(tmp_path / "packed") == content(tmp_path / "clean")


def test_interrupting_stops_workers_soon(tmp_path):
    source = make_photos(tmp_path / "photos", classes=4, each=50)
    process = start_slow_pack(source, tmp_path / "packed", stuck_after=60)
    started = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE)
    assert time.monotonic() - started < 30
    assert errors.decode().rstrip().endswith("KeyboardInterrupt")
    assert not (tmp_path / "packed").exists()
