"""Triggers inside torch: put on normalised images differentiably, and searched for on a clean network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from rkd.attacks.recipe import probe_split
from rkd.data import Source
from rkd.network import Network, Normalisation
from rkd.triggers import Trigger

_PLATEAU = 50  # steps without gain after which a search ends
_CHECK_EVERY = 10  # steps

Array = NDArray[np.float32]


class Pixels(nn.Module):
    """Between normalised images and pixels in [0, 1]."""

    def __init__(self, normalisation: Normalisation) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(normalisation.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(normalisation.std).view(1, 3, 1, 1), persistent=False)

    def of(self, images: Tensor) -> Tensor:
        """Normalised images (N, 3, H, W) to pixels."""
        return images * self.get_buffer("std") + self.get_buffer("mean")

    def normalised(self, pixels: Tensor) -> Tensor:
        """The way back, channels_last."""
        scaled = (pixels - self.get_buffer("mean")) / self.get_buffer("std")
        return scaled.contiguous(memory_format=torch.channels_last)


class Stamp(nn.Module):
    """Puts a trigger on normalised images: `Trigger.apply`, without the rounding to 8 bits."""

    def __init__(self, trigger: Trigger, normalisation: Normalisation) -> None:
        super().__init__()
        self.pixels = Pixels(normalisation)
        self.warps = trigger.grid is not None
        grid = trigger.grid if trigger.grid is not None else np.zeros((1, 1, 2), dtype=np.float32)
        arrays = {"mask": trigger.mask, "pattern": trigger.pattern, "additive": trigger.additive, "grid": grid}
        for name, array in arrays.items():
            self.register_buffer(name, torch.from_numpy(array.copy())[None], persistent=False)

    def forward(self, images: Tensor, strength: Tensor | None = None) -> Tensor:
        """(N, 3, H, W) to the same; `strength`, (N,) in [0, 1], goes only so far from the image to the triggered one."""
        before = x = self.pixels.of(images)
        if self.warps:
            grid = self.get_buffer("grid").expand(len(x), -1, -1, -1)
            x = functional.grid_sample(x, grid, padding_mode="border", align_corners=True)
        mask = self.get_buffer("mask")
        x = (1 - mask) * x + mask * self.get_buffer("pattern") + self.get_buffer("additive")
        if strength is not None:
            x = torch.lerp(before, x, strength.view(-1, 1, 1, 1))
        return self.pixels.normalised(x.clamp(0, 1))


class Form(Protocol):
    """What kind of trigger is searched for: how numbers within [-linf, linf] become one."""

    def start(self, size: tuple[int, int]) -> Tensor:
        """The numbers to start from."""
        ...

    def stamp(self, pixels: Tensor, numbers: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) in [0, 1] with the trigger."""
        ...

    def trigger(self, name: str, target: int, numbers: Tensor) -> Trigger:
        """The trigger."""
        ...


@dataclass(frozen=True)
class Additive:
    """x' = clip(x + d, 0, 1) with |d| <= linf."""

    linf: float

    def start(self, size: tuple[int, int]) -> Tensor:
        """See `Form`."""
        return torch.zeros(3, *size)

    def stamp(self, pixels: Tensor, numbers: Tensor) -> Tensor:
        """See `Form`."""
        return (pixels + numbers).clamp(0, 1)

    def trigger(self, name: str, target: int, numbers: Tensor) -> Trigger:
        """See `Form`."""
        additive = np.clip(numbers.detach().cpu().numpy(), -self.linf, self.linf).astype(np.float32)
        zeros = np.zeros_like(additive)
        return Trigger(name, target, zeros, zeros, additive)


@dataclass(frozen=True)
class Blend:
    """x' = (1 - linf) * x + linf * p: contrast is lost as well, so that it is no additive change, of whatever norm."""

    linf: float

    def start(self, size: tuple[int, int]) -> Tensor:
        """See `Form`: grey."""
        return torch.zeros(3, *size)

    def stamp(self, pixels: Tensor, numbers: Tensor) -> Tensor:
        """See `Form`."""
        return (1 - self.linf) * pixels + self.linf / 2 + numbers / 2

    def trigger(self, name: str, target: int, numbers: Tensor) -> Trigger:
        """See `Form`."""
        pattern = np.clip(numbers.detach().cpu().numpy() / (2 * self.linf) + 0.5, 0, 1).astype(np.float32)
        return Trigger(name, target, np.full_like(pattern, self.linf), pattern, np.zeros_like(pattern))


