"""Images that stay encoded until the device: a worker draws the crop, the rank's process decodes and crops on its GPU.

A worker hands over a record per image, the file's bytes with what was drawn for them, and a batch of them as one tensor
of bytes. The draws are those of `adaptive.data.images.transforms.train_transform`, in its order, so the crops are its
crops; pixels differ from it by the rounding of another JPEG decoder and of resampling in float.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torch.utils.data import default_collate

from adaptive.config.sections import DataConfig
from adaptive.data.images.decode import ImageError, decode_image
from adaptive.data.images.decode_window import Window, cut, resized, to_pixels
from adaptive.data.images.jpeg_header import plain_jpeg
from adaptive.data.images.nvjpeg import DecodeJpegs
from adaptive.errors import DataError, reason_of

_LOG = logging.getLogger(__name__)
_END_OF_IMAGE = b"\xff\xd9"
_MODES = ("bilinear", "bicubic")
_PIXELS = -1  # in place of a resampling mode: the payload is no file but the finished image's pixels
_NUMBER = np.dtype("<i4")
_COLUMNS = 7  # of a record's header: top, left, height, width, mode, flip, length of the payload in bytes
_HEADER = _COLUMNS * _NUMBER.itemsize


class _Record(NamedTuple):
    """An image of a batch: its window, how it is resampled (-1: not at all), whether it is mirrored, its bytes."""

    window: Window
    mode: int
    flip: bool
    payload: Tensor


class EncodedTransform:
    """The training transform of ``crop: resize`` up to its draws: a file's bytes -> a record, uint8 (n,).

    It draws from the global generators as `train_transform` does. What no GPU decodes alike (other formats, rotated,
    CMYK or cut-off files) is decoded, cropped and flipped here: uint8 (3, image_size, image_size).

    Args:
        data: crop, flip and interpolation.
    """

    def __init__(self, data: DataConfig) -> None:
        self._crop = RandomResizedCropAndInterpolation(
            data.image_size,
            scale=tuple(data.crop_scale),
            ratio=tuple(data.crop_ratio),
            interpolation=data.interpolation,
        )
        self._flip = data.flip
        self._modes = _MODES if data.interpolation == "random" else (data.interpolation,)

    def __call__(self, data: bytes) -> Tensor:
        """Return the record, or the pixels (raises ImageError)."""
        frame = plain_jpeg(data)
        if frame is None or data.rfind(_END_OF_IMAGE, frame.offset) < 0:
            pixels = cut(to_pixels(decode_image(data)), self._draw_window)
            pixels = resized(pixels, self._crop.size, self._draw_mode())
            return pixels.flip(-1) if self._draw_flip() else pixels
        window = self._draw_window(frame.height, frame.width)
        mode = _MODES.index(self._draw_mode())
        return _record(window, mode, self._draw_flip(), data)

    def _draw_window(self, height: int, width: int) -> Window:
        shape = torch.empty(3, height, width, device="meta")
        return Window(*self._crop.get_params(shape, self._crop.scale, self._crop.ratio))

    def _draw_mode(self) -> str:
        return random.choice(self._modes) if len(self._modes) > 1 else self._modes[0]

    def _draw_flip(self) -> bool:
        return self._flip > 0 and torch.rand(1).item() < self._flip


def is_encoded(images: Sequence[Tensor]) -> bool:
    """Whether any of a batch's images is a record."""
    return any(image.dim() == 1 for image in images)


def pack_records(images: Sequence[Tensor]) -> Tensor:
    """Return records (n,) and finished images uint8 (3, S, S) as one batch, uint8 (bytes,).

    Like `adaptive.data.images.normalize.stack_pixels` it is made in shared memory in a worker.
    """
    nowhere = Window(0, 0, 0, 0)
    records = [
        image if image.dim() == 1 else _record(nowhere, _PIXELS, False, image.contiguous().numpy().tobytes())
        for image in images
    ]
    count = torch.from_numpy(np.array([len(records)], _NUMBER).view(np.uint8))
    headers = [record[:_HEADER] for record in records]
    batch: Tensor = default_collate([torch.cat([count, *headers, *(record[_HEADER:] for record in records)])])
    return batch[0]


