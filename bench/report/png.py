"""Pictures inside a page: a PNG encoder, data URIs and the colours of heat maps (numpy and zlib only).

A board has no imaging library. Three of PNG's row filters are tried and the smallest result is kept, so that small
pictures of pixels and photographs both stay small.
"""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]  # (H, W, 1) grey or (H, W, 3) RGB

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOUR_TYPE = {1: 0, 3: 2}  # channels -> PNG colour type (ISO/IEC 15948, table 11.1)

# Lightness falls steadily along the ramp, so it reads the same in grey, in print and for a colour-blind reader.
_RAMP = np.array([(247, 243, 233), (238, 201, 138), (213, 128, 80), (150, 58, 82), (48, 22, 60)], dtype=np.float64)


def encode_png(pixels: Pixels) -> bytes:
    """Encode a picture without loss.

    Args:
        pixels: uint8 (H, W, 3) RGB or (H, W, 1) grey.

    Raises:
        ValueError: another shape or type, or no pixel at all.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in _COLOUR_TYPE or not pixels.size:
        raise ValueError(f"expected uint8 (H, W, 1 or 3), got {pixels.dtype} {pixels.shape}")
    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOUR_TYPE[channels], 0, 0, 0)
    rows = np.ascontiguousarray(pixels).reshape(height, width * channels)
    data = min((zlib.compress(candidate, 9) for candidate in _filtered(rows, channels)), key=len)
    return _SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def data_uri(pixels: Pixels) -> str:
    """The picture as a `data:` address for an `img` element."""
    return "data:image/png;base64," + base64.b64encode(encode_png(pixels)).decode()


def heat_pixels(values: NDArray[np.floating], high: float) -> Pixels:
    """Colour a map (H, W) from pale at 0 to dark at `high`; returns (H, W, 3)."""
    scaled = np.nan_to_num(np.asarray(values, dtype=np.float64) / (high if high > 0 else 1.0), nan=0.0)
    position = np.clip(scaled, 0, 1) * (len(_RAMP) - 1)
    stops = np.arange(len(_RAMP))
    planes = [np.interp(position, stops, _RAMP[:, channel]) for channel in range(3)]
    return np.rint(np.stack(planes, axis=-1)).astype(np.uint8)


def _filtered(rows: Pixels, channels: int) -> list[bytes]:
    """The rows behind their filter bytes, filtered by None (0), Sub (1) and Up (2)."""
    left, above = np.zeros_like(rows), np.zeros_like(rows)
    left[:, channels:], above[1:] = rows[:, :-channels], rows[:-1]
    candidates = []
    for kind, predicted in enumerate((np.zeros_like(rows), left, above)):
        marks = np.full((len(rows), 1), kind, dtype=np.uint8)
        candidates.append(np.hstack([marks, rows - predicted]).tobytes())  # uint8 wraps modulo 256, as PNG wants
    return candidates


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
