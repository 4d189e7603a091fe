"""Headers of JPEG files: whatever is read here without Pillow is what Pillow reads."""

import io
import random
import struct

import numpy as np
import pytest
from PIL import Image

from adaptive.data.images import jpeg_header
from adaptive.data.images.decode import ORIENTATION, ImageError, decode_image
from adaptive.data.images.jpeg_header import plain_jpeg

HEIGHT, WIDTH = 24, 40
ORDERS = {"<": b"II*\x00", ">": b"MM\x00*"}
SHORT, LONG = 3, 4
XMP = b"http://ns.adobe.com/xap/1.0/\x00"


def encode(**settings):
    noise = np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "jpeg", **settings)
    return buffer.getvalue()


PLAIN = encode()
SCAN = PLAIN.index(b"\xff\xda")


def segment(meta, marker=0xE1):
    return bytes((0xFF, marker)) + struct.pack(">H", len(meta) + 2) + meta


def with_metas(*metas, place=2):
    return PLAIN[:place] + b"".join(map(segment, metas)) + PLAIN[place:]


def exif(*entries, order="<", head=None, start=8):
    """EXIF with a directory of (tag, type, count, value of two bytes) and, as cameras write, a maker before it."""
    directory = struct.pack(order + "H", len(entries))
    directory += b"".join(struct.pack(order + "HHIHH", *entry, 0) for entry in entries)
    head = ORDERS[order] if head is None else head
    return b"Exif\x00\x00" + head + struct.pack(order + "I", start) + b"\x00" * (start - 8) + directory + b"\x00" * 4


def turned(orientation, order="<", kind=SHORT, count=1):
    return exif((0x010F, 2, 4, 0x4141), (ORIENTATION, kind, count, orientation), order=order)


def xmp(inner):
    return XMP + b"<x:xmpmeta>" + inner + b"</x:xmpmeta>"


@pytest.fixture
def asked(monkeypatch):
    """The files that Pillow was asked about."""
    files, ask = [], jpeg_header._is_plain_for_pillow

    def asking(data):
        files.append(data)
        return ask(data)

    monkeypatch.setattr(jpeg_header, "_is_plain_for_pillow", asking)
    return files


def upright(data):
    """Whether a decoder that knows nothing of orientations sees what `decode_image` returns, which may refuse it."""
    try:
        pixels = decode_image(data)
    except ImageError:
        return False
    return np.array_equal(np.asarray(pixels), np.asarray(Image.open(io.BytesIO(PLAIN))))


READ_HERE = {
    "nothing": PLAIN,
    "EXIF, upright": with_metas(turned(1)),
    "EXIF, upright, big end first": with_metas(turned(1, ">")),
    "EXIF without an orientation": with_metas(exif((0x010F, 2, 4, 0x4141))),
    "an empty EXIF": with_metas(exif()),
    "EXIF whose directory lies farther on": with_metas(exif((ORIENTATION, SHORT, 1, 1), start=60)),
    "XMP without an orientation": with_metas(xmp(b'<rdf:Description xmp:Rating="6"/>')),
    "XMP, upright": with_metas(xmp(b'<rdf:Description tiff:Orientation="1"/>')),
    "XMP, upright, as an element": with_metas(xmp(b"<tiff:Orientation>1</tiff:Orientation>")),
    "EXIF and XMP": with_metas(turned(1), xmp(b'<rdf:Description tiff:Orientation="1"/>')),
    "a colour profile": PLAIN[:2] + segment(b"ICC_PROFILE\x00\x01\x01" + b"6" * 300, 0xE2) + PLAIN[2:],
    "a comment": PLAIN[:2] + segment(b"Exif\x00\x00", 0xFE) + PLAIN[2:],
}


@pytest.mark.parametrize("name", READ_HERE)
def test_of_most_files_pillow_is_not_asked(name, asked):
    data = READ_HERE[name]
    frame = plain_jpeg(data)
    assert frame is not None
    assert frame[1:] == (HEIGHT, WIDTH, True)
    assert data[frame.offset : frame.offset + 2] == b"\xff\xc0"
    assert not asked
    assert upright(data)


