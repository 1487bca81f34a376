"""Latency of one batch at a time, as a camera would see it (numpy only).

Closed loop: the next inference starts when the last has returned. Wall time around `infer`, from a uint8 array in host
memory to float32 logits in host memory, by `time.perf_counter_ns`.

Warm-up ends when the medians of the last two windows agree within 5 %. A window is a quarter of all iterations so far,
at least 10; so at least 20 iterations, at least 0.25 s (clocks need time to rise), at most a stated cap.

Several models are interleaved in rounds, in a rotating order, so that a change of the machine hits all alike. After a
switch a few inferences go untimed: caches are cold, and the last session's idle worker threads still spin. A round
lasts about half a second a model; there are 5 to 40.

Where a runtime tells its device's own times of an inference (copy in, compute, copy out), they are fetched after the
end of the timed span.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rkd.bench.quantiles import Quantile, quantile
from rkd.bench.runner import Stages

Infer = Callable[[NDArray[np.uint8]], object]
Clock = Callable[[], int]  # nanoseconds
Times = NDArray[np.int64]  # nanoseconds

WINDOW = 10
WARM_UP_SECONDS = 0.25
TOLERANCE = 0.05
_ROUND_SECONDS, _FEWEST_ROUNDS, _MOST_ROUNDS = 0.5, 5, 40
_BINS = 60
_NEEDED_999 = 1000  # below, p99.9 is only the slowest sample
STAGES = ("h2d", "compute", "d2h")
_SETTLE_COUNT, _SETTLE_SECONDS = 3, 0.02
CAPACITY = 20_000_000  # samples a model at most: 160 MB, and 600 s of inferences of 30 us
_FEWEST_KEPT = 1024


@dataclass(frozen=True)
class Plan:
    """How long to measure each bundle.

    Attributes:
        seconds: of samples, at least.
        min_samples: at least.
        cap_seconds: of samples, at most, even if there are fewer than `min_samples`.
        warm_up_cap_seconds: of warm-up, at most.
    """

    seconds: float
    min_samples: int
    cap_seconds: float
    warm_up_cap_seconds: float

    @property
    def rounds(self) -> int:
        """How often each model has its turn."""
        return min(_MOST_ROUNDS, max(_FEWEST_ROUNDS, round(self.seconds / _ROUND_SECONDS)))

    def within(self, seconds: float) -> Plan:
        """The same, shortened where a bundle's warm-up and samples would take more."""
        factor = min(1.0, max(0.0, seconds) / (self.seconds + self.warm_up_cap_seconds))
        return replace(
            self,
            seconds=factor * self.seconds,
            cap_seconds=min(self.cap_seconds, max(0.0, seconds)),
            warm_up_cap_seconds=factor * self.warm_up_cap_seconds,
        )


@dataclass
class Series:
    """What is known about one model so far.

    Attributes:
        infer: runs one batch.
        images: the batch, uint8 (N, 3, H, W).
        warm_up: untimed inferences before the first sample.
        stationary: whether the warm-up ended by itself, not at its cap.
        times: samples in nanoseconds, in the order of measurement; `n` of them are filled in.
        n: samples.
        stages: asks for the device's times of the last inference; None where the runtime does not tell.
        stage_ms: these times in milliseconds, (3, capacity), of the first `n` samples; empty without `stages`.
        slices: when its samples were taken, one a round, in nanoseconds of the clock.
        ends: how many samples there were at the end of each slice.
    """

    infer: Infer
    images: NDArray[np.uint8]
    warm_up: int = 0
    stationary: bool = False
    times: Times = field(default_factory=lambda: np.empty(0, np.int64))
    n: int = 0
    stages: Callable[[], Stages] | None = None
    stage_ms: NDArray[np.float32] = field(default_factory=lambda: np.empty((3, 0), np.float32))
    slices: list[tuple[int, int]] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)

    def rounds(self) -> list[Times]:
        """The samples of each round."""
        return [self.times[start:end] for start, end in zip([0, *self.ends], self.ends, strict=False)]


@dataclass(frozen=True)
class Histogram:
    """Counts of samples in bins of equal ratio between the fastest and the slowest."""

    low_ms: float
    high_ms: float
    counts: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """As in result.json."""
        return {"low_ms": self.low_ms, "high_ms": self.high_ms, "counts": list(self.counts)}


