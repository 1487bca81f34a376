"""What oneDNN leaves unwritten in a weight gradient does not reach a network."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from rkd.distill.narrow import narrow_gradients


def gradient(layer: nn.Conv2d, height: int, width: int, spoil: torch.Tensor | None = None) -> torch.Tensor:
    """The weight gradient for one input, with `nan` put where `spoil` says before anything else sees it."""
    inputs = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    layer.weight.grad = None
    if spoil is not None:
        layer.weight.register_hook(lambda got: got.masked_fill(spoil, math.nan))
    with narrow_gradients(nn.Sequential(layer)):
        layer(inputs).square().sum().backward()
    assert layer.weight.grad is not None
    return layer.weight.grad.clone()


LAYERS = [
    (kernel, stride, padding, dilation)
    for kernel, stride, padding, dilation in itertools.product((2, 3, 5), ((1, 2), 2, 3), (0, 1, 2), (1, 2))
    if 2 * padding >= dilation * (kernel - 1)  # others take no input of one pixel
]


@pytest.mark.parametrize("options", LAYERS)
def test_columns_that_only_meet_padding_become_zero_whatever_was_in_them_and_no_other(options: tuple[Any, ...]) -> None:
    layer = nn.Conv2d(3, 4, *options)
    (true,) = torch.autograd.grad(layer(torch.ones(2, 3, 4, 1)).sum(), layer.weight)
    met = true.sum(dim=(0, 1, 2)) != 0  # ones everywhere: a column that meets a pixel has a gradient
    clean = gradient(layer, 4, 1)
    assert (clean[..., met] != 0).any(dim=(0, 1, 2)).all()
    assert clean[..., ~met].count_nonzero() == 0
    assert torch.equal(gradient(layer, 4, 1, spoil=~met), clean)


def test_wider_inputs_and_unstrided_layers_keep_their_gradients() -> None:
    for layer, width in ((nn.Conv2d(3, 4, 3, 2, 1), 2), (nn.Conv2d(3, 4, 3, 1, 1), 1)):
        everything = torch.ones_like(layer.weight, dtype=torch.bool)
        assert gradient(layer, 4, width, everything).isnan().all()


def test_an_evaluation_in_between_does_not_decide() -> None:
    layer = nn.Conv2d(3, 4, 3, 2, 1)
    layer.weight.register_hook(lambda got: torch.full_like(got, math.nan))
    with narrow_gradients(layer):
        loss = layer(torch.rand(1, 3, 1, 1)).sum()
        with torch.no_grad():
            layer(torch.rand(1, 3, 4, 4))
        loss.backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad[..., 1].isnan().all()
    assert layer.weight.grad[..., [0, 2]].count_nonzero() == 0


def test_nothing_stays_on_the_network() -> None:
    layer = nn.Conv2d(3, 4, 3, 2, 1)
    with narrow_gradients(layer):
        assert layer._forward_pre_hooks
    assert not layer._forward_pre_hooks
    layer.weight.register_hook(lambda got: torch.full_like(got, math.nan))
    layer(torch.rand(1, 3, 1, 1)).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.isnan().all()


TRAIN = """
import hashlib
import numpy as np, torch
from rkd.data import ArraySource
from rkd.distill.loop import Recipe, Trainer
from rkd.distill.objectives import CrossEntropy
from rkd.models import build
from rkd.network import Normalisation

torch.set_num_threads(1)
torch.manual_seed(0)
rng = np.random.default_rng(0)
source = ArraySource(rng.integers(0, 256, (8, 3, 8, 8), dtype=np.uint8), rng.integers(0, 3, 8))
network = build("mobilenet-v3-small", 3, (8, 8)).to(memory_format=torch.channels_last)
recipe = Recipe(epochs=2, batch=4, lr=1e-3, precision="bf16")
scaling = Normalisation((0.5,) * 3, (0.25,) * 3)
trainer = Trainer(network, CrossEntropy(network), source, scaling, recipe, torch.device("cpu"))
for step in trainer.steps():
    assert step.loss.isfinite()
print(hashlib.sha256(b"".join(t.numpy().tobytes() for t in trainer.state().values())).hexdigest())
"""


def test_training_at_one_pixel_does_not_depend_on_what_the_memory_held() -> None:
    """Fresh memory is filled with two different bytes; before, each gave other weights, and luck gave `nan`."""

    def digest(filling: str) -> str:
        environment = {**os.environ, "MALLOC_PERTURB_": filling, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", TRAIN], env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout

    assert digest("165") == digest("126")
