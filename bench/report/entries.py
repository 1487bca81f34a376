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
        device = self.data["device"]
        return str(device["model"] or device["cpu"] or device["architecture"])

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
        """Milliseconds a batch with the ends of the interval; NaN where it was not measured."""
        latency = self.data["latency"]
        if not latency:
            return math.nan, math.nan, math.nan
        found = latency[name]
        return float(found["ms"]), float(found["low"]), float(found["high"])


def read_entries(results: Sequence[dict[str, Any]]) -> list[Entry]:
    """The entries of all results, in order.

    Raises:
        RkdError: a result is not of the schema that `rkd.bench.result` reads.
    """
    found = [data for number, one in enumerate(results, 1) for data in verify(one, f"result {number}")["entries"]]
    return [
        Entry(_letters(index), data, Scores.from_json(data["scores"]) if data["scores"] else None)
        for index, data in enumerate(found)
    ]


def verdict(entries: Sequence[Entry]) -> str:
    """What the figures say, in plain words and about valid entries only."""
    if not entries:
        return "There is nothing to report: no result was given."
    valid = [entry for entry in entries if entry.valid]
    if not valid:
        what = f"None of the {len(entries)} measurements is" if len(entries) > 1 else "This measurement is not"
        return f"{what} valid. The figures below must not be used as evidence; the reasons come first."
    left_out = len(entries) - len(valid)
    sentences = [
        f"{left_out} of {len(entries)} measurements must not be used." if left_out else "",
        _speed(valid),
        _accuracy(valid),
        _attack(valid),
    ]
    return " ".join(filter(None, sentences)) or "Nothing was measured."


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


def _letters(index: int) -> str:
    """A, B, ..., Z, AA, AB, ..."""
    letters = chr(ord("A") + index % 26)
    return letters if index < 26 else _letters(index // 26 - 1) + letters
