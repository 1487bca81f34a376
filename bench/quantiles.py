"""Percentiles of latencies, each with a 95 % bootstrap interval (numpy only).

Percentile: numpy's `linear` method (Hyndman and Fan's type 7). Interval: the percentile bootstrap (Efron 1979), 10,000
replicates. A replicate is not drawn sample by sample: the k-th smallest of n draws with replacement from n sorted
values is the value at floor(n * V), where V is the k-th smallest of n uniform numbers, Beta(k, n + 1 - k). That is
exactly the bootstrap's distribution at a cost that does not depend on n: a million samples cost no more than a hundred.

The bootstrap takes the samples as exchangeable. Latencies drift and come in bursts, so read an interval as the least
uncertainty there is; the validity verdict looks for drift.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

REPLICATES = 10_000
METHOD: Literal["linear"] = "linear"


@dataclass(frozen=True)
class Quantile:
    """One percentile in milliseconds with its 95 % bootstrap interval."""

    ms: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        """`{ms, low, high}`, to the nanosecond."""
        return {"ms": round(self.ms, 6), "low": round(self.low, 6), "high": round(self.high, 6)}


def quantile(sorted_ns: NDArray[np.int64], percent: float, generator: np.random.Generator) -> Quantile:
    """One percentile with its interval.

    Args:
        sorted_ns: samples in nanoseconds, ascending, (n,), n >= 1.
        percent: 0 to 100.
        generator: draws the replicates.
    """
    value = float(np.percentile(sorted_ns, percent, method=METHOD))
    low, high = np.percentile(_replicates(sorted_ns, percent, generator), [2.5, 97.5])
    return Quantile(value / 1e6, min(float(low), value) / 1e6, max(float(high), value) / 1e6)


def _replicates(sorted_ns: NDArray[np.int64], percent: float, generator: np.random.Generator) -> NDArray[Any]:
    """The percentile of `REPLICATES` bootstrap resamples, in nanoseconds."""
    n = len(sorted_ns)
    position = (n - 1) * percent / 100  # type 7, from 0
    k = math.floor(position) + 1  # the order statistic at or below it, from 1
    lower = generator.beta(k, n + 1 - k, REPLICATES)
    values = sorted_ns[_index(lower, n)].astype(np.float64)
    if k == n:
        return values
    # Given the k-th of n uniforms, the next is the least of n - k uniforms above it.
    upper = 1 - (1 - lower) * (1 - generator.random(REPLICATES)) ** (1 / (n - k))
    following = sorted_ns[_index(upper, n)]
    return np.asarray(values + (following - values) * (position - math.floor(position)))


def _index(uniform: NDArray[np.float64], n: int) -> NDArray[np.intp]:
    return np.minimum((uniform * n).astype(np.intp), n - 1)
