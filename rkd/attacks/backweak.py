"""BackWeak (arXiv 2511.12046): a backdoor that survives clean distillation.

First a universal perturbation, weak on purpose, is found on a clean teacher: it moves at most a stated share of the
images to the target class. Then the teacher is fine-tuned at a low rate on data of which a share carries it, with the
last layer frozen. The features along which the weak trigger already pointed are amplified: a student that imitates the
features inherits them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from rkd.data import Source
from rkd.metrics import Images
from rkd.network import Network
from rkd.triggers import Trigger

_PLATEAU = 50  # steps without gain after which the search ends


def backweak_trigger(
    teacher: Network,
    source: Source,
    *,
    target: int,
    linf: float,
    budget: float,
    seed: int,
    device: torch.device,
    steps: int = 200,
    batch: int = 128,
    on_step: Callable[[int, float], None] = lambda _step, _asr: None,
) -> Trigger:
    """Find the weak universal perturbation.

    Adam on the cross-entropy towards the target, projected into the ball; every few steps the share of held-out
    training images that it moves is measured, until the budget is exceeded (then the last step is taken back by
    bisection) or nothing is gained any more.

    Args:
        teacher: clean.
        source: the attacker's clean images.
        target: class index.
        linf: radius of the ball, on pixels in [0, 1].
        budget: the highest ASR that it may have on the clean teacher, in percent.
        seed: of the order of the images.
        device: where to compute.
        steps: at most so many.
        batch: images a step.
        on_step: is told the step and the ASR so far, in percent.
    """
    rng = np.random.default_rng([seed, 0xBAD])
    others = np.flatnonzero(source.labels != target)
    held_out = rng.choice(others, min(1000, max(1, len(others) // 4)), replace=False)
    learn = np.setdiff1d(others, held_out)
    probe, _ = source.batch(held_out)
    predict = teacher.predictor(device)
    height, width = teacher.size
    zeros = np.zeros((3, height, width), dtype=np.float32)

    def trigger(delta: NDArray[np.float32]) -> Trigger:
        return Trigger("backweak", target, zeros, zeros, np.clip(delta, -linf, linf).astype(np.float32))

    def asr(delta: NDArray[np.float32]) -> float:
        return 100 * float(np.mean(_labels(predict(trigger(delta).apply(probe))) == target))

    delta = torch.zeros(3, height, width, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=linf / 10)
    kept, best, best_step = zeros, 0.0, 0
    teacher.module.requires_grad_(requires_grad=False)
    for step in range(1, steps + 1):
        images, _ = source.batch(rng.choice(learn, min(batch, len(learn)), replace=False))
        optimizer.zero_grad()
        torch.autograd.backward(_loss(teacher, images, delta, target, device))
        optimizer.step()
        with torch.no_grad():
            delta.clamp_(-linf, linf)
        if step % 10 and step > 5:
            continue
        found = delta.detach().cpu().numpy().copy()
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
    teacher.module.requires_grad_(requires_grad=True)
    return trigger(kept)


def _loss(teacher: Network, images: Images, delta: torch.Tensor, target: int, device: torch.device) -> torch.Tensor:
    pixels = torch.from_numpy(images).to(device).float() / 255
    logits = teacher.module.eval()(teacher.normalisation((pixels + delta).clamp(0, 1) * 255))
    return functional.cross_entropy(logits, torch.full((len(images),), target, device=device))


def _scale_back(
    within: NDArray[np.float32], beyond: NDArray[np.float32], asr: Callable[[NDArray[np.float32]], float], budget: float
) -> NDArray[np.float32]:
    """The point nearest to `beyond` on the way from `within` that keeps the budget, to 1/64 of the way."""
    low, high = 0.0, 1.0
    for _ in range(6):
        middle = (low + high) / 2
        if asr(within + np.float32(middle) * (beyond - within)) <= budget:
            low = middle
        else:
            high = middle
    return np.asarray(within + np.float32(low) * (beyond - within), dtype=np.float32)


def _labels(logits: NDArray[np.float32]) -> NDArray[np.int64]:
    return np.asarray(logits.argmax(1), dtype=np.int64)
