"""From the sensors, the neighbours and the memory child to the result: whole runs with a fault planted in them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from rkd.bench import memory, result, session
from rkd.bench.options import BenchOptions
from rkd.bench.sensors import monitor
from rkd.bench.sensors.monitor import Monitor

ONLY_LATENCY = BenchOptions(seconds=1.0, min_samples=30, threads=1, memory=False, accuracy=False)
ONLY_MEMORY = BenchOptions(threads=1, latency=False, accuracy=False)


def reasons(entry):
    return [(reason["code"], reason["text"]) for reason in entry["validity"]["reasons"]]


@pytest.mark.parametrize("start", ["import sys; sys.exit(3)", "import sys; sys.stdin.readline(); print('ready')"])
def test_a_sensor_process_that_dies_makes_the_timing_invalid(make_bundle, fast, monkeypatch, start):
    monkeypatch.setattr(monitor, "_START", start)
    options = dataclasses.replace(fast, memory=False, accuracy=False)
    (entry,) = session.run([make_bundle()], options)["entries"]
    assert entry["validity"]["timing"] is False
    (text,) = [text for code, text in reasons(entry) if code == "not-watched"]
    assert text == f"what happened while it was timed is not known: {entry['conditions']['reason']}; run it again"


@pytest.fixture
def one_core():
    """This process and its children share one core, however large the machine is."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


@pytest.fixture
def busy(one_core):
    """Three other programs that never rest: at least three quarters of the core are theirs."""
    children = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
    yield
    for child in children:
        child.kill()
        child.wait()


@pytest.mark.promise
def test_busy_processes_beside_the_bench_share_the_cpu(busy, make_bundle):
    (entry,) = session.run([make_bundle()], ONLY_LATENCY)["entries"]
    (text,) = [text for code, text in reasons(entry) if "another program shared the CPU" in text]
    assert entry["conditions"]["others"]["mean_cores"] > 0.5
    assert ("shared-cpu", text) in reasons(entry)


def test_a_boards_sensors_come_through_to_throttling_and_watts(make_bundle, tmp_path, monkeypatch):
    """The rail draws 2 W until the models are loaded and 6 W from then on; each slice has an over-current event."""
    chips = tmp_path / "sys/class/hwmon"

    def put(name, text):
        file = chips / name
        file.parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "new").write_text(f"{text}\n")
        (tmp_path / "new").replace(file)  # the sampler never sees a part of it

    def between_slices(_stage, done, _total):
        put("hwmon0/curr1_input", 1200)
        put("hwmon1/oc1_event_cnt", 7 + done)

    put("hwmon0/name", "ina3221")
    put("hwmon0/in1_label", "VDD_IN")
    put("hwmon0/in1_input", 5000)
    put("hwmon0/curr1_input", 400)
    put("hwmon1/name", "soctherm_oc")
    put("hwmon1/oc1_event_cnt", 7)
    monkeypatch.setattr(session, "Monitor", functools.partial(Monitor, root=tmp_path))
    (entry,) = session.run([make_bundle()], ONLY_LATENCY, between_slices)["entries"]
    assert any(code == "throttled" and "over-current oc1 (+" in text for code, text in reasons(entry))
    assert entry["conditions"]["throttle"]["count: over-current oc1"]["during"] >= 1
    power = entry["power"]
    assert power["watts"] == pytest.approx(6.0, rel=0.01)
    assert power["idle_watts"] == pytest.approx(2.0, rel=0.01)
    assert power["joules"] == pytest.approx(6.0 * entry["latency"]["mean_ms"] / 1e3, rel=0.01)


class Slowed:
    """A real runner whose inferences take what they are told, by a clock that only they move."""

    now_ns = 0

    def __init__(self, inner, times_ns):
        self.inner, self.times_ns = inner, times_ns

    def __enter__(self):
        self.inner.__enter__()
        self.identity = self.inner.identity
        return self

    def __exit__(self, *what):
        self.inner.__exit__(*what)

    def infer(self, images):
        Slowed.now_ns += int(next(self.times_ns))
        return self.inner.infer(images)


@pytest.mark.parametrize(
    ("bundles", "least"), [pytest.param(*few, marks=pytest.mark.promise) for few in ((1, 5), (2, 3), (5, 3), (8, 3))]
)
def test_quick_leaves_each_memory_child_time_to_start(make_bundle, monkeypatch, bundles, least):
    timeouts = []

    def used_up(_model, _choice, _shape, timeout, *_):
        timeouts.append(timeout)
        Slowed.now_ns += int(1e9 * timeout)
        return memory.Memory(reason="did not finish")

    open_runner = session.open_runner

    def slowed(*arguments):
        return Slowed(open_runner(*arguments), itertools.repeat(1e6))

    monkeypatch.setattr(session, "open_runner", slowed)
    monkeypatch.setattr(session, "measure", functools.partial(session.measure, clock=lambda: Slowed.now_ns))
    monkeypatch.setattr(session, "measure_memory", used_up)
    options = BenchOptions(mode="quick", threads=1, sensors=False)
    found = session.run([make_bundle()] * bundles, options, clock=lambda: Slowed.now_ns / 1e9)
    assert min(timeouts[:5]) >= least - 1e-6  # 20 s have no room for more
    said = [entry["memory"]["reason"] for entry in found["entries"]]
    assert said.count("did not finish") == len(timeouts) >= min(bundles, 5)
    assert set(said) <= {"did not finish", "no time was left for it; measure without --quick"}
    if bundles <= 3:
        assert "too-short" not in [code for entry in found["entries"] for code, _ in reasons(entry)]


