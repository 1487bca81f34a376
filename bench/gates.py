"""Limits that a board's figures must keep, e.g. `acc>=90, asr_upper<=2, p99<=5ms, memory<=200MB, agreement>=99.5`.

A limit is held against the bad end of a figure's 95 % interval where it has one: `acc>=90` asks that the lower end is
at least 90. Of several triggers the worst counts; `asr:NAME` and `ra:NAME` ask for one. A figure that was not measured
keeps no limit, nor does one that the entry calls invalid: a gate on ACC, ASR, RA or agreement needs valid scores, any
other needs valid timing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rkd.bench.quantiles import fewest_for_upper_end
from rkd.errors import ConfigError
from rkd.metrics import Proportion

_GATE = re.compile(
    r"\s*(?P<figure>[a-z_][a-z0-9_]*)(?::(?P<trigger>[a-z0-9][a-z0-9-]*))?\s*(?P<operator>>=|<=|>|<)\s*"
    r"(?P<value>\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*(?P<unit>%|[a-zA-Z/]*)\s*",
    re.ASCII,
)
_UNITS = {
    "percent": {"": 1.0, "%": 1.0},
    "milliseconds": {"": 1.0, "ms": 1.0, "us": 1e-3, "s": 1e3},
    "bytes": {"": 1e6, "MB": 1e6, "kB": 1e3, "GB": 1e9, "MiB": 2.0**20, "GiB": 2.0**30, "B": 1.0},
    "images/s": {"": 1.0, "img/s": 1.0},
    "watts": {"": 1.0, "W": 1.0, "mW": 1e-3},
    "joules": {"": 1.0, "J": 1.0, "mJ": 1e-3},
}
_FIGURES = {
    "acc": "percent", "asr": "percent", "asr_upper": "percent", "ra": "percent", "agreement": "percent",
    "p50": "milliseconds", "p90": "milliseconds", "p99": "milliseconds", "p999": "milliseconds",
    "memory": "bytes", "throughput": "images/s", "watts": "watts", "joules": "joules",
}  # fmt: skip
_SHOWN = {"percent": " %", "milliseconds": " ms", "bytes": " MB", "images/s": " img/s", "watts": " W", "joules": " J"}

_PERCENTILES = {"p50": 50, "p90": 90, "p99": 99, "p999": 99.9}

Ends = tuple[float, float]  # low and high end of an interval; the same where there is none, infinite where it is open


@dataclass(frozen=True)
class Gate:
    """One limit.

    Attributes:
        text: as the user wrote it, without spaces.
        figure: what is limited.
        trigger: that it is about; empty for the worst.
        operator: `>=`, `<=`, `>` or `<`.
        limit: in the figure's own unit.
    """

    text: str
    figure: str
    trigger: str
    operator: str
    limit: float

    def judge(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        """Hold an entry of a result against it: `{gate, value, passed, text}`; what is invalid passes nothing."""
        ends = _ends(self.figure, self.trigger, entry)
        if ends is None:
            return self._verdict(None, passed=False, text=f"{self.text}: {self._missing(entry)}")
        value = ends[0] if self.operator.startswith(">") else ends[1]
        if math.isinf(value):
            return self._verdict(None, passed=False, text=f"{self.text}: {self._open(ends[0], entry)}")
        passed = self._keeps(value)
        text = (
            f"{self.text}: {self.figure} is {self._shown(value, ends, entry)}{'' if passed else self._too_few(entry)}"
        )
        if spoiled := self._spoiled(entry["validity"]):
            return self._verdict(value, passed=False, text=f"{text}, but invalid: {', '.join(spoiled)}")
        return self._verdict(value, passed=passed, text=text)

    def _missing(self, entry: Mapping[str, Any]) -> str:
        """That there is no such figure; where only inferences lack, how many would do."""
        if self.figure not in _PERCENTILES or not entry["latency"]:
            return f"{self.figure} was not measured"
        n, fewest = entry["latency"]["n"], fewest_for_upper_end(_PERCENTILES[self.figure])
        return f"{n:,} inferences are too few for {self.figure}, {fewest:,} would do for its upper 95 % limit"

    def _open(self, low: float, entry: Mapping[str, Any]) -> str:
        """That there are too few inferences for an upper end, and how many would do."""
        fewest = fewest_for_upper_end(_PERCENTILES[self.figure])
        return (
            f"{self.figure} is at least {low:.4g} ms; {entry['latency']['n']:,} inferences are too few for an upper 95 % "
            f"limit, {fewest:,} would do"
        )

    def _shown(self, value: float, ends: Ends, entry: Mapping[str, Any]) -> str:
        """What was measured, and the end of its interval that is held against the limit."""
        kind = _FIGURES[self.figure]
        shown = f"{value / 1e6 if kind == 'bytes' else value:.4g}{_SHOWN[kind]}"
        if ends[0] == ends[1]:
            return shown
        end = "lower" if self.operator.startswith(">") else "upper"
        share = _share_of(self.figure, self.trigger, entry)
        if share is None:
            return f"{shown} ({end} 95 % limit)"
        return f"{100 * share['hits'] / share['n']:.4g} % of {share['n']:,} images, {end} 95 % limit {shown}"

    def _too_few(self, entry: Mapping[str, Any]) -> str:
        """Where a share keeps the limit and only its interval does not: how many images it takes to be sure."""
        share = _share_of(self.figure, self.trigger, entry)
        if share is None or not self._keeps(100 * share["hits"] / share["n"]):
            return ""
        for growth in (1.1**power for power in range(1, 100)):
            n = round(share["n"] * growth)
            low, high = Proportion(min(n, round(share["hits"] * growth)), n).interval
            if self._keeps(low if self.operator.startswith(">") else high):
                return f"; to be sure takes about {n:,} images"
        return ""

    def _keeps(self, value: float) -> bool:
        return {
            ">=": value >= self.limit, "<=": value <= self.limit, ">": value > self.limit, "<": value < self.limit
        }[self.operator]  # fmt: skip

    def _spoiled(self, validity: Mapping[str, Any]) -> list[str]:
        """The codes that make its figure invalid."""
        what = "scores" if _FIGURES[self.figure] == "percent" else "timing"
        return list(dict.fromkeys(r["code"] for r in validity["reasons"] if r["affects"] in ("all", what)))

    def _verdict(self, value: float | None, *, passed: bool, text: str) -> dict[str, Any]:
        return {"gate": self.text, "value": value, "passed": passed, "text": text}


def parse_gates(texts: Sequence[str]) -> tuple[Gate, ...]:
    """Read gates; each text may hold several, separated by commas.

    Raises:
        ConfigError: a gate that cannot be read, naming it and what is known; an empty one is none.
    """
    return tuple(_parse(part) for text in texts for part in text.split(","))


def _parse(text: str) -> Gate:
    found = _GATE.fullmatch(text)
    if not found:
        raise ConfigError(
            f"--gate {text.strip()!r}: expected a figure, <= or >=, and a number, as in acc>=90 or p99<=5ms"
        )
    figure, unit = found["figure"], found["unit"]
    if figure not in _FIGURES:
        raise ConfigError(f"--gate {text.strip()!r}: no figure is called {figure!r}; expected {', '.join(_FIGURES)}")
    units = _UNITS[_FIGURES[figure]]
    if unit not in units:
        known = ", ".join(name for name in units if name)
        raise ConfigError(f"--gate {text.strip()!r}: {figure} is not in {unit!r}; expected {known}")
    if found["trigger"] and figure not in ("asr", "asr_upper", "ra"):
        raise ConfigError(f"--gate {text.strip()!r}: only asr and ra belong to a trigger")
    limit = float(found["value"]) * units[unit]
    if not math.isfinite(limit):
        raise ConfigError(f"--gate {text.strip()!r}: that number is too large")
    return Gate("".join(text.split()), figure, found["trigger"] or "", found["operator"], limit)


def _ends(figure: str, trigger: str, entry: Mapping[str, Any]) -> Ends | None:
    """Both ends of a figure's interval; None where it was not measured."""
    latency, memory, power = (entry[key] for key in ("latency", "memory", "power"))
    if figure.startswith("p"):
        found = latency[figure] if latency else None
        return (found["low"], math.inf if found["high"] is None else found["high"]) if found else None
    if figure == "throughput":
        return _exactly(latency["images_per_second"] if latency else None)
    if figure == "memory":
        return _exactly(_held_bytes(memory) if memory else None)
    if figure in ("watts", "joules"):
        return _exactly(power[figure] if power else None)
    return _share_ends(_share_of(figure, trigger, entry))


