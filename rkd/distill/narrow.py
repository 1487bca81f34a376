"""Gradients that oneDNN leaves unwritten.

In bfloat16 on a CPU, oneDNN (3.13, as in PyTorch 2.15) computes the weight gradient of a strided convolution whose input
is one pixel wide without writing the columns of the kernel that only ever meet padding. They are zero; what is found
there is what the memory held before, sometimes `nan`. Networks that shrink small images to one pixel have such layers:
ResNet-50 and MobileNet at 16 pixels and below.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def narrow_gradients(*networks: nn.Module) -> Iterator[None]:
    """Within it, what a backward pass leaves unwritten in the weight gradients of these networks is zero.

    A layer is judged by the last input that it met before the pass: one pixel wide, or wider.
    """
    with ExitStack() as hooks:
        for module in [module for network in networks for module in network.modules()]:
            if isinstance(module, nn.Conv2d) and _may_be_left(module):
                guard = _Guard(module)
                hooks.callback(module.register_forward_pre_hook(guard.see).remove)
                handle = module.weight.register_hook(guard.clean)  # type: ignore[no-untyped-call]
                hooks.callback(handle.remove)
        yield


def _may_be_left(module: nn.Conv2d) -> bool:
    return (
        module.weight.requires_grad
        and module.stride[1] > 1
        and module.kernel_size[1] > 1
        and module.padding_mode == "zeros"  # other padding is put into the input before
    )


class _Guard:
    def __init__(self, module: nn.Conv2d) -> None:
        self._met = _columns_met(module)
        self._narrow = False

    def see(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            self._narrow = inputs[0].shape[-1] == 1

    def clean(self, gradient: Tensor) -> Tensor | None:
        if not self._narrow:
            return None
        written = torch.zeros_like(gradient)
        written[..., self._met] = gradient[..., self._met]
        return written


def _columns_met(module: nn.Conv2d) -> list[int]:
    """Columns of the kernel that come to lie on an input's only pixel."""
    kernel, stride, dilation = module.kernel_size[1], module.stride[1], module.dilation[1]
    padding = 0 if isinstance(module.padding, str) else module.padding[1]
    outputs = (2 * padding - dilation * (kernel - 1)) // stride + 1
    offsets = {padding - stride * place for place in range(outputs)}
    return [column for column in range(kernel) if column * dilation in offsets]
