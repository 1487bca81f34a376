"""Grouped convolutions, which oneDNN is slow to differentiate in bfloat16 on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def grouped_in_fp32(*networks: nn.Module) -> Iterator[None]:
    """Within it, grouped (depthwise) convolutions compute in FP32, whatever autocast says around them.

    A training step of MobileNet v3-small at 32 pixels takes 4.4 s a batch of 128 in bfloat16 on one core with AMX, 4.1 s of
    it in the derivatives of the depthwise convolutions; in FP32 1.6 s, and with these alone in FP32 1.1 s (oneDNN 3.13).
    """
    before: dict[nn.Module, Any] = {}  # a network may have had a method of its own
    for network in networks:
        for module in network.modules():
            if isinstance(module, nn.Conv2d) and module.groups > 1 and module not in before:
                before[module] = vars(module).get("forward")
                module.forward = partial(_in_fp32, module.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module, own in before.items():
            del module.forward
            if own is not None:
                module.forward = own


def _in_fp32(forward: Callable[..., Tensor], images: Tensor, *others: Any, **named: Any) -> Tensor:
    with torch.autocast(images.device.type, enabled=False):
        return forward(images.float(), *others, **named)
