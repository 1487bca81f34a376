"""Which calibrator, and which layers stay in the higher precision: found by measurement, on clean training images.

The deciding images are classified clean, and again blended in pairs: halfway between two images a network is as unsure
as it is under a trigger, so a file that agrees with the student there will agree under triggers that nobody has shown
to the exporter. (No trigger is used: a file that was tuned on the triggers that judge it would prove nothing.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rkd.export.calibration import Calibration, Observed, observe, ranges_of
from rkd.export.parity import Logits, predictor_of
from rkd.export.quantise import Graph, Range, labels_of
from rkd.metrics import Images, Labels, Predict
from rkd.target import Quantisation

_BATCH = 64
_RANKING_IMAGES = 48  # of the deciding images, for one layer's harm
_MOST_KEPT = 0.5  # of the layers; beyond that the file is not INT8
_GROWTH = 1.5  # from one number of kept layers to the next that is tried


@dataclass(frozen=True)
class Trial:
    """One quantised file on the deciding images.

    Attributes:
        accuracy: percent of the clean ones.
        agreement: percent of the clean and blended ones where its top-1 class is the FP32 file's.
        error: mean relative distance of its logits from the FP32 file's.
    """

    accuracy: float
    agreement: float
    error: float

    def to_json(self) -> dict[str, float]:
        """Rounded to what is reproducible."""
        return {
            "accuracy": round(self.accuracy, 3), "agreement": round(self.agreement, 3), "error": float(f"{self.error:.2e}")
        }  # fmt: skip


@dataclass(frozen=True)
class Quantised:
    """A quantised file and how it was chosen.

    Attributes:
        model: the ONNX file, its rest still in FP32.
        calibrator: the one that was chosen.
        trials: of all layers quantised, by calibrator.
        kept: labels of the layers that stay in the higher precision, the most harmful first.
        layers: how many layers there are.
        chosen: the trial of `model`.
        reference: the FP32 file's accuracy on the deciding images, in percent.
        images: that gave the ranges, and that decided.
        problems: what the recipe asks for and the file does not hold, a line each.
    """

    model: bytes
    calibrator: str
    trials: Mapping[str, Trial]
    kept: tuple[str, ...]
    layers: int
    chosen: Trial
    reference: float
    images: tuple[int, int]
    problems: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As it goes into the manifest."""
        return {
            "calibrator": self.calibrator,
            "calibrators": {name: trial.to_json() for name, trial in self.trials.items()},
            "layers": self.layers,
            "kept": list(self.kept),
            "chosen": self.chosen.to_json(),
            "reference_accuracy": round(self.reference, 3),
            "images": {"ranges": self.images[0], "deciding": self.images[1]},
        }


