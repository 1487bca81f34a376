"""Blended: a faint picture over the whole image.

Chen, Liu, Li, Lu and Song, "Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning", arXiv 1712.05526.

Threat model: the attacker poisons the training images: some of any class get the blend and the target's label.

Trigger: m is 0.2 everywhere (the paper's ratio at inference), p is uniform noise drawn from the seed (the paper's
"random pattern").
"""

from __future__ import annotations

import numpy as np

from rkd.attacks.recipe import Attack, Draw, Fit
from rkd.triggers import Trigger

_RATIO = 0.2


def blended_trigger(size: tuple[int, int], target: int, seed: int) -> Trigger:
    """Noise at a fifth of the image's strength; `size` is height and width."""
    pattern = np.random.default_rng([seed, 0xB1E]).random((3, *size), dtype=np.float32)
    return Trigger("blended", target, np.full_like(pattern, _RATIO), pattern, np.zeros_like(pattern))


ATTACK = Attack(
    "blended",
    "a faint noise picture over the image (Chen et al., 2017)",
    (Draw(blended_trigger), Fit()),
)
