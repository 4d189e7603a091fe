"""nvJPEG by way of TorchCodec: decodes the JPEGs of a batch on a GPU. No other module imports torchcodec."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from adaptive.errors import MachineError, reason_of

DecodeJpegs = Callable[[Sequence[Tensor]], list[Tensor]]  # bytes of files, uint8 (n,) on the CPU -> pixels (3, H, W)


def nvjpeg_decoder(device: torch.device) -> DecodeJpegs:
    """Return what decodes JPEGs to RGB, uint8 (3, H, W), on a CUDA device; it waits until they are decoded.

    TorchCodec's wheels need the CUDA of their version (13 for 0.17), as torch's do. Baseline files go to the GPU's
    JPEG engine where it has one (A100, H100), progressive ones to its kernels. Rotation by EXIF is applied, as Pillow's
    exif_transpose would.

    Raises:
        MachineError: the device is another one, or TorchCodec is missing or cannot be loaded.
    """
    if device.type != "cuda":
        raise MachineError(
            f"data.decoder = 'cuda' needs a CUDA device, training is on {device.type!r}; use data.decoder=cpu"
        )
    try:
        from torchcodec.decoders import decode_jpeg
    except ImportError as error:
        raise MachineError(
            f"data.decoder = 'cuda' needs torchcodec >= 0.17 ({reason_of(error, 100)}); "
            "pip install 'adaptive-training[gpu-decode]', or use data.decoder=cpu"
        ) from None
    except (OSError, RuntimeError) as error:  # its libraries belong to another torch or CUDA
        raise MachineError(
            f"data.decoder = 'cuda': torchcodec cannot be loaded ({reason_of(error, 200)}); "
            "install the build for this torch and CUDA, or use data.decoder=cpu"
        ) from None

    def decode(files: Sequence[Tensor]) -> list[Tensor]:
        decoded: list[Tensor] = decode_jpeg(list(files), mode="RGB", device=device)
        return decoded

    return decode
