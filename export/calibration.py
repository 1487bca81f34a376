"""Which values the activations take: images from the training side, and the ranges that follow from them.

The images are drawn from the training split, and none of them is in the evaluation set: compared by the SHA-256 of their
pixels, because a calibration on the images that judge it would prove nothing. One half gives the ranges, the other half
decides between calibrators and layers (`rkd.export.mixed`). No trigger is ever used here: triggers judge the result.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from rkd.data import Source
from rkd.errors import DataError, ExportError
from rkd.export.evaluation import stratified
from rkd.export.onnx_model import INPUT, serialise
from rkd.export.parity import session_of
from rkd.export.quantise import Range, activation_scale
from rkd.metrics import Images, Labels
from rkd.target import Quantisation

LEAST_IMAGES = 32  # for ranges and decision together
_BATCH = 16
_SAMPLES = 2048  # values of a tensor that are kept of each image
_CLIPS = np.linspace(0.3, 1.0, 29)  # shares of the whole range that `mse` tries
_MSE_SAMPLES = 1 << 15


@dataclass(frozen=True)
class Calibration:
    """Training images, none of which is in the evaluation set.

    Attributes:
        ranges: uint8 (N, 3, H, W), for the ranges of activations.
        deciding: uint8 (M, 3, H, W), to choose by.
        labels: true classes of `deciding`, (M,).
    """

    ranges: Images
    deciding: Images
    labels: Labels


@dataclass(frozen=True)
class Observed:
    """What was seen of one activation: its extremes, and a sample of its values."""

    low: float
    high: float
    sample: NDArray[np.float32]


def choose_calibration(
    train: Source,
    evaluation: Images,
    wanted: int,
    seed: int,
    advice: str = "give a data set with more training images",
) -> Calibration:
    """Draw twice `wanted` images, or as many as there are.

    Args:
        train: the training split.
        evaluation: the images that must not be among them.
        wanted: for the ranges; as many again decide.
        seed: decides which.
        advice: what to do where they are too few.

    Raises:
        DataError: fewer than `LEAST_IMAGES` are left.
    """
    forbidden = {_content(image) for image in evaluation}
    draw = min(len(train), 2 * wanted + 64)
    images, labels = _fresh(train, draw, forbidden, seed)
    if len(labels) < 2 * wanted and draw < len(train):
        images, labels = _fresh(train, len(train), forbidden, seed)
    if len(labels) < LEAST_IMAGES:
        raise DataError(
            f"INT8 is calibrated on training images that are not in the test set: {len(labels)} of {len(train)} are "
            f"left, at least {LEAST_IMAGES} are needed; {advice}, or take precision fp16 or fp32"
        )
    order = np.random.default_rng([seed, 0xCA11]).permutation(len(labels))[: 2 * wanted]
    first, second = np.sort(order[: len(order) // 2]), np.sort(order[len(order) // 2 :])
    return Calibration(images[first], images[second], labels[second])


def observe(model: bytes, tensors: Sequence[str], images: Images, seed: int = 0) -> dict[str, Observed]:
    """Run the FP32 model and look at some of its activations.

    Args:
        model: what `to_onnx` returned.
        tensors: names of float activations.
        images: uint8 (N, 3, H, W).
        seed: decides which values of large activations are kept.

    Raises:
        ExportError: ONNX Runtime refuses the file, or an activation is not finite.
    """
    shown = onnx.load_model_from_string(model)
    known = {value.name for value in shown.graph.output}
    shown.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in tensors if name not in known
    )
    session = session_of(serialise(shown))
    fixed = session.get_inputs()[0].shape[0] == 1
    rng = np.random.default_rng([seed, 0x0B5E])
    picks: dict[str, NDArray[np.int64]] = {}
    low, high = dict.fromkeys(tensors, 0.0), dict.fromkeys(tensors, 0.0)
    kept: dict[str, list[NDArray[np.float32]]] = {name: [] for name in tensors}
    for part in np.array_split(images, len(images) if fixed else -(-len(images) // _BATCH)):
        for name, values in zip(tensors, session.run(list(tensors), {INPUT: part}), strict=True):
            rows = values.reshape(len(part), -1)
            if not np.isfinite(rows).all():
                raise ExportError(f"activation {name} is NaN or infinite on a training image; distil again")
            if name not in picks:
                size = rows.shape[1]
                picks[name] = np.sort(rng.choice(size, _SAMPLES, replace=False)) if size > _SAMPLES else np.arange(size)
            low[name], high[name] = min(low[name], float(rows.min())), max(high[name], float(rows.max()))
            kept[name].append(rows[:, picks[name]].ravel())
    return {name: Observed(low[name], high[name], np.concatenate(kept[name])) for name in tensors}


def ranges_of(observed: Mapping[str, Observed], calibrator: str, recipe: Quantisation) -> dict[str, Range]:
    """The range of each activation by one calibrator.

    Args:
        observed: what `observe` returned.
        calibrator: `minmax`; `percentile-P`, which leaves (100 - P) % of the values outside, half of them at each end
            (all of them by magnitude where the recipe is symmetric); `mse`, the range with the least squared error.
        recipe: decides how values are rounded.
    """
    return {name: _range(seen, calibrator, recipe) for name, seen in observed.items()}


def _range(seen: Observed, calibrator: str, recipe: Quantisation) -> Range:
    if calibrator == "minmax":
        return seen.low, seen.high
    if calibrator == "mse":
        return _least_error(seen, recipe)
    outside = 1 - float(calibrator.partition("-")[2]) / 100
    if recipe.activations == "int8":
        limit = float(np.quantile(np.abs(seen.sample), 1 - outside))
        return -limit, limit
    low, high = np.quantile(seen.sample, [outside / 2, 1 - outside / 2])
    return float(low), float(high)


def _least_error(seen: Observed, recipe: Quantisation) -> Range:
    values = seen.sample[:: max(1, len(seen.sample) // _MSE_SAMPLES)].astype(np.float64)
    best: tuple[float, Range] = (np.inf, (seen.low, seen.high))
    least, most = (-128, 127) if recipe.activations == "int8" else (0, 255)
    for clip in _CLIPS[::-1]:
        span = (seen.low * clip, seen.high * clip)
        scale, zero = activation_scale(span, recipe)
        rounded = (np.clip(np.rint(values / float(scale)) + zero, least, most) - zero) * float(scale)
        error = float(((rounded - values) ** 2).mean())
        if error < best[0]:
            best = (error, span)
    return best[1]


def _fresh(train: Source, count: int, forbidden: set[bytes], seed: int) -> tuple[Images, Labels]:
    """`count` images with the split's shares of classes, without those that are forbidden."""
    rows = np.arange(len(train)) if count >= len(train) else stratified(train.labels, count, seed)
    height, width = train.size
    images: list[Images] = [np.empty((0, 3, height, width), np.uint8)]
    labels: list[Labels] = [np.empty(0, np.int64)]
    for pixels, truth in train.batches(256, rows):
        good = np.array([_content(image) not in forbidden for image in pixels], dtype=bool)
        images.append(pixels[good])
        labels.append(truth[good])
    return np.concatenate(images), np.concatenate(labels)


def _content(image: NDArray[np.uint8]) -> bytes:
    return hashlib.sha256(image.tobytes()).digest()
