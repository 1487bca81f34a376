"""Teachers and students by name.

wrn-D-K                      wide ResNet for small images (Zagoruyko and Komodakis, BMVC 2016), BN-ReLU order
resnet20, 32, 44, 56, 110    CIFAR ResNets (He et al., CVPR 2016), ReLU after the addition; resnet20-a, ... with
                             shortcuts without parameters (the paper's option A)
pyramidnet-D-A               PyramidNet for small images (Han et al., CVPR 2017); bottlenecks from 164 layers on, or as
                             pyramidnet-D-A-bottleneck and pyramidnet-D-A-basic say
mobilenet, mobilenet-v2,     torchvision's networks; below 73 pixels their stems are adapted so that the last
shufflenet-v2, resnet18, ... feature map is not a single pixel (any torchvision classification name works)
torchvision:NAME             torchvision's network as it is, at any input size
timm:NAME                    a timm network, where timm is installed
path/file.py:factory         your own code, which is then run
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from rkd.errors import ArchitectureError
from rkd.models.pyramidnet import BOTTLENECK_FROM, PyramidNet
from rkd.models.resnet import CifarResNet
from rkd.models.stem import adapt_stem, early_strides
from rkd.models.wrn import WideResNet
from rkd.students import STUDENTS, Student

ALIASES = {
    "mobilenet": "mobilenet_v3_small",
    "mobilenet_v3": "mobilenet_v3_small",
    "shufflenet_v2": "shufflenet_v2_x1_0",
    "vgg11": "vgg11_bn",
    "vgg13": "vgg13_bn",
    "vgg16": "vgg16_bn",
    "vgg19": "vgg19_bn",
}


def build(name: str, classes: int, size: tuple[int, int]) -> nn.Module:
    """Make a network with fresh weights, in train mode; the caller seeds torch.

    Args:
        name: as in the module's docstring.
        classes: number of outputs.
        size: height and width of its images in pixels.

    Raises:
        ArchitectureError: no network has that name, or it cannot be made.
    """
    kind, _, rest = name.partition(":")
    if kind.endswith(".py"):
        return _from_file(Path(kind), rest, classes)
    if kind == "timm":
        return _from_timm(rest, classes)
    if kind == "torchvision":
        return _from_torchvision(rest, classes)
    if match := re.fullmatch(r"wrn-(\d{1,4})-(\d{1,3})", name):
        return WideResNet(int(match[1]), int(match[2]), classes)
    if match := re.fullmatch(r"resnet-?(20|32|44|56|110)(-a)?", name):
        return CifarResNet(int(match[1]), classes, projection=match[2] is None)
    if match := re.fullmatch(r"pyramidnet-(\d{1,4})-(\d{1,4})(-basic|-bottleneck)?", name):
        depth, kind = int(match[1]), match[3] or ("-bottleneck" if int(match[1]) >= BOTTLENECK_FROM else "-basic")
        return PyramidNet(depth, int(match[2]), classes, bottleneck=kind == "-bottleneck")
    key = ALIASES.get(name.replace("-", "_"), name.replace("-", "_"))
    network = _with_quick_statistics(_from_torchvision(key, classes))
    return adapt_stem(network, _early_strides(key, size))


@functools.cache
def _early_strides(name: str, size: tuple[int, int]) -> tuple[str, ...]:
    """Found once a process: it takes a second."""
    with torch.random.fork_rng(devices=[]):
        return early_strides(lambda: _from_torchvision(name, 10), size)


def torchvision_names() -> list[str]:
    """The names of torchvision's classification networks."""
    from torchvision import models

    return list(models.list_models(module=models))


def _with_quick_statistics(network: nn.Module) -> nn.Module:
    """Let BN's running statistics follow at PyTorch's usual rate at least.

    MobileNet v3's 0.01 is meant for hundreds of thousands of steps: after 312 of them a student had 66 % of its training
    images right with each batch's own statistics and 16 % of the test images with the running ones.
    """
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and module.momentum is not None:
            module.momentum = max(module.momentum, 0.1)
    return network


def _from_torchvision(name: str, classes: int) -> nn.Module:
    from torchvision import models

    names = torchvision_names()
    if name not in names:
        known = [student.name for student in STUDENTS] + names
        close = difflib.get_close_matches(name.replace("_", "-"), known, 1) or difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ArchitectureError(f"no network is called {name!r}{hint} (`rkd students` lists the usual ones)")
    options: dict[str, Any] = (
        {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    )
    return cast("nn.Module", models.get_model(name, weights=None, num_classes=classes, **options))


def _from_timm(name: str, classes: int) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise ArchitectureError(f"timm:{name} needs timm; install it with: pip install timm") from None
    try:
        return cast("nn.Module", timm.create_model(name, pretrained=False, num_classes=classes))
    except Exception as error:
        raise ArchitectureError(f"timm cannot make {name!r}: {error}") from error


def _from_file(path: Path, factory_name: str, classes: int) -> nn.Module:
    """Run the user's own factory; it may take `num_classes`."""
    if not path.is_file():
        raise ArchitectureError(f"no such file: {path} (expected path/file.py:factory)")
    specification = importlib.util.spec_from_file_location(f"rkd_user_{path.stem}", path)
    if specification is None or specification.loader is None:
        raise ArchitectureError(f"{path} cannot be imported; expected path/file.py:factory")
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    try:
        specification.loader.exec_module(module)
        factory = cast("Callable[..., object]", getattr(module, factory_name))
        takes_classes = "num_classes" in inspect.signature(factory).parameters
        network = factory(num_classes=classes) if takes_classes else factory()
    except Exception as error:
        raise ArchitectureError(f"{path}:{factory_name} failed: {type(error).__name__}: {error}") from error
    if not isinstance(network, nn.Module):
        raise ArchitectureError(f"{path}:{factory_name} returned {type(network).__name__}, expected a torch.nn.Module")
    return network


__all__ = ["ALIASES", "STUDENTS", "Student", "build", "torchvision_names"]