TURNED = {
    **{f"EXIF, {number}, {order}": with_metas(turned(number, order)) for number in range(2, 9) for order in ORDERS},
    "EXIF after the frame": with_metas(turned(6), place=SCAN),
    "EXIF in two parts": with_metas(turned(6)[:20], b"Exif\x00\x00" + turned(6)[20:]),
    "EXIF named twice": with_metas(b"Exif\x00\x00" + turned(6)),
    "EXIF, a long number": with_metas(turned(6, kind=LONG)),
    "EXIF, twice": with_metas(exif((ORIENTATION, SHORT, 1, 6), (ORIENTATION, SHORT, 1, 1))),
    "XMP": with_metas(xmp(b'<rdf:Description tiff:Orientation="6"/>')),
    "XMP, as an element": with_metas(xmp(b"<tiff:Orientation>6</tiff:Orientation>")),
    "XMP after an EXIF without": with_metas(exif(), xmp(b'<rdf:Description tiff:Orientation="8"/>')),
    "XMP after the frame": with_metas(xmp(b'<rdf:Description tiff:Orientation="3"/>'), place=SCAN),
    "XMP, a closing tag only": with_metas(xmp(b"</tiff:Orientation>6")),
}


@pytest.mark.parametrize("name", TURNED)
def test_turned_files_are_pillows(name):
    data = TURNED[name]
    assert not upright(data), "the case shows nothing"
    assert plain_jpeg(data) is None


DOUBTFUL = {
    "two orientations in EXIF": with_metas(turned(1, count=2)),
    "an EXIF that was cut off": with_metas(turned(1)[:-10]),
    "an EXIF whose directory lies outside": with_metas(turned(1)[:10] + struct.pack("<I", 9999) + turned(1)[14:]),
    "an EXIF in an order that is none": with_metas(exif((ORIENTATION, SHORT, 1, 1), head=b"IM*\x00")),
    "a BigTIFF": with_metas(exif((ORIENTATION, SHORT, 1, 1), head=b"II+\x00")),
    "an EXIF that ends at its name": with_metas(b"Exif\x00\x00"),
    "an XMP with a word": with_metas(xmp(b'<rdf:Description tiff:Orientation="up"/>')),
    "an upright EXIF, a turned XMP": with_metas(turned(1), xmp(b'<rdf:Description tiff:Orientation="6"/>')),
}


@pytest.mark.parametrize("name", DOUBTFUL)
def test_of_doubtful_files_pillow_is_asked(name, asked):
    data = DOUBTFUL[name]
    assert (plain_jpeg(data) is not None) == upright(data)
    assert asked


def test_a_second_picture_is_no_doubt_where_it_is_none(asked):
    data = PLAIN[:2] + segment(b"MPF\x00", 0xE2) + PLAIN[2:]
    assert plain_jpeg(data) is not None
    assert asked
    assert upright(data)


def test_frames_that_are_none():
    frame = plain_jpeg(PLAIN).offset
    grey = Image.fromarray(np.zeros((8, 8), np.uint8))
    buffer = io.BytesIO()
    grey.save(buffer, "jpeg")
    assert plain_jpeg(buffer.getvalue())[1:] == (8, 8, True)
    assert plain_jpeg(encode(progressive=True))[1:] == (HEIGHT, WIDTH, False)
    twice = PLAIN[:SCAN] + PLAIN[frame : frame + 19] + PLAIN[SCAN:]
    empty = PLAIN[: frame + 5] + bytes(2) + PLAIN[frame + 7 :]
    deep = PLAIN[: frame + 4] + b"\x0c" + PLAIN[frame + 5 :]
    inks = PLAIN[: frame + 9] + b"\x04" + PLAIN[frame + 10 :]
    for data in (twice, empty, deep, inks, b"", b"\xff\xd8", PLAIN[: SCAN - 1], PLAIN[2:]):
        assert plain_jpeg(data) is None
    bomb = PLAIN[: frame + 5] + b"\xff\xff\xff\xff" + PLAIN[frame + 9 :]
    assert plain_jpeg(bomb) is None


def test_random_headers_are_never_taken_for_upright():
    """Whatever single bytes of EXIF and XMP say, and in whatever parts they come."""
    generator, taken = random.Random(5), {True: 0, False: 0}
    elements = [
        b"<tiff:Orientation>1</tiff:Orientation>",
        b' tiff:Orientation="1"',
        b"tiff:Orientation",
        b"6",
        b">",
        b"/",
    ]
    for _ in range(2000):
        metas = []
        for _ in range(generator.choice([1, 1, 2])):
            if generator.random() < 0.5:
                meta = bytearray(turned(generator.choice([1, 1, 3, 6]), generator.choice("<>")))
                for _ in range(generator.choice([0, 1, 2])):
                    meta[generator.randrange(4, len(meta))] = generator.choice([0, 1, 2, 3, 6, 18, 255])
            else:
                meta = xmp(b"".join(generator.choices(elements, k=3)))
            metas.append(bytes(meta))
        data = with_metas(*metas)
        found = plain_jpeg(data) is not None
        taken[found] += 1
        assert upright(data) or not found
    assert min(taken.values()) > 300
