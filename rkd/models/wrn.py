"""Wide residual networks (Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016).

Parameter names are those of the widely copied PyTorch port (`block1.layer.0.bn1`, `convShortcut`, `bn1`, `fc`), so that
its checkpoints load as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from rkd.errors import ArchitectureError


class _Block(nn.Module):
    """BN-ReLU-conv twice, with a 1x1 shortcut where the width changes."""

    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, 1, 1, bias=False)
        self.convShortcut = None if width_in == width_out else nn.Conv2d(width_in, width_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = functional.relu(self.bn1(x))
        out = self.conv2(functional.relu(self.bn2(self.conv1(activated))))
        shortcut: Tensor = x if self.convShortcut is None else self.convShortcut(activated)
        total: Tensor = shortcut + out
        return total


class _Stage(nn.Module):
    def __init__(self, depth: int, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(
            *(_Block(width_in if i == 0 else width_out, width_out, stride if i == 0 else 1) for i in range(depth))
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


class WideResNet(nn.Module):
    """WRN-depth-width with three stages.

    Args:
        depth: 6 n + 4.
        width: the widening factor.
        classes: number of outputs.

    Raises:
        ArchitectureError: `depth` is not 6 n + 4.
    """

    def __init__(self, depth: int, width: int, classes: int) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6 or width < 1:
            raise ArchitectureError(f"wrn-{depth}-{width} does not exist: the depth must be 10, 16, 22, 28, ...")
        n, widths = (depth - 4) // 6, (16, 16 * width, 32 * width, 64 * width)
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.block1 = _Stage(n, widths[0], widths[1], 1)
        self.block2 = _Stage(n, widths[1], widths[2], 2)
        self.block3 = _Stage(n, widths[2], widths[3], 2)
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.fc = nn.Linear(widths[3], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W), normalised, to logits (N, classes)."""
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        x = functional.relu(self.bn1(x))
        logits: Tensor = self.fc(torch.flatten(functional.adaptive_avg_pool2d(x, 1), 1))
        return logits
