import itertools
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest

from adaptive.data.packing import pack as pack_module
from adaptive.data.packing.pack import pack
from adaptive.data.shards.index import check_shards, load_index
from adaptive.errors import DataError
from tests.data.conftest import content, make_photos
from tests.helpers.noflock import EACH, take_flock_away
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


def test_of_two_packs_one_wins_and_the_other_is_refused(tmp_path, monkeypatch):
    """The second lists its source while the first comes to its end."""
    one, two = (make_photos(tmp_path / name, classes=2, each=3) for name in ("one", "two"))
    (two / "class0" / "0.png").unlink()
    outcomes = []

    def listing(*arguments):
        monkeypatch.undo()
        try:
            outcomes.append(pack(one, tmp_path / "packed", workers=1, progress=False).fingerprint)
        except DataError as error:
            outcomes.append(str(error))
        return open_source(*arguments)

    open_source = pack_module.open_source
    monkeypatch.setattr(pack_module, "open_source", listing)
    index = pack(two, tmp_path / "packed", workers=1, progress=False)
    assert "packed.packing is in use by another adaptive pack" in outcomes[0]
    assert load_index(tmp_path / "packed").fingerprint == index.fingerprint
    assert not (tmp_path / "packed.packing").exists()


def test_what_appears_at_the_destination_meanwhile_stays(tmp_path, monkeypatch):
    """Copied there by another program, which asks no lock of ours."""
    source = make_photos(tmp_path / "photos", classes=2, each=3)
    pack(source, tmp_path / "elsewhere", workers=1, progress=False)
    before = content(tmp_path / "elsewhere")
    run = pack_module._run

    def slowly(*arguments):
        shutil.copytree(tmp_path / "elsewhere", tmp_path / "packed")
        return run(*arguments)

    monkeypatch.setattr(pack_module, "_run", slowly)
    with pytest.raises(DataError, match="already holds a dataset; replace it with --overwrite"):
        pack(source, tmp_path / "packed", seed=1, workers=1, progress=False)
    assert content(tmp_path / "packed") == before


def killed_before(event, kinds, source, destination):
    """Pack over a dataset in a process that dies before its ``event``-th change of a folder; whether it came to it."""

    def die():
        count, mine = itertools.count(), os.getpid()

        def watch(kind, arguments):
            here = kind in kinds and os.getpid() == mine and str(destination.parent) in str(arguments)
            if here and next(count) == event:
                os.kill(mine, signal.SIGKILL)

        sys.addaudithook(watch)
        pack(source, destination, overwrite=True, workers=1, progress=False)

    process = multiprocessing.get_context("fork").Process(target=die)
    process.start()
    process.join(PATIENCE)
    return process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize(
    "kinds",
    [
        ["os.rename"],
        pytest.param(["os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"], marks=pytest.mark.full),
    ],
    ids=["renames", "every change"],
)
def test_whenever_a_replacing_pack_is_killed_the_next_one_tidies_up(tmp_path, kinds):
    old, new = (make_photos(tmp_path / name, classes=2, each=2) for name in ("old", "new"))
    (new / "class0" / "0.png").unlink()
    packed, staging = tmp_path / "packed", tmp_path / "packed.packing"
    expected = {
        name: pack(tmp_path / name, tmp_path / f"clean-{name}", workers=1, progress=False) for name in ("old", "new")
    }
    known = [index.fingerprint for index in expected.values()]
    for event in itertools.count():
        shutil.rmtree(packed, ignore_errors=True)
        shutil.rmtree(staging, ignore_errors=True)
        shutil.copytree(tmp_path / "clean-old", packed)
        if not killed_before(event, kinds, new, packed):
            break
        # Whoever does not say --overwrite gets the old dataset or the new one back, whole.
        with pytest.raises(DataError, match="already holds a dataset"):
            pack(new, packed, workers=1, progress=False)
        assert load_index(packed).fingerprint in known
        check_shards(load_index(packed), packed, "train", deep=True)
        pack(old if event % 2 else new, packed, overwrite=True, workers=1, progress=False)
        assert content(packed) == content(tmp_path / f"clean-{'old' if event % 2 else 'new'}")
        assert not staging.exists()
    assert event >= 4
    assert content(packed) == content(tmp_path / "clean-new")


@pytest.mark.parametrize("number", EACH)
def test_without_flock_one_packs_all_the_same(tmp_path, number, monkeypatch):
    take_flock_away(monkeypatch, number)
    source = make_photos(tmp_path / "photos", classes=2, each=3)
    refused = []

    def second(*arguments):
        monkeypatch.setattr(pack_module, "open_source", open_source)
        with pytest.raises(DataError, match=rf"in use by another adaptive pack \(process {os.getpid()} on "):
            pack(source, tmp_path / "packed", workers=1, progress=False)
        refused.append(True)
        return open_source(*arguments)

    open_source = pack_module.open_source
    monkeypatch.setattr(pack_module, "open_source", second)
    pack(source, tmp_path / "packed", workers=1, progress=False)
    assert refused
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed", "photos"]