@dataclass(frozen=True)
class Latency:
    """Latency of one model.

    Attributes:
        p50, p90, p99: milliseconds a batch.
        p999: 99.9 % took at most this long; None below 1,000 samples.
        mean_ms: of all samples.
        n: samples.
        batch: images in a batch.
        seconds: for which it was sampled, over all rounds.
        images_per_second: images over the sum of all samples, in this closed loop.
        warm_up: inferences before the first sample.
        stationary: whether the warm-up ended by itself.
        first_third_ms, last_third_ms: medians of the first and last third of the samples; None below 3 samples.
        histogram: all samples.
        rounds: when each round began, in seconds since the first, its median in milliseconds, and its n.
        stages: the device's own p50 of copy in, compute and copy out; None where the runtime does not tell.
    """

    p50: Quantile
    p90: Quantile
    p99: Quantile
    p999: Quantile | None
    mean_ms: float
    n: int
    batch: int
    seconds: float
    images_per_second: float
    warm_up: int
    stationary: bool
    first_third_ms: float | None
    last_third_ms: float | None
    histogram: Histogram
    rounds: tuple[tuple[float, float, int], ...]
    stages: dict[str, Quantile] | None = None

    def to_json(self) -> dict[str, Any]:
        """As in result.json."""
        return {
            "p50": self.p50.to_json(),
            "p90": self.p90.to_json(),
            "p99": self.p99.to_json(),
            "p999": self.p999.to_json() if self.p999 else None,
            "mean_ms": round(self.mean_ms, 6),
            "n": self.n,
            "batch": self.batch,
            "seconds": round(self.seconds, 3),
            "images_per_second": round(self.images_per_second, 4),
            "warm_up": self.warm_up,
            "stationary": self.stationary,
            "first_third_ms": self.first_third_ms,
            "last_third_ms": self.last_third_ms,
            "histogram": self.histogram.to_json(),
            "rounds": [{"at_s": round(at, 3), "p50_ms": round(p50, 6), "n": n} for at, p50, n in self.rounds],
            "stages": {name: value.to_json() for name, value in self.stages.items()} if self.stages else None,
        }