def _held_bytes(memory: Mapping[str, Any]) -> int | None:
    """The process's peak, and what the model holds on a GPU beside it, which the process's own figures do not count."""
    peak: int | None = memory["peak_bytes"]
    return None if peak is None else peak + (memory["device_bytes"] or 0)


def _share_of(figure: str, trigger: str, entry: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The share of images that a figure is, with hits and n; of several triggers' the worst. None for other figures."""
    scores = entry["scores"]
    if figure == "agreement":
        found = [entry["agreement"]["share"]] if entry["agreement"] else []
    elif figure == "acc":
        found = [scores["acc"]] if scores else []
    elif figure in ("asr", "asr_upper", "ra"):
        key = "ra" if figure == "ra" else "asr"
        found = [t[key] for t in (scores["triggers"] if scores else ()) if trigger in ("", t["name"])]
    else:
        return None
    shares: list[Mapping[str, Any]] = [share for share in found if share and share["n"]]
    if not shares:
        return None
    return (
        max(shares, key=lambda s: s["high"])
        if figure.startswith("asr")
        else min(shares, key=lambda s: (s["low"], s["high"]))
    )


def _share_ends(share: Mapping[str, Any] | None) -> Ends | None:
    return (share["low"], share["high"]) if share else None


def _exactly(value: float | None) -> Ends | None:
    return None if value is None else (value, value)
