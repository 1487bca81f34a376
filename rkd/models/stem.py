"""Adapt a network made for 224-pixel images to small ones.

Networks for 224 pixels divide the resolution by 32: a 32-pixel image would end as one pixel, having lost its detail in
the first two layers. The remedy in the literature is to take the stride out of the first layers (He et al., CVPR 2016,
do so for CIFAR). Here that is done by looking at the network: the first strided convolutions or poolings are set to
stride 1, one by one, as long as the network still runs and its last feature map grows.

VGG also loses the two hidden layers of its classifier, 120 of its 129 million parameters, as its ports to CIFAR do.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torchvision.models import VGG

_SMALL = {40: 2, 72: 1}  # images up to so many pixels lose so many stride-2 layers


def early_strides(make: Callable[[], nn.Module], size: tuple[int, int]) -> tuple[str, ...]:
    """Names of the layers whose stride is one too many for an image size.

    Args:
        make: gives a fresh network, to try it on.
        size: height and width of its images in pixels.
    """
    wanted = next((count for limit, count in _SMALL.items() if max(size) <= limit), 0)
    if not wanted:
        return ()
    found: list[str] = []
    trial = make().to("meta")
    area = _last_map(trial, size)
    for name in [name for name, module in trial.named_modules() if _downsamples(module)][:4]:
        module = trial.get_submodule(name)
        _set(trial, name, _without_stride(copy.deepcopy(module)))
        if (larger := _last_map(trial, size)) > area:
            found.append(name)
            area = larger
        else:
            _set(trial, name, module)
        if len(found) == wanted:
            break
    return tuple(found)


def adapt_stem(network: nn.Module, strides: tuple[str, ...]) -> nn.Module:
    """Return `network` without those strides, changed in place.

    Args:
        network: fresh.
        strides: what `early_strides` found.
    """
    from torchvision.models import VGG

    for name in strides:
        _set(network, name, _without_stride(network.get_submodule(name)))
    if strides and isinstance(network, VGG):
        _shorten_classifier(network)
    return network


def _shorten_classifier(network: VGG) -> None:
    """One linear layer behind a global average instead of three behind 7 x 7 places."""
    hidden, outputs = network.classifier[0], network.classifier[-1]
    assert isinstance(hidden, nn.Linear)  # noqa: S101  (torchvision's VGG)
    assert isinstance(outputs, nn.Linear)  # noqa: S101
    network.avgpool = nn.AdaptiveAvgPool2d(1)
    head = nn.Linear(hidden.in_features // 49, outputs.out_features, device=outputs.weight.device)
    if not head.weight.is_meta:
        nn.init.normal_(head.weight, 0, 0.01)
        nn.init.zeros_(head.bias)
    network.classifier = nn.Sequential(head)


def _downsamples(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d | nn.MaxPool2d) and 2 in (
        module.stride if isinstance(module.stride, tuple) else (module.stride,)
    )


def _without_stride(module: nn.Module) -> nn.Module:
    if not isinstance(module, nn.Conv2d):
        return nn.Identity()
    if module.kernel_size[0] < 7:
        module.stride = (1, 1)
        return module
    changed = nn.Conv2d(
        module.in_channels, module.out_channels, 3, 1, 1, bias=module.bias is not None, device=module.weight.device
    )
    if not changed.weight.is_meta:
        nn.init.kaiming_normal_(changed.weight, mode="fan_out", nonlinearity="relu")
    return changed


def _set(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, module)


def _last_map(network: nn.Module, size: tuple[int, int]) -> int:
    """Pixels of the last feature map before the global pooling; 0 where the network cannot run at that size."""
    areas: list[int] = []

    def record(_module: nn.Module, _inputs: object, output: object) -> None:
        if isinstance(output, Tensor) and output.ndim == 4:
            areas.append(output.shape[2] * output.shape[3])

    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    handles = [module.register_forward_hook(record) for module in convolutions]
    try:
        with torch.no_grad():
            network.eval()(torch.empty(1, 3, *size, device="meta"))
    except (RuntimeError, ValueError):
        return 0
    finally:
        for handle in handles:
            handle.remove()
    return areas[-1] if areas else 0
