from __future__ import annotations

import dataclasses

import pytest

from rkd.bench.device import Device, Load
from rkd.bench.latency import CAPACITY, Histogram, Latency
from rkd.bench.quantiles import Quantile
from rkd.bench.sensors.trace import Conditions, Others
from rkd.bench.validity import judge

Q = Quantile(1.0, 0.9, 1.1)
GOOD = Latency(
    Q, Q, Q, None, 1.0, 400, 1, 8.0, 1000.0, 20, stationary=True, first_third_ms=1.0, last_third_ms=1.05,
    histogram=Histogram(0.9, 1.1, (400,)), rounds=(),
)  # fmt: skip
DEVICE = Device(None, None, "x86_64", 4, 4, None, None, "6.1", "3.11", None, None, None, None, None)


def reasons(**changes):
    facts = {
        "instead": "",
        "device": DEVICE,
        "on_gpu": False,
        "load": Load(0.1, 3.0),
        "conditions": None,
        "latencies": {1: GOOD},
        "min_samples": 400,
        "seconds": 8.0,
        "not_finite": 0,
        "classes_present": 5,
        "interrupted": None,
    }
    verdict = judge(**{**facts, **changes})
    assert verdict.valid == (not verdict.reasons)
    return tuple(reason.text for reason in verdict.reasons)


def changed(**changes):
    return dataclasses.replace(GOOD, **changes)


def test_a_quiet_complete_run_is_valid_whatever_the_lagging_load_average_says():
    assert reasons() == ()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"instead": "another runtime"}, "another runtime"),
        ({"classes_present": 1}, "all evaluation images are of one class"),
        ({"interrupted": "latency"}, "interrupted during latency"),
        ({"not_finite": 3}, "3 images gave NaN"),
        ({"latencies": {1: changed(n=399)}}, "399 latency samples, 400 wanted"),
        ({"latencies": {1: changed(seconds=7.9)}}, "400 latency samples in 7.9 s, 8 s wanted; run it to the end"),
        ({"latencies": {1: changed(seconds=8.0)}, "seconds": 600.0}, "400 latency samples in 8 s, 600 s wanted"),
        (
            {"latencies": {1: changed(n=CAPACITY, seconds=7.0)}},
            "20,000,000 latency samples in 7 s, 8 s wanted; more are",
        ),
        ({"latencies": {1: changed(stationary=False)}}, "not stationary after 20"),
        ({"latencies": {1: changed(last_third_ms=1.11)}}, "drifted from 1 ms"),
        ({"latencies": {1: changed(last_third_ms=0.89)}}, "drifted from 1 ms"),
        ({"load": Load(0.51, 0.0)}, "cores busy before the start: 0.51, at most 0.50"),
        ({"load": Load(None, 0.51)}, "load average before the start"),
        ({"device": dataclasses.replace(DEVICE, emulator="qemu-aarch64")}, "emulated CPU (qemu-aarch64)"),
    ],
)
def test_each_fault_alone_makes_a_result_invalid(changes, words):
    (reason,) = reasons(**changes)
    assert words in reason


def test_drift_below_ten_percent_is_allowed():
    assert reasons(latencies={1: changed(last_third_ms=1.09)}) == ()


def test_a_large_server_may_have_five_percent_of_its_cores_busy():
    server = dataclasses.replace(DEVICE, cores=96)
    assert reasons(device=server, load=Load(4.8, None)) == ()
    assert len(reasons(device=server, load=Load(4.9, None))) == 1


def test_load_does_not_matter_where_no_latency_was_measured():
    assert reasons(latencies={}, load=Load(4.0, 4.0)) == ()


def seen(others=None, reason=None):
    return Conditions(80, 0.1, {}, {}, {}, {}, others, reason)


@pytest.mark.parametrize("conditions", [None, seen()])
def test_a_timing_of_which_nothing_tells_what_other_programs_took_is_not_watched(conditions):
    assert reasons(load=Load(None, None), conditions=conditions) == (
        "what other programs took of the CPU is not reported here",
    )


@pytest.mark.parametrize(
    ("load", "others"), [(Load(0.1, None), None), (Load(None, 0.1), None), (Load(None, None), Others(0, 0, 0, 8, 0.5))]
)
def test_a_timing_of_which_anything_tells_what_other_programs_took_is_not_blamed(load, others):
    assert reasons(load=load, conditions=seen(others)) == ()


def test_sensors_that_were_not_read_are_one_reason():
    (reason,) = reasons(load=Load(None, None), conditions=seen(reason="the process ended"))
    assert "the process ended" in reason
