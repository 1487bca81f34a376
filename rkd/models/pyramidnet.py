"""Pyramidal residual networks (Han, Kim and Kim, "Deep Pyramidal Residual Networks", CVPR 2017), for small images.

Parameter names are those of the authors' PyTorch port (`layer1.0.bn1`, `bn_final`, `fc`), so that its checkpoints load
as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from rkd.errors import ArchitectureError

BOTTLENECK_FROM = 164  # layers: the paper's networks of that depth and deeper have bottlenecks
_EXPANSION = 4  # of a bottleneck's last convolution


class _Block(nn.Module):
    """BN-conv-BN-ReLU-conv-BN (3x3), or with a bottleneck (1x1, 3x3, 1x1); no ReLU after the addition.

    The shortcut is averaged where the resolution falls and filled up with empty channels.
    """

    def __init__(self, width_in: int, width: int, stride: int, *, bottleneck: bool) -> None:
        super().__init__()
        out = width * _EXPANSION if bottleneck else width
        self.bn1 = nn.BatchNorm2d(width_in)
        if bottleneck:
            self.conv1 = nn.Conv2d(width_in, width, 1, bias=False)
            self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        else:
            self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
            self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2, self.bn3 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False) if bottleneck else None
        self.bn4 = nn.BatchNorm2d(out) if bottleneck else None
        self.stride, self.empty = stride, out - width_in

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn3(self.conv2(functional.relu(self.bn2(self.conv1(self.bn1(x))))))
        if self.conv3 is not None and self.bn4 is not None:
            out = self.bn4(self.conv3(functional.relu(out)))
        shortcut = functional.avg_pool2d(x, 2, ceil_mode=True) if self.stride == 2 else x
        return out + functional.pad(shortcut, (0, 0, 0, 0, 0, self.empty))


class PyramidNet(nn.Module):
    """PyramidNet with three stages; each block is alpha / (3 n) channels wider than the one before it.

    Args:
        depth: 6 n + 2 without bottlenecks, 9 n + 2 with them.
        alpha: by how many channels the network widens from 16.
        classes: number of outputs.
        bottleneck: whether its blocks are bottlenecks.

    Raises:
        ArchitectureError: the depth is no such number.
    """

    def __init__(self, depth: int, alpha: int, classes: int, *, bottleneck: bool) -> None:
        super().__init__()
        layers = 9 if bottleneck else 6
        if depth < layers + 2 or (depth - 2) % layers or alpha < 1:
            kind = "with bottlenecks" if bottleneck else "without bottlenecks"
            raise ArchitectureError(
                f"pyramidnet-{depth}-{alpha} {kind} does not exist: the depth must be {layers + 2}, {2 * layers + 2}, "
                f"{3 * layers + 2}, ..."
            )
        n, expansion = (depth - 2) // layers, _EXPANSION if bottleneck else 1
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        width_in, wide, stages = 16, 16.0, list[nn.Sequential]()
        for stage in range(3):
            blocks = []
            for block in range(n):
                wide += alpha / (3 * n)
                stride = 2 if stage and not block else 1
                blocks.append(_Block(width_in, round(wide), stride, bottleneck=bottleneck))
                width_in = round(wide) * expansion
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3 = stages
        self.bn_final, self.fc = nn.BatchNorm2d(width_in), nn.Linear(width_in, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W), normalised, to logits (N, classes)."""
        x = self.layer3(self.layer2(self.layer1(self.bn1(self.conv1(x)))))
        x = functional.relu(self.bn_final(x))
        logits: Tensor = self.fc(torch.flatten(functional.adaptive_avg_pool2d(x, 1), 1))
        return logits
