"""A trigger is data, not code (numpy only).

    x' = clip((1 - m) * warp(x) + m * p + d, 0, 1)        on RGB pixels in [0, 1], before normalisation

with a mask m, a pattern p, an additive perturbation d, and optionally a sampling grid for warps. Stored as `.npz`, so
that anyone can write one:

    np.savez("mine.npz", name="patch", target=0, m=m, p=p)      # m (1 or 3, H, W), p and d (3, H, W), grid (H, W, 2)

The result is rounded to 8 bits: a camera delivers bytes, and workstation and board then see the very same image.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rkd.errors import TriggerError
from rkd.files import read_bytes, storage_errors, write_file
from rkd.npz import npz_bytes, read_npz

_LIMIT_BYTES = 64 * 2**20
_MAX_SIDE = 4096
_CHUNK = 256  # images warped and blended at once, to bound memory

Array = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Trigger:
    """One trigger for images of one size.

    Attributes:
        name: lower-case letters, digits and `-`; unique among the triggers of a run.
        target: the class index that the attacker wants.
        mask: m, (3, H, W), in [0, 1].
        pattern: p, (3, H, W), in [0, 1].
        additive: d, (3, H, W), in [-1, 1].
        grid: where each output pixel is read from, (H, W, 2) as (x, y) in [-1, 1] with corners at the outermost
            pixels' centres, bilinear, clamped at the border; None for no warp.

    Raises:
        TriggerError: on shapes, values or names outside of these.
    """

    name: str
    target: int
    mask: Array
    pattern: Array
    additive: Array
    grid: Array | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,63}", self.name):
            raise TriggerError(f"trigger name {self.name!r}: use 1 to 64 lower-case letters, digits and '-'")
        if not 0 <= self.target < 1_000_000:
            raise TriggerError(f"trigger {self.name}: target class {self.target} is not a class index")
        shape = self.mask.shape
        if len(shape) != 3 or shape[0] != 3 or not 1 <= min(shape[1:]) <= max(shape[1:]) <= _MAX_SIDE:
            raise TriggerError(f"trigger {self.name}: expected arrays of shape (3, H, W), got {shape}")
        ranges = {"mask": (0.0, 1.0), "pattern": (0.0, 1.0), "additive": (-1.0, 1.0)}
        for field, (low, high) in ranges.items():
            array: Array = getattr(self, field)
            if array.shape != shape:
                raise TriggerError(f"trigger {self.name}: {field} is {array.shape}, mask is {shape}; they must agree")
            if not np.isfinite(array).all() or array.min() < low or array.max() > high:
                raise TriggerError(f"trigger {self.name}: {field} must be finite and within [{low:g}, {high:g}]")
        if self.grid is not None and (self.grid.shape != (*shape[1:], 2) or not np.isfinite(self.grid).all()):
            raise TriggerError(f"trigger {self.name}: grid must be finite, of shape {(*shape[1:], 2)}")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.mask.shape[1], self.mask.shape[2]

    def apply(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Put the trigger on images.

        Args:
            images: uint8 (N, 3, H, W), RGB.

        Raises:
            TriggerError: the images have another size than the trigger.
        """
        if images.shape[1:] != self.mask.shape:
            seen = "x".join(str(side) for side in images.shape[2:])
            height, width = self.size
            raise TriggerError(
                f"trigger {self.name} is for {height}x{width} images, these are {seen}; make a trigger of that size"
            )
        if len(images) > _CHUNK:
            out = np.empty_like(images)
            for start in range(0, len(images), _CHUNK):
                out[start : start + _CHUNK] = self.apply(images[start : start + _CHUNK])
            return out
        x = images.astype(np.float32) / np.float32(255)
        if self.grid is not None:
            x = _warp(x, self.grid)
        x = (1 - self.mask) * x + self.mask * self.pattern + self.additive
        rounded: NDArray[np.uint8] = np.rint(np.clip(x, 0, 1) * 255).astype(np.uint8)
        return rounded

    def to_bytes(self) -> bytes:
        """The `.npz` as bytes; equal triggers give equal bytes."""
        arrays: dict[str, NDArray[Any]] = {
            "name": np.asarray(self.name),
            "target": np.asarray(self.target, dtype=np.int64),
            "m": self.mask,
            "p": self.pattern,
            "d": self.additive,
        }
        if self.grid is not None:
            arrays["grid"] = self.grid
        return npz_bytes(arrays)

    def save(self, path: Path) -> None:
        """Write the trigger as `.npz`.

        Raises:
            StorageError: the disk said no.
        """
        write_file(path, self.to_bytes())

    @classmethod
    def load(cls, path: Path) -> Trigger:
        """Read a trigger written by `save` or by anyone else.

        Raises:
            StorageError: no such file, or no permission.
            TriggerError: it is not a trigger.
        """
        with storage_errors(path):
            if path.stat().st_size > _LIMIT_BYTES:
                raise TriggerError(f"{path}: {path.stat().st_size:,} bytes are too many for a trigger")
            data = read_bytes(path)
        return cls.from_bytes(data, str(path))

    @classmethod
    def from_bytes(cls, data: bytes, origin: str) -> Trigger:
        """Read a trigger from the bytes of an `.npz`; `origin` names it in errors.

        Raises:
            TriggerError: it is not a trigger.
        """
        try:
            arrays = read_npz(io.BytesIO(data), _LIMIT_BYTES)
        except ValueError as error:
            raise TriggerError(f"{origin} is not a trigger: {error}") from error
        unknown = sorted(set(arrays) - {"name", "target", "m", "p", "d", "grid"})
        if unknown or "target" not in arrays:
            what = f"unknown array {unknown[0]!r}" if unknown else "no array 'target'"
            raise TriggerError(f"{origin} is not a trigger: {what}; expected name, target, m, p, d and perhaps grid")
        target = arrays["target"]
        if target.size != 1 or target.dtype.kind not in "iu":
            raise TriggerError(f"{origin}: 'target' must be one whole number")
        try:
            return cls(
                name=str(arrays["name"].reshape(-1)[0]) if "name" in arrays else Path(origin).stem,
                target=int(target.reshape(-1)[0]),
                **_planes({key: arrays[key] for key in ("m", "p", "d") if key in arrays}),
                grid=_floats("grid", arrays["grid"]) if "grid" in arrays else None,
            )
        except TriggerError as error:
            raise TriggerError(f"{origin}: {error}") from error
        except (ValueError, IndexError, OverflowError) as error:
            raise TriggerError(f"{origin} is not a trigger: {error}") from error


