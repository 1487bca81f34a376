"""What one look at a machine's sensors gives; what is not reported is absent, never 0."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

# Rails that hold all others, best first: a board's input. Then sets whose sum is the module's power.
_INPUTS = ("VDD_IN", "VIN", "POM_5V_IN", "psys")
_SUMS = (
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),  # AGX Orin; VDDQ_VDD2_1V8AO is fed from VIN_SYS_5V0
    ("VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"),  # Thor
    ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"),  # AGX Xavier
)


@dataclass(frozen=True)
class Reading:
    """One look.

    Attributes:
        watts: of each power rail.
        celsius: of each thermal zone.
        hertz: of each clock: `cpu`, the fastest core in use, `gpu`, `emc`, and `cpu cap` and `gpu cap`, what is
            allowed.
        throttle: counters of throttling events, levels of cooling, and what throttles now, by name.
        load: percent busy of `gpu` and `emc`.
    """

    watts: Mapping[str, float] = field(default_factory=dict)
    celsius: Mapping[str, float] = field(default_factory=dict)
    hertz: Mapping[str, float] = field(default_factory=dict)
    throttle: Mapping[str, int] = field(default_factory=dict)
    load: Mapping[str, float] = field(default_factory=dict)

    def over(self, other: Reading) -> Reading:
        """Both, and this one where both report."""
        return Reading(*({**getattr(other, name), **getattr(self, name)} for name in asdict(self)))

    def to_json(self) -> dict[str, Any]:
        """All that is reported."""
        return {name: dict(value) for name, value in asdict(self).items() if value}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Reading:
        """Inverse of `to_json`."""
        return cls(**value)


def total_rails(names: Mapping[str, float]) -> tuple[str, ...]:
    """The rails whose sum is the power of the whole board or processor; empty where that is not known."""
    for name in _INPUTS:
        if name in names:
            return (name,)
    for group in _SUMS:
        if set(group) <= set(names):
            return group
    packages = tuple(sorted(name for name in names if re.fullmatch(r"package-\S+", name)))
    return packages or (("battery",) if "battery" in names else ())
