"""Gaussian noise on what the student sees: the simple alternative to hardening, for comparison."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rkd.distill.objectives import StudentObjective


class InputNoise(nn.Module):
    """Adds fresh Gaussian noise to every image.

    Args:
        deviation: of the noise, on pixels in [0, 1].
        std: deviations that the images were normalised by.
    """

    def __init__(self, deviation: float, std: tuple[float, float, float]) -> None:
        super().__init__()
        self.register_buffer("scale", deviation / torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (N, 3, H, W) to the same with noise."""
        return torch.addcmul(images, torch.randn_like(images), self.get_buffer("scale"))


class Noisy:
    """An objective whose student sees its images with noise.

    Args:
        objective: of the student.
        noise: what the images pass.
    """

    def __init__(self, objective: StudentObjective, noise: InputNoise) -> None:
        self.objective, self.noise = objective, noise
        self.extra = objective.extra

    def __call__(self, images: Tensor, labels: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `StudentObjective`."""
        return self.objective(images, labels, self.noise(images if seen is None else seen))
