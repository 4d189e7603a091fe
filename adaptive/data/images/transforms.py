"""Augmentation: image to tensor for training and for evaluation, and mixup and CutMix of batches."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import chain

import torch
from PIL import Image, ImageOps
from timm.data import Mixup, create_transform
from timm.data.mixup import mixup_target
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision import transforms  # type: ignore[import-untyped]

from adaptive.config.sections import DataConfig
from adaptive.data.images.crop_flip import Draws, crop_flip_image
from adaptive.data.images.decode import decode_image
from adaptive.data.images.decode_window import Window, cut, decode_window, resized, to_pixels
from adaptive.data.images.eval_crop import EvalCrop
from adaptive.data.images.resizing import FILTERS, ResizedView, resized_for, resized_size
from adaptive.data.seeding import MIX, seeded
from adaptive.errors import ConfigError


def train_transform(data: DataConfig, normalize: bool = True) -> Callable[[Image.Image | bytes], Tensor]:
    """Return the training transform: RGB image or file's bytes -> float tensor (3, image_size, image_size), normalised.

    ``crop: resize`` decodes no more of a file than its crop takes, and resamples as Pillow does, up to rounding, in a
    quarter of its time. It draws from the global generators of random, numpy and torch; the stream seeds them for each
    sample. Without ``normalize`` it ends at uint8 pixels, except with data.erasing, whose noise is that of normalised
    values. Called with bytes it raises ImageError where they are no image.

    Raises:
        ConfigError: data.auto_augment is not a policy that timm knows.
    """
    normalize = normalize or data.erasing > 0
    primary, augments, final = _timm_stages(data, normalize)
    if data.crop != "resize":
        first = [_decoded, *_own_scale(data), *_pad_crop(data), transforms.RandomHorizontalFlip(data.flip)]
        return transforms.Compose([*first, *augments, *final])
    crop = primary[0]
    augments = [transforms.ToPILImage(), *augments, to_pixels] if augments else []
    flip = [_flip_pixels(data.flip)] if data.flip > 0 else []
    scale = [_to_float] if normalize else []
    return transforms.Compose([_crop_pixels(crop), *flip, *augments, *scale, *final])


def drawn_transform(data: DataConfig) -> Callable[[bytes, Draws], Tensor]:
    """Return the training transform of ``crop: pad`` and ``none`` that is given an image's draws of crop and flip.

    It is `train_transform` otherwise, without ``normalize``; `draws_per_sample` says whether it draws any more.
    """
    _, augments, final = _timm_stages(data, data.erasing > 0)
    scaled = transforms.Compose([_decoded, *_own_scale(data)])
    rest = transforms.Compose([*augments, *final])
    padding = crop_padding(data)

    def transform(image: bytes, draws: Draws) -> Tensor:
        return rest(crop_flip_image(scaled(image), draws, data.image_size, padding, data.flip))

    return transform


def draws_per_sample(data: DataConfig) -> bool:
    """Whether anything but the crop and flip of `drawn_transform` draws from the generators."""
    random_filter = data.interpolation == "random"
    return bool(data.auto_augment or data.color_jitter or data.erasing or random_filter)


def crop_padding(data: DataConfig) -> int:
    """Return the pixels of padding on each side in training."""
    return data.crop_padding if data.crop == "pad" else 0


def eval_transform(data: DataConfig, normalize: bool = True) -> Callable[[Image.Image], Tensor]:
    """Return the deterministic transform: RGB image -> float tensor (3, image_size, image_size), normalised.

    ``crop: resize`` scales the shorter side to image_size / eval_crop and keeps the centre; ``pad`` scales it to
    image_size, ``none`` scales both sides, as each does in training. Without ``normalize`` it ends at uint8 pixels.
    """
    if not normalize:
        return transforms.Compose([EvalCrop.of(data), transforms.PILToTensor()])
    return transforms.Compose([EvalCrop.of(data), transforms.ToTensor(), transforms.Normalize(data.mean, data.std)])


class Mixer:
    """Mixup, CutMix and label smoothing of a batch (arXiv 1710.09412, 1905.04899, 1512.00567), drawn from given seeds.

    Raises:
        ConfigError: mixing pairs images inside a micro batch, so its size has to be even.
    """

    def __init__(self, data: DataConfig, num_classes: int, micro_batch: int) -> None:
        self.num_classes = num_classes
        self.smoothing = data.label_smoothing
        self.mixing = data.mixup > 0 or data.cutmix > 0
        if self.mixing and micro_batch % 2:
            raise ConfigError(
                f"train.micro_batch = {micro_batch} is odd, but data.mixup and data.cutmix pair the images of a micro "
                "batch; choose an even size"
            )
        self._mixup = Mixup(
            mixup_alpha=data.mixup,
            cutmix_alpha=data.cutmix,
            label_smoothing=data.label_smoothing,
            num_classes=num_classes,
        )

    @property
    def soft(self) -> bool:
        """Whether labels become distributions (N, C)."""
        return self.mixing or self.smoothing > 0

    def __call__(self, images: Tensor, labels: Tensor, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Mix images (N, C, H, W), in place, and labels (N,) int64 as drawn from ``seeds``.

        Returns the images and soft labels (N, num_classes); with nothing to do, the labels as they came.
        """
        if self.mixing:
            with seeded(MIX, *seeds):
                return self._mixup(images, labels)
        if self.smoothing > 0:
            return images, mixup_target(labels, self.num_classes, smoothing=self.smoothing)
        return images, labels


