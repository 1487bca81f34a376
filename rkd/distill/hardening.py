"""Hardening: a student that does not follow what moves many images at once.

A backdoor that survives distillation is a universal perturbation: one change that leads any image to the target class,
because the teacher's features respond to it. So before the student is trained, the perturbations are looked for that do
the teacher the most harm on clean images, within a ball; in a teacher with such a backdoor they find it, without knowing
the trigger or the target class (they are what trigger inversion would call a candidate). While the student is trained,
some of its images carry one of them, while the labels and the teacher's features stay those of the clean images
(universal adversarial training, Shafahi et al., AAAI 2020; with the teacher's perturbations and feature distillation).

Perturbations can also be looked for on the student while it is trained, as that paper does; docs/results.md compares.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from rkd.data import Source
from rkd.network import Network

COUNT = 4  # perturbations
_SHARE = 0.3  # of a batch's images that carry one
_STEP = 0.1  # of the radius
SEARCH_STEPS, _BATCH = 30, 128  # of the search on the teacher


@dataclass(frozen=True)
class Fooling:
    """Perturbations that fool a network.

    Attributes:
        perturbations: (K, 3, H, W), on pixels in [0, 1].
        fooled: share of the images of the last steps that are seen wrongly under one of them.
        towards: the class that these are seen as most often.
        together: share of the wrongly seen ones that are seen as it.
    """

    perturbations: Tensor
    fooled: float
    towards: int
    together: float


def random_perturbations(count: int, size: tuple[int, int], linf: float, seed: int) -> Tensor:
    """(count, 3, H, W), uniform within half the radius `linf`, on pixels in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, *size, generator=generator).mul_(2).sub_(1).mul_(linf / 2)


def fooling_perturbations(
    teacher: Network,
    clean: Source,
    first: Tensor,
    linf: float,
    *,
    seed: int,
    device: torch.device,
    on_step: Callable[[int], None],
) -> Fooling:
    """Look for the universal perturbations that do a network the most harm on clean images.

    Args:
        teacher: the network, in eval mode.
        clean: training images with labels.
        first: (K, 3, H, W), where the search starts, on pixels in [0, 1].
        linf: radius of the ball, on pixels in [0, 1].
        seed: which images are looked at.
        device: where to compute.
        on_step: called with the steps done, of SEARCH_STEPS.
    """
    module, std = teacher.module, torch.tensor(teacher.normalisation.std, device=device).view(1, 3, 1, 1)
    found = first.to(device)
    rng = np.random.default_rng([seed, 0xF001])
    wrong: list[Tensor] = []
    for step in range(SEARCH_STEPS):
        rows = np.sort(rng.permutation(len(clean))[:_BATCH])
        images, labels = clean.batch(rows)
        inputs = teacher.normalisation(torch.from_numpy(images).to(device)).contiguous(
            memory_format=torch.channels_last
        )
        truth = torch.from_numpy(labels).to(device)
        moving = (found / std).requires_grad_()
        which = torch.arange(len(inputs), device=device) % len(found)
        logits = module(inputs + moving[which]).float()
        (gradient,) = torch.autograd.grad(functional.cross_entropy(logits, truth), moving)
        found = (found + gradient.nan_to_num().sign() * linf * _STEP).clamp(-linf, linf)
        said = logits.detach().argmax(1)
        wrong.append(torch.where(said == truth, -1, said))
        on_step(step + 1)
    last = torch.cat(wrong[-SEARCH_STEPS // 3 :]).cpu()
    mistakes = last[last >= 0]
    counts = torch.bincount(mistakes, minlength=len(teacher.classes))
    return Fooling(
        found.cpu(), len(mistakes) / len(last), int(counts.argmax()), float(counts.max()) / max(1, len(mistakes))
    )


class UniversalPerturbations(nn.Module):
    """What a student's images pass while it is hardened.

    Args:
        first: (K, 3, H, W), the perturbations at the start, on pixels in [0, 1].
        linf: radius of the ball, on pixels in [0, 1].
        std: deviations that the images were normalised by.
        fixed: how many of them, from the first on, stay as they are. The others climb the student's loss, with the
            gradient that the training step has computed anyway.
        share: of the images that carry one.
        start: steps before the first image does: docs/results.md says what a late start is worth.
    """

    def __init__(
        self,
        first: Tensor,
        linf: float,
        std: tuple[float, float, float],
        *,
        fixed: int = 0,
        share: float = _SHARE,
        start: int = 0,
    ) -> None:
        super().__init__()
        self.fixed, self.share, self.start = fixed, share, start
        self.step = 0
        deviations = torch.tensor(std).view(1, 3, 1, 1)
        self.register_buffer("radius", linf / deviations, persistent=False)
        self.perturbations = nn.Parameter(first / deviations, requires_grad=fixed < len(first))
        if fixed < len(first):
            self.perturbations.register_post_accumulate_grad_hook(self._ascend)  # type: ignore[no-untyped-call]

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (N, 3, H, W) to the same, once it is time the first `share` of the batch perturbed."""
        self.step += 1
        if self.step <= self.start:
            return images
        carriers = int(self.share * len(images))
        which = torch.arange(carriers, device=images.device) % len(self.perturbations)
        return torch.cat([images[:carriers] + self.perturbations[which], images[carriers:]]).contiguous(
            memory_format=torch.channels_last
        )

    def get_extra_state(self) -> Tensor:
        """The steps so far: a resumed run goes on counting. No buffer, which each step would fetch from the device."""
        return torch.tensor(self.step)

    def set_extra_state(self, state: Tensor) -> None:
        """Inverse of `get_extra_state`."""
        self.step = int(state)

    def _ascend(self, perturbations: Tensor) -> None:
        """One step of signed-gradient ascent on the student's loss, inside the ball, as part of the backward pass."""
        gradient = perturbations.grad
        assert gradient is not None  # noqa: S101  (the hook runs when it is there)
        radius = self.get_buffer("radius")
        with torch.no_grad():
            moving = perturbations[self.fixed :]
            moving.add_(gradient[self.fixed :].nan_to_num().sign() * radius * _STEP)
            moving.copy_(moving.minimum(radius).maximum(-radius))
        perturbations.grad = None
