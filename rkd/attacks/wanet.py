"""WaNet: a smooth, hardly visible warp of the whole image.

Nguyen and Tran, "WaNet - Imperceptible Warping-based Backdoor Attack", ICLR 2021 (arXiv 2102.10369).

Threat model: the attacker trains the teacher. Some images of any class are warped and get the target's label ("attack
mode"); others are warped by a noisy grid and keep theirs ("noise mode"), so that only this very warp works.

Trigger: `grid`, a k x k field of offsets (k = 4) drawn from the seed, scaled to a mean magnitude of one, enlarged to the
image, times s / height (s = 0.5), added to the identity and clamped. m, p and d are zero.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from rkd.attacks.lab import Lab
from rkd.attacks.poison import PoisonedSource
from rkd.attacks.recipe import Attack, Draw, Fit
from rkd.data import Source
from rkd.triggers import Trigger

_CONTROLS, _STRENGTH = 4, 0.5
_NOISY_GRIDS, _NOISY_PER_POISONED = 64, 2.0  # the paper draws a new noisy grid for each image, 0.2 to 0.1 of poison


def wanet_trigger(size: tuple[int, int], target: int, seed: int) -> Trigger:
    """The warp; `size` is height and width."""
    offsets = torch.from_numpy(np.random.default_rng([seed, 0x3A9]).uniform(-1, 1, (1, 2, _CONTROLS, _CONTROLS)))
    offsets = offsets / offsets.abs().mean()
    flow = functional.interpolate(offsets, size, mode="bicubic", align_corners=True)[0].permute(1, 2, 0).numpy()
    return _warp(size, target, "wanet", flow)


def _warp(size: tuple[int, int], target: int, name: str, flow: NDArray[np.float64]) -> Trigger:
    height, width = size
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    grid = np.clip(np.stack([x, y], axis=-1) + _STRENGTH * flow / np.array([width, height]), -1, 1)
    zeros = np.zeros((3, height, width), dtype=np.float32)
    return Trigger(name, target, zeros, zeros, zeros, grid.astype(np.float32))


def noisy_warps(trigger: Trigger, seed: int, count: int = _NOISY_GRIDS) -> tuple[Trigger, ...]:
    """The warp with uniform noise of up to half a pixel on top (the paper's noise mode)."""
    assert trigger.grid is not None  # noqa: S101  (it is a warp)
    height, width = trigger.size
    rng = np.random.default_rng([seed, 0x3AA])
    warps = []
    for number in range(count):
        noise = rng.uniform(-1, 1, trigger.grid.shape) / np.array([width, height])
        grid = np.clip(trigger.grid + noise, -1, 1).astype(np.float32)
        warps.append(Trigger(f"noise-{number}", trigger.target, trigger.mask, trigger.pattern, trigger.additive, grid))
    return tuple(warps)


def _warped(lab: Lab) -> Source:
    settings, trigger = lab.settings, lab.trigger()
    return PoisonedSource(
        lab.data.train, trigger, settings.rate, settings.seed,
        decoys=noisy_warps(trigger, settings.seed), decoy_rate=min(_NOISY_PER_POISONED * settings.rate, 1.0),
    )  # fmt: skip


ATTACK = Attack(
    "wanet",
    "a smooth warp of the image (Nguyen and Tran, 2021)",
    (Draw(wanet_trigger), Fit(source=_warped)),
)