class _Jury:
    """The deciding images and what the FP32 file says of them."""

    def __init__(self, model: bytes, images: Images, labels: Labels, *, integer: bool) -> None:
        self._integer = integer
        other = np.roll(images, 1, axis=0).astype(np.uint16)
        self._images = np.concatenate([images, ((images.astype(np.uint16) + other) // 2).astype(np.uint8)])
        self._labels = labels
        self._reference = _logits(predictor_of(model), self._images)
        self._some = np.unique(np.linspace(0, len(self._images) - 1, _RANKING_IMAGES).astype(np.intp))
        self.accuracy = self._accuracy(self._reference)

    def __len__(self) -> int:
        return len(self._labels)

    def judge(self, model: bytes) -> Trial:
        """All images."""
        got = _logits(predictor_of(model, integer=self._integer), self._images)
        same = got.argmax(axis=1) == self._reference.argmax(axis=1)
        return Trial(self._accuracy(got), 100 * float(same.mean()), _distance(got, self._reference))

    def harm(self, model: bytes) -> float:
        """The relative distance of the logits, on a few images."""
        got = _logits(predictor_of(model, integer=self._integer), self._images[self._some])
        return _distance(got, self._reference[self._some])

    def _accuracy(self, logits: Logits) -> float:
        return 100 * float((logits[: len(self._labels)].argmax(axis=1) == self._labels).mean())


def choose(
    model: bytes,
    recipe: Quantisation,
    calibration: Calibration,
    *,
    acc_budget: float,
    integer: bool,
    tell: Callable[[str], None] = lambda _line: None,
) -> Quantised:
    """Quantise a file as well as its recipe allows.

    All layers are quantised with each calibrator, and the best one is taken (`best_trial`).
    Where that file loses more than half of the budget or agrees less than the recipe asks for, the layers are ranked by
    the harm that each does alone, and more and more of the worst ones are kept.

    Args:
        model: what `to_onnx` returned.
        recipe: the target's.
        calibration: training images.
        acc_budget: the target's, in points of ACC.
        integer: run the files with integer kernels, as the target will.
        tell: told what is tried.

    Returns:
        The first file that is good enough; where even half of the layers do not suffice, the best one with its `problems`.

    Raises:
        ExportError: nothing in the file can be quantised.
    """
    graph = Graph(model, recipe)
    observed = observe(model, graph.tensors(), calibration.ranges)
    jury = _Jury(model, calibration.deciding, calibration.labels, integer=integer)
    calibrator, trials, ranges = _calibrate(graph, observed, recipe, jury, tell)

    def good(trial: Trial) -> bool:
        return trial.accuracy >= jury.accuracy - acc_budget / 2 and trial.agreement >= recipe.min_agreement

    kept: tuple[str, ...] = ()
    found, file = trials[calibrator], graph.quantised(ranges)
    counts = _counts(len(graph.layers))
    if counts and not good(found):
        order = _by_harm(graph, ranges, jury, tell)
        best = (found, kept, file)
        for count in counts:
            kept = order[:count]
            file = graph.quantised(ranges, kept)
            found = jury.judge(file)
            tell(f"int8: {count} of {len(order)} layers kept: {found.agreement:.1f} % agree")
            if good(found):
                break
            best = max(best, (found, kept, file), key=lambda entry: (entry[0].agreement, -entry[0].error))
        else:
            found, kept, file = best
    ranked = [label for node in kept for label in labels_of(graph.layers, [node])]
    images = (len(calibration.ranges), len(calibration.deciding))
    what = f"even with {len(kept)} of {len(graph.layers)} layers in {recipe.rest}"
    problems = _problems(found, jury.accuracy, acc_budget, recipe, what)
    return Quantised(file, calibrator, trials, tuple(ranked), len(graph.layers), found, jury.accuracy, images, problems)


def _problems(trial: Trial, reference: float, acc_budget: float, recipe: Quantisation, what: str) -> tuple[str, ...]:
    found = []
    if trial.accuracy < reference - acc_budget:
        found.append(
            f"INT8 costs {reference - trial.accuracy:.1f} points of accuracy on training images ({trial.accuracy:.1f} %, "
            f"the student {reference:.1f} %) {what}, at most {acc_budget:g} are allowed; "
            f"take a target with precision {recipe.rest}"
        )
    if trial.agreement < recipe.min_agreement:
        found.append(
            f"INT8 agrees with the student on {trial.agreement:.2f} % of training images and blends of them {what}, "
            f"at least {recipe.min_agreement:g} % are required; take a target with precision {recipe.rest}"
        )
    return tuple(found)


def _calibrate(
    graph: Graph, observed: Mapping[str, Observed], recipe: Quantisation, jury: _Jury, tell: Callable[[str], None]
) -> tuple[str, dict[str, Trial], dict[str, Range]]:
    trials = {}
    spans = {name: ranges_of(observed, name, recipe) for name in recipe.calibrators}
    for name in recipe.calibrators:
        trials[name] = jury.judge(graph.quantised(spans[name]))
        tell(f"int8: {name}: {trials[name].accuracy:.1f} % right, {trials[name].agreement:.1f} % agree")
    best = best_trial(trials, len(jury))
    return best, trials, spans[best]


def best_trial(trials: Mapping[str, Trial], images: int) -> str:
    """The name of the best trial: the highest accuracy, then the highest agreement, then the least error.

    Accuracies within one standard error of the highest are equal: `images` cannot tell them apart.
    """
    top = max(trial.accuracy for trial in trials.values()) / 100
    noise = 100 * (top * (1 - top) / images) ** 0.5
    equal = {name: trial for name, trial in trials.items() if trial.accuracy >= 100 * top - noise}
    return max(equal, key=lambda name: (equal[name].agreement, -equal[name].error))


def _by_harm(graph: Graph, ranges: Mapping[str, Range], jury: _Jury, tell: Callable[[str], None]) -> tuple[str, ...]:
    """Nodes, the one first that does the most harm when it alone is quantised."""
    nodes = [layer.node for layer in graph.layers]
    harm = {}
    for done, node in enumerate(nodes, 1):
        harm[node] = jury.harm(graph.quantised(ranges, [other for other in nodes if other != node]))
        tell(f"int8: layer {done} of {len(nodes)} alone")
    return tuple(sorted(nodes, key=lambda node: -harm[node]))


def _counts(layers: int) -> list[int]:
    """1, 2, 3, 5, 8, ... up to the most that may be kept; none where that is the only layer."""
    most, counts, count = int(layers * _MOST_KEPT), list[int](), 1
    while count < most:
        counts.append(count)
        count = max(count + 1, int(count * _GROWTH))
    return [*counts, most] if most else []


def _logits(predict: Predict, images: Images) -> Logits:
    return np.concatenate([predict(images[i : i + _BATCH]) for i in range(0, len(images), _BATCH)])


def _distance(got: Logits, wanted: Logits) -> float:
    norm = np.linalg.norm(wanted, axis=1).clip(np.finfo(np.float32).tiny)
    return float((np.linalg.norm(got - wanted, axis=1) / norm).mean())