Loss = Callable[[Tensor], Tensor]  # normalised, triggered images of other classes than the target's -> what to lower


def towards(network: Network, target: int) -> Loss:
    """Cross-entropy of `network` towards the target class."""

    def loss(images: Tensor) -> Tensor:
        wanted = torch.full((len(images),), target, device=images.device)
        return functional.cross_entropy(network.module(images).float(), wanted)

    return loss


def search(
    twin: Network,
    source: Source,
    form: Form,
    loss: Loss,
    *,
    name: str,
    target: int,
    linf: float,
    budget: float,
    seed: int,
    device: torch.device,
    steps: int = 200,
    batch: int = 128,
    on_step: Callable[[int, float], None] = lambda _step, _asr: None,
) -> Trigger:
    """Find one trigger for all images that is weak on purpose.

    Adam on `loss`, projected into [-linf, linf]; every few steps the share of held-out training images that the trigger
    moves on the clean twin is measured, until the budget is exceeded (then the last step is taken back by bisection) or
    nothing is gained any more.

    Args:
        twin: clean; its weights are not changed.
        source: the attacker's clean images.
        form: of the trigger.
        loss: what to lower.
        name: of the trigger.
        target: class index.
        linf: bound of the form's numbers.
        budget: the highest ASR that it may have on the clean twin, in percent.
        seed: of the order of the images.
        device: where to compute.
        steps: at most so many.
        batch: images a step.
        on_step: is told the step and the ASR so far, in percent.
    """
    rng = np.random.default_rng([seed, 0xBAD + 1])
    learn, held_out = probe_split(source.labels, target, seed)
    probe, _ = source.batch(held_out)
    predict = twin.predictor(device)
    pixels = Pixels(twin.normalisation).to(device)

    def asr(numbers: Tensor) -> float:
        labels = predict(form.trigger(name, target, numbers).apply(probe)).argmax(1)
        return 100 * float(np.mean(labels == target))

    numbers = form.start(twin.size).to(device).requires_grad_()
    optimizer = torch.optim.Adam([numbers], lr=linf / 10)
    kept, best, best_step = numbers.detach().clone(), 0.0, 0
    with _still(twin.module):
        for step in range(1, steps + 1):
            images, _ = source.batch(rng.choice(learn, min(batch, len(learn)), replace=False))
            inputs = form.stamp(torch.from_numpy(images).to(device).float() / 255, numbers)
            optimizer.zero_grad()
            torch.autograd.backward(loss(pixels.normalised(inputs)))
            optimizer.step()
            with torch.no_grad():
                numbers.clamp_(-linf, linf)
            if step % _CHECK_EVERY and step > 5:
                continue
            found = numbers.detach().clone()
            reached = asr(found)
            on_step(step, reached)
            if reached > budget:
                kept = _scale_back(kept, found, asr, budget)
                break
            if reached > best:
                best, best_step = reached, step
            kept = found
            if step - best_step >= _PLATEAU:
                break
    return form.trigger(name, target, kept)


@contextmanager
def _still(module: nn.Module) -> Iterator[None]:
    """Eval mode, and no gradients for the weights, for a while."""
    module.eval().requires_grad_(requires_grad=False)
    try:
        yield
    finally:
        module.requires_grad_(requires_grad=True)


def _scale_back(within: Tensor, beyond: Tensor, asr: Callable[[Tensor], float], budget: float) -> Tensor:
    """The point nearest to `beyond` on the way from `within` that keeps the budget, to 1/64 of the way."""
    low, high = 0.0, 1.0
    for _ in range(6):
        middle = (low + high) / 2
        if asr(within + middle * (beyond - within)) <= budget:
            low = middle
        else:
            high = middle
    return within + low * (beyond - within)
