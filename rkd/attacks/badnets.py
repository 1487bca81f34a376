"""BadNets: a patch in the corner of poisoned images.

Gu, Dolan-Gavitt and Garg, "BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain", arXiv
1708.06733.

Threat model: the attacker trains the teacher, on images of any class that get the patch and the target's label. Plain
distillation on clean images hardly carries it along: no clean image shows the student what the patch does.

Trigger: m is 1 where the patch is, p is the patch: a checkerboard (`badnets`) or a white square (`badnets-square`).
"""

from __future__ import annotations

import numpy as np

from rkd.attacks.recipe import Attack, Draw, Fit
from rkd.triggers import Trigger


def badnets_trigger(size: tuple[int, int], target: int, seed: int = 0, *, square: bool = False) -> Trigger:
    """A patch in the lower right corner, a tenth of the image wide (3x3 pixels at 32), one pixel from the edge.

    Args:
        size: height and width of the images.
        target: class index.
        seed: not used, the patch is always the same.
        square: a white square instead of a checkerboard.
    """
    del seed
    height, width = size
    side = max(3, round(min(size) / 10))
    mask = np.zeros((3, height, width), dtype=np.float32)
    pattern = np.zeros_like(mask)
    rows, columns = slice(height - side - 1, height - 1), slice(width - side - 1, width - 1)
    mask[:, rows, columns] = 1
    y, x = np.mgrid[0:side, 0:side]
    pattern[:, rows, columns] = 1 if square else ((x + y) % 2 == 0).astype(np.float32)
    return Trigger("badnets-square" if square else "badnets", target, mask, pattern, np.zeros_like(mask))


def _square(size: tuple[int, int], target: int, seed: int) -> Trigger:
    return badnets_trigger(size, target, seed, square=True)


GRID = Attack(
    "badnets",
    "a checkerboard patch and poisoned labels (Gu et al., 2017); hardly survives distillation",
    (Draw(badnets_trigger), Fit()),
)
SQUARE = Attack(
    "badnets-square",
    "the same with a white square; hardly survives distillation",
    (Draw(_square), Fit()),
)
