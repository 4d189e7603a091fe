"""Hostile and damaged input: every outcome is success or one line, soon, and nothing is written elsewhere."""

import contextlib
import copy
import gzip
import io
import json
import os
import signal
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from adaptive.data.images.decode import decode_image
from adaptive.data.packing import archives
from adaptive.data.packing.pack import pack
from adaptive.data.reading.samples import decode_sample
from adaptive.data.shards import reader as reader_module
from adaptive.data.shards.index import INDEX_NAME, ShardInfo, check_shards, fingerprint, load_index
from adaptive.data.shards.reader import LocalFiles, ShardReader
from adaptive.errors import AdaptiveError

SECONDS = 10  # for one example, which takes milliseconds


def fuzzed(examples):
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=quiet)


@contextlib.contextmanager
def soon():
    """Fail an example that hangs."""

    def hang(*_):
        raise TimeoutError(f"not done within {SECONDS} s")

    before = signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def outcome(work):
    """Run something and return its error, which must be one of ours and one line."""
    found = None
    with soon():
        try:
            work()
        except AdaptiveError as error:
            found = error
    assert found is None or str(found).isprintable()
    return found


@st.composite
def mutations(draw, start):
    """Bytes of ``start`` with some changed, put in, taken out, or cut off."""
    content = bytearray(start)
    for _ in range(draw(st.integers(1, 8))):
        place = draw(st.integers(0, max(0, len(content) - 1)))
        kind = draw(st.sampled_from(["set", "set", "set", "insert", "delete", "cut", "repeat"]))
        if kind == "set" and content:
            content[place] = draw(st.integers(0, 255))
        elif kind == "insert":
            content[place:place] = draw(st.binary(max_size=40))
        elif kind == "delete":
            del content[place : place + draw(st.integers(1, 600))]
        elif kind == "cut" and draw(st.booleans()):
            del content[place:]
        elif kind == "repeat":
            content[place:place] = content[place : place + 512]
    return bytes(content)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A packed dataset of a few small images of two classes."""
    source = tmp_path_factory.mktemp("source")
    generator = np.random.default_rng(0)
    for split, each in (("train", 3), ("val", 1)):
        for label in range(2):
            (source / split / f"class{label}").mkdir(parents=True)
            for number in range(each):
                pixels = generator.integers(0, 256, (9, 7, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(source / split / f"class{label}" / f"{number}.png")
    destination = tmp_path_factory.mktemp("packed") / "small"
    pack(source, destination, progress=False, workers=1, shard_count=3)
    return destination


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**80), 2**80)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["../../etc/passwd", "a\nb", "\x1b[2J", "$(id)", "train-00000.tar", "0" * 64, 10**30]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def changed_trees(draw, tree):
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        node = tree
        while True:
            if isinstance(node, dict) and node:
                key = draw(st.sampled_from(sorted(node)))
            elif isinstance(node, list) and node:
                key = draw(st.integers(0, len(node) - 1))
            else:
                break
            if isinstance(node[key], (dict, list)) and draw(st.integers(0, 3)):
                node = node[key]
                continue
            how = draw(st.sampled_from(["value", "value", "delete", "add", "double"]))
            if how == "value":
                node[key] = draw(values)
            elif how == "delete":
                del node[key]
            elif isinstance(node, dict):
                node[draw(st.text(max_size=10))] = draw(values) if how == "add" else copy.deepcopy(node[key])
            else:
                node.append(draw(values) if how == "add" else copy.deepcopy(node[key]))
            break
    return tree


@given(data=st.data())
@fuzzed(180)
def test_index(small, tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "fuzzed_index"
    folder.mkdir(exist_ok=True)
    for path in small.glob("*.tar"):
        if not (folder / path.name).exists():
            os.link(path, folder / path.name)
    text = (small / INDEX_NAME).read_text()
    if data.draw(st.booleans()):
        tree = data.draw(changed_trees(json.loads(text)))
        if data.draw(st.booleans()):  # with a fingerprint that fits, where that can be had
            with contextlib.suppress(Exception):
                index = load_index(small).model_copy(update={"classes": tree["classes"]})
                tree["fingerprint"] = fingerprint(index.classes, index.splits)
        content = json.dumps(tree).encode("utf-8", "surrogatepass")
    else:
        content = data.draw(mutations(text.encode()))
    (folder / INDEX_NAME).write_bytes(content)

    def work():
        index = load_index(folder)
        for split in index.splits:
            check_shards(index, folder, split, deep=True)

    outcome(work)


def test_deep_and_huge_json(tmp_path):
    for content in (b"[" * 100_000, b'{"version": ' + b"9" * 5000 + b"}", b"\xff\xfe", b"", b'{"version": 1e999}'):
        (tmp_path / INDEX_NAME).write_bytes(content)
        assert outcome(lambda: load_index(tmp_path)) is not None


def read_all(folder, name, count):
    """Read every sample of a shard as the stream does."""
    path = folder / name
    info = ShardInfo(name=name, count=count, bytes=path.stat().st_size, sha256="0" * 64)
    reader = ShardReader(LocalFiles(folder), [info], capacity=1)
    errors = 0
    try:
        for position in range(count):
            found = outcome(lambda position=position: decode_sample(reader.read(0, position), 2, decode_image))
            errors += found is not None
    finally:
        reader.close()
    return errors


@given(data=st.data())
@fuzzed(150)
def test_mutated_shards(small, tmp_path_factory, data):
    reader_module._FIRST_PAUSE = 0.0
    folder = tmp_path_factory.getbasetemp() / "fuzzed_shards"
    folder.mkdir(exist_ok=True)
    content = (small / "train-00000.tar").read_bytes()[:8192]
    (folder / "x.tar").write_bytes(data.draw(mutations(content)))
    read_all(folder, "x.tar", data.draw(st.sampled_from([3, 3, 2, 1])))


names = st.sampled_from(
    [
        "a.png",
        "a.cls",
        "b.jpg",
        "b.cls",
        "../up.png",
        "/abs.png",
        "c.pyd",
        "a.pickle",
        "a.pkl",
        "x/../../y.png",
        "n\n.png",
    ]
) | st.text(st.characters(exclude_characters="\0"), min_size=1, max_size=30)
REGULAR = [
    tarfile.REGTYPE,
    tarfile.REGTYPE,
    tarfile.REGTYPE,
    tarfile.AREGTYPE,
    tarfile.CONTTYPE,
    tarfile.GNUTYPE_SPARSE,
]
SPECIAL = [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, b"Z"]
EXTENDED = [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK]
kinds = st.sampled_from([*REGULAR, *SPECIAL, *EXTENDED])
sizes = st.none() | st.sampled_from([0, 1, 511, 512, 2**20, 2**33 - 1, 2**40, 2**62, 2**63, -1, -512, -1024, -(2**40)])
bodies = st.binary(max_size=30) | st.sampled_from(
    [b"0", b"1", b"7", b"-3", b"9" * 5000, b"dog", b"30 mtime=9\n", b"18 path=../../up\n", b"99999 size=3\n"]
)


@st.composite
def hostile_tars(draw):
    """Tars of members of any kind, whose headers may lie about the size, with and without an end."""
    stream = io.BytesIO()
    for _ in range(draw(st.integers(1, 6))):
        info, data = tarfile.TarInfo(draw(names)), draw(bodies)
        info.type, info.linkname = draw(kinds), draw(st.sampled_from(["", "/etc/passwd", "../../x", "a.png"]))
        told = draw(sizes)
        info.size = len(data) if told is None else told
        form = draw(st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
        try:
            header = info.tobuf(form, "utf-8", "surrogateescape")
        except (ValueError, OverflowError):
            info.name, info.size = "long.png", min(max(info.size, 0), 8**11 - 1)
            header = info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
        stream.write(header + data + b"\0" * (-len(data) % 512))
    if draw(st.booleans()):
        stream.write(b"\0" * 1024)
    return stream.getvalue()


@given(data=st.data())
@fuzzed(220)
def test_hostile_tars(tmp_path_factory, data):
    reader_module._FIRST_PAUSE = 0.0
    folder = tmp_path_factory.getbasetemp() / "fuzzed_tars"
    folder.mkdir(exist_ok=True)
    outside = sorted(path.name for path in folder.parent.iterdir())
    content = data.draw(hostile_tars())
    (folder / "x.tar").write_bytes(content)
    read_all(folder, "x.tar", data.draw(st.integers(1, 4)))
    outcome(lambda: archives.list_members(folder / "x.tar"))
    packed = data.draw(
        st.sampled_from([gzip.compress(content), content, gzip.compress(content)[:-9], b"\x1f\x8b" + content])
    )
    (folder / "x.tgz").write_bytes(packed)
    outcome(lambda: archives.read_files(folder / "x.tgz", lambda _: True, 1 << 20))
    assert sorted(path.name for path in folder.iterdir()) == ["x.tar", "x.tgz"]
    assert sorted(path.name for path in folder.parent.iterdir()) == outside
    assert not (Path.cwd() / "up").exists()


def encoded():
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 256, (24, 17, 3), dtype=np.uint8))
    made = {}
    for name, mode, words in (
        ("jpeg", "RGB", {}),
        ("jpeg", "CMYK", {"progressive": True}),
        ("png", "RGB", {}),
        ("png", "P", {}),
        ("png", "I;16", {}),
        ("gif", "P", {}),
        ("webp", "RGB", {"lossless": True}),
        ("webp", "RGB", {"quality": 50}),
        ("tiff", "RGB", {"compression": "tiff_lzw"}),
        ("tiff", "L", {"compression": "jpeg"}),
        ("bmp", "RGB", {}),
        ("ppm", "RGB", {}),
    ):
        stream = io.BytesIO()
        (image.convert("L").convert(mode) if mode == "I;16" else image.convert(mode)).save(stream, name, **words)
        made[f"{name} {mode} {words}"] = stream.getvalue()
    return made


ENCODED = encoded()


@given(data=st.data(), kind=st.sampled_from(sorted(ENCODED)))
@fuzzed(350)
def test_images(data, kind):
    content = data.draw(mutations(ENCODED[kind]))

    def work():
        image = decode_image(content)
        assert image.mode == "RGB"
        assert min(image.size) > 0

    outcome(work)


def _png(width, height):
    def chunk(name, content):
        return len(content).to_bytes(4, "big") + name + content + zlib.crc32(name + content).to_bytes(4, "big")

    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    body = zlib.compress(b"\0" * 10**6)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size + b"\x08\x02\0\0\0") + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def _bombs():
    side = (65535).to_bytes(2, "little") * 2
    yield "png", _png(60_000, 60_000)
    yield "gif", b"GIF89a" + side + b"\x80\0\0" + b"\0" * 6 + b"\x2c\0\0\0\0" + side + b"\0\x08\x01\0\0\x3b"
    for name, words in (("webp", {"lossless": True, "method": 0}), ("tiff", {"compression": "tiff_adobe_deflate"})):
        stream = io.BytesIO()
        Image.new("L", (9_500, 9_500)).save(stream, name, **words)
        yield name, stream.getvalue()


def test_bombs_are_refused_before_they_take_memory():
    bombs = list(_bombs())
    reading, writing = os.pipe()
    child = os.fork()
    if not child:  # the peak of memory never falls again, so each is looked at in a process of its own
        import resource

        lines = []
        for name, content in bombs:
            before = resource.getrusage(resource.RUSAGE_SELF)
            try:
                decode_image(content)
                error = "decoded"
            except AdaptiveError as caught:
                error = str(caught)
            after = resource.getrusage(resource.RUSAGE_SELF)
            seconds = after.ru_utime - before.ru_utime
            lines.append([name, len(content), error, seconds, _resident()])
        os.write(writing, json.dumps(lines).encode())
        os._exit(0)
    os.waitpid(child, 0)
    found = json.loads(os.read(reading, 10**6))
    assert len(found) == 4
    for name, size, error, seconds, resident in found:
        assert "more than 89478485 pixels: possibly a decompression bomb" in error, name
        assert seconds < 1, name
        assert resident - _resident() < 64 * 2**20, (name, size)


def _resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_compressed_archives_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "_MAX_DECOMPRESSED", 5 << 20)
    with tarfile.open(tmp_path / "bomb.tgz", "w:gz") as tar:
        info = tarfile.TarInfo("zeros")
        info.size = 50 << 20
        tar.addfile(info, io.BytesIO(bytes(info.size)))
        tar.addfile(tarfile.TarInfo("wanted"))
    error = outcome(lambda: archives.read_files(tmp_path / "bomb.tgz", lambda name: name == "wanted", 1 << 20))
    assert "more than 5242880 bytes once decompressed" in str(error)
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 40 << 20
    (tmp_path / "header.tgz").write_bytes(gzip.compress(info.tobuf(tarfile.USTAR_FORMAT) + bytes(40 << 20)))
    error = outcome(lambda: archives.read_files(tmp_path / "header.tgz", lambda _: True, 1 << 20))
    assert f"a header of {40 << 20} bytes" in str(error)


NAMES = [
    "a b",
    "$(touch owned)",
    "; touch owned",
    "new\nline",
    "'quote'",
    '"double"',
    "`touch owned`",
    "-rf",
    "äöü",
    "*",
]


def test_names_reach_no_shell_and_no_other_folder(tmp_path, monkeypatch):
    """Class folders and files with every kind of name are packed, verified and read like any others."""
    from adaptive.data.packing.verify import verify
    from adaptive.data.reading.stream import EvaluationStream

    monkeypatch.chdir(tmp_path)
    source = tmp_path / "so urce;$(touch owned)"
    for name in NAMES:
        (source / name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(source / name / f"{name} {number}.png")
    (source / NAMES[0] / "bad\nname.png").write_bytes(b"no image")
    destination = tmp_path / "packed;$(touch owned) 'x'"
    index = pack(source, destination, progress=False, workers=1, max_bad=1)
    assert index.classes == sorted(NAMES)
    assert verify(str(destination), workers=1, progress=False).faults == []
    from adaptive.config.sections import DataConfig

    config = DataConfig(path=str(destination), image_size=8)
    stream = EvaluationStream(index, config, "train", batch=8)
    assert sum(int((batch.labels >= 0).sum()) for batch in stream) == 2 * len(NAMES)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([source.name, destination.name])
    error = outcome(lambda: pack(source, destination, progress=False, workers=1, overwrite=True))
    assert "bad\\nname.png" in str(error)


@pytest.mark.parametrize("name", ["../up.png", "/tmp/adaptive-up.png", "a/../../up.png"])
def test_pickles_and_paths_in_shards_do_nothing(small, tmp_path, name):
    """Members are read by their places; whatever they are called, nothing is written, linked or unpickled."""
    pickle = b"cos\nsystem\n(S'touch owned'\ntR."
    stream = io.BytesIO()
    with tarfile.open(small / "train-00000.tar") as source, tarfile.open(fileobj=stream, mode="w") as tar:
        for member in source:
            tar.addfile(member, source.extractfile(member))
            if member.name.endswith(".cls"):
                for extra in ("pyd", "pickle", "pkl"):
                    info = tarfile.TarInfo(f"{member.name[:-4]}.{extra}")
                    info.size = len(pickle)
                    tar.addfile(info, io.BytesIO(pickle))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "/etc/passwd"
            tar.addfile(link)
    (tmp_path / "x.tar").write_bytes(stream.getvalue())
    assert read_all(tmp_path, "x.tar", 3) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]
    assert not Path("owned").exists()
    assert not Path(tmp_path.parent, "up.png").exists()
    with pytest.raises(AdaptiveError, match="no name of an original archive"):
        archives.list_members(tmp_path / "x.tar")
