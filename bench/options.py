"""What to measure, and for how long."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rkd.bench.latency import Plan
from rkd.errors import ConfigError

_MAX_SECONDS = 24 * 3600.0
_CAP_FACTOR, _LEAST_CAP_SECONDS = 4, 60.0


@dataclass(frozen=True)
class BenchOptions:
    """What to measure, and for how long.

    Attributes:
        quick: about 3 s a bundle: 1.5 s of samples, at least 100, and at most 256 evaluation images.
        batch: images in one latency batch.
        threads: that compute one operator; None for the physical cores that this process may use.
        seconds: of latency samples a bundle; None for 8, quick 1.5.
        min_samples: at least so many, in at most 4 times `seconds` and at least a minute; None for 400, quick 100.
        seed: of the bootstrap.
        latency: measure latency and throughput.
        memory: measure memory.
        accuracy: measure ACC, ASR and RA.

    Raises:
        ConfigError: an impossible value.
    """

    quick: bool = False
    batch: int = 1
    threads: int | None = None
    seconds: float | None = None
    min_samples: int | None = None
    seed: int = 0
    latency: bool = True
    memory: bool = True
    accuracy: bool = True

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ConfigError(f"batch is {self.batch}, expected 1 or more")
        if self.seconds is not None and not 0 < self.seconds <= _MAX_SECONDS:
            raise ConfigError(f"seconds is {self.seconds:g}, expected more than 0 and at most {_MAX_SECONDS:g}")
        if self.min_samples is not None and not 1 <= self.min_samples <= 1_000_000:
            raise ConfigError(f"min_samples is {self.min_samples}, expected 1 to 1,000,000")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}, expected 0 or more")
        if not (self.latency or self.memory or self.accuracy):
            raise ConfigError("nothing to measure: latency, memory and accuracy are all off")

    @property
    def plan(self) -> Plan:
        """How long the latency is sampled."""
        seconds = self.seconds or (1.5 if self.quick else 8.0)
        least = self.min_samples or (100 if self.quick else 400)
        cap = max(_CAP_FACTOR * seconds, 5.0 if self.quick else _LEAST_CAP_SECONDS)
        return Plan(seconds, least, cap_seconds=cap, warm_up_cap_seconds=1.0 if self.quick else 10.0)

    def to_json(self) -> dict[str, Any]:
        """As in result.json: with every default filled in."""
        plan = self.plan
        return {
            "quick": self.quick,
            "batch": self.batch,
            "threads": self.threads,
            "seconds": plan.seconds,
            "min_samples": plan.min_samples,
            "cap_seconds": plan.cap_seconds,
            "warm_up_cap_seconds": plan.warm_up_cap_seconds,
            "seed": self.seed,
            "latency": self.latency,
            "memory": self.memory,
            "accuracy": self.accuracy,
        }
