import io

import numpy as np
import pytest
from PIL import Image

from adaptive.data.images.damage import DamagedImage, check_image
from adaptive.data.images.decode import ImageError, decode_image


def encoded(kind, **options):
    noise = np.random.default_rng(0).integers(0, 256, (25, 25, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).resize((200, 200), Image.Resampling.BICUBIC).convert(options.pop("mode", "RGB")).save(
        stream, kind, **options
    )
    return stream.getvalue()


def half(data, end=2):
    """The second half zeros, but for the end mark."""
    return data[: len(data) // 2] + bytes(len(data) - len(data) // 2 - end) + data[len(data) - end :]


DAMAGED = {
    "zeros": half(encoded("jpeg")),
    "cut, and an end mark": encoded("jpeg")[:4000] + b"\xff\xd9",
    "zeros, restart markers": half(encoded("jpeg", restart_marker_rows=1)),
    "zeros in CMYK": half(encoded("jpeg", mode="CMYK")),
    "zeros, rotated": half(
        encoded("jpeg", exif=bytes.fromhex("45786966000049492a000800000001001201030001000000060000000000"))
    ),
    "zeros in WebP": half(encoded("webp"), 0),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_an_image_that_decodes_in_part_is_damaged(name):
    decode_image(DAMAGED[name])  # Pillow has nothing to say
    with pytest.raises(DamagedImage, match="a part of the image is lost"):
        check_image(DAMAGED[name])


@pytest.mark.parametrize("kind", ["jpeg", "png", "gif", "webp", "bmp", "tiff", "ppm"])
def test_a_file_that_was_cut_off_is_no_image(kind):
    data = encoded(kind)
    with pytest.raises(ImageError):
        check_image(data[: len(data) // 2])


@pytest.mark.parametrize("kind", ["jpeg", "png", "gif", "webp", "bmp", "tiff", "ppm"])
def test_data_behind_an_image_do_no_harm(kind):
    for tail in (b"garbage" * 9, bytes(999)):
        checked = check_image(encoded(kind) + tail)
        assert (checked.image.size, checked.suspicion) == ((200, 200), "")


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"mode": "L"}, {"mode": "CMYK"}, {"quality": 30}])
def test_whole_images_are_what_pillow_says(options):
    data = encoded("jpeg", **options)
    checked = check_image(data)
    assert (checked.format, checked.plain) == ("JPEG", options.get("mode") != "CMYK")
    assert np.array_equal(np.asarray(checked.image), np.asarray(decode_image(data)))
