"""Small image folders, no two images alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def noise(seed: int, height: int = 6, width: int = 6, *channels: int) -> np.ndarray:
    """Pixels that are different for each seed."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, *(channels or (3,))), dtype=np.uint8)


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def folder(root: Path, splits: dict[str, dict[str, int]], **size: int) -> Path:
    """`{"train": {"cat": 3}}` gives train/cat/0.png to 2.png, no two images alike."""
    seed = 0
    for split, classes in splits.items():
        for name, count in classes.items():
            for i in range(count):
                save(root / split / name / f"{i}.png", noise(seed, **size))
                seed += 1
    return root
