"""What a student is trained for. All objectives run under one loop; see `rkd.distill.loop`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from rkd.errors import ArchitectureError
from rkd.taps import Tap, TappedNetwork, pair_taps


class Objective(Protocol):
    """A training objective; its own trainable parts, if any, are an `nn.Module`."""

    extra: nn.Module

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images (N, 3, H, W) and labels (N,) to the loss and the logits (N, classes)."""
        ...


class StudentObjective(Objective, Protocol):
    """An objective whose network may see other images than its teacher: perturbed ones."""

    def __call__(self, images: Tensor, labels: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `Objective`; `seen` (N, 3, H, W) is what the network sees in place of `images`. All is a mean over images."""
        ...


class CrossEntropy:
    """Cross-entropy of a network on labels: no teacher.

    Args:
        network: the network in training.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.extra: nn.Module = nn.ModuleDict()

    def __call__(self, images: Tensor, labels: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `StudentObjective`."""
        logits = self.network(images if seen is None else seen).float()
        return functional.cross_entropy(logits, labels), logits


class LogitDistillation:
    """Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015.

    (1 - weight) * CE + weight * T^2 * KL(softmax(teacher / T) || softmax(student / T))

    Args:
        student: the network in training.
        teacher: frozen, in eval mode; a tapped one may be detoxified.
        temperature: T.
        weight: of the teacher's answers.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, temperature: float = 4.0, weight: float = 0.9) -> None:
        self.student, self.teacher = student, teacher
        self.temperature, self.weight = temperature, weight
        self.extra: nn.Module = nn.ModuleDict()

    def __call__(self, images: Tensor, labels: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `StudentObjective`."""
        with torch.no_grad():
            said = self.teacher(images)
            wanted = (said[0] if isinstance(self.teacher, TappedNetwork) else said).float()
        logits = self.student(images if seen is None else seen).float()
        t = self.temperature
        divergence = functional.kl_div(
            functional.log_softmax(logits / t, 1),
            functional.log_softmax(wanted / t, 1),
            reduction="batchmean",
            log_target=True,
        )
        return (1 - self.weight) * functional.cross_entropy(logits, labels) + self.weight * t * t * divergence, logits


class FeatureDistillation:
    """Overhaul of feature distillation (Heo et al., ICCV 2019), in the form that RobustKD uses.

        L = CE + sum over taps l of  2^-(L - 1 - l) * d(connector_l(student_l), max(teacher_l, margin_l)) / (1000 * N)

    where d is the squared error, without the places where the teacher is negative and the student lower still. The
    student's features pass a 1x1 convolution and BN; margins are the expectation of the teacher's negative responses.

    Args:
        student: the network in training.
        teacher: tapped, frozen, in eval mode, detoxified or not.
        size: height and width of the images.
        margins: per teacher tap, (C,), negative; see `margins`.

    Raises:
        ArchitectureError: there is no feature map to distil.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: TappedNetwork,
        size: tuple[int, int],
        margins: Sequence[Tensor],
    ) -> None:
        self.student, self.teacher = TappedNetwork(student, size), teacher
        self.pairs = pair_taps(teacher.taps, self.student.taps)
        if not self.pairs:
            raise ArchitectureError(
                "no feature map was found to distil in the teacher or the student; use --method kd, which needs none"
            )
        connectors = []
        for t, s in self.pairs:
            width = teacher.taps[t].channels
            convolution = nn.Conv2d(self.student.taps[s].channels, width, 1, bias=False)
            nn.init.normal_(convolution.weight, 0, math.sqrt(2 / width))
            connectors.append(nn.Sequential(convolution, nn.BatchNorm2d(width)))
        self.connectors = nn.ModuleList(connectors)
        self.extra: nn.Module = nn.ModuleDict({"connectors": self.connectors})
        self.margins = [margins[t].view(1, -1, 1, 1) for t, _ in self.pairs]

    def __call__(self, images: Tensor, labels: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `StudentObjective`."""
        with torch.no_grad():
            _, wanted = self.teacher(images)
        logits, features = self.student(images if seen is None else seen)
        logits = logits.float()
        loss = functional.cross_entropy(logits, labels)
        for level, ((t, s), connector) in enumerate(zip(self.pairs, self.connectors, strict=True)):
            feature = connector(features[s])
            if feature.shape[2:] != wanted[t].shape[2:]:
                feature = functional.interpolate(feature, wanted[t].shape[2:], mode="bilinear", antialias=False)
            distance = _PartialL2.apply(feature, wanted[t], self.margins[level])
            loss = loss + distance / (2 ** (len(self.pairs) - 1 - level) * 1000 * len(images))
        return loss, logits


_FAR = 3e38


class _PartialL2(torch.autograd.Function):
    """sum of (s - max(t, margin))^2 where that target is positive or s is above it.

    Written out because autograd would keep, and pass over, five feature maps where one is enough. A selection by mask
    is several times slower than the arithmetic here: `floor` is the target where it is negative and far below
    everything where it is positive, so that max(s, floor) - target is what the formula asks for.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
        target = torch.maximum(teacher, margin.to(teacher.dtype))
        floor = torch.sub(target, target.relu(), alpha=_FAR)
        difference = torch.maximum(student, floor).sub_(target)
        ctx.save_for_backward(difference)
        norm: Tensor = torch.linalg.vector_norm(difference, dtype=torch.float32)
        return norm.square()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        (difference,) = ctx.saved_tensors
        return difference * (2 * gradients[0]).to(difference.dtype), None, None


def margins(teacher: TappedNetwork, network: nn.Module, batches: Sequence[Tensor]) -> list[Tensor]:
    """Expected negative response of each channel at each tap, (C,), at most 0.

    At a BN's output, the mean of the negative part of a normal with the BN's shift and scale (Heo et al., eq. 4);
    elsewhere, its mean over clean images.

    Args:
        teacher: tapped.
        network: the same network untapped, where the BNs are looked up.
        batches: clean, normalised images (N, 3, H, W).
    """
    measured: list[Tensor] | None = None
    found = []
    for index, tap in enumerate(teacher.taps):
        bn = _affine_bn(network, tap)
        if bn is not None:
            found.append(_normal_margin(bn.bias.detach(), bn.weight.detach().abs()))
        else:
            measured = measured or _measured_margins(teacher, batches)
            found.append(measured[index])
    return found


def margins_need_images(teacher: TappedNetwork, network: nn.Module) -> bool:
    """Whether `margins` will look at images: where a tap is no affine BN's output."""
    return any(_affine_bn(network, tap) is None for tap in teacher.taps)


def _affine_bn(network: nn.Module, tap: Tap) -> nn.BatchNorm2d | None:
    bn = network.get_submodule(tap.bn) if tap.bn else None
    return bn if isinstance(bn, nn.BatchNorm2d) and bn.affine else None


def _normal_margin(mean: Tensor, deviation: Tensor) -> Tensor:
    """E[x | x < 0] of N(mean, deviation); -3 deviations where x < 0 hardly ever happens."""
    z = -mean.double() / deviation.double().clamp_min(1e-12)
    below = torch.special.ndtr(z)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    margin = mean.double() - deviation.double() * density / below.clamp_min(1e-12)
    return torch.where(below > 1e-3, margin, -3 * deviation.double()).clamp_max(0).float()


def _measured_margins(teacher: TappedNetwork, batches: Sequence[Tensor]) -> list[Tensor]:
    totals: list[Tensor] = []
    counts: list[Tensor] = []
    with torch.no_grad():
        for images in batches:
            _, features = teacher(images)
            for i, feature in enumerate(features):
                value = feature.float()
                if len(totals) <= i:
                    totals.append(torch.zeros(value.shape[1], device=value.device))
                    counts.append(torch.zeros_like(totals[i]))
                totals[i] += value.clamp_max(0).sum((0, 2, 3))
                counts[i] += (value < 0).sum((0, 2, 3))
    return [total / count.clamp_min(1) for total, count in zip(totals, counts, strict=True)]


def tap_report(teacher: Sequence[Tap], student: Sequence[Tap]) -> list[str]:
    """One line a pair, for people."""
    return [
        f"features: the student's {student[s]} learns the teacher's {teacher[t]}"
        for t, s in pair_taps(teacher, student)
    ]
