"""Good images with metadata that Pillow refuses: at every door their pixels are taken."""

from __future__ import annotations

import io
import random
import struct
import tarfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from adaptive.data.images.damage import check_image
from adaptive.data.images.decode import ImageError, decode, decode_image
from adaptive.data.images.image_files import ImageFile
from adaptive.data.images.metadata import without_metadata
from adaptive.data.packing.index_tars import index_tars
from adaptive.data.packing.verify import verify
from adaptive.data.shards.index import load_index
from tests.data.conftest import colour_field, report
from tests.helpers.memory import at_most

RGB = colour_field(np.random.default_rng(1), 40, 30)
TEXT = zlib.compress(b"x" * 3_000_000)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


PNG, JPEG = encode(RGB, "png"), encode(RGB, "jpeg", quality=95)


def chunk(kind: bytes, body: bytes, checksum: int | None = None) -> bytes:
    found = zlib.crc32(kind + body) if checksum is None else checksum
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", found)


def png_with(*chunks: bytes, behind: bool = False) -> bytes:
    at = len(PNG) - 12 if behind else 33
    return PNG[:at] + b"".join(chunks) + PNG[at:]


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def jpeg_with(*segments: bytes) -> bytes:
    return JPEG[:2] + b"".join(segments) + JPEG[2:]


FILES = {
    "text of an image generator": png_with(chunk(b"zTXt", b"workflow\0\0" + TEXT)),
    "text behind the pixels": png_with(chunk(b"zTXt", b"workflow\0\0" + TEXT), behind=True),
    "international text": png_with(chunk(b"iTXt", b"workflow\0\1\0\0\0" + TEXT)),
    "many texts": png_with(*[chunk(b"zTXt", b"%d\0\0" % i + zlib.compress(b"y" * 1_000_000)) for i in range(70)]),
    "text of an unknown compression": png_with(chunk(b"zTXt", b"a\0\7" + TEXT)),
    "text with a wrong checksum": png_with(chunk(b"tEXt", b"a\0b", 1)),
    "large profile": png_with(chunk(b"iCCP", b"icc\0\0" + TEXT)),
    "short profile": png_with(chunk(b"iCCP", b"icc")),
    "short resolution": png_with(chunk(b"pHYs", b"")),
    "short gamma": png_with(chunk(b"gAMA", b"")),
    "JPEG's short profile": jpeg_with(segment(0xE2, b"ICC_PROFILE\0")),
    "JPEG's short header": jpeg_with(segment(0xE0, b"JFIF")),
    "Photoshop's block, cut off": jpeg_with(segment(0xED, b"Photoshop 3.0\0008BIM\4\4")),
    "Adobe's marker, cut off": jpeg_with(segment(0xEE, b"Adobe")),
}


@pytest.mark.parametrize("name", FILES)
def test_their_pixels_are_taken(name: str, tmp_path: Path) -> None:
    expected = np.asarray(decode_image(PNG if FILES[name].startswith(b"\x89") else JPEG))
    (tmp_path / "image").write_bytes(FILES[name])
    with at_most(200):
        for image in (
            decode_image(FILES[name]),
            check_image(FILES[name]).image,
            ImageFile(str(tmp_path / "image")).open(),
        ):
            assert np.array_equal(np.asarray(image), expected)


def test_a_png_is_packed_without_the_text_that_other_readers_refuse(tmp_path: Path) -> None:
    for name, data in {
        "a/1.png": FILES["text of an image generator"],
        "b/1.jpg": FILES["JPEG's short profile"],
    }.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True)
        (tmp_path / "in" / name).write_bytes(data)
    found = report(tmp_path / "in", tmp_path / "out")
    assert (found.converted, found.bad) == (1, [])
    assert verify(str(tmp_path / "out"), progress=False).faults == []
    assert FILES["JPEG's short profile"] in (tmp_path / "out" / "train-00000.tar").read_bytes()


def test_shards_of_others_hold_them_too(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "train-0.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, data in enumerate(FILES.values()):
            extension = "png" if data.startswith(PNG[:4]) else "jpg"
            for name, content in ((f"{number}.{extension}", data), (f"{number}.cls", b"0")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    index_tars(tmp_path, progress=False)
    found = verify(str(tmp_path), workers=1, progress=False)
    assert (found.fine, found.faults) == (len(FILES), [])
    assert load_index(tmp_path).split("train").count == len(FILES)


def test_which_way_is_up_is_kept() -> None:
    """EXIF is of metadata the part that pixels depend on."""
    exif = Image.Exif()
    exif[0x0112] = 6
    expected = np.asarray(RGB.transpose(Image.Transpose.ROTATE_270))
    turned = png_with(chunk(b"eXIf", exif.tobytes()[6:]), chunk(b"zTXt", b"workflow\0\0" + TEXT))
    assert np.array_equal(np.asarray(decode_image(turned)), expected)
    damaged = png_with(chunk(b"eXIf", exif.tobytes()[6:], 1), chunk(b"zTXt", b"workflow\0\0" + TEXT))
    assert np.array_equal(np.asarray(decode_image(damaged)), np.asarray(RGB))
    jpeg = encode(RGB, "jpeg", quality=98, subsampling=0, exif=exif)
    jpeg = jpeg[:2] + segment(0xE2, b"ICC_PROFILE\0") + jpeg[2:]
    assert decode_image(jpeg).size == (30, 40)


def test_garbage_in_exif_keeps_no_image_from_being_read() -> None:
    generator, refused = random.Random(0), Counter[str]()
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x011A] = 6, "camera", 72.0
    exif[0x8769] = {0x9000: b"0220", 0x9003: "2020:01:01 00:00:00"}
    original = exif.tobytes()
    for _ in range(1500):
        damaged = bytearray(original)
        for _ in range(generator.randint(1, 6)):
            damaged[generator.randrange(14, len(damaged))] = generator.randrange(256)
        try:
            assert decode_image(jpeg_with(segment(0xE1, bytes(damaged)))).size in ((40, 30), (30, 40))
        except ImageError as error:
            refused[str(error)] += 1
    assert not refused


@pytest.mark.parametrize("orientation", [0, 9, 99, 65535])
def test_an_orientation_that_means_nothing_turns_nothing(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(RGB, "jpeg", exif=exif)
    assert decode(data).plain
    assert check_image(data).plain


def test_damaged_pixels_stay_damaged() -> None:
    """What is refused for its pixels is refused without its metadata as well, with their reason."""
    cut = FILES["text of an image generator"][:-60]
    with pytest.raises(ImageError, match=r"truncated|broken"):
        decode(cut)
    broken = bytearray(jpeg_with(segment(0xE2, b"ICC_PROFILE\0")))
    with pytest.raises(ImageError, match=r"(?i)truncated"):
        decode(bytes(broken[: len(broken) // 2]))


def test_other_files_have_no_metadata_that_is_known() -> None:
    for data in (b"", b"text", PNG, encode(RGB, "webp"), PNG[:8], PNG[:20], b"\xff\xd8", b"\xff\xd8\xff\xe0\0"):
        found = without_metadata(data)
        assert found is None or found == data[: len(found)]
    assert without_metadata(png_with(chunk(b"tEXt", b"a\0b"))) == PNG
