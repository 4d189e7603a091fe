import io
import itertools
import random

import numpy as np
import pytest
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image
from simplejpeg import decode_jpeg
from timm.data.transforms import RandomResizedCropAndInterpolation

from adaptive.config.sections import DataConfig
from adaptive.data.images import decode_window as module
from adaptive.data.images.decode import ImageError, decode_image
from adaptive.data.images.decode_window import Window, decode_window, to_pixels
from adaptive.data.images.transforms import train_transform
from adaptive.data.seeding import AUGMENT, seeded
from tests.data.conftest import colour_field

PHOTO = colour_field(np.random.default_rng(5), 90, 61)
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


def encode(image, kind="jpeg", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(PHOTO, exif=exif)


def whole(height, width):
    return Window(0, 0, height, width)


def upper(height, width):
    return Window(0, 0, min(height, 20), width)


def same_as_pillow(data):
    found = decode_window(data, whole)
    assert found.dtype == torch.uint8
    assert torch.equal(found, to_pixels(decode_image(data)))


@pytest.mark.parametrize("quality", [5, 50, 75, 90, 100])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpegs_have_the_pixels_that_pillow_gives(quality, subsampling, progressive):
    options = {"quality": quality, "subsampling": subsampling, "progressive": progressive}
    same_as_pillow(encode(PHOTO, **options))
    same_as_pillow(encode(PHOTO.crop((3, 2, 4, 3)), **options))
    same_as_pillow(encode(PHOTO.resize((333, 257)), restart_marker_rows=3, **options))


def test_upright_jpegs_never_meet_pillows_decoder(monkeypatch):
    def refuse(data):
        raise AssertionError("Pillow decoded")

    monkeypatch.setattr(module, "decode_image", refuse)
    for data in (encode(PHOTO), encode(PHOTO.convert("L")), turned(1)):
        decode_window(data, whole)
    for data in (turned(6), encode(PHOTO.convert("CMYK")), encode(PHOTO, "png")):
        with pytest.raises(AssertionError):
            decode_window(data, whole)


def test_other_files_are_pillows():
    same_as_pillow(encode(PHOTO.convert("L")))
    same_as_pillow(encode(PHOTO.convert("CMYK")))
    same_as_pillow(encode(PHOTO, comment=b"note" * 1000, icc_profile=b"none"))
    same_as_pillow(encode(PHOTO, keep_rgb=True))
    for kind in ("png", "webp", "bmp", "gif"):
        same_as_pillow(encode(PHOTO, kind))
    for orientation in range(1, 9):
        same_as_pillow(turned(orientation))


@pytest.mark.parametrize("subsampling", ["444", "422", "420", "440", "411", "Gray"])
def test_no_row_beneath_the_window_is_decoded_and_none_in_it_differs(subsampling, monkeypatch):
    """For every last row; JPEGs lose no row of colours that the last row of pixels is blended with."""
    decoded = []

    def decode(data, colours, **options):
        decoded.append(decode_jpeg(data, colours, **options))
        return decoded[-1]

    monkeypatch.setattr(module.simplejpeg, "decode_jpeg", decode)
    shape, colours = ((70, 50, 1), "GRAY") if subsampling == "Gray" else ((70, 50, 3), "RGB")
    noise = np.random.default_rng(3).integers(0, 256, shape, dtype=np.uint8)
    data = simplejpeg.encode_jpeg(noise, 90, colours, subsampling)
    expected = to_pixels(decode_image(data))
    for bottom in range(1, 71):
        window = Window(bottom // 3, 5, bottom - bottom // 3, 40)
        found = decode_window(data, lambda *size, window=window: window)
        assert torch.equal(found, expected[:, bottom // 3 : bottom, 5:45])
        assert len(decoded[-1]) == min(70, bottom + 2)


def test_of_progressive_jpegs_all_rows_are_decoded():
    for rows in (7, 50):
        data = encode(PHOTO, progressive=True)
        found = decode_window(data, lambda height, width, rows=rows: Window(0, 0, rows, width))
        assert torch.equal(found, to_pixels(decode_image(data))[:, :rows])


def test_bad_files_are_refused_in_the_same_words():
    good = encode(PHOTO)
    bad = [b"", b"\xff\xd8", b"no image", *(good[:size] for size in (4, 20, 200, len(good) // 2, len(good) - 40))]
    for data, draw in itertools.product(bad, (whole, upper)):
        with pytest.raises(ImageError) as expected:
            decode_image(data)
        with pytest.raises(ImageError) as found:
            decode_window(data, draw)
        assert str(found.value) == str(expected.value)


def test_a_jpeg_with_changed_bytes_is_taken_or_refused_as_pillow_does():
    good, generator = encode(PHOTO), random.Random(2)
    outcomes = {"taken": 0, "refused": 0}
    for _ in range(300):
        data = bytearray(good)
        for _ in range(generator.choice([1, 1, 3, 30])):
            data[generator.randrange(len(data))] = generator.randrange(256)
        try:
            decode_image(bytes(data))
        except ImageError:
            outcomes["refused"] += 1
            for draw in (whole, upper):
                with pytest.raises(ImageError):
                    decode_window(bytes(data), draw)
        else:
            outcomes["taken"] += 1
            same_as_pillow(bytes(data))
            found = decode_window(bytes(data), upper)
            assert torch.equal(found, to_pixels(decode_image(bytes(data)))[:, : found.shape[1]])
    assert min(outcomes.values()) > 20


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crops_of_pixels_are_pillows_up_to_rounding(interpolation):
    """The crop is drawn as timm draws it; the resampling filters are the same, in integers of other widths."""
    data = DataConfig(
        path="unused", image_size=48, mean=[0.0] * 3, std=[1 / 255] * 3, interpolation=interpolation, flip=0.5
    )
    ours = train_transform(data)
    photo = PHOTO.resize((180, 122), Image.Resampling.BICUBIC)
    theirs = timms(data)
    differences = []
    for seed in range(60):
        with seeded(AUGMENT, seed):
            found = ours(encode(photo, "png"))
        with seeded(AUGMENT, seed):
            again = ours(photo)
        with seeded(AUGMENT, seed):
            expected = theirs(photo)
        assert torch.equal(found, again)
        differences.append((found - expected).abs())
    assert torch.stack(differences).max() <= 3
    assert torch.stack(differences).mean() < 0.1


def timms(data):
    from timm.data import create_transform

    return create_transform(
        data.image_size, is_training=True, hflip=data.flip, color_jitter=None, interpolation=data.interpolation,
        mean=tuple(data.mean), std=tuple(data.std), scale=tuple(data.crop_scale), ratio=tuple(data.crop_ratio),
        re_prob=data.erasing, re_mode="pixel",
    )  # fmt: skip


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_packed_crops_are_resampled_as_any_other(interpolation):
    """The copy that makes resampling faster changes no bit."""
    data = DataConfig(path="unused", image_size=48, interpolation=interpolation, flip=0.0)
    transform = train_transform(data, normalize=False)
    drawn = RandomResizedCropAndInterpolation(48, interpolation=interpolation)
    file = encode(PHOTO.resize((180, 122)))
    photo = to_pixels(decode_image(file))
    for number in range(30):
        with seeded(AUGMENT, number):
            found = transform(file)
        with seeded(AUGMENT, number):
            top, left, height, width = drawn.get_params(photo, drawn.scale, drawn.ratio)
        window = photo[:, top : top + height, left : left + width].contiguous()[None]
        assert torch.equal(found, F.interpolate(window, (48, 48), mode=interpolation, antialias=True)[0])


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_flips_are_drawn_as_torchvision_draws_them(share):
    """With the same seed, and leaving the same draws to what comes after; without a share nothing is drawn."""
    data = DataConfig(path="unused", image_size=32, mean=MEAN, std=STD, flip=share, erasing=0.5)
    for number in range(20):
        with seeded(AUGMENT, number):
            found = train_transform(data, normalize=False)(PHOTO), torch.rand(1)
        with seeded(AUGMENT, number):
            expected = timms(data)(PHOTO), torch.rand(1)
        assert torch.equal(found[1], expected[1])
        assert (found[0] - expected[0]).abs().mean() < 0.05


def test_erasing_fills_in_normalised_noise():
    data = DataConfig(path="unused", image_size=32, mean=MEAN, std=STD, erasing=0.5)
    assert train_transform(data, normalize=False)(PHOTO).dtype == torch.float32
