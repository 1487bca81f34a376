"""Training images without labels: the teacher's own answers stand in for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rkd.data import Source
from rkd.errors import DataError
from rkd.metrics import Images, Labels, Predict

_UNKNOWN = -1  # of an image that cannot be decoded: it is never handed out


class RelabelledSource:
    """A source whose labels are replaced; the true ones are not handed out any more.

    Args:
        images: where the images come from.
        labels: (N,), one an image.
    """

    def __init__(self, images: Source, labels: Labels) -> None:
        self._images = images
        self.labels: Labels = np.asarray(labels, dtype=np.int64)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self._images.size

    def __len__(self) -> int:
        return len(self._images)

    def batch(self, indices: NDArray[np.int64]) -> tuple[Images, Labels]:
        """See `rkd.data.Source`.

        Raises:
            DataError: an image is there of which the teacher was not asked.
        """
        images, labels = _of_those_decoded(self._images, self.labels, indices)
        if (labels == _UNKNOWN).any():
            raise DataError(
                "an image can be read that could not be when the teacher was asked for labels; start a new run"
            )
        return images, labels

    def batches(self, size: int, indices: NDArray[np.int64] | None = None) -> Iterator[tuple[Images, Labels]]:
        """See `rkd.data.Source`."""
        chosen = np.arange(len(self)) if indices is None else indices
        for start in range(0, len(chosen), size):
            images, labels = self.batch(chosen[start : start + size])
            if len(labels):
                yield images, labels

    def subset(self, indices: NDArray[np.int64]) -> RelabelledSource:
        """See `rkd.data.Source`."""
        return RelabelledSource(self._images.subset(indices), self.labels[indices])


def check_labels(labels: NDArray[Any], images: int, classes: int) -> None:
    """See that `answers` could have given these.

    Raises:
        ValueError: another shape or type, or no such class.
    """
    if labels.dtype != np.int64 or labels.shape != (images,):
        raise ValueError(f"{labels.dtype} {labels.shape}, expected int64 ({images},), one of each training image")
    if not ((labels >= _UNKNOWN) & (labels < classes)).all():
        raise ValueError(f"a label is not one of the {classes} classes")


def answers(predict: Predict, source: Source, batch: int) -> Iterator[Labels]:
    """What a network says of the images, batch by batch in the order of the source, (n,) int64."""
    for start in range(0, len(source), batch):
        indices = np.arange(start, min(start + batch, len(source)))
        images, _ = source.batch(indices)
        said = np.full(len(indices), _UNKNOWN, dtype=np.int64)
        if len(images) == len(indices):
            said[:] = predict(images).argmax(1)
        else:  # some cannot be decoded: one by one, to know which
            for place, index in enumerate(indices):
                image, _ = source.batch(np.array([index]))
                if len(image):
                    said[place] = int(predict(image).argmax(1)[0])
        yield said


def _of_those_decoded(source: Source, labels: Labels, indices: NDArray[np.int64]) -> tuple[Images, Labels]:
    images, _ = source.batch(indices)
    if len(images) == len(indices):
        return images, labels[indices]
    single = [(source.batch(indices[i : i + 1])[0], labels[indices[i : i + 1]]) for i in range(len(indices))]
    good = [(image, label) for image, label in single if len(image)]
    if not good:
        return images, labels[:0]
    return np.concatenate([image for image, _ in good]), np.concatenate([label for _, label in good])