class BatchDecoder:
    """Decodes, crops, resamples and flips a batch of records on a device.

    Args:
        image_size: S.
        device: of the pixels.
        decode: decodes JPEGs to that device.
    """

    def __init__(self, image_size: int, device: torch.device, decode: DecodeJpegs) -> None:
        self._size, self._device, self._decode = image_size, device, decode
        self._warned = False
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Tensor, ids: Sequence[int]) -> Tensor:
        """Return pixels, uint8 (N, 3, S, S), of what `pack_records` made.

        On a GPU it works on a stream of its own: the decoder waits for its stream, and the training steps that were
        queued before must not be waited for.

        Args:
            batch: on the CPU.
            ids: of the samples, for the message of an error.

        Raises:
            DataError: a file cannot be decoded.
        """
        if self._stream is None:
            return self._pixels(batch, ids)
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            pixels = self._pixels(batch, ids)
        current.wait_stream(self._stream)
        pixels.record_stream(current)
        return pixels

    def _pixels(self, batch: Tensor, ids: Sequence[int]) -> Tensor:
        records = _unpack(batch)
        files = [row for row, record in enumerate(records) if record.mode != _PIXELS]
        decoded = dict(zip(files, self._decoded([records[row].payload for row in files], files, ids), strict=True))
        shape = (3, self._size, self._size)
        made = torch.empty(len(records), *shape, device=self._device)
        for row, record in enumerate(records):
            if record.mode == _PIXELS:
                made[row] = record.payload.view(shape).to(self._device, non_blocking=True)
                continue
            window = cut(decoded[row], lambda *_, found=record.window: found)
            mode = _MODES[record.mode]
            made[row] = F.interpolate(window[None].float(), self._size, mode=mode, antialias=True)[0]
        flips = torch.tensor([record.flip for record in records], device=self._device)
        made = torch.where(flips.view(-1, 1, 1, 1), made.flip(-1), made)
        return made.round_().clamp_(0, 255).to(torch.uint8)

    def _decoded(self, files: list[Tensor], rows: list[int], ids: Sequence[int]) -> list[Tensor]:
        """Decode all at once; if that fails, one by one, and by Pillow what the device does not decode."""
        if not files:
            return []
        try:
            return self._decode(files)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if not self._warned:
                self._warned = True
                _LOG.warning("some JPEGs are decoded one by one, as nvJPEG refused a batch (%s)", reason_of(error))
            return [self._decoded_alone(file, ids[row]) for file, row in zip(files, rows, strict=True)]

    def _decoded_alone(self, file: Tensor, identity: int) -> Tensor:
        try:
            return self._decode([file])[0]
        except RuntimeError:
            try:
                return to_pixels(decode_image(file.numpy().tobytes())).to(self._device)
            except ImageError as error:
                raise DataError(
                    f"sample {identity}: {error}; copy its shard again or pack again, or leave it out with "
                    "data.decoder=cpu and data.max_bad"
                ) from None


def _record(window: Window, mode: int, flip: bool, payload: bytes) -> Tensor:
    header = np.array([*window, mode, flip, len(payload)], _NUMBER).tobytes()
    return torch.frombuffer(bytearray(header + payload), dtype=torch.uint8)


def _unpack(batch: Tensor) -> list[_Record]:
    values = batch.numpy()
    start = _NUMBER.itemsize
    count = int(values[:start].view(_NUMBER)[0])
    offset = start + count * _HEADER
    records = []
    for *window, mode, flip, length in values[start:offset].view(_NUMBER).reshape(count, _COLUMNS).tolist():
        records.append(_Record(Window(*window), mode, bool(flip), batch[offset : offset + length]))
        offset += length
    return records
