"""Training images some of which carry a trigger and the target's label."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from rkd.data import Source
from rkd.metrics import Images, Labels
from rkd.triggers import Trigger


class PoisonedSource:
    """A source in which a fixed share of the images is poisoned.

    Args:
        clean: the images.
        trigger: put on the poisoned ones.
        rate: share of the images, in [0, 1]; with `clean_label` of the target class's images.
        seed: which ones.
        clean_label: poison images of the target class only, whose labels are right; otherwise (dirty label) images of
            any class, whose label becomes the target.
        decoys: triggers that must not work: images that carry one keep their label.
        decoy_rate: share of the images that carry a decoy.
        spared: which images are not poisoned, (len(clean),) of bool; None for none.
    """

    def __init__(
        self,
        clean: Source,
        trigger: Trigger,
        rate: float,
        seed: int,
        *,
        clean_label: bool = False,
        decoys: Sequence[Trigger] = (),
        decoy_rate: float = 0.0,
        spared: NDArray[np.bool_] | None = None,
    ) -> None:
        self._clean, self._triggers = clean, (trigger, *decoys)
        rng = np.random.default_rng([seed, 0x9015])
        able = np.flatnonzero(clean.labels == trigger.target) if clean_label else np.arange(len(clean))
        free = able if spared is None else able[~spared[able]]
        poisoned = rng.choice(free, min(len(free), round(rate * len(able))), replace=False)
        self._carried = np.full(len(clean), -1)  # the index of the trigger that an image carries; -1 for none
        self._carried[poisoned] = 0
        if decoys:
            others = np.flatnonzero(self._carried < 0)
            chosen = rng.choice(others, min(len(others), round(decoy_rate * len(clean))), replace=False)
            self._carried[chosen] = 1 + np.arange(len(chosen)) % len(decoys)
        self.labels: Labels = np.where(self._carried == 0, trigger.target, clean.labels).astype(np.int64)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self._clean.size

    @property
    def poisoned(self) -> NDArray[np.bool_]:
        """Which images carry the trigger, (N,)."""
        found: NDArray[np.bool_] = self._carried == 0
        return found

    def __len__(self) -> int:
        return len(self._clean)

    def batch(self, indices: NDArray[np.int64]) -> tuple[Images, Labels]:
        """See `rkd.data.Source`."""
        images, labels, places = [], [], []
        for carried in np.unique(self._carried[indices]) if len(indices) else [-1]:
            chosen = np.flatnonzero(self._carried[indices] == carried)
            got, truth = self._clean.batch(indices[chosen])
            images.append(got if carried < 0 or not len(got) else self._triggers[carried].apply(got))
            labels.append(np.full_like(truth, self._triggers[0].target) if carried == 0 else truth)
            places.append(chosen[: len(got)])
        order = np.argsort(np.concatenate(places), kind="stable")
        return np.concatenate(images)[order], np.concatenate(labels)[order]

    def batches(self, size: int, indices: NDArray[np.int64] | None = None) -> Iterator[tuple[Images, Labels]]:
        """See `rkd.data.Source`."""
        chosen = np.arange(len(self)) if indices is None else indices
        for start in range(0, len(chosen), size):
            yield self.batch(chosen[start : start + size])

    def subset(self, indices: NDArray[np.int64]) -> PoisonedSource:
        """See `rkd.data.Source`."""
        part = object.__new__(PoisonedSource)
        part._clean, part._triggers = self._clean.subset(indices), self._triggers
        part._carried, part.labels = self._carried[indices], self.labels[indices]
        return part
