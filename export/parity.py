"""Does the exported file decide as the student does?

Agreement: the images on which the exported file's top-1 class is the student's, clean and under each trigger.

Tie: FP32 libraries add in different orders, so where the student itself does not separate the file's class from its own,
by more than 1e-4 of the image's scale, the file is taken to have said what the student said; here and in what the ledger
judges (`HostRun.settled`), not in the labels that travel.

Difference: the largest, over all images, of max |exported - student| / scale.

Scale of an image: its largest |logit| of the student, but no less than the median of that over all images: the rounding
of an image on which the student is nearly silent is that of what was added up, not of the sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from rkd.errors import ExportError, first_line
from rkd.export.onnx_model import INPUT, OUTPUT
from rkd.ledger import Step, shown
from rkd.metrics import Images, Labels, Predict, Proportion, Scores, allowed, evaluate
from rkd.target import Precision
from rkd.triggers import Trigger

Logits = NDArray[np.float32]  # (N, classes)
REQUIRED_AGREEMENT: Mapping[str, float] = {"fp32": 100.0, "fp16": 99.8}
FP32_DIFFERENCE = 1e-4  # the most that an FP32 file may differ, relative
_TIE = 1e-4


@dataclass(frozen=True)
class HostRun:
    """What one network did with the evaluation images.

    Attributes:
        scores: ACC, ASR and RA.
        logits: of all N images, by the keys of `rkd.ledger.shown`.
    """

    scores: Scores
    logits: Mapping[str, Logits]

    def step(self, name: str) -> Step:
        """Its labels, as a step of the ledger."""
        return Step(name, {key: _top1(logits) for key, logits in self.logits.items()})

    def settled(self, name: str, student: HostRun) -> Step:
        """Its labels, as a step to be judged: where the student is tied between them and its own, its own."""
        labels = {}
        for key, reference in student.logits.items():
            rows, top, got = np.arange(len(reference)), _top1(reference), _top1(self.logits[key])
            tied = reference[rows, top] - reference[rows, got] <= _TIE * _scale(reference)
            labels[key] = np.where(tied, top, got)
        return Step(name, labels)


@dataclass(frozen=True)
class Parity:
    """How far an exported file is from its student.

    Attributes:
        agreement: images, per key of `HostRun.logits`.
        max_difference: relative, over all images, clean and triggered.
    """

    agreement: Mapping[str, Proportion]
    max_difference: float

    def to_json(self) -> dict[str, Any]:
        """`{percent: {clean, trigger NAME...}, max_difference}`; two digits of the difference are reproducible."""
        percent = {key: round(share.value, 4) for key, share in self.agreement.items()}
        return {"percent": percent, "max_difference": float(f"{self.max_difference:.1e}")}


def session_of(model: bytes, *, optimise: bool = True, integer: bool = True) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session on the CPU, with torch's number of threads.

    Args:
        model: the ONNX file.
        optimise: let ONNX Runtime rewrite the graph.
        integer: compute Q/DQ patterns with integer kernels. A file for another runtime is computed without them: as the
            ONNX specification says, and not with the 16-bit overflow of some x86 kernels.

    Raises:
        ExportError: ONNX Runtime refuses the file.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if not integer:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(
            f"ONNX Runtime cannot load the exported file ({first_line(error)}); try another opset or student"
        ) from error


def predictor_of(model: bytes, *, integer: bool = True) -> Predict:
    """A function from uint8 images (N, 3, H, W) to float32 logits (N, classes), by ONNX Runtime on the CPU.

    A file whose batch is fixed is given one image at a time.
    """
    session = session_of(model, integer=integer)
    fixed = session.get_inputs()[0].shape[0] == 1

    def predict(images: Images) -> Logits:
        parts = np.split(images, len(images)) if fixed else [images]
        logits = [session.run([OUTPUT], {INPUT: np.ascontiguousarray(part)})[0] for part in parts]
        return np.concatenate(logits).astype(np.float32, copy=False)

    return predict


def host_run(predict: Predict, evaluation: tuple[Images, Labels], triggers: Sequence[Trigger], batch: int) -> HostRun:
    """Score a network on this machine.

    Args:
        predict: maps uint8 images (N, 3, H, W) to logits (N, classes).
        evaluation: images and labels.
        triggers: with names that differ.
        batch: images at once.

    Raises:
        DataError: there are no images.
    """
    recorded: list[Logits] = []

    def recording(images: Images) -> Logits:
        recorded.append(np.asarray(predict(images), dtype=np.float32))
        return recorded[-1]

    images, labels = evaluation
    batches = ((images[i : i + batch], labels[i : i + batch]) for i in range(0, len(images), batch))
    scores, _ = evaluate(recording, batches, triggers)
    keys = shown(triggers)  # evaluate() predicts in this order
    return HostRun(scores, {key: np.concatenate(recorded[i :: len(keys)]) for i, key in enumerate(keys)})


def compare(student: HostRun, exported: HostRun) -> Parity:
    """Agreement and difference, as this module's docstring defines them.

    Raises:
        ExportError: the exported file gives logits that are not finite.
    """
    labels = exported.settled("exported", student).labels
    agreement, differences = {}, []
    for key, reference in student.logits.items():
        got = exported.logits[key]
        if not np.isfinite(got).all():
            broken = int((~np.isfinite(got)).any(axis=1).sum())
            raise ExportError(
                f"the exported file gives NaN or infinity on {broken} of {len(got)} images ({key}); "
                "take a target with precision fp32, or distil again"
            )
        same = labels[key] == _top1(reference)
        agreement[key] = Proportion(int(same.sum()), len(same))
        differences.append(float((np.abs(got - reference).max(axis=1) / _scale(reference)).max()))
    return Parity(agreement, max(differences))


def problems(parity: Parity, precision: Precision) -> list[str]:
    """What is wrong with a file: it decides differently more often, or computes otherwise, than its precision explains.

    INT8 files have no line here: the ledger's budgets of ACC and ASR judge them.
    """
    found = []
    advice = "this is a fault of the exporter, try another opset" if precision == "fp32" else "take precision fp32"
    wanted = REQUIRED_AGREEMENT.get(precision)
    key, least = min(parity.agreement.items(), key=lambda item: item[1].value)
    if wanted is not None and least.n - least.hits > _may_differ(wanted, least.n):
        found.append(
            f"the {precision} file agrees with the student on {least.value:.2f} % of {least.n} images ({key}), at least "
            f"{wanted:g} % are required; largest relative logit difference {parity.max_difference:.1e}; {advice}"
        )
    if precision == "fp32" and parity.max_difference > FP32_DIFFERENCE:
        found.append(
            f"the fp32 file's logits differ from the student's by {parity.max_difference:.2e} (relative), at most "
            f"{FP32_DIFFERENCE:.0e} are allowed; {advice}"
        )
    return found


def _may_differ(wanted: float, n: int) -> float:
    return 0.0 if wanted == 100 else allowed(100 - wanted, n)


def _top1(logits: Logits) -> Labels:
    return np.asarray(logits.argmax(axis=1), np.int64)


def _scale(logits: Logits) -> Logits:
    """What differences of each image are relative to, (N,)."""
    largest = np.abs(logits).max(axis=1)
    scale: Logits = np.maximum(largest, np.median(largest)).clip(np.finfo(np.float32).tiny)
    return scale
