"""Which network do these tensors belong to?"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from rkd.models import build, torchvision_names

Shapes = Mapping[str, tuple[int, ...]]

_FAMILIES = {  # a tensor that only this family has -> torchvision names that start so
    "layer4.0.conv1.weight": ("resnet", "resnext", "wide_resnet"),
    "stage2.0.branch2.0.weight": ("shufflenet",),
    "features.denseblock1.denselayer1.conv1.weight": ("densenet",),
    "features.0.0.weight": ("mobilenet", "efficientnet", "convnext"),
    "layers.0.weight": ("mnasnet",),
    "stem.0.weight": ("regnet",),
    "features.3.squeeze.weight": ("squeezenet",),
    "features.0.weight": ("vgg", "alexnet", "squeezenet"),
    "inception3a.branch1.conv.weight": ("googlenet",),
    "Mixed_5b.branch1x1.conv.weight": ("inception",),
}


def output_count(shapes: Shapes) -> int | None:
    """Number of classes: the rows of the last matrix, or of the last 1x1 convolution where there is no matrix."""
    matrices = [shape for name, shape in shapes.items() if name.endswith("weight") and len(shape) == 2]
    if matrices:
        return matrices[-1][0]
    convolutions = [shape for shape in shapes.values() if len(shape) == 4]
    return convolutions[-1][0] if convolutions else None


def infer_arch(shapes: Shapes, size: tuple[int, int]) -> tuple[str, ...]:
    """Names that `build` turns into a network with exactly these tensors, the likeliest first; none where unknown.

    Several names fit where a network differs only in what tensors do not show (strides of the stem).

    Args:
        shapes: tensor names and shapes, without BN's counters.
        size: height and width of the images, which decides whether a stem is adapted.
    """
    classes = output_count(shapes)
    if classes is None:
        return ()
    return tuple(name for name in _guesses(shapes) if _fits(name, shapes, classes, size))


def _guesses(shapes: Shapes) -> list[str]:
    if "block1.layer.0.conv1.weight" in shapes:
        n = _count(shapes, r"block1\.layer\.(\d+)\.conv1\.weight")
        return [f"wrn-{6 * n + 4}-{shapes['block1.layer.0.conv1.weight'][0] // 16}"]
    if "layer3.0.conv1.weight" in shapes and "layer4.0.conv1.weight" not in shapes:
        n = _count(shapes, r"layer1\.(\d+)\.conv1\.weight")
        return [f"resnet{6 * n + 2}"]
    for tensor, prefixes in _FAMILIES.items():
        if tensor in shapes:
            names = [name for name in torchvision_names() if name.startswith(prefixes)]
            return [guess for name in names for guess in (f"torchvision:{name}", name)]
    return []


def _count(shapes: Shapes, pattern: str) -> int:
    return sum(re.fullmatch(pattern, name) is not None for name in shapes)


def _fits(name: str, shapes: Shapes, classes: int, size: tuple[int, int]) -> bool:
    try:
        with torch.device("meta"):
            network = build(name, classes, size)
    except Exception:  # noqa: BLE001  (a guess that cannot be built is a wrong guess, whatever it raises)
        return False
    wanted = {key: tuple(t.shape) for key, t in network.state_dict().items() if not key.endswith("num_batches_tracked")}
    return wanted == dict(shapes)
