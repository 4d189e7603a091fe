"""Crop and flip of a batch are those of every image by itself, and are drawn for a whole epoch."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import crop, hflip, pad, pil_to_tensor

from adaptive.data.images.crop_flip import (
    CropFlipDraws,
    crop_flip_bytes,
    crop_flip_image,
    crop_flip_pixels,
    crop_flip_places,
)
from tests.data.conftest import colour_field


def images(count, size):
    generator = np.random.default_rng(1)
    return [colour_field(generator, size, size) for _ in range(count)]


@pytest.mark.parametrize(("padding", "flip"), [(4, 0.5), (0, 0.5), (1, 0.0), (9, 1.0)])
def test_a_batch_is_cropped_and_flipped_as_its_images_and_as_by_torchvision(padding, flip):
    size, count = 8, 40
    pictures, draws = images(count, size), CropFlipDraws(3, count).of(1, np.arange(count))
    places = crop_flip_places(draws, padding, flip)
    pixels = torch.stack([pil_to_tensor(image).permute(1, 2, 0) for image in pictures])
    before = pixels.clone()
    batch = crop_flip_bytes(pixels, places, padding).permute(0, 3, 1, 2)
    assert torch.equal(batch, crop_flip_pixels(pixels, torch.from_numpy(places), padding).permute(0, 3, 1, 2))
    assert torch.equal(pixels, before)
    for image, drawn, (top, left, flipped), found in zip(pictures, draws, places.tolist(), batch, strict=True):
        expected = crop(pad(image, padding), top, left, size, size)
        expected = pil_to_tensor(hflip(expected) if flipped else expected)
        assert torch.equal(pil_to_tensor(crop_flip_image(image, drawn, size, padding, flip)), expected)
        assert torch.equal(found, expected)
    assert len({tuple(place) for place in places.tolist()}) >= min(2 * padding * padding, 20)
    assert places[:, 2].mean() == flip or 0.2 < places[:, 2].mean() < 0.8


@pytest.mark.device
def test_pixels_on_the_device_are_the_cpus(device):
    pixels = torch.randint(256, (40, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    places = torch.from_numpy(crop_flip_places(CropFlipDraws(3, 40).of(1, np.arange(40)), 2, 0.5))
    found = crop_flip_pixels(pixels.to(device), places.to(device), 2)
    assert found.device == device
    assert torch.equal(found.cpu(), crop_flip_bytes(pixels, places.numpy(), 2))


def test_images_of_any_shape_are_cropped_within_their_borders():
    wide, extremes = Image.new("RGB", (30, 10), "white"), np.array([[0.0, 0.0, 0.9], [1 - 2**-53, 1 - 2**-53, 0.9]])
    for draws in (*extremes, *CropFlipDraws(0, 50).of(0, np.arange(50))):
        assert np.asarray(crop_flip_image(wide, draws, 10, 0, 0.5)).min() == 255
    corner = np.asarray(crop_flip_image(wide, extremes[1], 10, 2, 0.5))
    assert corner[:8, :8].min() == 255
    assert corner[8:].max() == corner[:, 8:].max() == 0


def test_draws_are_a_function_of_seed_epoch_and_sample_alone():
    draws = CropFlipDraws(5, 1000)
    first = draws.of(0, np.arange(1000)).copy()
    other = draws.of(1, np.arange(1000)).copy()
    assert np.array_equal(draws.of(0, [7, 3]), first[[7, 3]])
    assert np.array_equal(CropFlipDraws(5, 1000).of(1, [999]), other[999:])
    assert np.array_equal(CropFlipDraws(5, 10).of(0, np.arange(10)), first[:10])
    assert not np.isin(other, first).any()
    assert not np.isin(CropFlipDraws(6, 1000).of(0, np.arange(1000)), first).any()
    counts = np.bincount(crop_flip_places(first, 4, 0.3)[:, 0], minlength=9)
    assert counts.min() > 70
    assert counts.max() < 160
    assert 0.25 < crop_flip_places(first, 4, 0.3)[:, 2].mean() < 0.35
