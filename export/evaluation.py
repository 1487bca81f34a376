"""Which test images travel with a bundle."""

from __future__ import annotations

import numpy as np

from rkd.data import Indices, Source
from rkd.errors import DataError
from rkd.metrics import Images, Labels

_BATCH = 256


def choose_evaluation(
    test: Source, seed: int, limit_images: int = 5000, limit_bytes: int = 64 * 2**20
) -> tuple[Images, Labels]:
    """The whole test set where it fits, otherwise a part of it with the same shares of classes.

    Args:
        test: the held-out split; only one batch of it is held besides the result.
        seed: decides which images of a class are taken.
        limit_images: take at most so many.
        limit_bytes: of pixels, but one image is always taken.

    Returns:
        Images, uint8 (N, 3, H, W), and labels, (N,), in the order of the split.

    Raises:
        DataError: no image is there, or none can be decoded.
    """
    height, width = test.size
    limit = max(1, min(limit_images, limit_bytes // (3 * height * width)))
    indices = np.arange(len(test)) if len(test) <= limit else stratified(test.labels, limit, seed)
    images, labels = np.empty((len(indices), 3, height, width), np.uint8), np.empty(len(indices), np.int64)
    n = 0
    for pixels, truth in test.batches(_BATCH, indices):
        images[n : n + len(truth)], labels[n : n + len(truth)] = pixels, truth
        n += len(truth)
    if not n:
        raise DataError("the test set holds no image that can be decoded; give another --data")
    return images[:n], labels[:n]


def stratified(labels: Labels, n: int, seed: int) -> Indices:
    """`n` rows, ascending, each class within one image of its share; one of every class first, as far as n goes.

    The k-th of a class's m images, in random order, gets the key k / m; the n smallest keys are taken.
    """
    random = np.random.default_rng(seed)
    key = np.empty(len(labels))
    for label in np.unique(labels):
        rows = random.permutation(np.flatnonzero(labels == label))
        key[rows] = np.arange(len(rows)) / len(rows)
    order = np.lexsort((random.permutation(len(labels)), key))
    return np.sort(order[:n])
