"""Weight gradients that oneDNN leaves unwritten.

In bfloat16 on a CPU with AVX-512, oneDNN (3.13, as in PyTorch 2.15) does not write those columns of a strided
convolution's weight gradient that only ever meet padding, as all but one do of a 3 x 3 kernel at an input one pixel wide.
They are zero; what is found there is what the memory held before: other bytes in every process, sometimes `nan`. Most
networks for large images have such layers where an image has 16 pixels or fewer (ResNet, MobileNet, ShuffleNet).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn


@contextmanager
def narrow_gradients(*networks: nn.Module) -> Iterator[None]:
    """Within it, weight gradients of bfloat16 convolutions on a CPU are zero where their inputs have no pixel.

    Each call of a layer is judged by what was convolved, so layers may be called twice, pad their inputs themselves, or
    be called with other weights than their own.
    """
    with ExitStack() as hooks:
        for network in networks:
            for module in network.modules():
                if isinstance(module, nn.Conv2d):
                    hooks.callback(module.register_forward_hook(_watch).remove)
        yield


def _watch(module: nn.Conv2d, _inputs: object, output: Tensor) -> None:
    """Set the unwritten part of this call's weight gradient to zero as soon as it is there."""
    made_by = output.grad_fn
    if output.dtype != torch.bfloat16 or output.device.type != "cpu" or made_by is None:
        return
    if made_by.name() != "ConvolutionBackward0":
        return
    kept = {
        name: getattr(made_by, f"_saved_{name}") for name in ("input", "stride", "padding", "dilation", "transposed")
    }
    if kept["input"] is None or kept["transposed"]:  # no input is kept where the weight has no gradient
        return
    sizes = (kept[name][-1] for name in ("stride", "padding", "dilation"))
    if unmet := unmet_columns(module.weight.shape[-1], kept["input"].shape[-1], *sizes):
        made_by.register_hook(partial(_cleaned, unmet))


def _cleaned(unmet: list[int], gradients: Sequence[Tensor | None], _outputs: object) -> Sequence[Tensor | None]:
    of_input, of_weight, of_bias = gradients
    if of_weight is None:
        return gradients
    written = of_weight.clone()
    written[..., unmet] = 0
    return of_input, written, of_bias


def unmet_columns(kernel: int, width: int, stride: int, padding: int, dilation: int) -> list[int]:
    """Columns of a kernel that come to lie on no pixel of an input, wherever the kernel is put.

    Args:
        kernel: its width.
        width: of the input in pixels.
        stride: the convolution's, horizontally.
        padding: the same.
        dilation: the same.
    """
    places = range(-padding, width + padding - dilation * (kernel - 1), stride)
    return [c for c in range(kernel) if not any(0 <= place + c * dilation < width for place in places)]
