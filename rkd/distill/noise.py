"""Gaussian noise on what the student sees: the simple alternative to hardening, for comparison."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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
