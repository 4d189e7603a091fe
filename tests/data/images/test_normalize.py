import numpy as np
import pytest
import torch
from torchvision.transforms.functional import normalize, to_tensor

from adaptive.config.sections import DataConfig
from adaptive.data.images.decode_window import to_pixels
from adaptive.data.images.normalize import Normalize, stack_pixels
from adaptive.data.images.transforms import train_transform
from adaptive.data.seeding import AUGMENT, seeded
from tests.data.conftest import colour_field

PHOTO = colour_field(np.random.default_rng(5), 90, 61)
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


def test_batches_are_normalised_as_images_are():
    images = torch.stack([to_pixels(PHOTO), to_pixels(PHOTO).flip(2)])
    expected = torch.stack([normalize(to_tensor(PHOTO), MEAN, STD), normalize(to_tensor(PHOTO), MEAN, STD).flip(2)])
    kept = images.clone()
    assert torch.equal(Normalize(MEAN, STD, torch.device("cpu"))(images), expected)
    assert torch.equal(images, kept)


@pytest.mark.parametrize("changes", [{}, {"color_jitter": 0.3}, {"auto_augment": "rand-m9-mstd0.5-inc1"}])
@pytest.mark.parametrize("crop", ["resize", "pad", "none"])
def test_pixels_normalised_later_are_the_same(changes, crop):
    data = DataConfig(path="unused", image_size=32, mean=MEAN, std=STD, crop=crop, **changes)
    late = Normalize(MEAN, STD, torch.device("cpu"))
    for seed in range(20):
        with seeded(AUGMENT, seed):
            found = train_transform(data, normalize=False)(PHOTO)
        with seeded(AUGMENT, seed):
            expected = train_transform(data)(PHOTO)
        assert found.dtype == torch.uint8
        assert torch.equal(late(found[None])[0], expected)


def test_a_batch_of_pixels_keeps_their_layout_and_is_normalised_into_the_one_asked_for():
    images = [to_pixels(PHOTO), to_pixels(PHOTO).flip(2), to_pixels(PHOTO).contiguous()]
    batch = stack_pixels(images)
    assert torch.equal(batch, torch.stack(images))
    assert batch.is_contiguous(memory_format=torch.channels_last)
    expected = Normalize(MEAN, STD, torch.device("cpu"))(torch.stack(images))
    for layout in (torch.contiguous_format, torch.channels_last):
        found = Normalize(MEAN, STD, torch.device("cpu"), layout)(batch)
        assert found.is_contiguous(memory_format=layout)
        assert torch.equal(found, expected)
