from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from rkd.bench.quantiles import fewest_for_upper_end, quantile, ranks

SIZES = [1, 2, 5, 6, 30, 36, 100, 300, 367, 368, 400, 999, 1000, 3687, 3688, 100_000, 20_000_000]


@pytest.mark.parametrize("percent", [50, 90, 99, 99.9])
@pytest.mark.parametrize("n", SIZES)
def test_ranks_are_the_tightest_that_scipys_binomial_allows(percent, n):
    lower, upper = ranks(n, percent)
    below = stats.binom(n, percent / 100)
    assert below.cdf(lower - 1) <= 0.025 < below.cdf(lower)
    if upper is None:
        assert below.sf(n - 1) > 0.025
    else:
        assert below.sf(upper - 1) <= 0.025 < below.sf(upper - 2)


@pytest.mark.parametrize("n", [30, 100, 400, 1000, 2000, 5000])
@pytest.mark.parametrize("percent", [50, 90, 99, 99.9])
def test_intervals_cover_a_lognormal_quantile_in_at_least_95_of_100_runs(percent, n):
    """At the sizes of quick, default and mlperf runs; a bootstrap's covered p99 of 100 in 62 runs of 100."""
    runs = 4000
    generator = np.random.default_rng([n, int(10 * percent)])
    lower, upper = ranks(n, percent)
    # The k-th of n samples is the distribution's quantile at the k-th of n uniform numbers: Beta(k, n + 1 - k), and the
    # next ones above it follow in the same way; no run has to be sorted.
    low = generator.beta(lower, n + 1 - lower, runs) if lower else np.zeros(runs)
    high = np.ones(runs)
    if upper is not None:
        high = low + (1 - low) * generator.beta(upper - lower, n + 1 - upper, runs)
    ends = stats.lognorm.ppf([low, high], 0.3)
    truth = stats.lognorm.ppf(percent / 100, 0.3)
    assert ((ends[0] <= truth) & (truth <= ends[1])).mean() >= 0.95 - 3 * np.sqrt(0.95 * 0.05 / runs)


@pytest.mark.parametrize(("percent", "n"), [(50, 100), (90, 100), (99, 100), (99, 400), (99.9, 1000), (99.9, 5000)])
def test_intervals_of_real_samples_cover_too(percent, n):
    runs = 1000
    samples = np.sort((1e6 * np.random.default_rng(n).lognormal(0, 0.3, (runs, n))).astype(np.int64), axis=1)
    truth = stats.lognorm.ppf(percent / 100, 0.3)
    found = [quantile(row, percent) for row in samples]
    covered = sum(q.low <= truth and (q.high is None or truth <= q.high) for q in found) / runs
    assert covered >= 0.95 - 3 * np.sqrt(0.95 * 0.05 / runs)
    assert all(q.low <= q.ms and (q.high is None or q.ms <= q.high) for q in found)


@pytest.mark.parametrize(("percent", "fewest"), [(50, 6), (90, 36), (99, 368), (99.9, 3688)])
def test_below_the_fewest_samples_there_is_no_upper_end(percent, fewest):
    assert fewest_for_upper_end(percent) == fewest
    assert quantile(np.arange(1, fewest), percent).high is None
    assert quantile(np.arange(1, fewest + 1), percent).high == pytest.approx(fewest / 1e6)  # the slowest


@pytest.mark.parametrize("n", [1, 2, 3, 10])
def test_small_samples_have_an_interval_around_their_value(n):
    sample = np.arange(1, n + 1) * 1_000_000
    for percent in (50, 90, 99):
        found = quantile(sample, percent)
        assert 0 <= found.low <= found.ms <= n
        assert found.high is None or found.high >= found.ms


def test_an_open_end_is_null_in_json():
    assert quantile(np.full(100, 2_000_000), 99).to_json() == {"ms": 2.0, "low": 2.0, "high": None}
