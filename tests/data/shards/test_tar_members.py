"""The fast scan of a tar's headers against tarfile, on what other writers make."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive.data.faults import BadDataError
from adaptive.data.packing.archives import list_members
from adaptive.data.packing.foreign.tar_check import examine
from adaptive.data.shards import tar_members
from adaptive.data.shards.tar_members import members_of
from adaptive.errors import DataError

KEYS = ("mtime", "atime", "uname", "comment", "path", "size", "linkpath", "hdrcharset", "GNU.sparse.size", "x")
NAMES = ("a.jpg", "é.jpg", "b/" * 60 + "c.jpg", "d" * 120 + ".cls", "e.jpg/", "f\udce9.jpg")


def by_tarfile(path: Path) -> list[tuple[str, int, int]]:
    with tarfile.open(path) as tar:
        return [(m.name, m.offset_data, m.size) for m in tar if m.isreg() and not m.issparse()]


def scanned(path: Path) -> list[tuple[str, int, int]]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return members_of("x", descriptor)
    finally:
        os.close(descriptor)


@pytest.fixture
def no_tarfile(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(shown: str, descriptor: int) -> None:
        raise AssertionError("scanned by tarfile")

    monkeypatch.setattr(tar_members, "_members_of_any_tar", slow)


@pytest.mark.usefixtures("no_tarfile")
def test_webdatasets_own_writer_is_scanned_fast(tmp_path: Path) -> None:
    """It puts an extended header, with a time in fractions of a second, before every member."""
    path = tmp_path / "train-0.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for number in range(20):
            writer.write({"__key__": f"{number:04d}", "jpg": b"\xff\xd8" + bytes(number), "cls": number})
    assert path.read_bytes().count(b"mtime=") == 40
    assert scanned(path) == by_tarfile(path)
    assert len(scanned(path)) == 40


@pytest.mark.usefixtures("no_tarfile")
def test_long_names_of_extended_headers_are_scanned_fast(tmp_path: Path) -> None:
    path = tmp_path / "long.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for number, name in enumerate([*NAMES[1:4], "short.jpg"]):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = number, number + 0.5
            tar.addfile(info, io.BytesIO(bytes(number)))
    assert scanned(path) == by_tarfile(path)


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.sampled_from(NAMES), st.dictionaries(st.sampled_from(KEYS), st.sampled_from(("3", "b.png", "é")))),
        max_size=3,
    ),
    st.sampled_from((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)),
    st.booleans(),
    st.integers(0, 2000),
    st.binary(max_size=2),
)
def test_what_is_said_of_members_is_tarfiles(
    tmp_path_factory: pytest.TempPathFactory,
    entries: list[tuple[str, dict[str, str]]],
    form: int,
    before_all: bool,
    at: int,
    damage: bytes,
) -> None:
    """Extended headers that say more than a time, and damaged ones, are read as tarfile reads them, or refused."""
    path = tmp_path_factory.getbasetemp() / "members.tar"
    with tarfile.open(path, "w", format=form, pax_headers={"comment": "x"} if before_all else {}) as tar:
        for name, header in entries:
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = 5, dict(header)
            tar.addfile(info, io.BytesIO(b"12345"))
    content = bytearray(path.read_bytes())
    content[at : at + len(damage)] = damage
    path.write_bytes(content)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        expected = tar_members._members_of_any_tar("x", descriptor)
        found = members_of("x", descriptor)
    except BadDataError:
        return
    finally:
        os.close(descriptor)
    if damage and found != expected:  # tarfile looks at the checksums of headers, a reader of plain ones does not
        return
    assert found == expected


def test_a_hostile_first_header_is_a_damaged_shard(tmp_path: Path) -> None:
    """tarfile reads it as it opens the file, and raises whatever comes."""
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.jpg")
        info.pax_headers = {"GNU.sparse.size": "b", "size": "c"}
        tar.addfile(info)
    with pytest.raises(BadDataError, match="is not a tar file"):
        scanned(path)
    assert "no tar file" in examine(path).faults[0][1]
    with pytest.raises(DataError, match="not an uncompressed tar"):
        list_members(path)
