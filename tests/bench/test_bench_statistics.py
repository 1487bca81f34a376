"""Statistics against other implementations, known quantiles, and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from rkd.bench import comparison
from rkd.bench.comparison import ratio
from rkd.bench.latency import Series, summarise
from rkd.bench.quantiles import quantile
from rkd.metrics import Proportion

SIZES = [(hits, n) for n in (1, 7, 50, 1000, 10_000) for hits in sorted({0, 1, n // 3, n - 1, n})]


@pytest.mark.parametrize(("hits", "n"), SIZES)
def test_wilson_intervals_are_statsmodels_and_scipys(hits, n):
    low, high = (end / 100 for end in Proportion(hits, n).interval)
    assert (low, high) == pytest.approx(proportion_confint(hits, n, method="wilson"), abs=1e-12)
    theirs = stats.binomtest(hits, n).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


@pytest.mark.parametrize(("p", "n"), [(0.02, 500), (0.5, 100), (0.9, 1000), (0.99, 2000)])
def test_wilson_intervals_cover_the_truth_in_about_95_of_100(p, n):
    hits = np.random.default_rng(0).binomial(n, p, 20_000)
    covered = {int(h): (i := Proportion(int(h), n).interval)[0] <= 100 * p <= i[1] for h in np.unique(hits)}
    assert np.mean([covered[int(h)] for h in hits]) == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize("distribution", [stats.expon(), stats.gamma(3), stats.lognorm(0.5)])
def test_percentiles_of_known_distributions(distribution):
    ordered = np.sort((1e6 * distribution.rvs(200_000, random_state=0)).astype(np.int64))
    for percent in (50, 90, 99, 99.9):
        found = quantile(ordered, percent)
        truth = distribution.ppf(percent / 100)
        assert found.ms == pytest.approx(truth, rel=0.03)
        assert found.ms == pytest.approx(stats.scoreatpercentile(ordered, percent) / 1e6)


def test_students_quantiles_are_scipys():
    expected = stats.t.ppf(0.975, np.arange(1, len(comparison._T975) + 1))
    np.testing.assert_allclose(comparison._T975, expected, atol=5e-5)


@pytest.mark.parametrize("rounds", [2, 5, 16, 40])
def test_the_ratio_and_its_interval_are_scipys_of_the_logarithms(rounds):
    generator = np.random.default_rng(rounds)
    first, second = generator.lognormal(0, 0.1, rounds), generator.lognormal(0.5, 0.1, rounds)
    found = ratio(first, second)
    logs = np.log(second / first)
    theirs = stats.t.interval(0.95, rounds - 1, loc=logs.mean(), scale=stats.sem(logs))
    assert found.ratio == pytest.approx(stats.gmean(second / first))
    assert (found.low, found.high) == pytest.approx(np.exp(theirs), rel=1e-4)


@pytest.mark.parametrize("rounds", [5, 16])
def test_the_interval_of_a_ratio_covers_the_truth_in_about_95_of_100(rounds):
    generator = np.random.default_rng(3)
    inside = 0
    for _ in range(1500):
        drift = generator.lognormal(0, 0.3, rounds)  # of the machine: hits both alike
        found = ratio(drift * generator.lognormal(0, 0.05, rounds), 2 * drift * generator.lognormal(0, 0.05, rounds))
        inside += found.low <= 2 <= found.high
    assert inside / 1500 == pytest.approx(0.95, abs=0.02)


def test_one_round_has_no_interval_and_none_no_ratio():
    one = ratio([1.0], [3.0])
    assert (one.ratio, one.low, one.high, one.rounds) == (pytest.approx(3), None, None, 1)
    assert one.to_json() == {"ratio": 3.0, "low": None, "high": None, "rounds": 1}
    assert ratio([], []) is None
    assert ratio([0.0], [1.0]) is None


def test_histograms_hold_every_sample_and_are_numpys():
    times = (1e6 * np.random.default_rng(4).lognormal(0, 1, 5000)).astype(np.int64)
    series = Series(lambda _: None, np.zeros((1, 3, 2, 2), np.uint8), times=times, n=5000, slices=[(0, 1)], ends=[5000])
    found = summarise(series).histogram
    assert sum(found.counts) == 5000
    assert (found.low_ms, found.high_ms) == (times.min() / 1e6, times.max() / 1e6)
    edges = np.exp(np.linspace(math.log(times.min()), math.log(times.max()), 61))
    edges[0], edges[-1] = times.min(), times.max()
    assert list(found.counts) == np.histogram(times, edges)[0].tolist()


def test_equal_samples_are_one_bin():
    series = Series(
        lambda _: None, np.zeros((1, 3, 2, 2), np.uint8), times=np.full(9, 5), n=9, slices=[(0, 1)], ends=[9]
    )
    assert summarise(series).histogram.counts == (9,)


def test_the_tail_needs_a_thousand_samples():
    times = np.arange(1, 1001)
    images = np.zeros((1, 3, 2, 2), np.uint8)
    full = Series(lambda _: None, images, times=times, n=1000, slices=[(0, 1)], ends=[1000])
    short = Series(lambda _: None, images, times=times, n=999, slices=[(0, 1)], ends=[999])
    assert summarise(full).p999.ms == pytest.approx(np.percentile(times, 99.9) / 1e6)
    assert summarise(short).p999 is None
