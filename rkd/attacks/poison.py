"""Training images some of which carry a trigger and the target's label."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from rkd.data import Source
from rkd.metrics import Images, Labels
from rkd.triggers import Trigger


class PoisonedSource:
    """A source in which a fixed share of the images is poisoned (dirty label).

    Args:
        clean: the images.
        trigger: put on the poisoned ones, whose label becomes its target.
        rate: share of the images, in [0, 1].
        seed: which ones.
    """

    def __init__(self, clean: Source, trigger: Trigger, rate: float, seed: int) -> None:
        self._clean, self._trigger = clean, trigger
        rng = np.random.default_rng([seed, 0x9015])
        self._poisoned = np.zeros(len(clean), dtype=bool)
        self._poisoned[rng.choice(len(clean), round(rate * len(clean)), replace=False)] = True
        self.labels: Labels = np.where(self._poisoned, trigger.target, clean.labels).astype(np.int64)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self._clean.size

    def __len__(self) -> int:
        return len(self._clean)

    def batch(self, indices: NDArray[np.int64]) -> tuple[Images, Labels]:
        """See `rkd.data.Source`."""
        images, labels, poisoned = [], [], []
        for marked in (False, True):
            chosen = np.flatnonzero(self._poisoned[indices] == marked)
            got, truth = self._clean.batch(indices[chosen])
            images.append(self._trigger.apply(got) if marked and len(got) else got)
            labels.append(np.full_like(truth, self._trigger.target) if marked else truth)
            poisoned.append(chosen[: len(got)])
        order = np.argsort(np.concatenate(poisoned), kind="stable")
        return np.concatenate(images)[order], np.concatenate(labels)[order]

    def batches(self, size: int, indices: NDArray[np.int64] | None = None) -> Iterator[tuple[Images, Labels]]:
        """See `rkd.data.Source`."""
        chosen = np.arange(len(self)) if indices is None else indices
        for start in range(0, len(chosen), size):
            yield self.batch(chosen[start : start + size])

    def subset(self, indices: NDArray[np.int64]) -> PoisonedSource:
        """See `rkd.data.Source`."""
        part = object.__new__(PoisonedSource)
        part._clean, part._trigger = self._clean.subset(indices), self._trigger
        part._poisoned, part.labels = self._poisoned[indices], self.labels[indices]
        return part
