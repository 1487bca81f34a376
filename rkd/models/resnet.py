"""CIFAR ResNets (He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class _Block(nn.Module):
    """conv-BN-ReLU-conv-BN, addition, ReLU."""

    def __init__(self, width_in: int, width_out: int, stride: int, *, projection: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width_out)
        self.downsample = (
            None
            if not projection or (stride == 1 and width_in == width_out)
            else nn.Sequential(nn.Conv2d(width_in, width_out, 1, stride, bias=False), nn.BatchNorm2d(width_out))
        )
        self.stride, self.empty = stride, width_out - width_in

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        if self.downsample is not None:
            x = self.downsample(x)
        elif self.empty:
            half = self.empty // 2
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.empty - half))
        return functional.relu(x + out)


class CifarResNet(nn.Module):
    """ResNet with three stages of (depth - 2) / 6 blocks, 16, 32 and 64 channels wide.

    Args:
        depth: 6 n + 2.
        classes: number of outputs.
        projection: whether shortcuts that change the width are convolutions (the paper's option B); otherwise they
            skip pixels and are filled up with empty channels on both sides (option A, without parameters).
    """

    def __init__(self, depth: int, classes: int, *, projection: bool = True) -> None:
        super().__init__()
        self.projection = projection
        n = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(n, 16, 16, 1)
        self.layer2 = self._stage(n, 16, 32, 2)
        self.layer3 = self._stage(n, 32, 64, 2)
        self.fc = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _stage(self, n: int, width_in: int, width_out: int, stride: int) -> nn.Sequential:
        first = _Block(width_in, width_out, stride, projection=self.projection)
        others = (_Block(width_out, width_out, 1, projection=self.projection) for _ in range(n - 1))
        return nn.Sequential(first, *others)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W), normalised, to logits (N, classes)."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(torch.flatten(functional.adaptive_avg_pool2d(x, 1), 1))
        return logits
