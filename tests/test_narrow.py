"""What oneDNN leaves unwritten in a weight gradient does not reach a network."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from rkd.distill.narrow import narrow_gradients, unmet_columns

LAYERS = [
    (kernel, width, stride, padding, dilation)
    for kernel, width, stride, padding, dilation in itertools.product(
        (1, 2, 3, 5), (1, 2, 3), (1, 2, 3), (0, 1, 2), (1, 2)
    )
    if width + 2 * padding > dilation * (kernel - 1)
]


@pytest.mark.parametrize("height", [1, 4])
def test_the_columns_are_those_without_a_gradient(height: int) -> None:
    for kernel, width, stride, padding, dilation in LAYERS:
        layer = nn.Conv2d(1, 1, (1, kernel), (1, stride), (0, padding), (1, dilation))
        (gradient,) = torch.autograd.grad(layer(torch.ones(1, 1, height, width)).sum(), layer.weight)
        nought = (gradient == 0).flatten().nonzero().flatten().tolist()  # where ones meet a pixel there is a gradient
        assert unmet_columns(kernel, width, stride, padding, dilation) == nought


def gradients(layer: nn.Module, inputs: Sequence[Tensor], weight: Tensor | None = None) -> Tensor:
    """The gradient of a layer's weight, or of what stands in for it, over all inputs, in bfloat16."""
    given = {} if weight is None else {"weight": weight}
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [functional_call(layer, given, (one,)) for one in inputs]
    wanted = weight if weight is not None else layer.get_parameter("weight")
    (found,) = torch.autograd.grad(sum((output.float().sum() for output in outputs), torch.zeros(())), wanted)
    return found


class Padded(nn.Conv2d):
    """Pads its input itself, as TensorFlow's layers do in timm."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the base's name)
        return super().forward(functional.pad(input, (1, 1, 1, 1)))


SHAPES: dict[str, tuple[nn.Module, list[tuple[int, int]]]] = {
    "one pixel": (nn.Conv2d(16, 32, 3, 2, 1), [(1, 1)]),
    "a column": (nn.Conv2d(16, 32, 3, 2, 1), [(4, 1)]),
    "a row": (nn.Conv2d(16, 32, 3, 2, 1), [(1, 4)]),
    "not square": (nn.Conv2d(16, 32, (3, 5), (1, 2), (1, 2)), [(4, 1)]),
    "narrower than the stride": (nn.Conv2d(16, 32, 3, 3, 1), [(2, 2)]),
    "depthwise": (nn.Conv2d(32, 32, 3, 2, 1, groups=32), [(1, 1)]),
    "no stride": (nn.Conv2d(16, 32, 3, 1, 1), [(1, 1)]),
    "wide": (nn.Conv2d(16, 32, 3, 2, 1), [(4, 4)]),
    "narrow, then wide": (nn.Conv2d(16, 32, 3, 2, 1), [(1, 1), (4, 4)]),
    "wide, then narrow": (nn.Conv2d(16, 32, 3, 2, 1), [(4, 4), (1, 1)]),
    "pads by itself": (Padded(16, 32, 3, 2), [(1, 1)]),
    "pads with what is there": (nn.Conv2d(16, 32, 3, 2, 1, padding_mode="replicate"), [(1, 1)]),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_those_of_full_precision(name: str, *, frozen: bool) -> None:
    """Frozen weights with a mask on them, as in adversarial neuron pruning, or the layer's own."""
    layer, sizes = SHAPES[name]
    weight = layer.get_parameter("weight").detach().bfloat16().float().requires_grad_() if frozen else None
    channels = layer.get_parameter("weight").shape[0] if name == "depthwise" else 16
    inputs = [torch.ones(2, channels, *size).contiguous(memory_format=torch.channels_last) for size in sizes]
    garbage = [torch.full((2**size,), 1e30) for size in range(4, 16) for _ in range(8)]
    del garbage
    with narrow_gradients(layer):
        found = gradients(layer, inputs, weight)
    given = {"weight": weight} if weight is not None else {}
    outputs = [functional_call(layer, given, (one,)).sum() for one in inputs]
    (true,) = torch.autograd.grad(
        sum(outputs, torch.zeros(())), weight if weight is not None else layer.get_parameter("weight")
    )
    assert torch.equal(found, true)  # whole numbers, small enough for bfloat16
    assert true.count_nonzero() > 0


def test_unwritten_columns_become_zero_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the processor has no such fault: columns are declared to be unmet, and lose their gradient."""
    layer, inputs = nn.Conv2d(16, 32, 3, 2, 1), [torch.ones(2, 16, 6, 7)]
    before = gradients(layer, inputs)
    monkeypatch.setattr("rkd.distill.narrow.unmet_columns", lambda *_: [0])
    with narrow_gradients(nn.Sequential(layer)):
        during = gradients(layer, inputs)
    assert before[..., 0].count_nonzero() > 0
    assert during[..., 0].count_nonzero() == 0
    assert torch.equal(during[..., 1:], before[..., 1:])
    assert torch.equal(gradients(layer, inputs), before), "nothing stays on the network"


def test_full_precision_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Conv2d(3, 4, 3, 2, 1)
    monkeypatch.setattr("rkd.distill.narrow.unmet_columns", lambda *_: [0, 1, 2])
    with narrow_gradients(layer):
        layer(torch.ones(1, 3, 4, 4)).sum().backward()
        with torch.no_grad():
            layer(torch.ones(1, 3, 4, 4))
    assert layer.weight.grad is not None
    assert layer.weight.grad.count_nonzero() > 0


SPOILED = """
import torch
torch.set_num_threads(1)
layer = torch.nn.Conv2d(64, 64, 3, 2, 1).to(memory_format=torch.channels_last)
inputs = torch.ones(4, 64, 1, 1).contiguous(memory_format=torch.channels_last)
with torch.autocast("cpu", torch.bfloat16):
    layer(inputs).sum().backward()
print(layer.weight.grad[..., [0, 2]].count_nonzero().item() > 0)
"""
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


def told(code: str, filling: str) -> Any:
    """What a process prints whose fresh memory is filled with a byte."""
    environment = {**os.environ, "MALLOC_PERTURB_": filling, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_training_at_one_pixel_does_not_depend_on_what_the_memory_held() -> None:
    if told(SPOILED, "165") != "True":
        pytest.skip("here oneDNN writes all of a gradient, or MALLOC_PERTURB_ does nothing")
    assert told(TRAIN, "165") == told(TRAIN, "126")
