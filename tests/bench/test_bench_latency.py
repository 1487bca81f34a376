from __future__ import annotations

import gc
import itertools

import numpy as np
import pytest

from rkd.bench import latency
from rkd.bench.latency import Plan, Series, is_stationary, measure, sample, summarise, warm_up

MS = 1_000_000


class Machine:
    """A clock that only inferences move forward."""

    def __init__(self):
        self.now = 0
        self.order = []

    def clock(self):
        return self.now

    def series(self, times_ns, name="a", batch=1):
        times = iter(times_ns)

        def infer(_):
            self.order.append(name)
            self.now += next(times)

        return Series(infer, np.zeros((batch, 3, 2, 2), np.uint8))


def test_a_constant_latency_is_stationary():
    assert is_stationary([100] * 20)


@pytest.mark.parametrize(("later", "expected"), [(104, True), (96, True), (106, False), (94, False)])
def test_medians_may_differ_by_five_percent(later, expected):
    assert is_stationary([100] * 10 + [later] * 10) is expected


def test_fewer_than_two_windows_are_not_stationary():
    assert not is_stationary([100] * 19)


def test_single_spikes_do_not_count():
    times = [100] * 20
    times[12] = 10_000
    assert is_stationary(times)


def test_windows_grow_so_that_a_slow_ramp_is_seen():
    ramp = [1000 - i for i in range(400)]  # 1 % within 10 iterations, but 14 % between the last two quarters
    assert is_stationary(ramp[-20:])
    assert not is_stationary(ramp)


def test_warm_up_goes_on_until_the_latency_has_settled():
    machine = Machine()
    decay = (int(MS * (10 + 90 * 0.97**i)) for i in itertools.count())
    one = machine.series(decay)
    typical = warm_up(one, 60, machine.clock)
    assert one.stationary
    assert one.warm_up > 100
    assert typical == pytest.approx(10 * MS, rel=0.3)


def test_warm_up_lasts_at_least_two_windows_and_a_quarter_second():
    machine = Machine()
    slow = machine.series(itertools.repeat(100 * MS))
    warm_up(slow, 60, machine.clock)
    assert slow.warm_up == 20
    machine = Machine()
    quick = machine.series(itertools.repeat(MS))
    warm_up(quick, 60, machine.clock)
    assert 250 <= quick.warm_up < 300


def test_warm_up_ends_at_its_cap():
    machine = Machine()
    one = machine.series(100 * MS * 2**i for i in itertools.count())
    warm_up(one, 2.0, machine.clock)
    assert not one.stationary
    assert one.warm_up == 5  # 0.1 + 0.2 + 0.4 + 0.8 + 1.6 s


def sampled(times_ns, least, seconds, cap_seconds, capacity=1000):
    machine = Machine()
    one = machine.series(times_ns)
    one.times = np.empty(capacity, np.int64)
    sample(one, least, seconds, cap_seconds, machine.clock)
    return one


def test_sampling_waits_for_both_count_and_seconds():
    assert sampled(itertools.repeat(10 * MS), least=5, seconds=0.5, cap_seconds=9).n == 50
    assert sampled(itertools.repeat(100 * MS), least=20, seconds=0.5, cap_seconds=9).n == 20


def test_sampling_ends_at_its_cap_with_too_few_samples():
    assert sampled(itertools.repeat(1000 * MS), least=20, seconds=0.5, cap_seconds=3).n == 3


def test_a_model_that_gets_faster_after_its_warm_up_is_sampled_for_as_long_as_stated():
    """The last warm-up inferences say that there will be 200; there are ten times as many."""
    machine = Machine()
    one = machine.series(itertools.chain([10 * MS] * 25, itertools.repeat(MS // 2)))
    one.stages = lambda: (1, 2, machine.now / MS)
    measure([one], Plan(seconds=1.0, min_samples=50, cap_seconds=9, warm_up_cap_seconds=9), clock=machine.clock)
    found = summarise(one)
    assert (one.warm_up, one.n) == (25, 2000)
    assert found.seconds == pytest.approx(1.0)
    assert found.to_json()["seconds"] == 1.0
    assert set(one.times[: one.n].tolist()) == {MS // 2}
    np.testing.assert_allclose(one.stage_ms[2, : one.n], 250.5 + 0.5 * np.arange(2000))


def test_no_more_samples_are_kept_than_there_is_room_for(monkeypatch):
    monkeypatch.setattr(latency, "CAPACITY", 3000)
    assert sampled(itertools.repeat(MS), least=5, seconds=9, cap_seconds=9, capacity=0).n == 3000


def test_samples_are_the_inferences_times_in_order():
    one = sampled((i * MS for i in range(1, 100)), least=4, seconds=0, cap_seconds=9)
    assert one.times[: one.n].tolist() == [MS, 2 * MS, 3 * MS, 4 * MS]


def test_an_interrupted_slice_keeps_its_samples_and_garbage_collection():
    def times():
        yield from [MS] * 7
        raise KeyboardInterrupt

    machine = Machine()
    one = machine.series(times())
    one.times = np.empty(100, np.int64)
    with pytest.raises(KeyboardInterrupt):
        sample(one, 50, 0, 9, machine.clock)
    assert one.n == 7
    assert gc.isenabled()


def test_bundles_are_interleaved_in_rotating_rounds():
    machine = Machine()
    both = [machine.series(itertools.repeat(10 * MS), name) for name in "ab"]
    calls = []
    plan = Plan(seconds=1.0, min_samples=50, cap_seconds=9, warm_up_cap_seconds=9)
    measure(both, plan, lambda done, total: calls.append((done, total)), machine.clock)
    turns = [name for name, _ in itertools.groupby(machine.order)]
    # warm-up ab, then rounds ab ba ab ba ab; equal neighbours melt into one turn
    assert "".join(turns) == "abababab"
    assert [len(part) for part in both[0].rounds()] == [20] * 5
    assert [one.n for one in both] == [100, 100]
    assert calls == [(i, 12) for i in range(13)]
    untimed = len(machine.order) - 200 - sum(one.warm_up for one in both)
    assert untimed == 2 * plan.rounds * 3


def test_one_bundle_alone_runs_nothing_untimed_after_its_warm_up():
    machine = Machine()
    one = machine.series(itertools.repeat(10 * MS))
    measure([one], Plan(1.0, 50, 9, 9), clock=machine.clock)
    assert len(machine.order) == one.warm_up + one.n


def test_summary_states_percentiles_throughput_and_thirds():
    times = np.arange(1, 301) * MS
    one = Series(
        lambda _: None,
        np.zeros((4, 3, 2, 2), np.uint8),
        33,
        stationary=True,
        times=times,
        n=300,
        slices=[(0, 1)],
        ends=[300],
    )
    found = summarise(one)
    assert found is not None
    assert (found.p50.ms, found.p90.ms) == (150.5, pytest.approx(270.1))
    assert found.p90.low <= found.p90.ms <= found.p90.high <= 300
    assert found.p99.high is None  # of 300
    assert found.images_per_second == pytest.approx(4 * 300 / (300 * 301 / 2 / 1000))
    assert (found.n, found.batch, found.warm_up) == (300, 4, 33)
    assert (found.first_third_ms, found.last_third_ms) == (50.5, 250.5)


def test_no_sample_has_no_summary():
    assert summarise(Series(lambda _: None, np.zeros((1, 3, 2, 2), np.uint8))) is None
