import io
import random

import numpy as np
import pytest
from PIL import Image

from adaptive.data.images.decode import ImageError, decode, decode_image
from tests.data.conftest import colour_field

RGB = colour_field(np.random.default_rng(1), 40, 30)


def encode(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pixels(image):
    return np.asarray(image).astype(int)


def close(image, expected, tolerance):
    assert image.mode == "RGB"
    assert image.size == expected.size
    assert np.abs(pixels(image) - pixels(expected)).max() <= tolerance


@pytest.mark.parametrize("kind", ["png", "bmp", "tiff", "ppm", "gif", "webp"])
def test_lossless_formats_keep_pixels(kind):
    source = RGB.quantize(64).convert("RGB") if kind == "gif" else RGB
    decoded = decode(encode(source, kind, **({"lossless": True} if kind == "webp" else {})))
    close(decoded.image, source, 0)
    assert decoded.plain == (kind == "png")


def test_jpeg_and_grey_and_palette_and_alpha():
    close(decode_image(encode(RGB, "jpeg", quality=95)), RGB, 12)
    grey = RGB.convert("L")
    for kind in ("png", "jpeg"):
        decoded = decode(encode(grey, kind))
        close(decoded.image, grey.convert("RGB"), 0 if kind == "png" else 12)
        assert decoded.plain
    palette = RGB.quantize(32)
    decoded = decode(encode(palette, "png"))
    close(decoded.image, palette.convert("RGB"), 0)
    assert decoded.plain
    rgba = RGB.copy()
    rgba.putalpha(Image.linear_gradient("L").resize(RGB.size))
    decoded = decode(encode(rgba, "png"))
    close(decoded.image, RGB, 0)  # alpha is dropped, colours are not blended
    assert not decoded.plain


def test_cmyk_jpeg_with_and_without_adobe_marker():
    red = Image.new("CMYK", (32, 32), (0, 255, 255, 0))
    data = encode(red, "jpeg", quality=95)
    decoded = decode(data)
    close(decoded.image, Image.new("RGB", (32, 32), (255, 0, 0)), 6)
    assert not decoded.plain
    # Without the marker inks are stored as they are: the same scan then means the complement.
    start = data.index(b"\xff\xee")
    plain = data[:start] + data[start + 2 + int.from_bytes(data[start + 2 : start + 4], "big") :]
    image = Image.open(io.BytesIO(plain))
    assert image.mode == "CMYK"
    assert "adobe" not in image.info
    inverted = Image.new("CMYK", (32, 32), (255, 0, 0, 255)).convert("RGB")
    close(decode_image(plain), inverted, 6)


def test_16_bit_png_is_scaled_not_clipped():
    values = np.linspace(0, 65535, 40 * 30).astype(np.uint16).reshape(30, 40)
    decoded = decode(encode(Image.fromarray(values), "png"))
    expected = np.round(values / 257).astype(int)
    assert np.abs(pixels(decoded.image) - expected[..., None]).max() <= 1
    assert decoded.image.getpixel((39, 29)) == (255, 255, 255)
    assert not decoded.plain


@pytest.mark.parametrize("orientation", range(2, 9))
def test_exif_rotation_is_applied(orientation):
    operations = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode(encode(RGB, "jpeg", quality=98, subsampling=0, exif=exif))
    close(decoded.image, RGB.transpose(operations[orientation]), 12)
    assert not decoded.plain


def test_upright_exif_is_kept_as_it_is():
    exif = Image.Exif()
    exif[0x0112] = 1
    assert decode(encode(RGB, "jpeg", exif=exif)).plain


def test_what_is_not_an_image_is_refused_with_a_reason(monkeypatch):
    jpeg = encode(RGB.resize((200, 200)), "jpeg")
    frames = [Image.new("L", (8, 8), 80 * n) for n in range(3)]
    cases = {
        b"": "empty",
        b"this is text, not an image": "not an image",
        jpeg[: len(jpeg) // 2]: "truncated",
        encode(frames[0], "gif", save_all=True, append_images=frames[1:], duration=10): "frames",
        encode(Image.new("F", (4, 4), 0.5), "tiff"): "floating",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n": "not an image",
    }
    for data, reason in cases.items():
        with pytest.raises(ImageError, match=reason):
            decode_image(data)
    # Between the limit and twice the limit Pillow only warns.
    for limit in (RGB.width * RGB.height * 2 // 3, 100):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ImageError, match="bomb"):
            decode_image(encode(RGB, "png"))


def test_damaged_bytes_never_raise_anything_else():
    generator = random.Random(0)
    originals = [encode(RGB, kind) for kind in ("png", "jpeg", "gif", "bmp", "tiff", "webp")]
    for number in range(300):
        data = bytearray(originals[number % len(originals)])
        for _ in range(generator.randint(1, 20)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        try:
            image = decode_image(bytes(data[: generator.randint(1, len(data))] if number % 3 else data))
        except ImageError:
            continue
        assert image.mode == "RGB"
