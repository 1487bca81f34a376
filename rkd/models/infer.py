"""Which network do these tensors belong to?"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache

import torch

from rkd.models import build, torchvision_names
from rkd.models.keys import known_names
from rkd.models.pyramidnet import BOTTLENECK_FROM

Shapes = Mapping[str, tuple[int, ...]]

_FAMILIES = {  # a tensor that only this family has -> torchvision names that start so
    "layer4.0.conv1.weight": ("resnet", "resnext", "wide_resnet"),
    "stage2.0.branch2.0.weight": ("shufflenet",),
    "features.denseblock1.denselayer1.conv1.weight": ("densenet",),
    "features.1.conv.0.0.weight": ("mobilenet_v2",),
    "features.1.block.0.0.weight": ("mobilenet_v3",),
    "features.1.0.block.0.0.weight": ("efficientnet",),
    "features.1.0.layer_scale": ("convnext",),
    "layers.0.weight": ("mnasnet",),
    "stem.0.weight": ("regnet",),
    "features.3.squeeze.weight": ("squeezenet",),
    "features.0.weight": ("vgg", "alexnet", "squeezenet"),
    "inception3a.branch1.conv.weight": ("googlenet",),
    "Mixed_5b.branch1x1.conv.weight": ("inception",),
}
_MAX_BLOCKS = 33  # a stage; making a network of thousands takes a minute
_HEADS = ("fc", "classifier", "head", "heads", "linear")


def output_count(shapes: Shapes) -> int | None:
    """Number of classes: the rows of the head's last matrix, or of its last convolution where there is no matrix."""
    for dimensions in (2, 4):
        found = {name: s for name, s in shapes.items() if name.endswith("weight") and len(s) == dimensions}
        heads = [
            name for name in found if name.partition(".")[0] in _HEADS
        ]  # safetensors sorts names: they may come first
        if found:
            return found[(heads or list(found))[-1]][0]
    return None


def infer_arch(shapes: Shapes, size: tuple[int, int]) -> tuple[str, ...]:
    """Names that `build` turns into a network with exactly these tensors, the likeliest first; none where unknown.

    Several names fit where a network differs only in what tensors do not show (strides of the stem).

    Args:
        shapes: tensor names and shapes, without BN's counters; names of other people's ports are known too.
        size: height and width of the images, which decides whether a stem is adapted.
    """
    shapes = known_names(shapes)
    classes = output_count(shapes)
    if classes is None:
        return ()
    fitting: list[str] = []
    for guess in _guesses(shapes):
        plain = _shapes(guess, classes, size)
        if plain is None or set(plain) != set(shapes):
            continue  # before a stem is adapted, which takes a second
        adapted = guess.removeprefix("torchvision:")
        fitting += [guess] if plain == dict(shapes) else []
        fitting += [adapted] if adapted != guess and _shapes(adapted, classes, size) == dict(shapes) else []
    return tuple(fitting)


def _guesses(shapes: Shapes) -> list[str]:
    if len(first := shapes.get("block1.layer.0.conv1.weight", ())) == 4:
        n = _count(shapes, r"block1\.layer\.(\d+)\.conv1\.weight")
        return [f"wrn-{6 * n + 4}-{first[0] // 16}"] if n <= _MAX_BLOCKS else []
    if "layer3.0.conv1.weight" in shapes and "layer4.0.conv1.weight" not in shapes:
        n = _count(shapes, r"layer1\.(\d+)\.conv1\.weight")
        if len(final := shapes.get("bn_final.weight", ())) == 1:
            return [_pyramidnet(n, final[0], bottleneck="layer1.0.conv3.weight" in shapes)]
        return [f"resnet{6 * n + 2}", f"resnet{6 * n + 2}-a"]
    for tensor, prefixes in _FAMILIES.items():
        if tensor in shapes:
            return [f"torchvision:{name}" for name in torchvision_names() if name.startswith(prefixes)]
    return []


def _pyramidnet(n: int, final: int, *, bottleneck: bool) -> str:
    """Its name from the blocks of a stage and the last width, which is 16 + alpha, four times that with bottlenecks."""
    depth, alpha = (9 * n + 2, final // 4 - 16) if bottleneck else (6 * n + 2, final - 16)
    usual = bottleneck == (depth >= BOTTLENECK_FROM)
    return f"pyramidnet-{depth}-{alpha}{'' if usual else '-bottleneck' if bottleneck else '-basic'}"


def _count(shapes: Shapes, pattern: str) -> int:
    return sum(re.fullmatch(pattern, name) is not None for name in shapes)


@cache
def _shapes(name: str, classes: int, size: tuple[int, int]) -> Shapes | None:
    """Of the network of that name; None where there is none."""
    try:
        with torch.device("meta"):
            network = build(name, classes, size)
    except Exception:  # noqa: BLE001  (a guess that cannot be built is a wrong guess, whatever it raises)
        return None
    return {key: tuple(t.shape) for key, t in network.state_dict().items() if not key.endswith("num_batches_tracked")}