@pytest.mark.parametrize(
    ("ms_an_image", "bundles"), [(0.5, 1), (60, 1), pytest.param(60, 3, marks=pytest.mark.promise)]
)
def test_quick_ends_within_twenty_seconds_however_slow_the_models_are(make_bundle, monkeypatch, ms_an_image, bundles):
    class Slow(Slowed):
        def infer(self, images):
            self.times_ns = iter([1e6 * ms_an_image * len(images)])
            return super().infer(images)

    def slow_memory(_model, _choice, _shape, timeout, *_):
        Slowed.now_ns += int(1e9 * timeout)
        return memory.Memory(reason="did not finish")

    open_runner = session.open_runner
    monkeypatch.setattr(session, "open_runner", lambda *arguments: Slow(open_runner(*arguments), None))
    monkeypatch.setattr(session, "measure", functools.partial(session.measure, clock=lambda: Slowed.now_ns))
    monkeypatch.setattr(session, "measure_memory", slow_memory)
    started = []

    def tell(stage, done, _total):
        if (stage, done) == ("latency", 0):
            started.append(Slowed.now_ns)

    options = BenchOptions(mode="quick", threads=1, sensors=False)
    found = session.run([make_bundle() for _ in range(bundles)], options, tell, clock=lambda: Slowed.now_ns / 1e9)
    result.verify(found, "test")
    assert (Slowed.now_ns - started[0]) / 1e9 <= 20.01
    for entry in found["entries"]:
        assert entry["evaluated"]["images"] == entry["scores"]["acc"]["n"] == entry["agreement"]["share"]["n"] // 2
        assert (entry["evaluated"]["images"] < 256) == (ms_an_image > 1)
        assert entry["latency"]["n"] >= 5
        assert ("too-short" in dict(reasons(entry))) == (bundles > 1)


@pytest.mark.promise
def test_a_millisecond_more_of_sleep_is_a_millisecond_more_in_the_pair(make_bundle, monkeypatch):
    generator = np.random.default_rng(0)
    open_runner = session.open_runner
    means_ms = iter((4.0, 5.0))

    def slowed(*arguments):
        mean_ns = 1e6 * next(means_ms)
        return Slowed(open_runner(*arguments), iter(lambda: mean_ns + generator.normal(0, 1e5), None))

    monkeypatch.setattr(session, "open_runner", slowed)
    monkeypatch.setattr(session, "measure", functools.partial(session.measure, clock=lambda: Slowed.now_ns))
    options = dataclasses.replace(ONLY_LATENCY, sensors=False)
    found = session.run([make_bundle(), make_bundle(name="slower.ort-cpu")], options)
    first, second = (entry["latency"]["p50"]["ms"] for entry in found["entries"])
    (pair,) = found["comparisons"]
    assert second - first == pytest.approx(1.0, abs=0.05)
    assert first * (pair["ratio"] - 1) == pytest.approx(1.0, abs=0.05)


LEAKING = """
import sys; sys.path[:] = sys.argv[1:]
import itertools, mmap
from rkd.bench import memory_child
from rkd.bench.runner import OrtRunner
kept, turns, infer = [], itertools.count(), OrtRunner.infer
def leak(self, images):
    if next(turns) % {every} == 0:
        pages = mmap.mmap(-1, {size})
        pages.write(bytes([1]) * {size})
        kept.append(pages)
    return infer(self, images)
OrtRunner.infer = leak
sys.exit(memory_child.main())
"""


@pytest.mark.parametrize(("size", "every"), [(64 * 1024, 1), (8 * 1024, 5)], ids=["64 KiB", "1.6 kB"])
def test_a_runner_that_leaks_in_its_child_is_found_and_its_rate_is_what_was_planted(
    make_bundle, monkeypatch, size, every
):
    monkeypatch.setattr(memory, "_START", LEAKING.format(size=size, every=every))
    (entry,) = session.run([make_bundle()], ONLY_MEMORY)["entries"]
    (text,) = [finding["text"] for finding in entry["findings"] if finding["code"] == "leak"]
    assert "resident memory grew all along" in text
    said = re.search(r"\(about (\d+\.\d) kB each\)", text)
    assert float(said[1]) == pytest.approx(size / every / 1e3, rel=0.1)


def test_a_runner_that_does_not_leak_in_its_child_is_not_blamed(make_bundle):
    (entry,) = session.run([make_bundle()], ONLY_MEMORY)["entries"]
    assert "leak" not in [finding["code"] for finding in entry["findings"]]
