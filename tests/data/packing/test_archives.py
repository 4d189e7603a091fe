import io
import tarfile

import pytest

from adaptive.data.packing.archives import list_members, read_files
from adaptive.errors import DataError

BLOCK = 512


def tar_of(files, mode="w", form=tarfile.USTAR_FORMAT):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode, format=form) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def stored(folder, data):
    path = folder / "some.tar"
    path.write_bytes(data)
    return path


FILES = {"a.jpg": b"a" * 700, "folder/b.jpg": b"", "c.jpg": b"c" * 1024}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_offsets_lead_to_the_bytes_also_two_archives_deep(tmp_path, form):
    long = {f"{'long' * 40}.jpg": b"long", "é.jpg": b"accent"} if form != tarfile.USTAR_FORMAT else {}
    inner = tar_of(FILES | long, form=form)
    path = stored(tmp_path, tar_of({"before": b"x" * 513, "inner.tar": inner, "after": b"y"}, form=form))
    outer, ignored = list_members(path)
    assert ([member.name for member in outer], ignored) == (["before", "inner.tar", "after"], [])
    members, _ = list_members(path, outer[1])
    content = path.read_bytes()
    read = {member.name: content[member.offset : member.offset + member.size] for member in members}
    assert read == {name.rpartition("/")[2]: data for name, data in (FILES | long).items()}


def test_an_inner_archive_ends_where_its_member_ends(tmp_path):
    bare = tar_of(FILES)[: 512 + 1024 + 512 + 512 + 1024]  # without the end mark, as some writers leave it
    path = stored(tmp_path, tar_of({"one.tar": bare, "two.tar": tar_of({"z.jpg": b"z"})}))
    one, _ = list_members(path)[0]
    assert [member.name for member in list_members(path, one)[0]] == ["a.jpg", "b.jpg", "c.jpg"]


def test_every_cut_through_content_is_noticed(tmp_path):
    whole = tar_of(FILES)
    end = 512 + 1024 + 512 + 512 + 1024
    for size in [*range(0, end + 1, 256), end - 1]:
        with pytest.raises(DataError, match=r"some\.tar is cut off"):
            list_members(stored(tmp_path, whole[:size]))
    assert len(list_members(stored(tmp_path, whole[: end + BLOCK]))[0]) == 3


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path):
    data = bytearray(tar_of(FILES))
    data[512 + 1024 + 512 + 3] ^= 255
    with pytest.raises(DataError, match=r"some\.tar is cut off or damaged at byte 2048"):
        list_members(stored(tmp_path, bytes(data)))


@pytest.mark.parametrize("name", ["../x.jpg", "/x.jpg", "a/../../x.jpg", "a\nb.jpg"])
def test_names_that_lead_outside_are_refused(tmp_path, name):
    with pytest.raises(DataError, match="no name of an original archive"):
        list_members(stored(tmp_path, tar_of({name: b"x"})))
    with pytest.raises(DataError, match="no name of an original archive"):
        read_files(stored(tmp_path, tar_of({name: b"x"}, "w:gz")), {"x.jpg"}.__contains__, 100)


def test_links_devices_and_sparse_files_are_ignored(tmp_path):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            member = tarfile.TarInfo("x.jpg")
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        tar.addfile(tarfile.TarInfo("y.jpg"))
    path = stored(tmp_path, stream.getvalue())
    members, ignored = list_members(path)
    assert ([member.name for member in members], ignored) == (["y.jpg"], ["x.jpg"] * 4)
    assert read_files(path, lambda name: True, 100)[0] == {"y.jpg": b""}


def test_small_files_of_a_compressed_archive(tmp_path):
    path = stored(tmp_path, tar_of(FILES, "w:gz"))
    contents, names = read_files(path, {"a.jpg", "z.jpg"}.__contains__, 700)
    assert (contents, names) == ({"a.jpg": FILES["a.jpg"]}, list(FILES))
    with pytest.raises(DataError, match=r"a\.jpg in .* has 700 bytes, over 699"):
        read_files(path, {"a.jpg"}.__contains__, 699)
    with pytest.raises(DataError, match=r"is cut off, damaged or not a tar"):
        read_files(stored(tmp_path, tar_of(FILES, "w:gz")[:-30]), {"a.jpg"}.__contains__, 700)
    with pytest.raises(DataError, match=r"is cut off, damaged or not a tar"):
        read_files(stored(tmp_path, b"text"), {"a.jpg"}.__contains__, 700)
