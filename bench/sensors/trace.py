"""What the sensors said before, during and after the timing (numpy only).

Slices are spans of `time.perf_counter_ns`, on Linux the clock that all processes share.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from rkd.bench.sensors.reading import Reading, total_rails

Slice = tuple[int, int]  # nanoseconds
_COUNTER = "count: "
_SECOND_NS = 1_000_000_000
_LONGEST_GAP_NS = 2 * _SECOND_NS


@dataclass(frozen=True)
class Sample:
    """One look: when, how many cores others kept busy since the last, and the sensors."""

    at_ns: int
    others: float | None
    reading: Reading


@dataclass(frozen=True)
class Trace:
    """All looks in order of time.

    Attributes:
        samples: the looks.
        interval_s: between two of them.
        reason: why there are none.
        silent_ns: when tegrastats last said something, where it stopped; None where it did not.
    """

    samples: tuple[Sample, ...]
    interval_s: float
    reason: str | None = None
    silent_ns: int | None = None

    def within(self, slices: Iterable[Slice]) -> list[Sample]:
        """The samples inside of any of the slices."""
        times = [sample.at_ns for sample in self.samples]
        found: list[Sample] = []
        for start, end in sorted(slices):
            found += self.samples[bisect_left(times, start) : bisect_right(times, end)]
        return found


@dataclass(frozen=True)
class Span:
    """One figure before, during and after the timing; None where it was not reported."""

    before: float | None
    during: float | None
    after: float | None

    def to_json(self) -> dict[str, float | None]:
        """`{before, during, after}`."""
        return {"before": self.before, "during": self.during, "after": self.after}


@dataclass(frozen=True)
class Conditions:
    """The state of the machine around the timing.

    Attributes:
        samples: looks during the timing.
        interval_s: between two looks.
        clocks: hertz by name; `during` is the lowest.
        thirds: medians of a clock in the first and in the last third of the timing.
        celsius: by zone; `during` is the highest.
        throttle: by name; a level (`level: ...`, and `now: ...`, 1 or 0) at its highest, a counter (`count: ...`) as
            what was added.
        others: cores that others kept busy: mean, highest second, and how many of the seconds were above a limit.
        reason: why nothing is reported, or not of all of the timing.
        gpu_percent: median load of the GPU before the timing, when no model was loaded: all of it others'; None where it
            is not reported.
    """

    samples: int
    interval_s: float
    clocks: Mapping[str, Span]
    thirds: Mapping[str, tuple[float, float]]
    celsius: Mapping[str, Span]
    throttle: Mapping[str, Span]
    others: Others | None
    reason: str | None = None
    gpu_percent: float | None = None

    def to_json(self) -> dict[str, Any]:
        """As in result.json."""
        return {
            "samples": self.samples,
            "interval_s": self.interval_s,
            "clocks_hz": {
                name: {
                    **span.to_json(),
                    "first_third": self.thirds[name][0] if name in self.thirds else None,
                    "last_third": self.thirds[name][1] if name in self.thirds else None,
                }
                for name, span in self.clocks.items()
            },
            "celsius": {name: span.to_json() for name, span in self.celsius.items()},
            "throttle": {name: span.to_json() for name, span in self.throttle.items()},
            "others": self.others.to_json() if self.others else None,
            "gpu_percent_before": self.gpu_percent,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Others:
    """What other programs took of the CPU while a model was timed.

    Attributes:
        mean_cores: over all of the timing.
        highest_cores: in the worst second.
        busy_seconds: seconds with more than `limit_cores`.
        seconds: in all.
        limit_cores: what is tolerated.
    """

    mean_cores: float
    highest_cores: float
    busy_seconds: int
    seconds: int
    limit_cores: float

    def to_json(self) -> dict[str, Any]:
        """As in result.json."""
        return dict(self.__dict__)


@dataclass(frozen=True)
class Power:
    """What one model drew.

    Attributes:
        rails: mean watts of each rail while this model was timed.
        total: the rails whose sum is the board's or the processor's power; empty where that is not known.
        watts: that sum.
        idle_watts: the same before the models were loaded.
        joules: of one inference: `watts` times its mean time.
        samples: looks in this model's time.
    """

    rails: Mapping[str, float]
    total: tuple[str, ...]
    watts: float | None
    idle_watts: float | None
    joules: float | None
    samples: int

    def to_json(self) -> dict[str, Any]:
        """As in result.json."""
        return {**self.__dict__, "rails": dict(self.rails), "total": list(self.total)}


def conditions(trace: Trace, slices: Sequence[Slice], ready_ns: int, limit_cores: float) -> Conditions:
    """Sum a trace up.

    Args:
        trace: what was seen.
        slices: when models were timed; all samples from the first to the last count as during.
        ready_ns: what was seen before it counts as before: no model was loaded yet.
        limit_cores: what others may take.
    """
    if trace.reason or not trace.samples or not slices:
        reason = trace.reason or ("nothing was timed" if not slices else "the sensors were not read in time")
        return Conditions(0, trace.interval_s, {}, {}, {}, {}, None, reason)
    first, last = min(start for start, _ in slices), max(end for _, end in slices)
    before = [sample for sample in trace.samples if sample.at_ns <= ready_ns]
    during = trace.within([(first, last)])
    after = [sample for sample in trace.samples if sample.at_ns > last]
    parts = (before, during, after)
    clocks = _spans(parts, lambda r: r.hertz, min)
    thirds = {name: t for name in clocks if (t := _thirds([s.reading.hertz.get(name) for s in during])) is not None}
    throttle = {
        name: _events(parts, name) for name in sorted({name for s in trace.samples for name in s.reading.throttle})
    }
    celsius = _spans(parts, lambda r: r.celsius, max)
    others = _others(during, limit_cores)
    gap = _gap([first, *(sample.at_ns for sample in during), last])
    if trace.silent_ns is not None and trace.silent_ns < last:
        gap = "tegrastats stopped reporting" + (f", and {gap}" if gap else "")
    return Conditions(
        len(during), trace.interval_s, clocks, thirds, celsius, throttle, others, gap, _gpu_percent(before)
    )


def power(trace: Trace, slices: Sequence[Slice], ready_ns: int, seconds: float) -> Power | None:
    """What one model drew in its slices; None where no rail is reported.

    Args:
        trace: what was seen.
        slices: when this model was timed.
        ready_ns: what was seen before it is idle.
        seconds: the mean time of one inference.
    """
    samples = trace.within(slices)
    rails = _mean_watts(samples)
    if not rails:
        return None
    total = total_rails(rails)
    watts = sum(rails[name] for name in total) if total else None
    idle = _mean_watts([sample for sample in trace.samples if sample.at_ns <= ready_ns])
    idle_watts = sum(idle[name] for name in total) if total and set(total) <= set(idle) else None
    return Power(rails, total, watts, idle_watts, watts * seconds if watts is not None else None, len(samples))


def _gap(times_ns: Sequence[int]) -> str | None:
    """What is wrong where one look came too long after the other."""
    longest_ns = max(later - earlier for earlier, later in pairwise(times_ns))
    return f"the sensors were not read for {longest_ns / 1e9:.1f} s" if longest_ns > _LONGEST_GAP_NS else None


def _mean_watts(samples: Sequence[Sample]) -> dict[str, float]:
    names = dict.fromkeys(name for sample in samples for name in sample.reading.watts)
    return {name: float(np.mean([s.reading.watts[name] for s in samples if name in s.reading.watts])) for name in names}


def _spans(
    parts: tuple[Sequence[Sample], Sequence[Sample], Sequence[Sample]],
    pick: Callable[[Reading], Mapping[str, float]],
    worst: Callable[[Iterable[float]], float],
) -> dict[str, Span]:
    names = dict.fromkeys(name for part in parts for sample in part for name in pick(sample.reading))
    found = {}
    for name in names:
        before, during, after = ([v for s in part if (v := pick(s.reading).get(name)) is not None] for part in parts)
        found[name] = Span(
            before[-1] if before else None, worst(during) if during else None, after[-1] if after else None
        )
    return found


def _events(parts: tuple[Sequence[Sample], Sequence[Sample], Sequence[Sample]], name: str) -> Span:
    """A level at its highest; a counter as what was added since the part before ended."""
    values = [[v for s in part if (v := s.reading.throttle.get(name)) is not None] for part in parts]
    if not name.startswith(_COUNTER):
        return Span(*(float(max(part)) if part else None for part in values))
    added: list[float | None] = []
    last: int | None = None
    for part in values:
        start = last if last is not None else (part[0] if part else None)
        added.append(float(max(0, part[-1] - start)) if part and start is not None else None)
        last = part[-1] if part else last
    return Span(*added)


def _gpu_percent(samples: Sequence[Sample]) -> float | None:
    loads = [load for sample in samples if (load := sample.reading.load.get("gpu")) is not None]
    return float(np.median(loads)) if loads else None


def _thirds(values: Sequence[float | None]) -> tuple[float, float] | None:
    known = [value for value in values if value is not None]
    third = len(known) // 3
    return (float(np.median(known[:third])), float(np.median(known[-third:]))) if third >= 3 else None


def _others(samples: Sequence[Sample], limit_cores: float) -> Others | None:
    """By the second: a tick of the kernel's clock is as long as a tenth of a look."""
    seconds: dict[int, list[float]] = {}
    for sample in samples:
        if sample.others is not None:
            seconds.setdefault((sample.at_ns - samples[0].at_ns) // _SECOND_NS, []).append(sample.others)
    means = [math.fsum(values) / len(values) for values in seconds.values()]
    if not means:
        return None
    every = [value for values in seconds.values() for value in values]
    busy = sum(mean > limit_cores for mean in means)
    return Others(math.fsum(every) / len(every), max(means), busy, len(means), limit_cores)
