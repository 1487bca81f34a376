"""The order of the images and their augmentation, derived from (seed, epoch, step).

There is no loader state: any step's batch can be made again from these three numbers, so a resumed run sees the very
same images.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from rkd.data import Source
from rkd.errors import ConfigError
from rkd.metrics import Images, Labels

AUGMENTATIONS = ("none", "crop", "crop-flip")


def steps_per_epoch(images: int, batch: int) -> int:
    """Full batches only, so that BN never sees a sliver; one batch where there are fewer images."""
    return max(1, images // batch)


def epoch_order(images: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of one epoch, (images,)."""
    return np.random.default_rng([seed, epoch]).permutation(images).astype(np.int64)


def augment(images: Images, how: str, rng: np.random.Generator) -> Images:
    """Random crops out of images padded by an eighth with their edge's mirror image, and horizontal flips.

    Args:
        images: uint8 (N, 3, H, W).
        how: `none`, `crop` or `crop-flip`.
        rng: where the randomness comes from.

    Raises:
        ConfigError: no such augmentation.
    """
    if how not in AUGMENTATIONS:
        raise ConfigError(f"augmentation {how!r}: expected one of {', '.join(AUGMENTATIONS)}")
    if how == "none":
        return images
    count, _, height, width = images.shape
    pad = max(1, min(height, width) // 8)
    padded = np.pad(images, ((0, 0), (0, 0), (pad, pad), (pad, pad)), mode="reflect")
    rows, columns = rng.integers(0, 2 * pad + 1, (2, count))
    flips = np.asarray(rng.random(count)) < (0.5 if how == "crop-flip" else 0.0)
    out = np.empty_like(images)
    for i in range(count):
        crop = padded[i, :, rows[i] : rows[i] + height, columns[i] : columns[i] + width]
        out[i] = crop[..., ::-1] if flips[i] else crop
    return out


def training_batches(
    source: Source, batch: int, seed: int, start_step: int, total_steps: int, augmentation: str
) -> Iterator[tuple[int, int, Images, Labels]]:
    """Epoch, step, images and labels from `start_step` on; the next batch is prepared while one is used."""
    per_epoch = steps_per_epoch(len(source), batch)
    orders: dict[int, NDArray[np.int64]] = {}

    def make(step: int) -> tuple[int, int, Images, Labels]:
        epoch, within = divmod(step, per_epoch)
        if epoch not in orders:
            orders.clear()
            orders[epoch] = epoch_order(len(source), seed, epoch)
        images, labels = source.batch(orders[epoch][within * batch : (within + 1) * batch])
        return epoch, step, augment(images, augmentation, np.random.default_rng([seed, epoch, step])), labels

    with ThreadPoolExecutor(1, thread_name_prefix="rkd-batches") as pool:
        ahead: Future[tuple[int, int, Images, Labels]] | None = None
        for step in range(start_step, total_steps):
            current = ahead if ahead is not None else pool.submit(make, step)
            ready = current.result()
            ahead = pool.submit(make, step + 1) if step + 1 < total_steps else None
            yield ready
