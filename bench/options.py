"""What to measure, and for how long."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rkd.bench.latency import Plan
from rkd.errors import ConfigError, shortened

Mode = Literal["quick", "default", "mlperf"]

_MAX_SECONDS = 24 * 3600.0
_CAP_FACTOR, _LEAST_CAP_SECONDS = 4, 60.0
_MOST_BATCHES = 16
# Seconds of samples, samples, seconds of warm-up at most. MLPerf: single stream, 600 s and 1,024 queries (the rules at
# github.com/mlcommons/inference_policies, "Scenarios").
_PLANS: dict[Mode, tuple[float, int, float]] = {
    "quick": (1.5, 100, 1.0), "default": (8.0, 400, 10.0), "mlperf": (600.0, 1024, 30.0),
}  # fmt: skip


@dataclass(frozen=True)
class BenchOptions:
    """What to measure, and for how long.

    Attributes:
        mode: `quick` is about 3 s a bundle (1.5 s of samples, at least 100, and at most 256 evaluation images) and 20 s
            in all once the models are loaded: what does not fit is left out and said,
            `default` 8 s of samples and all images, `mlperf` 600 s of samples.
        batch: images in one latency batch.
        sweep: further batch sizes whose latency is measured.
        threads: that compute one operator; None for the physical cores that this process may use.
        seconds: of latency samples a bundle and batch; None for the mode's.
        min_samples: at least so many, in at most 4 times `seconds` and at least a minute; None for the mode's.
        data: a folder or .npz to evaluate on instead of the bundle's images.
        latency: measure latency and throughput.
        memory: measure memory.
        accuracy: measure ACC, ASR and RA.
        sensors: read power, clocks, heat and other programs' load meanwhile.
        lock_clocks: fix clocks for as long as the latency is measured.

    Raises:
        ConfigError: an impossible value.
    """

    mode: Mode = "default"
    batch: int = 1
    sweep: tuple[int, ...] = ()
    threads: int | None = None
    seconds: float | None = None
    min_samples: int | None = None
    data: Path | None = None
    latency: bool = True
    memory: bool = True
    accuracy: bool = True
    sensors: bool = True
    lock_clocks: bool = False

    def __post_init__(self) -> None:
        if min(self.batches) < 1:
            raise ConfigError(f"batch is {min(self.batches)}, expected 1 or more")
        if len(set(self.batches)) < len(self.batches) or len(self.batches) > _MOST_BATCHES:
            raise ConfigError(f"batch: expected up to {_MOST_BATCHES} different sizes")
        if self.seconds is not None and not 0 < self.seconds <= _MAX_SECONDS:
            raise ConfigError(f"seconds is {self.seconds:g}, expected more than 0 and at most {_MAX_SECONDS:g}")
        if self.min_samples is not None and not 1 <= self.min_samples <= 1_000_000:
            raise ConfigError(f"min_samples is {self.min_samples}, expected 1 to 1,000,000")
        if not (self.latency or self.memory or self.accuracy):
            raise ConfigError("nothing to measure: latency, memory and accuracy are all off")

    @property
    def quick(self) -> bool:
        """Whether a first answer is wanted."""
        return self.mode == "quick"

    @property
    def batches(self) -> tuple[int, ...]:
        """All batch sizes, the main one first."""
        return self.batch, *self.sweep

    @property
    def plan(self) -> Plan:
        """How long the latency is sampled."""
        mode_seconds, mode_least, warm_up = _PLANS[self.mode]
        seconds, least = self.seconds or mode_seconds, self.min_samples or mode_least
        cap = max(_CAP_FACTOR * seconds, 5.0 if self.quick else _LEAST_CAP_SECONDS)
        return Plan(seconds, least, cap_seconds=cap, warm_up_cap_seconds=warm_up)

    def to_json(self) -> dict[str, Any]:
        """As in result.json: with every default filled in."""
        plan = self.plan
        return {
            "mode": self.mode,
            "batch": self.batch,
            "sweep": list(self.sweep),
            "threads": self.threads,
            "seconds": plan.seconds,
            "min_samples": plan.min_samples,
            "cap_seconds": plan.cap_seconds,
            "warm_up_cap_seconds": plan.warm_up_cap_seconds,
            "rounds": plan.rounds,
            "latency": self.latency,
            "memory": self.memory,
            "accuracy": self.accuracy,
            "sensors": self.sensors,
            "lock_clocks": self.lock_clocks,
        }


def parse_batches(text: str) -> tuple[int, ...]:
    """Batch sizes from `1` or `1,4,16`.

    Raises:
        ConfigError: that is not a list of whole numbers below 10^9.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and len(part) < 10 for part in parts):
        raise ConfigError(
            f"--batch {shortened(text, 80)!r} is not a batch size, expected a number, or several as in 1,4,16"
        )
    return tuple(map(int, parts))
