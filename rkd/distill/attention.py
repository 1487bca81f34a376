"""Attention transfer: where a network looks, not what it sees there.

Zagoruyko and Komodakis, "Paying More Attention to Attention", ICLR 2017. Also what neural attention distillation
purifies a teacher with.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from rkd.errors import ArchitectureError
from rkd.taps import Tap, TappedNetwork, pair_taps

_WEIGHT = 1000.0  # beta of the paper's experiments, for the mean over images and positions


class AttentionTransfer:
    """Cross-entropy, and the distance of the student's attention maps from the teacher's.

        L = CE + sum over taps l of  weight_l * mean((Q(student_l) - Q(teacher_l))^2)

    where Q is the attention map of a feature map: the sum of squares over channels, at unit length (equation 2).

    Args:
        student: the network in training.
        teacher: tapped, frozen, in eval mode, detoxified or not.
        size: height and width of the images.
        weights: one a pair of taps; 1000 each by default.

    Raises:
        ArchitectureError: there is no feature map to look at.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: TappedNetwork,
        size: tuple[int, int],
        weights: Sequence[float] = (),
    ) -> None:
        self.student, self.teacher = TappedNetwork(student, size), teacher
        self.pairs = pair_taps(teacher.taps, self.student.taps)
        if not self.pairs:
            raise ArchitectureError(
                "no feature map was found to distil in the teacher or the student; use --method kd, which needs none"
            )
        self.weights = tuple(weights) or (_WEIGHT,) * len(self.pairs)
        self.extra: nn.Module = nn.ModuleDict()

    def __call__(self, images: Tensor, labels: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `rkd.distill.objectives.StudentObjective`."""
        with torch.no_grad():
            _, wanted = self.teacher(images)
        logits, features = self.student(images if seen is None else seen)
        logits = logits.float()
        loss = functional.cross_entropy(logits, labels)
        for (t, s), weight in zip(self.pairs, self.weights, strict=True):
            theirs = attention(wanted[t], self.teacher.taps[t])
            mine = attention(features[s], self.student.taps[s], theirs.shape[1:])
            loss = loss + weight * (mine - theirs).square().mean()
        return loss, logits


def attention(feature: Tensor, tap: Tap, size: Sequence[int] = ()) -> Tensor:
    """Attention maps, float32 (N, H, W), each of unit length.

    Args:
        feature: (N, C, H, W), as tapped.
        tap: where; where an activation follows, the map is that of the activated feature, as in the paper.
        size: height and width that the maps are resized to.
    """
    value = feature.float()
    energy = (value.relu() if tap.pre_activation else value).square().mean(1, keepdim=True)
    if size and tuple(size) != tuple(energy.shape[2:]):
        energy = functional.interpolate(energy, tuple(size), mode="bilinear", antialias=False)
    return functional.normalize(energy.flatten(1)).view(len(energy), *energy.shape[2:])