def _timm_stages(data: DataConfig, normalize: bool) -> tuple[list, list, list]:
    """Return timm's transforms of crop, of augmentation, and of the way to a tensor (raises ConfigError)."""
    try:
        stages = create_transform(
            data.image_size,
            is_training=True,
            scale=tuple(data.crop_scale),
            ratio=tuple(data.crop_ratio),
            hflip=data.flip,
            color_jitter=data.color_jitter or None,
            auto_augment=data.auto_augment,
            interpolation=data.interpolation,
            mean=tuple(data.mean),
            std=tuple(data.std),
            re_prob=data.erasing,
            re_mode="pixel",  # random pixels, as in the paper and in timm's recipes
            normalize=normalize,
            separate=True,
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise ConfigError(
            f"data.auto_augment = {data.auto_augment!r} is not a timm policy ({error}); "
            "for example rand-m9-mstd0.5-inc1, augmix-m3 or original"
        ) from None
    primary, secondary, final = (list(stage.transforms) for stage in stages)
    for augment in secondary:
        _keep_a_bit(augment)
    return primary, secondary, final


def _keep_a_bit(augment: object) -> None:
    """Make timm's Posterize keep one bit at its strongest: it keeps none, which Pillow 13 refuses (before: black)."""
    policies = [getattr(augment, "ops", []), *getattr(augment, "policy", [])]
    for operation in chain.from_iterable(policies):
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    return image if bits >= 8 else ImageOps.posterize(image, max(1, bits))


def _decoded(image: Image.Image | bytes) -> Image.Image:
    return decode_image(image) if isinstance(image, bytes) else image


def _crop_pixels(crop: RandomResizedCropAndInterpolation) -> Callable[[Image.Image | bytes], Tensor]:
    """Return timm's random resized crop, with the same draws, by libjpeg-turbo's decoder and torch's resampling."""
    modes = crop.interpolation if isinstance(crop.interpolation, list | tuple) else [crop.interpolation]

    def draw(height: int, width: int) -> Window:
        return Window(*crop.get_params(torch.empty(3, height, width, device="meta"), crop.scale, crop.ratio))

    def cropped(image: Image.Image | bytes) -> Tensor:
        window = decode_window(image, draw) if isinstance(image, bytes) else cut(to_pixels(image), draw)
        mode = random.choice(modes) if len(modes) > 1 else modes[0]
        return resized(window, crop.size, mode.value)

    return cropped


def _flip_pixels(share: float) -> Callable[[Tensor], Tensor]:
    """Return torchvision's RandomHorizontalFlip, the same draws included, in a third of its time."""
    return lambda pixels: pixels.flip(-1) if torch.rand(1).item() < share else pixels


def _to_float(pixels: Tensor) -> Tensor:
    return pixels.contiguous().to(torch.float32).div_(255)


def _own_scale(data: DataConfig) -> list[Callable[[Image.Image], Image.Image | ResizedView]]:
    names = list(FILTERS) if data.interpolation == "random" else [data.interpolation]
    resizes = [_resize(data, FILTERS[name]) for name in names]
    return [resizes[0] if len(resizes) == 1 else transforms.RandomChoice(resizes)]


def _resize(data: DataConfig, method: Image.Resampling) -> Callable[[Image.Image], Image.Image | ResizedView]:
    def resize(image: Image.Image) -> Image.Image | ResizedView:
        size = resized_size(image.size, data.image_size, squash=data.crop == "none")
        return resized_for(image, size, method, data.image_size)

    return resize


def _pad_crop(data: DataConfig) -> list[Callable[[Image.Image | ResizedView], Image.Image]]:
    """Return torchvision's RandomCrop with padding, the same draws included, which also takes a view."""
    side, padding = data.image_size, data.crop_padding

    def cropped(image: Image.Image | ResizedView) -> Image.Image:
        width, height = (length + 2 * padding for length in image.size)
        shape = torch.empty(3, height, width, device="meta")
        top, left, _, _ = transforms.RandomCrop.get_params(shape, (side, side))
        left, top = left - padding, top - padding
        return image.crop((left, top, left + side, top + side))  # black beyond the image

    return [cropped] if data.crop == "pad" else []
