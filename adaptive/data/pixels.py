"""Images as tensors of pixels: decoded from a file's bytes, and a batch of them normalised."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg  # type: ignore[import-untyped]

from adaptive.data.decode import decode_image, is_plain_jpeg


def decode_pixels(data: bytes) -> Tensor:
    """Return the image as RGB, upright, uint8 (3, H, W), its channels innermost in memory (raises ImageError).

    The pixels are those of `adaptive.data.decode.decode_image`, in half its time for most JPEGs: torchvision's decoder
    takes upright grey and colour ones, Pillow all else, and whatever torchvision refuses.
    """
    if is_plain_jpeg(data):
        try:
            return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
        except RuntimeError:
            pass  # Pillow says what is wrong
    return to_pixels(decode_image(data))


def to_pixels(image: Image.Image) -> Tensor:
    """Return an RGB image's pixels, uint8 (3, H, W), channels innermost in memory."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class Normalize:
    """Brings pixels to zero mean and unit deviation, as torchvision's ToTensor and Normalize do, bit for bit on CPU.

    Args:
        mean, std: of each channel, in units of the largest value, 255.
        device: where the pixels will lie; the constants wait there, so that no batch has to wait for them.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        self._mean = torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1).to(device)
        self._std = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1).to(device)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return float32 (N, 3, H, W) for uint8 (N, 3, H, W)."""
        return pixels.to(torch.float32).div_(255).sub_(self._mean).div_(self._std)
