"""When a result's figures do not mean what they seem to mean, and why.

Thresholds: another program kept more than 0.5 cores (or 5 % of them, if that is more) busy just before the start; the
medians of the first and last third of the samples differ by more than 10 %; fewer samples than asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rkd.bench.device import Device, Load
from rkd.bench.latency import Latency

BUSY_CORES, BUSY_SHARE = 0.5, 0.05
DRIFT = 0.10


@dataclass(frozen=True)
class Validity:
    """Valid if there is no reason against it."""

    reasons: tuple[str, ...]

    @property
    def valid(self) -> bool:
        """Whether the figures may be used."""
        return not self.reasons

    def to_json(self) -> dict[str, Any]:
        """`{valid, reasons}`."""
        return {"valid": self.valid, "reasons": list(self.reasons)}


def judge(
    *,
    instead: str,
    device: Device,
    load: Load,
    latency: Latency | None,
    min_samples: int,
    not_finite: int,
    interrupted: str | None,
) -> Validity:
    """All reasons against one bundle's figures.

    Args:
        instead: why another runtime than the target's was used; empty if it was the target's.
        device: the machine.
        load: what others did on it before the start.
        latency: None if it was not measured.
        min_samples: as asked for.
        not_finite: images with a NaN or infinite logit.
        interrupted: the stage that was interrupted, if any.
    """
    reasons = []
    if interrupted:
        reasons.append(f"interrupted during {interrupted}; run it again to the end")
    if instead:
        reasons.append(instead)
    if device.emulator:
        reasons.append(f"emulated CPU ({device.emulator}): scores hold for the file, latency and memory mean nothing")
    if not_finite:
        reasons.append(f"{not_finite} images gave NaN or infinite logits: the model overflows in this runtime")
    if latency:
        reasons += _latency_reasons(latency, min_samples)
        reasons += _load_reasons(load, device.cores)
    return Validity(tuple(reasons))


def _latency_reasons(latency: Latency, min_samples: int) -> list[str]:
    reasons = []
    if latency.n < min_samples:
        reasons.append(f"{latency.n} latency samples, {min_samples} wanted; allow more seconds")
    if not latency.stationary:
        reasons.append(f"latency was not stationary after {latency.warm_up} warm-up inferences; allow more seconds")
    first, last = latency.first_third_ms, latency.last_third_ms
    if first is not None and last is not None and abs(last - first) > DRIFT * first:
        reasons.append(
            f"latency drifted from {first:.3g} ms (median of the first third) to {last:.3g} ms (last third); "
            "check cooling and other programs"
        )
    return reasons


def _load_reasons(load: Load, cores: int) -> list[str]:
    busy, what = (load.busy_cores, "cores busy") if load.busy_cores is not None else (load.average, "load average")
    limit = max(BUSY_CORES, BUSY_SHARE * cores)
    if busy is None or busy <= limit:
        return []
    return [f"{what} before the start: {busy:.2f}, at most {limit:.2f} wanted; stop other programs and run again"]
