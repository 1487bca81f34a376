"""Names that other people's implementations give to the tensors of networks that rkd knows.

resnet-cifar ports    `linear` for `fc`, `shortcut.0` and `.1` for `downsample.0` and `.1` (ResNet-20 to 110, and
                      ResNet-18, 34, 50 for 32 pixels)
pytorch-cifar100      `conv1.0`, `conv2_x.0.residual_function.3` for `conv1`, `layer1.0.conv2`
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")

_RESIDUAL = {"0": "conv1", "1": "bn1", "3": "conv2", "4": "bn2", "6": "conv3", "7": "bn3"}
_STEM = {"0": "conv1", "1": "bn1"}


def known_names(tensors: Mapping[str, T]) -> dict[str, T]:
    """The same values under the names that rkd's networks have; as they are where nothing is known of them.

    Two tensors never get one name: then all stay as they are.
    """
    sequential = any(re.match(r"conv2_x\.0\.residual_function\.", name) for name in tensors)
    renamed = {_known(name, sequential=sequential): value for name, value in tensors.items()}
    return renamed if len(renamed) == len(tensors) else dict(tensors)


def _known(name: str, *, sequential: bool) -> str:
    if sequential:
        if match := re.fullmatch(r"conv1\.([01])\.(\w+)", name):
            return f"{_STEM[match[1]]}.{match[2]}"
        if match := re.fullmatch(r"conv([2-5])_x\.(\d+)\.(.+)", name):
            rest = re.sub(r"^residual_function\.([013467])\.", lambda m: f"{_RESIDUAL[m[1]]}.", match[3])
            name = f"layer{int(match[1]) - 1}.{match[2]}.{rest}"
    name = re.sub(r"^linear\.", "fc.", name)
    return re.sub(r"^(layer\d+\.\d+)\.shortcut\.", r"\1.downsample.", name)
