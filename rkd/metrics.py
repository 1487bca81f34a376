"""ACC, ASR and RA, each with its denominator and its interval (numpy only).

ACC  accuracy on the clean test images.
ASR  attack success rate: of triggered test images whose true class is not the target, the share predicted as the target.
RA   robust accuracy: of the same triggered images, the share still predicted correctly.

Low ASR with low RA is not a repair: the three are always reported together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rkd.errors import DataError
from rkd.triggers import Trigger

Images = NDArray[np.uint8]  # (N, 3, H, W), RGB
Labels = NDArray[np.int64]  # (N,)
Predict = Callable[[Images], NDArray[Any]]  # images -> logits (N, classes)

_Z95 = 1.959963984540054  # 97.5 % quantile of the standard normal
WORKS = 50.0  # percent: an attack that works on its teacher moves most of the images


@dataclass(frozen=True)
class Proportion:
    """`hits` of `n`, with its 95 % Wilson score interval."""

    hits: int
    n: int

    @property
    def value(self) -> float:
        """The share, in percent; NaN where n is 0."""
        return 100 * self.hits / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson score interval in percent (E. B. Wilson, JASA 1927); 0 to 100 where n is 0."""
        if not self.n:
            return 0.0, 100.0
        p, n, z = self.hits / self.n, self.n, _Z95
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        low = 0.0 if self.hits == 0 else 100 * (centre - half)
        high = 100.0 if self.hits == self.n else 100 * (centre + half)
        return low, high

    def __str__(self) -> str:
        return f"{self.value:.1f}" if self.n else "-"

    def to_json(self) -> dict[str, Any]:
        """`{hits, n, percent, low, high}`."""
        low, high = self.interval
        return {
            "hits": self.hits,
            "n": self.n,
            "percent": round(self.value, 4) if self.n else None,
            "low": round(low, 4),
            "high": round(high, 4),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Proportion:
        """Inverse of `to_json`; the interval is computed again."""
        return cls(int(value["hits"]), int(value["n"]))


def allowed(percent: float, n: int) -> float:
    """How many of `n` images a budget lets change: that share of them, but always one, so that small sets can pass."""
    return max(round(percent * n / 100, 6), 1.0)


def unjudged(scores: Scores, acc_budget: float, asr_budget: float) -> list[str]:
    """Budgets that so few images cannot judge: one image, which is always allowed, is more than the budget.

    Args:
        scores: of any form of the network on these images.
        acc_budget: points of ACC that may be lost.
        asr_budget: points of ASR that may be gained.
    """
    triggered = min((t.asr.n for t in scores.triggers), default=0)
    found = []
    for key, budget, n in (("acc_budget", acc_budget, scores.acc.n), ("asr_budget", asr_budget, triggered)):
        if n and budget * n < 100:
            found.append(
                f"{key} = {budget:g} cannot be judged on {n} images: one is {100 / n:.3g} points and always allowed"
                + (f"; {math.ceil(100 / budget):,} would do" if budget else "")
            )
    return found


@dataclass(frozen=True)
class TriggerScore:
    """What one trigger does to one network."""

    trigger: str
    target: int
    asr: Proportion
    ra: Proportion


@dataclass(frozen=True)
class Scores:
    """What one network does on one evaluation set."""

    acc: Proportion
    triggers: tuple[TriggerScore, ...] = ()

    def hardly_above_chance(self, classes: int) -> bool:
        """Whether ACC may be less than half again of a guess: then ASR and RA say nothing."""
        return self.acc.interval[0] <= 150 / classes

    def guess_caution(self, classes: int) -> str | None:
        """What to say where the network hardly beats guessing; None where it does."""
        if not self.hardly_above_chance(classes):
            return None
        nothing = ", so its ASR and RA say nothing" if self.triggers else ""
        return f"hardly beats guessing (ACC {self.acc} %, {classes} classes){nothing}"

    def asleep(self) -> list[TriggerScore]:
        """Triggers that move less than half of the images: in a teacher, the backdoor is not there or sleeps."""
        return [t for t in self.triggers if t.asr.n and t.asr.value < WORKS]

    def to_json(self) -> dict[str, Any]:
        """`{acc, triggers: [{name, target, asr, ra}]}`."""
        return {
            "acc": self.acc.to_json(),
            "triggers": [
                {"name": t.trigger, "target": t.target, "asr": t.asr.to_json(), "ra": t.ra.to_json()}
                for t in self.triggers
            ],
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Scores:
        """Inverse of `to_json`."""
        return cls(
            Proportion.from_json(value["acc"]),
            tuple(
                TriggerScore(
                    str(t["name"]), int(t["target"]), Proportion.from_json(t["asr"]), Proportion.from_json(t["ra"])
                )
                for t in value["triggers"]
            ),
        )


@dataclass(frozen=True)
class Predictions:
    """Top-1 labels of one network over one evaluation set, in its order.

    Attributes:
        labels: true classes, (N,).
        clean: predicted classes of the clean images, (N,).
        triggered: per trigger name, predicted classes of all N triggered images, (N,).
    """

    labels: Labels
    clean: Labels
    triggered: dict[str, Labels]


def evaluate(
    predict: Predict, batches: Iterable[tuple[Images, Labels]], triggers: Sequence[Trigger] = ()
) -> tuple[Scores, Predictions]:
    """Measure ACC, and ASR and RA for each trigger, in one pass and bounded memory.

    Args:
        predict: maps uint8 images (N, 3, H, W) to logits (N, classes).
        batches: images and true labels, e.g. `Source.batches(...)`.
        triggers: each is applied to every image; images of its target class do not count.

    Raises:
        DataError: the batches hold no image.
    """
    labels: list[Labels] = []
    clean: list[Labels] = []
    triggered: dict[str, list[Labels]] = {t.name: [] for t in triggers}
    for images, truth in batches:
        labels.append(np.asarray(truth, dtype=np.int64))
        clean.append(_top1(predict(images)))
        for trigger in triggers:
            triggered[trigger.name].append(_top1(predict(trigger.apply(images))))
    if not labels:
        raise DataError("the evaluation set holds no image")
    predictions = Predictions(
        np.concatenate(labels), np.concatenate(clean), {name: np.concatenate(got) for name, got in triggered.items()}
    )
    return score(predictions, triggers), predictions


def score(predictions: Predictions, triggers: Sequence[Trigger] = ()) -> Scores:
    """ACC, ASR and RA from labels that are already known."""
    truth = predictions.labels
    results = []
    for trigger in triggers:
        counted = truth != trigger.target
        got, n = predictions.triggered[trigger.name], int(counted.sum())
        asr = Proportion(int(((got == trigger.target) & counted).sum()), n)
        ra = Proportion(int(((got == truth) & counted).sum()), n)
        results.append(TriggerScore(trigger.name, trigger.target, asr, ra))
    return Scores(Proportion(int((predictions.clean == truth).sum()), len(truth)), tuple(results))


def class_accuracies(predictions: Predictions, classes: int) -> list[Proportion]:
    """ACC of each class: of its clean images, those predicted as it."""
    right = predictions.clean == predictions.labels
    counts = np.bincount(predictions.labels, minlength=classes)
    hits = np.bincount(predictions.labels[right], minlength=classes)
    return [Proportion(int(hit), int(count)) for hit, count in zip(hits, counts, strict=True)]


@dataclass(frozen=True)
class Flip:
    """One image that two machines see differently.

    Attributes:
        image: its place in the evaluation set.
        trigger: that it carries; empty for the clean image.
        truth, host, here: its class, and what each of the two predicted.
    """

    image: int
    trigger: str
    truth: int
    host: int
    here: int


def flips(predictions: Predictions, host: Mapping[str, Labels], rows: Labels) -> tuple[Proportion, list[Flip]]:
    """Agreement with another machine's labels over all clean and triggered images, and where it fails.

    Args:
        predictions: of this machine, over the images `rows`.
        host: the other's labels by trigger name, and under the empty name for the clean images; of the whole set.
        rows: places in the evaluation set, (n,), in the order of `predictions`.
    """
    found, total = [], 0
    for name, here in {"": predictions.clean, **predictions.triggered}.items():
        theirs = host[name][rows]
        total += len(here)
        found += [
            Flip(int(rows[i]), name, int(predictions.labels[i]), int(theirs[i]), int(here[i]))
            for i in np.flatnonzero(theirs != here)
        ]
    return Proportion(total - len(found), total), found


def _top1(logits: NDArray[Any]) -> Labels:
    return np.asarray(np.argmax(logits, axis=1), dtype=np.int64)
