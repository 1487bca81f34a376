"""Images that come as arrays, in an .npz or from a library: are they images, what are the classes, pixels of one size."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rkd import _images
from rkd._images import MAX_SIDE, Pixels, Size, shown
from rkd.errors import DataError


def check(what: str, x: NDArray[Any], y: NDArray[Any]) -> None:
    """See that `x` is uint8 images, (N, H, W) or (N, H, W, C), and `y` a whole number for each.

    Raises:
        DataError: they are not; the message begins with `what`.
    """
    if x.dtype != np.uint8:
        raise DataError(f"{what} is {x.dtype}; expected uint8 images, 0 to 255")
    if x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[3] not in (1, 3, 4)):
        hint = "; this looks like (N, C, H, W): transpose it" if x.ndim == 4 and x.shape[1] in (1, 3, 4) else ""
        raise DataError(f"{what} has shape {x.shape}; expected (N, H, W) or (N, H, W, C) with C of 1, 3 or 4{hint}")
    if 0 in x.shape or max(x.shape[1:3]) > MAX_SIDE:
        raise DataError(f"{what} has shape {x.shape}; expected images of 1 to {MAX_SIDE} pixels a side")
    if y.dtype.kind not in "iu" or y.shape != (len(x),):
        raise DataError(f"{what} goes with labels {y.dtype} {y.shape}; expected {len(x)} whole numbers")


def class_names(origin: str, arrays: dict[str, NDArray[Any]]) -> tuple[str, ...]:
    """The names in `classes`, or numbers where there is none.

    Raises:
        DataError: a label in `y` or `y_test` has no name.
    """
    labels = np.concatenate([arrays[key] for key in ("y", "y_test") if key in arrays])
    low, high = int(labels.min()), int(labels.max())
    if "classes" in arrays:
        names = arrays["classes"]
        if names.dtype.kind != "U" or names.ndim != 1:
            raise DataError(f"{origin}: classes is {names.dtype} of shape {names.shape}; expected one text a class")
        classes = tuple(shown(str(name)) for name in names)
    else:
        classes = tuple(str(i) for i in range(min(high + 1, len(labels))))  # more cannot all have an image
    if low < 0 or high >= len(classes):
        raise DataError(
            f"{origin}: labels go from {low} to {high}; expected 0 to K - 1 for K classes, each with images"
        )
    return classes


def to_pixels(x: Pixels, size: Size) -> Pixels:
    """(N, H, W) or (N, H, W, C) to (N, 3, height, width)."""
    if x.ndim == 3:
        x = x[..., None]
    if x.shape[3] == 4:
        x = np.concatenate([_over_black(x[i : i + 1024]) for i in range(0, len(x), 1024)])
    if x.shape[1:3] != size:
        _images.require_pillow()
        from PIL.Image import fromarray

        rgb = np.broadcast_to(x, (*x.shape[:3], 3))
        scaled = np.empty((len(x), 3, *size), dtype=np.uint8)
        for i in range(len(x)):
            scaled[i] = _images.to_pixels(fromarray(np.ascontiguousarray(rgb[i])), size)[0]
        return scaled
    return np.ascontiguousarray(np.broadcast_to(x.transpose(0, 3, 1, 2), (len(x), 3, *size)))


def _over_black(rgba: Pixels) -> Pixels:
    """(..., 4) with alpha to (..., 3)."""
    blended = rgba[..., :3].astype(np.uint16) * rgba[..., 3:]
    return np.asarray((blended + 127) // 255, dtype=np.uint8)