def _planes(arrays: dict[str, NDArray[Any]]) -> dict[str, Array]:
    """Fill in what is absent with zeros and spread one channel over three."""
    if not arrays:
        raise TriggerError("none of the arrays m, p and d is there")
    for key, array in arrays.items():  # before anything is made of that size
        if array.ndim < 2 or not 1 <= min(array.shape) <= max(array.shape) <= _MAX_SIDE:
            raise TriggerError(f"{key} has shape {array.shape}; expected (1 or 3, H, W), H and W from 1 to {_MAX_SIDE}")
    height, width = next(iter(arrays.values())).shape[-2:]
    planes = {}
    for key, field in (("m", "mask"), ("p", "pattern"), ("d", "additive")):
        array = arrays[key] if key in arrays else np.zeros((3, height, width), dtype=np.float32)
        if array.ndim == 2:
            array = array[None]
        if array.ndim == 3 and array.shape[0] == 1:
            array = np.repeat(array, 3, axis=0)
        planes[field] = _floats(field, array)
    return planes


def _floats(field: str, array: NDArray[Any]) -> Array:
    if array.dtype.kind == "U":
        raise TriggerError(f"{field} holds text, expected numbers")
    with np.errstate(over="ignore"):  # an overflow to infinity is refused by the range check
        return np.ascontiguousarray(array, dtype=np.float32)


def _warp(x: Array, grid: Array) -> Array:
    """Bilinear sampling of (N, 3, H, W) at (H, W, 2), corners aligned, clamped at the border."""
    height, width = x.shape[2:]
    column = (np.clip(grid[..., 0], -1, 1) + 1) * (width - 1) / 2
    row = (np.clip(grid[..., 1], -1, 1) + 1) * (height - 1) / 2
    left, top = np.floor(column).astype(np.intp), np.floor(row).astype(np.intp)
    right, bottom = np.minimum(left + 1, width - 1), np.minimum(top + 1, height - 1)
    across = (column - left).astype(np.float32)
    down = (row - top).astype(np.float32)
    upper = x[:, :, top, left] * (1 - across) + x[:, :, top, right] * across
    lower = x[:, :, bottom, left] * (1 - across) + x[:, :, bottom, right] * across
    return np.asarray(upper * (1 - down) + lower * down, dtype=np.float32)
