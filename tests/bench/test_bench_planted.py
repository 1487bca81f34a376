"""What is planted is called by its name: a slower model, a leak, throttling, a noisy neighbour."""

from __future__ import annotations

import itertools
import math
import mmap
from functools import cache

import numpy as np
import pytest

from rkd.bench import memory, memory_child
from rkd.bench.comparison import compare
from rkd.bench.device import Device, Load
from rkd.bench.latency import Plan, Series, measure, summarise
from rkd.bench.memory import Memory, growth
from rkd.bench.sensors.reading import Reading
from rkd.bench.sensors.sysfs import Sysfs
from rkd.bench.sensors.tegrastats import parse_line
from rkd.bench.sensors.trace import Sample, Trace, conditions
from rkd.bench.validity import findings, judge
from rkd.metrics import Proportion, Scores

MS, S = 1_000_000, 1_000_000_000
TIMING = [(1 * S, 11 * S)]


DEVICE = Device(None, None, "aarch64", 4, 4, None, None, "5.15", "3.10", None, None, None, None, None)


class Machine:
    """A clock that only inferences move forward."""

    def __init__(self):
        self.now = 0

    def clock(self):
        return self.now

    def series(self, times_ns):
        times = iter(times_ns)

        def infer(_):
            self.now += next(times)

        return Series(infer, np.zeros((1, 3, 2, 2), np.uint8))


@cache
def steady():
    """Half a second of inferences of a millisecond."""
    machine = Machine()
    one = machine.series(itertools.repeat(MS))
    measure([one], Plan(0.5, 400, 9, 9), clock=machine.clock)
    return summarise(one)


