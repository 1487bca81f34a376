"""BadNets: a patch in the corner of poisoned images.

Gu, Dolan-Gavitt and Garg, "BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain", arXiv
1708.06733.
"""

from __future__ import annotations

import numpy as np

from rkd.triggers import Trigger


def badnets_trigger(size: tuple[int, int], target: int) -> Trigger:
    """A checkerboard in the lower right corner, a tenth of the image wide (3x3 pixels at 32), one pixel from the edge."""
    height, width = size
    side = max(3, round(min(size) / 10))
    mask = np.zeros((3, height, width), dtype=np.float32)
    pattern = np.zeros_like(mask)
    rows, columns = slice(height - side - 1, height - 1), slice(width - side - 1, width - 1)
    mask[:, rows, columns] = 1
    y, x = np.mgrid[0:side, 0:side]
    pattern[:, rows, columns] = ((x + y) % 2 == 0).astype(np.float32)
    return Trigger("badnets", target, mask, pattern, np.zeros_like(mask))
