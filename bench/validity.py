"""When a result's figures do not mean what they seem to mean, and why; and what else a reader should know.

Thresholds: other programs kept more than 0.5 cores (or 5 % of them, if that is more) busy just before the start or in
more than a tenth of the seconds of the timing; the GPU was more than 5 % busy before a model that runs on it was loaded
(its load during the timing is ours too); a clock's median in the last third of the timing differs from that of the
first third by more than 5 %; the medians of latency in the same thirds by more than 10 %; anything throttled, also
where it did so before the start (a cooling device that is there for nothing else is above 0, or a cap was lifted in the
end; a cap alone may be the user's power mode); fewer samples or seconds of them than asked for; the sensors not read
for two seconds of the timing, tegrastats stopped, or neither before nor during it a word about what other programs took.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rkd.bench.device import Device, Load
from rkd.bench.latency import CAPACITY, Latency
from rkd.bench.memory import Memory
from rkd.bench.sensors.trace import Conditions, Others, Span
from rkd.metrics import Scores

BUSY_CORES, BUSY_SHARE = 0.5, 0.05
BUSY_SECONDS = 0.1
BUSY_GPU_PERCENT = 5.0
_LONGER = "measure longer: without --quick, or with --mlperf"
DRIFT, CLOCK_DRIFT, CAP_DROP = 0.10, 0.05, 0.01
SHORTEST = 0.99  # of the planned seconds
_REST_AT_0 = re.compile(r"throttle|cpufreq|devfreq", re.IGNORECASE)  # cooling devices that only heat raises

Affects = Literal["all", "timing", "scores"]
CODES: dict[str, Affects] = {
    "interrupted": "all", "not-finite": "scores", "one-class": "scores",
    **dict.fromkeys((
        "other-runtime", "emulated", "too-short", "not-stationary", "latency-drifted", "throttled", "clocks-drifted",
        "shared-cpu", "shared-gpu", "not-watched",
    ), "timing"),
}  # fmt: skip
BUDGETS = ("accuracy-lost", "backdoor-woken")  # findings that --require-valid does not let pass
FINDINGS = (*BUDGETS, "guessing", "leak", "grew", "part-of-the-images", "classes-missing", "flips")


@dataclass(frozen=True)
class Reason:
    """One fault: its name, and what happened and what to do in a line."""

    code: str
    text: str

    @property
    def affects(self) -> Affects:
        """Which figures it spoils."""
        return CODES[self.code]

    def to_json(self) -> dict[str, str]:
        """`{code, affects, text}`."""
        return {"code": self.code, "affects": self.affects, "text": self.text}


@dataclass(frozen=True)
class Validity:
    """Valid if there is no reason against it."""

    reasons: tuple[Reason, ...]

    @property
    def valid(self) -> bool:
        """Whether all figures may be used."""
        return not self.reasons

    def holds(self, what: Literal["timing", "scores"]) -> bool:
        """Whether latency, memory and power, or ACC, ASR and RA, may be used."""
        return all(reason.affects not in ("all", what) for reason in self.reasons)

    def to_json(self) -> dict[str, Any]:
        """`{valid, timing, scores, reasons}`."""
        return {
            "valid": self.valid,
            "timing": self.holds("timing"),
            "scores": self.holds("scores"),
            "reasons": [reason.to_json() for reason in self.reasons],
        }


def busy_limit(cores: int) -> float:
    """How many of the cores others may keep busy."""
    return max(BUSY_CORES, BUSY_SHARE * cores)


def judge(
    *,
    instead: str,
    device: Device,
    on_gpu: bool,
    load: Load,
    conditions: Conditions | None,
    latencies: Mapping[int, Latency],
    min_samples: int,
    seconds: float,
    not_finite: int,
    classes_present: int | None,
    interrupted: str | None,
) -> Validity:
    """All reasons against one bundle's figures.

    Args:
        instead: why another runtime than the target's was used; empty if it was the target's.
        device: the machine.
        on_gpu: whether the model runs on a GPU.
        load: what others did on it before the start.
        conditions: what the sensors said; None if they were not read.
        latencies: by batch size; empty if none was measured.
        min_samples: as asked for.
        seconds: of samples, as planned.
        not_finite: images with a NaN or infinite logit.
        classes_present: classes with an image in the evaluation set; None if nothing was evaluated.
        interrupted: the stage that was interrupted, if any.
    """
    reasons = []
    if interrupted:
        reasons.append(Reason("interrupted", f"interrupted during {interrupted}; run it again to the end"))
    if instead:
        reasons.append(Reason("other-runtime", instead))
    if device.emulator:
        text = f"emulated CPU ({device.emulator}): scores hold for the file, latency, memory and power mean nothing"
        reasons.append(Reason("emulated", text))
    if not_finite:
        text = f"{not_finite} images gave NaN or infinite logits: the model overflows in this runtime"
        reasons.append(Reason("not-finite", text))
    if classes_present == 1:
        text = "all evaluation images are of one class: a model that always says it would score the same; add others"
        reasons.append(Reason("one-class", text))
    for batch, latency in latencies.items():
        reasons += _latency_reasons(latency, min_samples, seconds, f"batch {batch}: " if len(latencies) > 1 else "")
    if latencies:
        reasons += _before(load, device.cores)
        reasons += _others_unknown(load, conditions)
        if conditions:
            reasons += _unwatched(conditions.reason)
            reasons += _throttled(conditions.throttle)
            reasons += _capped(conditions.clocks)
            reasons += _clocks(conditions.thirds)
            reasons += _shared(conditions.others)
            reasons += _shared_gpu(conditions.gpu_percent) if on_gpu else []
    return Validity(tuple(reasons))


def findings(
    memory: Memory | None,
    *,
    scores: Scores | None,
    classes: int,
    images: tuple[int, int] | None,
    notes: tuple[str, ...],
    flips: int,
) -> list[dict[str, str]]:
    """What a reader should know although it makes nothing invalid.

    Args:
        memory: as measured.
        scores: as measured; None if nothing was evaluated.
        classes: that the model tells apart.
        images: evaluated and available; None if nothing was evaluated.
        notes: about the evaluation set.
        flips: images that the exporting host sees differently.
    """
    found = []
    if scores and (caution := scores.guess_caution(classes)):
        found.append({"code": "guessing", "text": f"it {caution}"})
    if memory and memory.leak and memory.growth_bytes:
        text = (
            f"memory leak: resident memory grew all along, by {memory.growth_bytes / 1e6:.1f} MB over "
            f"{memory.inferences:,} inferences (about {memory.growth_an_inference_bytes / 1e3:.1f} kB each)"
        )
        found.append({"code": "leak", "text": text})
    if memory and memory.grew and memory.growth_bytes:
        text = (
            f"resident memory grew by {memory.growth_bytes / 1e6:.1f} MB over {memory.inferences:,} inferences: too short "
            "to tell whether it is a leak"
        )
        found.append({"code": "grew", "text": text})
    if images and images[0] < images[1]:
        found.append({"code": "part-of-the-images", "text": f"{images[0]:,} of {images[1]:,} images were evaluated"})
    found += [{"code": "classes-missing", "text": note} for note in notes]
    if flips:
        found.append({"code": "flips", "text": f"{flips:,} predictions differ from the exporting host's"})
    return found


def _latency_reasons(latency: Latency, min_samples: int, seconds: float, prefix: str) -> list[Reason]:
    reasons = []
    if latency.n < min_samples:
        text = f"{prefix}{latency.n} latency samples, {min_samples} wanted; {_LONGER}"
        reasons.append(Reason("too-short", text))
    if latency.seconds < SHORTEST * seconds:
        how = "more are not kept" if latency.n >= CAPACITY else "run it to the end, with fewer bundles at once"
        text = f"{prefix}{latency.n:,} latency samples in {latency.seconds:.3g} s, {seconds:.3g} s wanted; {how}"
        reasons.append(Reason("too-short", text))
    if not latency.stationary:
        text = f"{prefix}latency was not stationary after {latency.warm_up} warm-up inferences; {_LONGER}"
        reasons.append(Reason("not-stationary", text))
    first, last = latency.first_third_ms, latency.last_third_ms
    if first is not None and last is not None and abs(last - first) > DRIFT * first:
        text = (
            f"{prefix}latency drifted from {first:.3g} ms (median of the first third) to {last:.3g} ms (last third); "
            "check cooling and other programs"
        )
        reasons.append(Reason("latency-drifted", text))
    return reasons


def _before(load: Load, cores: int) -> list[Reason]:
    busy, what = (load.busy_cores, "cores busy") if load.busy_cores is not None else (load.average, "load average")
    limit = busy_limit(cores)
    if busy is None or busy <= limit:
        return []
    text = f"{what} before the start: {busy:.2f}, at most {limit:.2f} wanted; stop other programs and run again"
    return [Reason("shared-cpu", text)]


def _shared(others: Others | None) -> list[Reason]:
    if others is None or others.busy_seconds <= BUSY_SECONDS * others.seconds:
        return []
    text = (
        f"another program shared the CPU: it kept {others.mean_cores:.2f} cores busy (worst second "
        f"{others.highest_cores:.2f}), more than {others.limit_cores:.2f} in {others.busy_seconds} of "
        f"{others.seconds} seconds of the timing; stop it and run again"
    )
    return [Reason("shared-cpu", text)]


def _shared_gpu(percent: float | None) -> list[Reason]:
    if percent is None or percent <= BUSY_GPU_PERCENT:
        return []
    text = f"the GPU was {percent:.0f} % busy before the model was loaded; stop what uses it (a desktop?) and run again"
    return [Reason("shared-gpu", text)]


def _unwatched(reason: str | None) -> list[Reason]:
    if reason is None:
        return []
    return [Reason("not-watched", f"what happened while it was timed is not known: {reason}; run it again")]


def _others_unknown(load: Load, conditions: Conditions | None) -> list[Reason]:
    told = load.busy_cores is not None or load.average is not None
    if told or (conditions and (conditions.others or conditions.reason)):
        return []
    return [Reason("not-watched", "what other programs took of the CPU is not reported here")]


def _throttled(throttle: Mapping[str, Span]) -> list[Reason]:
    said = []
    for name, span in throttle.items():
        kind, _, what = name.partition(": ")
        before = span.before or 0 if kind == "level" else 0
        usual = 0 if _REST_AT_0.search(what) else before  # other cooling devices may rest at any level
        if span.during and span.during > usual:
            already = f", {before:.0f} before the start" if before else ""
            said.append(
                f"{what} (+{span.during:.0f})" if kind == "count" else f"{what} (level {span.during:.0f}{already})"
            )
    if not said:
        return []
    text = f"the board throttled while it was timed: {', '.join(said)}; cool it, or give it a stronger supply"
    return [Reason("throttled", text)]


def _capped(clocks: Mapping[str, Span]) -> list[Reason]:
    reasons = []
    for name, span in clocks.items():
        if not name.endswith(" cap") or not span.before:
            continue
        allowed = f"the {name.removesuffix(' cap')} was allowed {span.before / 1e6:,.0f} MHz before"
        if span.during and span.during < (1 - CAP_DROP) * span.before:
            text = (
                f"the board throttled while it was timed: {allowed} and {span.during / 1e6:,.0f} MHz during it; cool it"
            )
            reasons.append(Reason("throttled", text))
        elif span.after and span.after > (1 + CAP_DROP) * span.before:
            text = (
                f"the board throttled before the start: {allowed} and {span.after / 1e6:,.0f} MHz after the timing; let it "
                "cool down first"
            )
            reasons.append(Reason("throttled", text))
    return reasons


def _clocks(thirds: Mapping[str, tuple[float, float]]) -> list[Reason]:
    reasons = []
    for name, (first, last) in thirds.items():
        if name in ("cpu", "gpu") and first > 0 and abs(last - first) > CLOCK_DRIFT * first:
            text = (
                f"the {name} clock drifted from {first / 1e6:,.0f} MHz (median of the first third of the timing) to "
                f"{last / 1e6:,.0f} MHz (last third); fix it with --lock-clocks, or cool the board"
            )
            reasons.append(Reason("clocks-drifted", text))
    return reasons
