import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import normalize, pad, to_tensor

from adaptive.config.sections import DataConfig
from adaptive.data.images.transforms import Mixer, eval_transform, train_transform
from adaptive.data.seeding import AUGMENT, seeded
from adaptive.errors import ConfigError
from tests.data.conftest import colour_field

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
IMAGE = colour_field(np.random.default_rng(3), 32, 32)
WIDE = colour_field(np.random.default_rng(4), 80, 40)


def config(**changes):
    return DataConfig(path="unused", image_size=changes.pop("image_size", 32), mean=MEAN, std=STD, **changes)


def plain(image):
    return normalize(to_tensor(image), MEAN, STD)


def draw(transform, image, seed):
    with seeded(AUGMENT, seed):
        return transform(image)


def test_without_augmentation_pixels_are_only_normalised():
    for crop in ("none", "pad"):
        data = config(crop=crop, flip=0.0, crop_padding=0)
        assert torch.equal(train_transform(data)(IMAGE), plain(IMAGE))
        assert torch.equal(eval_transform(data)(IMAGE), plain(IMAGE))


def test_flip_always_mirrors():
    flipped = train_transform(config(crop="none", flip=1.0))(IMAGE)
    assert torch.equal(flipped, plain(IMAGE).flip(2))


def test_pad_and_crop_takes_a_window_of_the_padded_image():
    transform = train_transform(config(crop="pad", flip=0.0, crop_padding=4))
    padded = plain(pad(IMAGE, 4))
    windows = {padded[:, y : y + 32, x : x + 32].numpy().tobytes() for y in range(9) for x in range(9)}
    drawn = {draw(transform, IMAGE, seed).numpy().tobytes() for seed in range(40)}
    assert drawn <= windows
    assert len(drawn) > 20


@pytest.mark.parametrize("crop", ["resize", "pad", "none"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "random"])
def test_every_crop_gives_square_tensors(crop, interpolation):
    data = config(crop=crop, interpolation=interpolation)
    for transform in (train_transform(data), eval_transform(data)):
        for image in (WIDE, IMAGE.resize((9, 60))):
            tensor = draw(transform, image, 1)
            assert tensor.shape == (3, 32, 32)
            assert tensor.dtype == torch.float32


def test_evaluation_scales_the_shorter_side_and_keeps_the_centre():
    expected = WIDE.resize((72, 36), Image.Resampling.BICUBIC).crop((20, 2, 52, 34))
    assert torch.equal(eval_transform(config(eval_crop=32 / 36))(WIDE), plain(expected))
    squashed = WIDE.resize((32, 32), Image.Resampling.BICUBIC)
    assert torch.equal(eval_transform(config(crop="none"))(WIDE), plain(squashed))


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m10-inc1-n4", "augmix-m3", "original", "v0"])
def test_policies_change_images_and_survive_many_draws(policy):
    transform = train_transform(config(crop="none", flip=0.0, auto_augment=policy))
    drawn = [draw(transform, IMAGE, seed) for seed in range(150)]
    assert sum(not torch.equal(tensor, plain(IMAGE)) for tensor in drawn) > 60
    assert all(torch.isfinite(tensor).all() for tensor in drawn)


def test_erasing_and_jitter_do_something():
    erased = draw(train_transform(config(crop="none", flip=0.0, erasing=1.0)), IMAGE, 0)
    share = (erased != plain(IMAGE)).any(0).float().mean()
    assert 0.02 <= share <= 0.4
    jittered = draw(train_transform(config(crop="none", flip=0.0, color_jitter=0.5)), IMAGE, 0)
    assert not torch.equal(jittered, plain(IMAGE))


def test_unknown_policy_names_the_key():
    for policy in ("nonsense", "rand-zz9"):
        with pytest.raises(ConfigError, match=rf"data\.auto_augment = '{policy}'"):
            train_transform(config(auto_augment=policy))


def test_seeding_gives_the_generators_back():
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    with seeded(AUGMENT, 1, 2, 3):
        draws = random.random(), np.random.rand(), torch.rand(1).item()
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])
    with seeded(AUGMENT, 1, 2, 3):
        assert (random.random(), np.random.rand(), torch.rand(1).item()) == draws
    with seeded(AUGMENT + 1, 1, 2, 3):
        assert random.random() != draws[0]


def one_hot(labels, classes, smoothing):
    return torch.eye(classes)[labels] * (1 - smoothing) + smoothing / classes


def test_mixup_is_a_convex_mix_with_the_flipped_batch():
    images, labels = torch.rand(8, 3, 16, 16), torch.arange(8) % 5
    mixed, soft = Mixer(config(mixup=0.8, label_smoothing=0.1), 5, 8)(images.clone(), labels, (0, 1, 2, 3))
    share = ((mixed - images.flip(0)) / (images - images.flip(0))).median()
    assert 0 < share < 1
    torch.testing.assert_close(mixed, share * images + (1 - share) * images.flip(0), atol=1e-5, rtol=1e-4)
    expected = share * one_hot(labels, 5, 0.1) + (1 - share) * one_hot(labels.flip(0), 5, 0.1)
    torch.testing.assert_close(soft, expected, atol=1e-5, rtol=1e-4)


def test_cutmix_pastes_a_box_and_weighs_labels_by_its_area():
    images, labels = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    mixed, soft = Mixer(config(cutmix=1.0), 4, 4)(images.clone(), labels, (0, 5, 0, 0))
    pasted = (mixed != images).any(1)
    assert torch.equal(torch.where(pasted[:, None], images.flip(0), images), mixed)
    rows, columns = pasted[0].any(1).sum(), pasted[0].any(0).sum()
    assert pasted[0].sum() == rows * columns  # one box
    share = 1 - float(rows * columns) / 32**2
    expected = share * one_hot(labels, 4, 0) + (1 - share) * one_hot(labels.flip(0), 4, 0)
    torch.testing.assert_close(soft, expected, atol=1e-6, rtol=1e-6)


def test_mixing_is_a_function_of_its_seeds():
    mixer = Mixer(config(mixup=1.0), 10, 4)
    images, labels = torch.rand(4, 3, 8, 8), torch.arange(4)
    first = mixer(images.clone(), labels, (1, 2, 3, 4))
    np.random.rand(7)
    again = mixer(images.clone(), labels, (1, 2, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    others = [mixer(images.clone(), labels, seeds)[1] for seeds in ((2, 2, 3, 4), (1, 3, 3, 4), (1, 2, 4, 4))]
    assert not any(torch.equal(first[1], other) for other in others)


def test_smoothing_alone_and_nothing_at_all():
    images, labels = torch.rand(3, 3, 8, 8), torch.tensor([2, 0, 1])
    mixer = Mixer(config(label_smoothing=0.3), 4, 3)
    assert mixer.soft
    same, soft = mixer(images, labels, (0,))
    assert same is images
    torch.testing.assert_close(soft, one_hot(labels, 4, 0.3))
    mixer = Mixer(config(), 4, 3)
    assert not mixer.soft
    assert mixer(images, labels, (0,)) == (images, labels)


def test_odd_micro_batch_names_the_key():
    with pytest.raises(ConfigError, match=r"train\.micro_batch = 7 is odd"):
        Mixer(config(cutmix=1.0), 10, 7)
    Mixer(config(label_smoothing=0.1), 10, 7)
