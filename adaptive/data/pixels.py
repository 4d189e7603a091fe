"""Images as tensors of pixels: decoded from a file's bytes, and a batch of them normalised."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import simplejpeg  # type: ignore[import-untyped]
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from adaptive.data.decode import decode_image, is_plain_jpeg


def decode_pixels(data: bytes) -> Tensor:
    """Return the image as RGB, upright, uint8 (3, H, W), its channels innermost in memory (raises ImageError).

    The pixels are those of `adaptive.data.decode.decode_image`, in half its time for most JPEGs: libjpeg-turbo takes
    upright grey and colour ones by itself, Pillow all else, and whatever libjpeg-turbo has a doubt about.
    """
    if is_plain_jpeg(data):
        try:
            return torch.from_numpy(simplejpeg.decode_jpeg(data, "RGB")).permute(2, 0, 1)
        except ValueError:
            pass  # Pillow says what is wrong
    return to_pixels(decode_image(data))


def to_pixels(image: Image.Image) -> Tensor:
    """Return an RGB image's pixels, uint8 (3, H, W), channels innermost in memory."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def stack_pixels(images: Sequence[Tensor]) -> Tensor:
    """Return uint8 images (3, H, W) as one batch (N, 3, H, W), channels innermost in memory as decoders leave them.

    Copying each as it lies takes a seventh of the time of turning it over, which is left to the device. In a worker the
    batch is made in shared memory at once, as default_collate does: handing it over copies nothing.
    """
    batch: Tensor = default_collate([image.permute(1, 2, 0) for image in images])
    return batch.permute(0, 3, 1, 2)


class Normalize:
    """Brings pixels to zero mean and unit deviation, as torchvision's ToTensor and Normalize do, bit for bit on CPU.

    Args:
        mean, std: of each channel, in units of the largest value, 255.
        device: where the pixels will lie; the constants wait there, so that no batch has to wait for them.
        layout: memory format of what it returns.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        layout: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self.layout = layout
        self._mean = torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1).to(device)
        self._std = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1).to(device)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return float32 (N, 3, H, W) for uint8 (N, 3, H, W)."""
        return pixels.to(torch.float32, memory_format=self.layout).div_(255).sub_(self._mean).div_(self._std)