def judged(reading, others=lambda _: 0.0, *, on_gpu=False):
    """The codes and texts of a run whose sensors said this, a function of the second."""
    return judged_trace(
        Trace(tuple(Sample(i * S // 10, others(i / 10), reading(i / 10)) for i in range(120)), 0.1), on_gpu
    )


def judged_trace(trace, on_gpu=False):
    verdict = judge(
        instead="",
        device=DEVICE,
        on_gpu=on_gpu,
        load=Load(0.0, 0.0),
        conditions=conditions(trace, TIMING, S, 0.5),
        latencies={1: steady()},
        min_samples=400,
        seconds=0.5,
        not_finite=0,
        classes_present=5,
        interrupted=None,
    )
    assert verdict.holds("scores")
    return {reason.code: reason.text for reason in verdict.reasons}


def noisy(mean_ns, seed):
    generator = np.random.default_rng(seed)
    return (int(mean_ns * value) for value in iter(lambda: generator.lognormal(0, 0.05), None))


def test_a_millisecond_of_sleep_in_a_model_is_seen_as_a_millisecond():
    machine = Machine()
    plain = machine.series(noisy(4 * MS, 0))
    slowed = machine.series(t + MS for t in noisy(4 * MS, 1))
    measure([plain, slowed], Plan(2.0, 400, 60, 10), clock=machine.clock)
    before, after = summarise(plain), summarise(slowed)
    assert after.p50.ms - before.p50.ms == pytest.approx(1.0, abs=0.02)
    pair = compare(plain, slowed)
    assert pair.low <= 1.25 <= pair.high
    assert pair.high - pair.low < 0.03


@pytest.mark.promise
def test_drift_of_the_machine_cancels_in_the_pair_but_not_in_the_percentiles():
    machine = Machine()

    def drifting(factor):
        return (int(factor * (MS + machine.now / 5_000)) for _ in itertools.count())

    both = [machine.series(drifting(factor)) for factor in (1, 2)]
    measure(both, Plan(2.0, 400, 60, 1), clock=machine.clock)
    pair = compare(*both)
    assert pair.ratio == pytest.approx(2, rel=0.02)
    assert summarise(both[0]).rounds[-1][1] > 1.3 * summarise(both[0]).rounds[0][1]


class Leaking:
    """A runner that keeps a little of each batch."""

    def __init__(self, kept_bytes):
        self.kept, self.size = [], kept_bytes

    def infer(self, images):
        if self.size:
            pages = mmap.mmap(
                -1, self.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            )  # memory that the process had freed before cannot stand in for it
            pages.write(bytes(self.size - 1) + b"1")
            self.kept.append(pages)
        return images


@pytest.mark.parametrize(("kept_bytes", "leak"), [(64 * 1024, True), (0, False)])
def test_a_leak_in_real_memory_is_found_and_its_absence_too(kept_bytes, leak):
    done, settled, sizes = memory_child.run(Leaking(kept_bytes), np.zeros((1, 3, 8, 8), np.uint8), 300, 0, 60)
    assert done == 300
    assert settled is not None
    grown, found = growth(sizes)
    assert found is leak
    if leak:
        assert grown == pytest.approx(0.75 * 290 * kept_bytes, rel=0.1)


class Ticking(Leaking):
    """It takes a while by a clock that only it moves."""

    def __init__(self, kept_bytes, seconds):
        super().__init__(kept_bytes)
        self.seconds, self.now = seconds, 0.0

    def infer(self, images):
        self.now += self.seconds
        return super().infer(images)


@pytest.mark.parametrize(
    ("seconds", "kept_bytes", "inferences"),
    [
        (2**-11, 0, 2048),  # a second
        (5 / 1024, 0, 600),
        (2**-6, 0, 384),  # six seconds
        (1.0, 0, 40),
        (2**-11, 128 * 1024, 600),  # by then 74 MiB
        (2**-11, 64 * 1024, 1040),  # 64 MiB after the tenth, looked at every eight
    ],
)
def test_the_memory_run_is_long_enough_for_a_slow_leak_and_short_enough_for_a_slow_model(
    monkeypatch, seconds, kept_bytes, inferences
):
    runner = Ticking(kept_bytes, seconds)
    monkeypatch.setattr(memory_child.time, "monotonic", lambda: runner.now)
    images = np.zeros((1, 3, 8, 8), np.uint8)
    done, *_ = memory_child.run(runner, images, memory.INFERENCES, memory.SECONDS, memory.CAP_SECONDS)
    assert done == pytest.approx(inferences, abs=0 if not kept_bytes else 16)


def test_a_leak_is_called_a_leak():
    leaking = Memory(peak_bytes=9, steady_bytes=9, growth_bytes=6_000_000, leak=True, inferences=410)
    (found,) = findings(leaking, scores=None, classes=3, images=None, notes=(), flips=0)
    assert found["code"] == "leak"
    assert (
        "memory leak: resident memory grew all along, by 6.0 MB over 410 inferences (about 20.0 kB each)"
        in found["text"]
    )


@pytest.mark.parametrize(
    ("sizes", "leak"),
    [
        ([100 * 2**20] * 100, False),
        ([100 * 2**20] * 50 + [108 * 2**20] * 50, False),  # an arena that grew once
        ([100 * 2**20 + i * 2**16 for i in range(100)], True),
        ([100 * 2**20 + i * 2**10 for i in range(100)], False),  # 100 KiB in all
        ([100 * 2**20 - i * 2**16 for i in range(100)], False),
        ([100 * 2**20 + i // 20 * 2**21 for i in range(100)], True),  # in steps, but all along
        ([100 * 2**20 + i // 50 * 2**23 for i in range(150)], False),  # two steps
        ([100 * 2**20 + i // 38 * 2**22 for i in range(150)], False),  # three steps
        ([int(100e6 + 2e6 * (1 - math.exp(-3 * i / 150))) for i in range(150)], False),
        ([int(100e6 + 2e6 * math.log1p(4 * i) / math.log(601)) for i in range(150)], False),
        ([int(100e6 + 50e3 * i * 400 / 150) for i in range(150)], True),  # 50 kB an inference
    ],
)
def test_growth_all_along_is_a_leak_and_one_step_is_none(sizes, leak):
    assert growth(sizes)[1] is leak


def test_a_random_walk_of_64_kb_a_step_is_seldom_called_a_leak_and_a_leak_beside_noise_always():
    generator = np.random.default_rng(0)
    walks = 1e8 + np.cumsum(generator.normal(0, 64e3, (2000, 150)), axis=1)
    assert np.mean([growth(walk.tolist())[1] for walk in walks]) < 0.02
    leaks = 1e8 + np.linspace(0, 2e7, 150) + generator.normal(0, 1e6, (200, 150))
    assert all(growth(leak.tolist())[1] for leak in leaks)


@pytest.mark.parametrize(
    ("grown", "steady", "leak", "said"),
    [
        (8_388_608, 110_000_000, False, True),
        (8_388_608, 110_000_000, True, False),
        (4_194_304, 10_000_000, False, False),  # not over 4 MiB
        (8_388_608, 170_000_000, False, False),  # not over 5 %
        (-8_388_608, 110_000_000, False, False),
    ],
)
def test_large_growth_that_is_no_leak_is_said_to_be_too_short_to_tell(grown, steady, leak, said):
    seen = Memory(peak_bytes=steady, steady_bytes=steady, growth_bytes=grown, leak=leak, inferences=600)
    found = findings(seen, scores=None, classes=3, images=None, notes=(), flips=0)
    text = "resident memory grew by 8.4 MB over 600 inferences: too short to tell whether it is a leak"
    assert ({"code": "grew", "text": text} in found) is said


def test_few_figures_say_nothing_about_growth():
    assert growth([1, 2, 3]) is None


@pytest.mark.parametrize(
    ("reading", "words"),
    [
        (lambda t: Reading(throttle={"count: over-current oc3": int(t > 5) * 12}), "over-current oc3 (+12)"),
        (lambda t: Reading(throttle={"level: cpu-throttle-alert": int(6 < t < 7)}), "cpu-throttle-alert (level 1)"),
        (lambda t: Reading(throttle={"level: Processor": 2 + int(t > 5)}), "Processor (level 3, 2 before the start)"),
        (lambda _: Reading(throttle={"now: under-voltage": 1}), "under-voltage (level 1)"),
        (lambda t: Reading(throttle={"count: cpu0 core too hot": 5 + int(t)}), "cpu0 core too hot (+10)"),
        (
            lambda t: Reading(hertz={"gpu cap": 1020e6 if t < 6 else 612e6}),
            "the gpu was allowed 1,020 MHz before and 612 MHz",
        ),
    ],
)
def test_a_throttled_board_is_called_throttled(reading, words):
    found = judged(reading)
    assert list(found) == ["throttled"]
    assert words in found["throttled"]


def test_throttling_before_and_after_the_timing_does_not_spoil_it():
    assert judged(lambda t: Reading(throttle={"count: oc3": int(t < 0.5), "now: hot": int(t > 11.2)})) == {}


def test_a_level_that_a_cooling_device_had_before_is_none_of_throttling():
    assert judged(lambda t: Reading(throttle={"level: Processor": 3 - int(t > 5)})) == {}


@pytest.mark.parametrize(
    "name",
    ["cpu-throttle-alert", "gpu-throttle-alert", "thermal-cpufreq-0", "devfreq-17000000.gpu"],
)
def test_a_board_that_is_hot_from_the_run_before_is_called_throttled(name):
    """Levels beside lines of tegrastats: hot from the first look on, and never cooler."""

    def reading(t):
        line = f"CPU [9%@729,7%@729] EMC_FREQ 3%@2133 GR3D_FREQ 0%@612 tj@{97 - t / 10:.3f}C VDD_IN 9744mW/9179mW"
        return parse_line(line).over(Reading(throttle={f"level: {name}": 2}))

    found = judged(reading)
    assert list(found) == ["throttled"]
    assert f"{name} (level 2, 2 before the start)" in found["throttled"]


def test_a_board_that_warns_of_its_hot_surface_is_not_called_throttled(tmp_path):
    """A Jetson Orin raises it at 70 C, 29 below the trip that cuts its clocks."""
    base = tmp_path / "sys/class/thermal"
    files = {"cooling_device9/type": "hot-surface-alert", "cooling_device9/cur_state": "1"}
    files |= {"thermal_zone8/type": "tj-thermal", "thermal_zone8/temp": "72500"}
    for name, text in files.items():
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(f"{text}\n")
    seen = Sysfs(tmp_path).read()
    assert seen.celsius == {"tj": 72.5}
    assert judged(lambda t: seen if t > 5 else Reading()) == {}


def test_a_level_that_had_fallen_before_the_timing_does_not_spoil_it():
    assert judged(lambda t: Reading(throttle={"level: cpu-throttle-alert": int(t < 0.9)})) == {}


def test_a_cap_that_is_lifted_after_the_timing_was_throttling_and_one_that_stays_is_a_power_mode():
    found = judged(lambda t: Reading(hertz={"cpu cap": 1.2e9 if t < 11.2 else 2.2e9}))
    assert list(found) == ["throttled"]
    assert "throttled before the start: the cpu was allowed 1,200 MHz before and 2,200 MHz after" in found["throttled"]
    assert judged(lambda _: Reading(hertz={"cpu cap": 1.2e9})) == {}


def test_a_clock_that_falls_is_called_drift():
    found = judged(lambda t: Reading(hertz={"cpu": 1.5e9 if t < 8 else 1.2e9}))
    assert list(found) == ["clocks-drifted"]
    assert "from 1,500 MHz" in found["clocks-drifted"]
    assert "to 1,200 MHz" in found["clocks-drifted"]


@pytest.mark.parametrize("others", [lambda _: 0.8, lambda t: 1.6 if 3 < t < 6 else 0.1])
def test_a_noisy_neighbour_is_called_another_program(others):
    found = judged(lambda _: Reading(), others)
    assert list(found) == ["shared-cpu"]
    assert "another program shared the CPU" in found["shared-cpu"]


@pytest.mark.parametrize("others", [lambda _: None, lambda _: 0.3, lambda t: 2.0 if 4 < t < 4.3 else 0.0])
def test_a_quiet_machine_is_valid(others):
    assert judged(lambda _: Reading(hertz={"cpu": 1.5e9, "cpu cap": 1.5e9}, celsius={"cpu": 60.0}), others) == {}


@pytest.mark.parametrize(
    ("before", "on_gpu", "codes"), [(37, True, ["shared-gpu"]), (37, False, []), (5, True, []), (0, True, [])]
)
def test_a_neighbour_on_the_gpu_is_named_where_the_model_runs_there_and_our_own_load_is_not(before, on_gpu, codes):
    def reading(t):
        return parse_line(f"CPU [9%@729] GR3D_FREQ {before if t < 1 else 99}%@612 VDD_IN 4744mW/6179mW")

    found = judged(reading, on_gpu=on_gpu)
    assert list(found) == codes
    assert not codes or "the GPU was 37 % busy before the model was loaded" in found["shared-gpu"]


def test_one_look_at_a_busy_gpu_is_no_neighbour():
    assert judged(lambda t: Reading(load={"gpu": 80.0 * (0.4 < t < 0.6)}), on_gpu=True) == {}


def test_a_machine_that_does_not_tell_its_gpus_load_is_not_blamed():
    assert judged(lambda _: Reading(), on_gpu=True) == {}


def looks(*seconds):
    return Trace(tuple(Sample(int(t * S), 0.0, Reading()) for t in seconds), 0.1)


@pytest.mark.parametrize(
    ("trace", "words"),
    [
        (Trace((), 0.1, "the process that reads the sensors ended"), "the process that reads the sensors ended"),
        (looks(), "not read in time"),
        (looks(0.5, 1.1, 3, 5, 7, 8.9), "not read for 2.1 s"),  # it ended before the timing did
        (looks(0.5, 3.2, 5, 7, 9, 10.9), "not read for 2.2 s"),
        (looks(0.5, 1.1, 3, 5.5, 7, 9, 10.9), "not read for 2.5 s"),
    ],
)
def test_a_timing_that_nobody_watched_is_called_not_watched(trace, words):
    found = judged_trace(trace)
    assert list(found) == ["not-watched"]
    assert words in found["not-watched"]


def test_a_look_every_two_seconds_is_watching():
    assert judged_trace(looks(0, 2, 4, 6, 8, 10, 12)) == {}


def test_a_network_that_guesses_is_called_that():
    guess, better = (Scores(Proportion(hits, 120), ()) for hits in (12, 60))
    (found,) = findings(None, scores=guess, classes=10, images=None, notes=(), flips=0)
    assert found == {"code": "guessing", "text": "it hardly beats guessing (ACC 10.0 %, 10 classes)"}
    assert findings(None, scores=better, classes=10, images=None, notes=(), flips=0) == []
