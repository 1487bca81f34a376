"""The ledger: what each form of one student said of the same images, step by step (numpy only).

    student in torch -> ONNX in FP32 -> typed FP16 or INT8 -> (on the board) engine

It keeps the label of every image, clean and under each trigger, at every step, so that each image whose label flips can
be named, and so that a step that loses accuracy, or wakes a backdoor, is caught at that step.

    Ledger.from_bytes(ledger.to_bytes(), origin) == ledger
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rkd.errors import BundleError
from rkd.metrics import Labels, Predictions, Proportion, Scores, allowed, score
from rkd.npz import npz_bytes, read_npz
from rkd.triggers import Trigger

CLEAN = "clean"
_MAX_STEPS, _MAX_NAME = 8, 100


def shown(triggers: Sequence[Trigger]) -> tuple[str, ...]:
    """The keys of a step: `clean`, and `trigger NAME` for each trigger."""
    return (CLEAN, *(f"trigger {trigger.name}" for trigger in triggers))


@dataclass(frozen=True)
class Step:
    """One form of the student.

    Attributes:
        name: `student`, `onnx-fp32`, `fp16`, `int8`, or an engine's.
        labels: top-1 classes of all N images, under each key of `shown`.
    """

    name: str
    labels: Mapping[str, Labels]

    @classmethod
    def of(cls, name: str, predictions: Predictions) -> Step:
        """The step of what `rkd.metrics.evaluate` found."""
        triggered = {f"trigger {trigger}": labels for trigger, labels in predictions.triggered.items()}
        return cls(name, {CLEAN: predictions.clean, **triggered})


@dataclass(frozen=True)
class Flip:
    """One image whose label changed between two steps.

    Attributes:
        image: its row in `eval.npz`.
        shown: `clean` or `trigger NAME`.
        before, after: the two labels.
        truth: its true class.
    """

    image: int
    shown: str
    before: int
    after: int
    truth: int


@dataclass(frozen=True)
class Ledger:
    """All steps of one export over one set of images.

    Attributes:
        truth: true classes, (N,).
        steps: in their order, at least one; each has the same keys.
    """

    truth: Labels
    steps: tuple[Step, ...]

    @property
    def decisions(self) -> int:
        """Labels of one step: images, clean and under each trigger."""
        return sum(len(labels) for labels in self.steps[0].labels.values())

    def scores(self, step: Step, triggers: Sequence[Trigger]) -> Scores:
        """ACC, ASR and RA of one step."""
        triggered = {trigger.name: step.labels[f"trigger {trigger.name}"] for trigger in triggers}
        return score(Predictions(self.truth, step.labels[CLEAN], triggered), triggers)

    def flips(self, before: Step, after: Step) -> list[Flip]:
        """The images whose label changed, by key and row."""
        found = []
        for key, old in before.labels.items():
            new = after.labels[key]
            rows = np.flatnonzero(old != new)
            found += [Flip(int(i), key, int(old[i]), int(new[i]), int(self.truth[i])) for i in rows]
        return found

    def agreement(self, before: Step, after: Step) -> dict[str, Proportion]:
        """Images with the same label at both steps, by key."""
        return {key: Proportion(int((old == after.labels[key]).sum()), len(old)) for key, old in before.labels.items()}

    def judge(self, triggers: Sequence[Trigger], acc_budget: float, asr_budget: float) -> list[str]:
        """What is wrong: steps that lose more ACC, or gain more ASR, than allowed.

        Each step is compared with the one before it, and the last one with the first. One image is always allowed.

        Args:
            triggers: those of the ledger.
            acc_budget: points of ACC that may be lost.
            asr_budget: points of ASR that may be gained, under each trigger.
        """
        compared = pairs(self)
        if len(self.steps) > 2:
            compared.append((self.steps[0], self.steps[-1]))
        found: list[str] = []
        for before, after in compared:
            old, new = self.scores(before, triggers), self.scores(after, triggers)
            what = f"{before.name} -> {after.name}"
            if old.acc.hits - new.acc.hits > allowed(acc_budget, new.acc.n):
                found.append(
                    f"{what}: ACC falls from {old.acc.value:.2f} to {new.acc.value:.2f} % (n = {new.acc.n}), "
                    f"at most {_points(acc_budget, new.acc.n)} allowed"
                )
            for was, now in zip(old.triggers, new.triggers, strict=True):
                if now.asr.hits - was.asr.hits > allowed(asr_budget, now.asr.n):
                    found.append(
                        f"{what}: ASR of trigger {now.trigger} rises from {was.asr.value:.2f} to {now.asr.value:.2f} % "
                        f"(n = {now.asr.n}), at most {_points(asr_budget, now.asr.n)} allowed"
                    )
        return found

    def to_json(self, triggers: Sequence[Trigger]) -> list[dict[str, Any]]:
        """One object a step: its scores, and agreement and flips against the step before."""
        rows: list[dict[str, Any]] = []
        for number, step in enumerate(self.steps):
            row: dict[str, Any] = {"step": step.name, "scores": self.scores(step, triggers).to_json()}
            if number:
                same = self.agreement(self.steps[number - 1], step)
                row["agreement"] = {key: round(share.value, 4) for key, share in same.items()}
                row["flips"] = {key: share.n - share.hits for key, share in same.items()}
            rows.append(row)
        return rows

    def to_bytes(self) -> bytes:
        """An `.npz`; equal ledgers give equal bytes."""
        keys = list(self.steps[0].labels)
        labels = np.stack([np.stack([step.labels[key] for key in keys]) for step in self.steps])
        arrays: dict[str, NDArray[Any]] = {
            "steps": np.asarray([step.name for step in self.steps]),
            "shown": np.asarray(keys),
            "truth": self.truth.astype(np.int32),
            "labels": labels.astype(np.int32),  # (steps, keys, N)
        }
        return npz_bytes(arrays)

    @classmethod
    def from_bytes(cls, data: bytes, origin: str) -> Ledger:
        """Read what `to_bytes` wrote; `origin` names it in errors.

        Raises:
            BundleError: it is not a ledger.
        """
        try:
            arrays = read_npz(io.BytesIO(data), len(data), members=4)
            names, keys, truth, labels = (arrays[key] for key in ("steps", "shown", "truth", "labels"))
        except (ValueError, KeyError) as error:
            raise BundleError(f"{origin} is not a ledger: {error}; export the run again") from error
        shapes = (names.ndim, keys.ndim, truth.ndim) == (1, 1, 1) and labels.shape == (
            len(names),
            len(keys),
            len(truth),
        )
        kinds = names.dtype.kind == keys.dtype.kind == "U" and labels.dtype.kind == truth.dtype.kind == "i"
        if (
            not shapes
            or not kinds
            or not 1 <= len(names) <= _MAX_STEPS
            or CLEAN not in keys
            or len(set(keys)) < len(keys)
        ):
            raise BundleError(f"{origin} is not a ledger: its arrays do not fit together; export the run again")
        if max(len(str(name)) for name in (*names, *keys)) > _MAX_NAME:
            raise BundleError(f"{origin} is not a ledger: a name is too long; export the run again")
        steps = tuple(
            Step(str(name), {str(key): row.astype(np.int64) for key, row in zip(keys, rows, strict=True)})
            for name, rows in zip(names, labels, strict=True)
        )
        return cls(truth.astype(np.int64), steps)


def pairs(ledger: Ledger) -> list[tuple[Step, Step]]:
    """Each step with the one before it."""
    return list(zip(ledger.steps, ledger.steps[1:], strict=False))


def _points(budget: float, n: int) -> str:
    return f"{budget:g} points are" if allowed(budget, n) > 1 else "one image is"
