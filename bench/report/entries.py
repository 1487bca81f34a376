"""The entries of one or several results, and what they say in plain words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rkd.bench.report.markup import decimal, significant
from rkd.bench.result import verify
from rkd.metrics import Scores, TriggerScore


@dataclass(frozen=True)
class Entry:
    """One verified entry of a result and the letter that stands for it on the page."""

    key: str
    data: dict[str, Any]
    scores: Scores | None

    @property
    def name(self) -> str:
        """The bundle's name."""
        return str(self.data["bundle"]["name"])

    @property
    def label(self) -> str:
        """Letter and name, marked where the figures do not count."""
        return f"{self.mark}{self.key} \N{MIDDLE DOT} {self.name}"

    def holds(self, what: str) -> bool:
        """Whether the figures of `timing` or `scores` may be used."""
        return bool(self.data["validity"][what])

    @property
    def mark(self) -> str:
        """A warning sign before what does not count."""
        return "" if self.valid else "\N{WARNING SIGN} "

    @property
    def valid(self) -> bool:
        """Whether the figures may be used."""
        return bool(self.data["validity"]["valid"])

    @property
    def place(self) -> str:
        """The machine in a few words."""
        device, host = self.data["device"], self.data["host"]
        place = str(device["model"] or device["cpu"] or device["architecture"])
        return f"{host}: {place}" if host else place

    @property
    def worst(self) -> TriggerScore | None:
        """The trigger that succeeds most often."""
        measured = [trigger for trigger in self.scores.triggers if trigger.asr.n] if self.scores else []
        return max(measured, key=lambda trigger: trigger.asr.value, default=None)

    @property
    def p50(self) -> float:
        """Median latency in milliseconds a batch; NaN where it was not measured."""
        return self.percentile("p50")[0]

    def percentile(self, name: str) -> tuple[float, float, float]:
        """Milliseconds a batch with the ends of the interval, infinite where open; NaN where it was not measured."""
        latency = self.data["latency"]
        if not latency:
            return math.nan, math.nan, math.nan
        found = latency[name]
        return float(found["ms"]), float(found["low"]), math.inf if found["high"] is None else float(found["high"])


def read_entries(results: Sequence[dict[str, Any]]) -> list[Entry]:
    """The entries of all results, in order.

    Raises:
        RkdError: a result is not of the schema that `rkd.bench.result` reads.
    """
    found = [data for number, one in enumerate(results, 1) for data in verify(one, f"result {number}")["entries"]]
    return [
        Entry(letters(index), data, Scores.from_json(data["scores"]) if data["scores"] else None)
        for index, data in enumerate(found)
    ]


def verdict(entries: Sequence[Entry]) -> str:
    """What the figures say, in plain words and about valid entries only."""
    if not entries:
        return "There is nothing to report: no result was given."
    timing, scores = ([entry for entry in entries if entry.holds(what)] for what in ("timing", "scores"))
    if not timing and not scores:
        what = f"None of the {len(entries)} measurements is" if len(entries) > 1 else "This measurement is not"
        return f"{what} valid. The figures below must not be used as evidence; the reasons come first."
    sentences = [
        _left_out(len(entries), len(timing), "latency, memory and power"),
        _left_out(len(entries), len(scores), "ACC, ASR and RA"),
        _speed(timing),
        _accuracy(scores),
        _attack(scores),
        _gates(entries),
    ]
    return " ".join(filter(None, sentences)) or "Nothing was measured."


def best(entries: Sequence[Entry]) -> set[str]:
    """Keys of the entries on the Pareto front: no other is at least as fast, as accurate and as safe, and better in one.

    Only entries with all three figures, all of which may be used, take part.
    """
    figures = {}
    for entry in entries:
        if entry.valid and entry.scores and entry.scores.acc.n and entry.p50 > 0:
            worst = entry.worst
            figures[entry.key] = (entry.p50, -entry.scores.acc.value, worst.asr.value if worst else 0.0)
    return {
        key
        for key, mine in figures.items()
        if not any(
            other != mine and all(o <= m for o, m in zip(other, mine, strict=True)) for other in figures.values()
        )
    }


def _left_out(count: int, usable: int, what: str) -> str:
    if usable == count:
        return ""
    who = "The" if count == 1 else "All" if not usable else f"{count - usable} of {count}"
    return (
        f"{who} figures of {what} must not be used; the reasons come first."
        if who in ("The", "All")
        else (f"{who} measurements of {what} must not be used.")
    )


def _gates(entries: Sequence[Entry]) -> str:
    gates = [gate for entry in entries for gate in entry.data["gates"]]
    broken = sum(not gate["passed"] for gate in gates)
    if not gates:
        return ""
    return f"{broken} of {len(gates)} gates failed." if broken else f"All {len(gates)} gates were kept."


def _speed(valid: Sequence[Entry]) -> str:
    timed = [entry for entry in valid if math.isfinite(entry.p50)]
    if not timed:
        return ""
    fastest = min(timed, key=lambda entry: entry.p50)
    batch = fastest.data["latency"]["batch"]
    unit = "an image" if batch == 1 else f"a batch of {batch:,}"
    who = f"{fastest.name} ({fastest.key}), the fastest of {len(timed)}," if len(timed) > 1 else fastest.name
    return f"{who} takes {significant(fastest.p50)} ms for {unit} at the median on {fastest.place}."


def _accuracy(valid: Sequence[Entry]) -> str:
    shares = [entry.scores.acc.value for entry in valid if entry.scores and entry.scores.acc.n]
    if not shares:
        return ""
    low, high = decimal(min(shares)), decimal(max(shares))
    return f"Clean accuracy is {low} %." if low == high else f"Clean accuracy is {low} to {high} %."


def _attack(valid: Sequence[Entry]) -> str:
    attacked = [(worst, entry) for entry in valid if (worst := entry.worst)]
    if not attacked:
        return ""
    worst, entry = max(attacked, key=lambda pair: pair[0].asr.value)
    where = f" (in {entry.key})" if len(valid) > 1 else ""
    rate = f"{worst.asr.value:.1f} %"
    return f"The trigger that succeeds most often, {worst.trigger}{where}, does so on {rate} of the images."


def letters(index: int) -> str:
    """A, B, ..., Z, AA, AB, ..."""
    letter = chr(ord("A") + index % 26)
    return letter if index < 26 else letters(index // 26 - 1) + letter
