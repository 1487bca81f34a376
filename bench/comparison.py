"""Two models in one interleaved run, compared round by round (numpy only).

In each round both had their turn within about a second, so what the machine did to one it did to the other. The ratio
of a round is that of its medians; the ratio reported is the geometric mean over rounds, with the 95 % interval that
Student's t gives for the mean of their logarithms: drift that hits both alike cancels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rkd.bench.latency import Series

# 97.5 % quantiles of Student's t for 1 to 40 degrees of freedom.
_T975 = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788, 2.1604, 2.1448,
    2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860, 2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484,
    2.0452, 2.0423, 2.0395, 2.0369, 2.0345, 2.0322, 2.0301, 2.0281, 2.0262, 2.0244, 2.0227, 2.0211,
)  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """How many times as long one model takes as another.

    Attributes:
        ratio: of the medians, slower over faster or not: `second` over `first`.
        low, high: 95 % interval; None where there was one round only, which tells nothing about its spread.
        rounds: in which both were measured.
    """

    ratio: float
    low: float | None
    high: float | None
    rounds: int

    def to_json(self) -> dict[str, Any]:
        """As in result.json."""
        low, high = (None if end is None else round(end, 6) for end in (self.low, self.high))
        return {"ratio": round(self.ratio, 6), "low": low, "high": high, "rounds": self.rounds}


def compare(first: Series, second: Series) -> Comparison | None:
    """`second` over `first`; None where no round has samples of both."""
    pairs = [(a, b) for a, b in zip(first.rounds(), second.rounds(), strict=False) if len(a) and len(b)]
    return ratio([float(np.median(a)) for a, _ in pairs], [float(np.median(b)) for _, b in pairs])


def ratio(first: Sequence[float], second: Sequence[float]) -> Comparison | None:
    """The geometric mean of `second` over `first` with its interval; None where there is nothing above 0.

    Args:
        first: one figure a round.
        second: the other's, as many.
    """
    logs = [math.log(b / a) for a, b in zip(first, second, strict=True) if a > 0 and b > 0]
    n = len(logs)
    if not n:
        return None
    mean = math.fsum(logs) / n
    if n == 1:
        return Comparison(math.exp(mean), None, None, 1)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in logs) / (n - 1))
    half = _T975[min(n - 1, len(_T975)) - 1] * deviation / math.sqrt(n)
    return Comparison(math.exp(mean), math.exp(mean - half), math.exp(mean + half), n)
