"""What is made of the sensors' figures, with traces that are written by hand."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest

from rkd.bench.sensors import monitor
from rkd.bench.sensors.load import OtherLoad
from rkd.bench.sensors.monitor import Monitor
from rkd.bench.sensors.reading import Reading
from rkd.bench.sensors.sampler import Latest, until_end
from rkd.bench.sensors.trace import Sample, Trace, conditions, power

S = 1_000_000_000
READY = 1 * S
TIMING = [(2 * S, 5 * S), (6 * S, 9 * S)]


def trace(reading, others=lambda _: 0.0, seconds=11):
    """Ten looks a second; `reading` and `others` are functions of the second."""
    samples = [Sample(i * S // 10, others(i / 10), reading(i / 10)) for i in range(10 * seconds)]
    return Trace(tuple(samples), 0.1)


def test_power_is_that_of_a_models_own_slices_and_its_energy_follows():
    watts = trace(lambda t: Reading({"VDD_IN": 4.0 if t <= 1 else 10.0 if t <= 5 else 6.0}))
    first, second = (power(watts, [one], READY, seconds=0.01) for one in TIMING)
    assert (first.watts, second.watts) == (10.0, 6.0)
    assert (first.idle_watts, second.idle_watts) == (4.0, 4.0)
    assert (first.joules, second.joules) == (pytest.approx(0.1), pytest.approx(0.06))
    assert first.samples == 31


def test_rails_without_a_known_total_are_stated_and_not_summed():
    found = power(trace(lambda _: Reading({"VDD_NEW": 2.0, "VDD_OTHER": 3.0})), TIMING, READY, 0.01)
    assert found.rails == {"VDD_NEW": 2.0, "VDD_OTHER": 3.0}
    assert (found.total, found.watts, found.joules) == ((), None, None)


def test_no_rail_is_no_power_and_never_zero():
    assert power(trace(lambda _: Reading()), TIMING, READY, 0.01) is None


def test_clocks_are_the_lowest_and_heat_the_highest_during_the_timing():
    found = conditions(
        trace(lambda t: Reading(celsius={"cpu": 40 + t}, hertz={"cpu": 2e9 if t < 8 else 1e9})), TIMING, READY, 0.5
    )
    assert found.celsius["cpu"].to_json() == {"before": 41.0, "during": 49.0, "after": pytest.approx(50.9)}
    assert found.clocks["cpu"].to_json() == {"before": 2e9, "during": 1e9, "after": 1e9}
    assert found.thirds["cpu"] == (2e9, 2e9)


def test_counters_count_what_was_added_and_levels_are_the_highest():
    def reading(t):
        return Reading(throttle={"count: oc3": 100 + int(max(0, t - 4)), "now: hot": int(t > 8)})

    found = conditions(trace(reading), TIMING, READY, 0.5)
    assert found.throttle["count: oc3"].to_json() == {"before": 0.0, "during": 5.0, "after": 1.0}
    assert found.throttle["now: hot"].to_json() == {"before": 0.0, "during": 1.0, "after": 1.0}


def test_others_are_counted_by_the_second():
    found = conditions(trace(lambda _: Reading(), lambda t: 2.0 if 4 <= t < 5 else 0.1), TIMING, READY, 0.5).others
    assert (found.busy_seconds, found.seconds) == (1, 8)
    assert found.highest_cores == pytest.approx(2.0)


def test_a_trace_with_a_reason_reports_nothing_but_it():
    found = conditions(Trace((), 0.1, "no process"), TIMING, READY, 0.5)
    assert (found.reason, found.samples, found.others) == ("no process", 0, None)


def stat(root, busy, idle, own):
    (root / "proc/7").mkdir(parents=True, exist_ok=True)
    rows = [f"cpu{i} {busy[i]} 0 0 {idle[i]} 0 0 0 0 0 0" for i in range(2)]
    (root / "proc/stat").write_text("cpu 0\n" + "\n".join(rows) + "\nintr 1\n")
    (root / "proc/7/stat").write_text(f"7 (a) b) c) R {' '.join(['1'] * 10)} {own} 0 0 0 20 0\n")


def test_the_benchs_own_time_is_not_others(tmp_path):
    stat(tmp_path, [100, 100], [100, 100], own=50)
    load = OtherLoad(tmp_path, [0, 1], [7])
    stat(tmp_path, [110, 104], [100, 106], own=60)  # 10 ticks later: one core ours, 0.4 of the other somebody's
    assert load.read() == pytest.approx(0.4)


def test_load_is_none_where_the_system_does_not_tell(tmp_path):
    assert OtherLoad(tmp_path, [0], [7]).read() is None


def test_a_real_sampler_looks_about_as_often_as_it_should_and_knows_the_clock():
    with Monitor([0], interval_s=0.02) as watching:
        pass
    found = watching.stop()
    assert found.reason is None
    assert len(found.samples) >= 2
    assert found.samples == tuple(sorted(found.samples, key=lambda sample: sample.at_ns))


def test_the_sampler_passes_on_what_tegrastats_says_last(tmp_path):
    """Its loop, with a pipe for the tool and one for standard input."""
    tool, speak = os.pipe()
    stdin, end = os.pipe()
    code = SAMPLER.format(tool=tool, stdin=stdin)
    child = subprocess.Popen([sys.executable, "-c", code], pass_fds=(tool, stdin), stdout=subprocess.PIPE, text=True)
    os.write(speak, b"one\ntwo\n")
    lines = iter(child.stdout.readline, "")
    assert next(line for line in lines if line.startswith("line")) == "line two\n"
    os.close(end)
    rest, _ = child.communicate(timeout=60)
    assert "look" in rest
    for descriptor in (tool, speak, stdin):
        os.close(descriptor)


SAMPLER = """
import os, sys
sys.stdin = os.fdopen({stdin})
from rkd.bench.sensors.sampler import until_end
until_end(0.01, lambda: print("look", flush=True), os.fdopen({tool}, "rb", 0), lambda text: print("line", text, flush=True))
"""


LINE = "CPU [9%@1200] GR3D_FREQ 40%@612 tj@61.5C VDD_IN 9744mW/9179mW"


@pytest.mark.parametrize("then", ["pass", "import signal; signal.pause()"], ids=["ends", "hangs"])
def test_a_tegrastats_that_stops_is_not_reported_any_more_and_said_to_have_stopped(monkeypatch, then):
    """A real pipe from a real process; the clock moves by a quarter of a second at each look after its line came."""
    now, looks = [0], []
    stdin, end = (os.fdopen(descriptor, mode) for descriptor, mode in zip(os.pipe(), "rw", strict=True))
    monkeypatch.setattr(sys, "stdin", stdin)
    latest = Latest(0.1, clock=lambda: now[0])

    def take(text):
        latest.take(text)
        now[0] += S // 10

    def look():
        looks.append(latest.reading().watts)
        now[0] += S // 4 if now[0] else 0
        if now[0] > 4 * S:
            end.close()

    tool = subprocess.Popen([sys.executable, "-c", f"print({LINE!r}, flush=True); {then}"], stdout=subprocess.PIPE)
    with tool, stdin, end:
        until_end(0.01, look, tool.stdout, take, clock=lambda: now[0])
        tool.kill()
    live = {"VDD_IN": 9.744}
    known = looks[looks.index(live) :]
    assert known[:2] == [live, live]  # 0.1 and 0.35 s old
    assert not any(known[2:])
    assert latest.silent_ns == 0
    assert len(known) > 10


def test_a_tegrastats_that_goes_on_has_not_stopped_and_one_that_never_began_neither():
    now = [0]
    latest = Latest(0.1, clock=lambda: now[0])
    for now[0] in range(0, 9 * S, S // 10):
        assert latest.reading() == Reading()
        latest.take("tegrastats: permission denied")
    for now[0] in range(9 * S, 18 * S, S // 10):
        latest.take(LINE)
        assert latest.reading().watts == {"VDD_IN": 9.744}
    assert latest.silent_ns is None


def test_a_sensor_that_stopped_before_the_timing_ended_is_a_reason_and_its_last_figures_do_not_count():
    seen = trace(lambda t: Reading({"VDD_IN": 10.0}) if t < 4 else Reading())
    stopped = dataclasses.replace(seen, silent_ns=4 * S)
    assert conditions(stopped, TIMING, READY, 0.5).reason == "tegrastats stopped reporting"
    assert conditions(dataclasses.replace(seen, silent_ns=TIMING[-1][1]), TIMING, READY, 0.5).reason is None
    assert power(stopped, TIMING[:1], READY, 0.01).watts == 10.0
    assert power(stopped, TIMING[1:], READY, 0.01) is None


@pytest.mark.parametrize(
    ("start", "reason"), [("import sys; sys.exit(3)", "ended (3)"), ("print('ready'); print('[')", "ended (0)")]
)
def test_a_sampler_that_dies_is_a_reason(monkeypatch, start, reason):
    monkeypatch.setattr(monitor, "_START", start)
    assert reason in Monitor([0]).stop().reason
