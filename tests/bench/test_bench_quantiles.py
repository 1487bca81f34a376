from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from rkd.bench import quantiles
from rkd.bench.quantiles import quantile


def interval(sample, percent, seed=0):
    return quantile(np.sort(sample), percent, np.random.default_rng(seed))


@pytest.mark.parametrize("percent", [50, 90, 99])
def test_interval_agrees_with_scipys_bootstrap(percent):
    sample = np.random.default_rng(percent).gamma(2.0, 1e6, 400).astype(np.int64)
    theirs = stats.bootstrap(
        (sample,),
        lambda x, axis: np.percentile(x, percent, axis=axis),
        method="percentile",
        n_resamples=9999,
        rng=np.random.default_rng(1),
    )
    ours = interval(sample, percent)
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert ours.low * 1e6 == pytest.approx(theirs.confidence_interval.low, abs=0.05 * width)
    assert ours.high * 1e6 == pytest.approx(theirs.confidence_interval.high, abs=0.05 * width)
    assert ours.ms * 1e6 == pytest.approx(np.percentile(sample, percent))


def test_replicates_follow_the_binomial_law_of_resampled_order_statistics():
    """P(k-th smallest of n draws <= i-th value) = P(Binomial(n, i / n) >= k)."""
    n, k = 101, 51
    values = np.arange(1, n + 1)
    replicates = quantiles._replicates(values, 50, np.random.default_rng(3))
    for i in (40, 46, 50, 51, 55, 62):
        assert (replicates <= i).mean() == pytest.approx(stats.binom.sf(k - 1, n, i / n), abs=0.02)


@pytest.mark.parametrize("percent", [50, 90])
def test_95_percent_intervals_hold_the_true_quantile_95_times_in_100(percent):
    generator = np.random.default_rng(4)
    truth = stats.expon.ppf(percent / 100) * 1e6
    found = [interval(generator.exponential(1e6, 500).astype(np.int64), percent, seed) for seed in range(300)]
    covered = sum(q.low * 1e6 <= truth <= q.high * 1e6 for q in found)
    low, high = stats.binom.ppf([1e-4, 1 - 1e-4], 300, 0.95)
    assert low - 3 <= covered <= high + 3  # 1 point for the bootstrap's own bias


@pytest.mark.parametrize("n", [1, 2, 3, 10])
def test_small_samples_have_an_interval_around_their_value(n):
    sample = np.arange(1, n + 1) * 1_000_000
    for percent in (50, 90, 99):
        found = interval(sample, percent)
        assert 1 <= found.low <= found.ms <= found.high <= n


def test_equal_seeds_give_equal_intervals():
    sample = np.random.default_rng(0).integers(1, 10**6, 1000)
    assert interval(sample, 99, seed=5) == interval(sample, 99, seed=5)
