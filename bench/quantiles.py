"""Percentiles of latencies, each with a distribution-free 95 % interval (numpy only).

Percentile: numpy's `linear` method (Hyndman and Fan's type 7). Interval: two order statistics, which hold the true
percentile in at least 95 of 100 runs whatever the distribution, because the number of samples up to it is binomial
(David and Nagaraja, Order Statistics, section 7.1); 2.5 % at most on either side. A bootstrap ends at the slowest
sample, and covered p99 in 62 of 100 runs of 100 samples.

Where there are too few samples for an upper order statistic (fewer than 368 for p99, 3,688 for p99.9) the interval has
no upper end: nothing that was measured bounds the percentile from above.

The samples are taken as independent. Latencies drift and come in bursts, so an interval is the least uncertainty there
is; the validity verdict looks for drift.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

METHOD: Literal["linear"] = "linear"
_TAIL = 0.025  # of probability, on either side
_SPREAD = 10  # standard deviations of a binomial number that are looked at; outside lies less than 1e-15


@dataclass(frozen=True)
class Quantile:
    """One percentile in milliseconds with its 95 % interval; `high` is None where there are too few samples for it."""

    ms: float
    low: float
    high: float | None

    def to_json(self) -> dict[str, float | None]:
        """`{ms, low, high}`, to the nanosecond."""
        high = None if self.high is None else round(self.high, 6)
        return {"ms": round(self.ms, 6), "low": round(self.low, 6), "high": high}


def quantile(sorted_ns: NDArray[np.int64], percent: float) -> Quantile:
    """One percentile with its interval.

    Args:
        sorted_ns: samples in nanoseconds, ascending, (n,), n >= 1.
        percent: above 0 and below 100.
    """
    value = float(np.percentile(sorted_ns, percent, method=METHOD))
    lower, upper = ranks(len(sorted_ns), percent)
    low = float(sorted_ns[lower - 1]) if lower else 0.0  # no latency is below 0
    high = max(float(sorted_ns[upper - 1]), value) / 1e6 if upper else None
    return Quantile(value / 1e6, min(low, value) / 1e6, high)


def ranks(n: int, percent: float) -> tuple[int, int | None]:
    """The order statistics, from 1, at the ends of a percentile's interval among n samples.

    Returns:
        The lower one, 0 where none is low enough, and the upper one, None where none is high enough.
    """
    p = percent / 100
    half = _SPREAD * math.sqrt(n * p * (1 - p)) + 30
    start, end = max(0, math.floor(n * p - half)), min(n, math.ceil(n * p + half))
    k = np.arange(start, end + 1)
    # Log of P(B = k) up to a constant, from P(B = k + 1) / P(B = k) = (n - k) / (k + 1) * p / (1 - p).
    steps = np.log((n - k[:-1]) / (k[:-1] + 1)) + math.log(p / (1 - p))
    weights = np.concatenate([[0.0], np.cumsum(steps)])
    chances = np.exp(weights - weights.max())
    chances /= chances.sum()
    below = np.cumsum(chances)  # P(B <= k)
    above = np.cumsum(chances[::-1])[::-1]  # P(B >= k)
    lower = start + int(np.searchsorted(below, _TAIL, side="right"))  # the largest with P(B < lower) <= 2.5 %
    upper = end + 1 - int(np.searchsorted(above[::-1], _TAIL, side="right"))  # the smallest with P(B >= upper) <= 2.5 %
    return lower, upper if upper <= n else None


def fewest_for_upper_end(percent: float) -> int:
    """How many samples a percentile's interval needs to have an upper end."""
    return math.ceil(math.log(_TAIL) / math.log(percent / 100))