def measure(
    series: Sequence[Series],
    plan: Plan,
    on_slice: Callable[[int, int], None] | None = None,
    clock: Clock = time.perf_counter_ns,
    enough: Callable[[], bool] = lambda: False,
) -> None:
    """Warm up and sample all models, interleaved; what was sampled is in `series` even after an interruption.

    Args:
        series: one a model; filled in.
        plan: how long.
        on_slice: called between slices, never while one is timed, with slices done and in all.
        clock: nanoseconds.
        enough: asked after each round; the last one, where it says so.
    """
    rounds = plan.rounds
    total = len(series) * (rounds + 1)
    tell = on_slice or (lambda *_: None)
    for done, one in enumerate(series):
        tell(done, total)
        typical_ns = warm_up(one, plan.warm_up_cap_seconds, clock)
        wanted = max(plan.min_samples, int(2 * plan.seconds * 1e9 / max(typical_ns, 1)))
        one.times = np.empty(min(wanted, CAPACITY), dtype=np.int64)
        if one.stages:
            one.stage_ms = np.empty((3, len(one.times)), np.float32)
    done = len(series)
    for turn in range(rounds):
        for position in range(len(series)):
            tell(done, total)
            one = series[(turn + position) % len(series)]
            if len(series) > 1:
                _settle(one, clock)
            least = -(-plan.min_samples // rounds)
            sample(one, least, plan.seconds / rounds, plan.cap_seconds / rounds, clock)
            done += 1
        if enough():
            break
    tell(total, total)


def summarise(series: Series) -> Latency | None:
    """The figures of one model; None without a sample."""
    if not series.n:
        return None
    times = series.times[: series.n]
    ordered = np.sort(times)
    p50, p90, p99 = (quantile(ordered, percent) for percent in (50, 90, 99))
    p999 = quantile(ordered, 99.9) if series.n >= _NEEDED_999 else None
    batch, third = len(series.images), series.n // 3
    return Latency(
        p50,
        p90,
        p99,
        p999,
        mean_ms=float(times.mean()) / 1e6,
        n=series.n,
        batch=batch,
        seconds=sum(end - start for start, end in series.slices) / 1e9,
        images_per_second=batch * series.n / (max(int(times.sum()), 1) / 1e9),
        warm_up=series.warm_up,
        stationary=series.stationary,
        first_third_ms=float(np.median(times[:third])) / 1e6 if third else None,
        last_third_ms=float(np.median(times[-third:])) / 1e6 if third else None,
        histogram=_histogram(ordered),
        rounds=tuple(
            ((start - series.slices[0][0]) / 1e9, float(np.median(part)) / 1e6, len(part))
            for (start, _), part in zip(series.slices, series.rounds(), strict=True)
            if len(part)
        ),
        stages=_stages(series),
    )


def _histogram(ordered: Times) -> Histogram:
    """`ordered`: nanoseconds, ascending, at least one."""
    low, high = max(float(ordered[0]), 1.0), max(float(ordered[-1]), 1.0)
    if high <= low:
        return Histogram(low / 1e6, high / 1e6, (len(ordered),))
    edges = np.geomspace(low, high, _BINS + 1)
    edges[0], edges[-1] = low, high  # geomspace rounds
    counts, _ = np.histogram(np.maximum(ordered, 1), edges)
    return Histogram(low / 1e6, high / 1e6, tuple(int(count) for count in counts))


def _stages(series: Series) -> dict[str, Quantile] | None:
    if not series.stage_ms.size:
        return None
    rows = series.stage_ms[:, : series.n].astype(np.float64)
    return {
        name: quantile(np.sort(np.rint(row * 1e6).astype(np.int64)), 50) for name, row in zip(STAGES, rows, strict=True)
    }


def is_stationary(times: Sequence[int] | Times) -> bool:
    """Whether the medians of the last two windows differ by at most 5 % of the earlier one."""
    window = max(WINDOW, len(times) // 4)
    if len(times) < 2 * window:
        return False
    earlier = float(np.median(times[-2 * window : -window]))
    later = float(np.median(times[-window:]))
    return abs(later - earlier) <= TOLERANCE * earlier


def warm_up(series: Series, cap_seconds: float, clock: Clock = time.perf_counter_ns) -> float:
    """Run until the latency is stationary or the cap is reached.

    Returns:
        The median of the last window in nanoseconds.
    """
    infer, images = series.infer, series.images
    times: list[int] = []
    start, next_check = clock(), 2 * WINDOW
    while True:
        begin = clock()
        infer(images)
        end = clock()
        times.append(end - begin)
        series.warm_up = len(times)
        if len(times) >= next_check and end - start >= WARM_UP_SECONDS * 1e9:
            if is_stationary(times):
                series.stationary = True
                break
            next_check = len(times) + max(WINDOW, len(times) // 10)
        if end - start >= cap_seconds * 1e9:
            break
    return float(np.median(times[-WINDOW:]))


def sample(series: Series, least: int, seconds: float, cap_seconds: float, clock: Clock = time.perf_counter_ns) -> None:
    """Append samples: at least `least` and for at least `seconds`, but for at most `cap_seconds`, and `CAPACITY`."""
    infer, images, times, stages, stage_ms = series.infer, series.images, series.times, series.stages, series.stage_ms
    i = series.n
    enough = i + least
    start = end = clock()
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # collections would be of the harness's garbage
    try:
        start = clock()
        deadline, cap = start + int(seconds * 1e9), start + int(cap_seconds * 1e9)
        while i < CAPACITY:
            if i == len(times):
                times, stage_ms = _enlarge(series)
            begin = clock()
            infer(images)
            end = clock()
            times[i] = end - begin
            if stages is not None:
                stage_ms[:, i] = stages()
            i += 1
            if (end >= deadline and i >= enough) or end >= cap:
                break
    finally:
        series.n = i
        series.slices.append((start, end))
        series.ends.append(i)
        if collecting:
            gc.enable()


def _enlarge(series: Series) -> tuple[Times, NDArray[np.float32]]:
    """Room for twice as many samples: the warm-up only guesses how many there will be."""
    kept, size = len(series.times), min(max(2 * len(series.times), _FEWEST_KEPT), CAPACITY)
    times, stage_ms = np.empty(size, np.int64), np.empty((3, size if series.stages else 0), np.float32)
    times[:kept] = series.times
    stage_ms[:, :kept] = series.stage_ms
    series.times, series.stage_ms = times, stage_ms
    return times, stage_ms


def _settle(series: Series, clock: Clock) -> None:
    start, count = clock(), 0
    while count < _SETTLE_COUNT or clock() - start < _SETTLE_SECONDS * 1e9:
        series.infer(series.images)
        count += 1
