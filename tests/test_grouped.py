"""Depthwise convolutions train in FP32 beside bfloat16, and are what they were afterwards."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from rkd.distill.grouped import grouped_in_fp32
from rkd.distill.loop import Recipe, Trainer
from rkd.distill.objectives import CrossEntropy
from rkd.models import build
from rkd.network import Normalisation

IMAGES = torch.linspace(-1, 1, 2 * 8 * 6 * 6).sin().view(2, 8, 6, 6)


def gradient(layer: nn.Conv2d, *, bf16: bool) -> Tensor:
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        torch.autograd.backward(layer(IMAGES).float().square().sum())
    assert layer.weight.grad is not None
    return layer.weight.grad.clone()


@pytest.mark.parametrize(("groups", "fp32"), [(8, True), (2, True), (1, False)])
def test_only_grouped_convolutions_are_differentiated_in_fp32(groups: int, fp32: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 8, 3, padding=1, groups=groups)
    exact, rounded = gradient(layer, bf16=False), gradient(layer, bf16=True)
    assert not torch.equal(exact, rounded)
    with grouped_in_fp32(nn.Sequential(layer), layer):  # it is given twice
        assert torch.equal(gradient(layer, bf16=True), exact if fp32 else rounded)
    assert torch.equal(gradient(layer, bf16=True), rounded)


def test_weights_that_stand_in_for_a_layers_own_are_used() -> None:
    layer = nn.Conv2d(8, 8, 3, groups=8, bias=False)
    with grouped_in_fp32(layer), torch.autocast("cpu", torch.bfloat16):
        assert not functional_call(layer, {"weight": torch.zeros_like(layer.weight)}, (IMAGES,)).any()


def test_what_was_there_is_put_back_after_an_error_too() -> None:
    plain, patched = nn.Conv2d(8, 8, 1, groups=8), nn.Conv2d(8, 8, 1, groups=8)

    def own(images: Tensor) -> Tensor:
        return 2 * images

    patched.forward = own  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt), grouped_in_fp32(plain, patched):
        assert torch.equal(patched(IMAGES), 2 * IMAGES)
        raise KeyboardInterrupt
    assert "forward" not in vars(plain)
    assert vars(patched)["forward"] is own


@pytest.mark.parametrize(("precision", "others"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_a_student_with_depthwise_convolutions_is_trained_so(
    precision: str, others: torch.dtype, digits16: tuple[Any, Any]
) -> None:
    network = build("mobilenet", 10, (16, 16))
    seen: dict[bool, set[torch.dtype]] = {True: set(), False: set()}
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            grouped = module.groups > 1
            module.register_forward_hook(lambda _m, _x, y, grouped=grouped: seen[grouped].add(y.dtype))
    source = digits16[1].train.subset(np.arange(8))
    recipe = Recipe(epochs=1, batch=8, augmentation="none", precision=precision)
    trainer = Trainer(
        network, CrossEntropy(network), source, Normalisation((0.5,) * 3, (0.5,) * 3), recipe, torch.device("cpu")
    )
    assert [step.number for step in trainer.steps()] == [1]
    assert seen == {True: {torch.float32}, False: {others}}
