"""RobustKD's depoisoning mask.

Chen et al., "Robust Knowledge Distillation Based on Feature Variance Against Backdoored Teacher Model",
arXiv 2406.03409. At each tap the teacher's feature map A is replaced by

    A' = (1 - m) * A + m * P          m in [0, cap] and P of shape (C, H, W)

and A' feeds the later stages as well as the distillation loss. m and P are learned on clean data so that the teacher
keeps its accuracy while its features vary as little as possible from image to image:

    L = L_ce(A') + lambda * L_f        L_f = mean over taps of Var_x(A') / Var_x(A)

What a feature map can lose without costing clean accuracy is where a backdoor lives. The paper does not give lambda.
Here it is not a setting: dual ascent raises it as long as the teacher stays within the accuracy budget on held-out
clean images, and lowers it otherwise, so that the mask takes all that the budget allows.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from rkd.data import Source
from rkd.errors import RunError
from rkd.network import Normalisation
from rkd.npz import npz_bytes, read_npz
from rkd.taps import Edit, TappedNetwork

_MASKS_LIMIT_BYTES = 2**31


@dataclass(frozen=True)
class DetoxRecipe:
    """How the mask is learned.

    Attributes:
        accuracy_budget: points of clean accuracy that the detoxified teacher may lose.
        cap: c, the upper end of the mask.
        steps: optimisation steps.
        batch: images a step.
        lr: Adam's learning rate, for the mask's logit and for P in units of the feature's deviation.
        check_every: steps between two looks at the held-out images.
        shape: `position` for m and P at each place of each channel, `channel` for one m and one P a channel.
        variance: whether the features' variance is part of the loss; without it, cross-entropy alone moves the mask.
        start: of the replacement: `mean` of the clean features, `zero`, or `random` (drawn as the features vary).
    """

    accuracy_budget: float = 1.0
    cap: float = 0.9
    steps: int = 200
    batch: int = 128
    lr: float = 0.05
    check_every: int = 20
    shape: str = "position"
    variance: bool = True
    start: str = "mean"


@dataclass(frozen=True)
class TapMask:
    """m and P of one tap, float32 (C, H, W)."""

    tap: str
    mask: NDArray[np.float32]
    replacement: NDArray[np.float32]

    def edit(self, device: torch.device, dtype: torch.dtype) -> Edit:
        """The function to set at the tap: (N, C, H, W) to the same."""
        mask = torch.from_numpy(self.mask).to(device)
        keep = (1 - mask)[None].to(dtype).contiguous(memory_format=torch.channels_last)
        shift = (mask * torch.from_numpy(self.replacement).to(device))[None].to(dtype)
        shift = shift.contiguous(memory_format=torch.channels_last)

        def apply(x: Tensor) -> Tensor:
            detoxified: Tensor = torch.addcmul(shift.to(x.dtype), x, keep.to(x.dtype))
            return detoxified

        return apply


@dataclass(frozen=True)
class DetoxCheck:
    """One look at the held-out images: step, lambda, accuracy in percent, points lost, and L_f, the variance left."""

    step: int
    weight: float
    accuracy: float
    lost: float
    variance: float


@dataclass(frozen=True)
class Detoxification:
    """What `detoxify` found.

    Attributes:
        masks: one a tap.
        teacher_accuracy: percent on the held-out clean images, before.
        accuracy: the same with the masks.
        variance: L_f with the masks on the held-out images; 1 means untouched.
            Accuracy and variance belong to the best of several looks at them: they flatter a little.
        weight: lambda at that point.
        n: held-out images.
        history: every look on the way.
    """

    masks: tuple[TapMask, ...]
    teacher_accuracy: float
    accuracy: float
    variance: float
    weight: float
    n: int
    history: tuple[DetoxCheck, ...]

    def to_bytes(self) -> bytes:
        """The masks as an `.npz`."""
        arrays: dict[str, NDArray[np.float32]] = {}
        for index, mask in enumerate(self.masks):
            arrays[f"{index}.{mask.tap}.mask"] = mask.mask
            arrays[f"{index}.{mask.tap}.replacement"] = mask.replacement
        return npz_bytes(arrays)


def masks_from_bytes(data: bytes, origin: str, cap: float = 1.0) -> tuple[TapMask, ...]:
    """Inverse of `Detoxification.to_bytes`.

    Args:
        data: the file.
        origin: names it in errors.
        cap: what no mask is above.

    Raises:
        RunError: the file is damaged, or holds what no mask can be.
    """
    try:
        arrays = read_npz(io.BytesIO(data), _MASKS_LIMIT_BYTES, members=256)
        names = sorted({name.rpartition(".")[0] for name in arrays}, key=lambda name: int(name.split(".")[0]))
        for name, array in arrays.items():
            if array.dtype != np.float32 or not np.isfinite(array).all():
                raise ValueError(f"{name} is not of finite float32")
            if name.endswith(".mask") and not ((array >= 0) & (array <= np.float32(cap))).all():
                raise ValueError(f"{name} is not from 0 to {cap:g}")
        return tuple(
            TapMask(name.partition(".")[2], arrays[f"{name}.mask"], arrays[f"{name}.replacement"]) for name in names
        )
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{origin} does not hold masks: {error}") from error


class _Masks(nn.Module):
    """The learned m and P of all taps."""

    def __init__(self, mean: Sequence[Tensor], deviation: Sequence[Tensor], recipe: DetoxRecipe, seed: int = 0) -> None:
        super().__init__()
        shapes = [tuple(m.shape) for m in mean]
        if recipe.shape == "channel":  # P too: a shift of a whole channel is nothing that a student has to learn
            mean = [m.mean((1, 2), keepdim=True) for m in mean]
            deviation = [d.square().mean((1, 2), keepdim=True).sqrt() for d in deviation]
        self.cap, self.shapes = recipe.cap, list(shapes)
        self.start, self.deviation = _starts(mean, deviation, recipe.start, seed), list(deviation)
        self.logit = nn.ParameterList(torch.full_like(m, -2.0) for m in mean)
        self.offset = nn.ParameterList(torch.zeros_like(m) for m in mean)

    def mask(self, index: int) -> Tensor:
        mask: Tensor = self.cap * torch.sigmoid(self.logit[index])
        return mask

    def replacement(self, index: int) -> Tensor:
        replacement: Tensor = self.start[index] + self.deviation[index] * self.offset[index]
        return replacement

    def edit(self, index: int) -> Edit:
        def apply(x: Tensor) -> Tensor:
            mask = self.mask(index)
            shift = (mask * self.replacement(index)).to(x.dtype)
            edited: Tensor = torch.addcmul(shift, x, (1 - mask).to(x.dtype))
            return edited

        return apply

    def export(self, names: Sequence[str]) -> tuple[TapMask, ...]:
        with torch.no_grad():
            return tuple(
                TapMask(
                    name,
                    self.mask(i).expand(self.shapes[i]).cpu().numpy().copy(),
                    self.replacement(i).expand(self.shapes[i]).cpu().numpy().copy(),
                )
                for i, name in enumerate(names)
            )


def detoxify(
    teacher: TappedNetwork,
    normalisation: Normalisation,
    clean: Source,
    held_out: Source,
    recipe: DetoxRecipe,
    *,
    seed: int,
    device: torch.device,
    autocast: Callable[[], torch.autocast],
    on_check: Callable[[DetoxCheck], None] = lambda _check: None,
) -> Detoxification:
    """Learn the masks of all taps.

    Args:
        teacher: tapped, in eval mode (its BN statistics are not touched); its weights are not changed.
        normalisation: the teacher's input scaling.
        clean: clean training images that the mask is learned on.
        held_out: clean training images that the budget is checked on; never the test set.
        recipe: see `DetoxRecipe`.
        seed: of the order of the images.
        device: where to compute.
        autocast: makes the context of mixed precision.
        on_check: is told every look at the held-out images.
    """
    teacher.eval().requires_grad_(requires_grad=False)
    order = np.random.default_rng([seed, 0xDE70])

    def batch(indices: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        images, labels = clean.batch(indices)
        inputs = torch.from_numpy(images).to(device).contiguous(memory_format=torch.channels_last)
        return normalisation(inputs), torch.from_numpy(labels).to(device)

    def look() -> tuple[float, list[float]]:
        """Accuracy in percent, and the variance of each tap, on the held-out images."""
        hits = n = 0

        def batches() -> Iterator[Tensor]:
            for images, _ in held_out.batches(recipe.batch):
                yield normalisation(torch.from_numpy(images).to(device).contiguous(memory_format=torch.channels_last))

        def count(logits: Tensor) -> None:
            nonlocal hits, n
            hits += int((logits.argmax(1).cpu() == truth[n : n + len(logits)]).sum())
            n += len(logits)

        _, variance = _feature_statistics(teacher, batches(), autocast, count)
        return 100 * hits / n, [float(v.sum()) for v in variance]

    truth = torch.from_numpy(np.concatenate([labels for _, labels in held_out.batches(recipe.batch)]))
    teacher.set_edits([None] * len(teacher.taps))
    before, untouched = look()
    draws = order.choice(len(clean), size=min(len(clean), 16 * recipe.batch), replace=False)
    parts = (batch(part)[0] for part in np.array_split(draws, 16) if len(part))
    mean, variance = _feature_statistics(teacher, parts, autocast)
    masks = _Masks(mean, [v.sqrt() for v in variance], recipe, seed).to(device)
    reference = [max(float(v.sum()), 1e-12) for v in variance]  # a tap that never varies has nothing to lose
    optimizer = torch.optim.Adam(masks.parameters(), lr=recipe.lr)
    names = [tap.name for tap in teacher.taps]

    weight, history = 0.3 if recipe.variance else 0.0, list[DetoxCheck]()
    best: tuple[float, tuple[TapMask, ...], DetoxCheck] | None = None
    teacher.set_edits([masks.edit(i) for i in range(len(names))])
    for step in range(1, recipe.steps + 1):
        images, labels = batch(order.integers(0, len(clean), recipe.batch))
        with autocast():
            logits, features = teacher(images)
            ratio = torch.stack([_variance(f) / r for f, r in zip(features, reference, strict=True)]).mean()
            loss = functional.cross_entropy(logits.float(), labels) + weight * ratio
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
        if step % recipe.check_every == 0 or step == recipe.steps:
            now, varying = look()
            left = float(np.mean([v / max(u, 1e-12) for v, u in zip(varying, untouched, strict=True)]))
            check = DetoxCheck(step, weight, now, before - now, left)
            history.append(check)
            on_check(check)
            if check.lost <= recipe.accuracy_budget and (
                best is None or check.variance < best[0] or not recipe.variance  # without it: the latest
            ):
                best = check.variance, masks.export(names), check
            weight = _ascend(weight, check.lost, recipe.accuracy_budget) if recipe.variance else 0.0
    teacher.set_edits([None] * len(names))
    if best is None:  # nothing within the budget: an identity mask is the honest answer
        identity = tuple(
            TapMask(name, np.zeros(m.shape, np.float32), m.cpu().numpy()) for name, m in zip(names, mean, strict=True)
        )
        return Detoxification(identity, before, before, 1.0, 0.0, len(held_out), tuple(history))
    _, found, check = best
    return Detoxification(found, before, check.accuracy, check.variance, check.weight, len(held_out), tuple(history))


def _starts(mean: Sequence[Tensor], deviation: Sequence[Tensor], start: str, seed: int) -> list[Tensor]:
    """Where the replacement of each tap starts, (C, H, W)."""
    if start == "zero":
        return [torch.zeros_like(m) for m in mean]
    if start == "random":
        generator = torch.Generator().manual_seed(seed)
        return [
            m + d * torch.randn(m.shape, generator=generator).to(m.device) for m, d in zip(mean, deviation, strict=True)
        ]
    return list(mean)


def _variance(feature: Tensor) -> Tensor:
    """Variance over the images of a batch, summed over positions: (N, C, H, W) to a number."""
    centred = feature.float() - feature.float().mean(0)
    return centred.square().sum() / (len(feature) - 1)


def _ascend(weight: float, lost: float, budget: float) -> float:
    """One step of dual ascent on log(lambda): up while points are left, down (faster) when they are spent."""
    slack = (budget - lost) / max(budget, 0.5)
    return min(max(weight * math.exp(0.25 * min(max(slack, -3.0), 1.0)), 1e-3), 1e3)


def _feature_statistics(
    teacher: TappedNetwork,
    batches: Iterable[Tensor],
    autocast: Callable[[], torch.autocast],
    on_logits: Callable[[Tensor], None] = lambda _logits: None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Mean and variance over images at each position of each tap, float32 (C, H, W)."""
    sums: list[Tensor] = []
    squares: list[Tensor] = []
    count = 0
    with torch.no_grad(), autocast():
        for images in batches:
            logits, features = teacher(images)
            on_logits(logits)
            count += len(images)
            for i, feature in enumerate(features):
                value = feature.double() if feature.device.type == "cpu" else feature.float()
                if len(sums) <= i:
                    sums.append(torch.zeros_like(value[0]))
                    squares.append(torch.zeros_like(value[0]))
                sums[i] += value.sum(0)
                squares[i] += value.square().sum(0)
    mean = [total / count for total in sums]
    variance = [(square / count - m.square()).clamp_min(0) for square, m in zip(squares, mean, strict=True)]
    return [m.float() for m in mean], [v.float() for v in variance]


def set_masks(teacher: TappedNetwork, masks: Sequence[TapMask], device: torch.device, dtype: torch.dtype) -> None:
    """Detoxify `teacher` with masks that were learned before.

    Raises:
        RunError: the masks are another network's.
    """
    by_name: Mapping[str, TapMask] = {mask.tap: mask for mask in masks}
    given = {name: (mask.mask.shape, mask.replacement.shape) for name, mask in by_name.items()}
    if given != {tap.name: (tap.shape, tap.shape) for tap in teacher.taps}:
        taps = ", ".join(f"{mask.tap} {mask.mask.shape}" for mask in masks)
        raise RunError(f"the masks are for taps {taps}; the teacher has {', '.join(map(str, teacher.taps))}")
    teacher.set_edits([by_name[tap.name].edit(device, dtype) for tap in teacher.taps])
