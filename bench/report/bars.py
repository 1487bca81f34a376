"""Horizontal rows with intervals: bars for shares, dots for latencies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rkd.bench.report.markup import DASH, Markup, decimal, significant, tag
from rkd.bench.report.svg import Axis, line, linear_ticks, shorten, svg, text, tick_texts
from rkd.metrics import Proportion

WIDTH = 312.0  # narrower than other charts: three panels share a row
_ROW = 40.0  # from one row to the next
_TOP = 14.0  # baseline of the first row's text
_LEFT, _RIGHT = 3.0, WIDTH - 3  # room for half a whisker cap at both ends
_LANE, _GROUP = 13.0, 68.0  # from one percentile to the next, from one bundle to the next
_LOG_ABOVE = 30.0  # a latency axis with a wider ratio than this is logarithmic

Estimate = tuple[float, float, float]  # value, low, high; an interval without an upper end goes to infinity


@dataclass(frozen=True)
class LatencyRow:
    """What one bundle took, in milliseconds; NaN where it was not measured.

    Attributes:
        label: its name.
        p50, p90, p99: percentiles, each as (value, low, high) with its 95 % interval.
    """

    label: str
    p50: Estimate
    p90: Estimate
    p99: Estimate

    @property
    def lanes(self) -> tuple[tuple[str, Estimate], ...]:
        """Name and value of each percentile."""
        return ("p50", self.p50), ("p90", self.p90), ("p99", self.p99)


def share_bars(label: str, rows: Sequence[tuple[str, Proportion]], colour: str) -> Markup:
    """A bar from 0 to 100 % for each share, with its 95 % interval and its n; nothing where no share has an n.

    Args:
        label: what the chart shows; the values are added to it for a screen reader.
        rows: names and shares.
        colour: name of a colour of the style sheet, e.g. `acc`.
    """
    if not any(share.n for _, share in rows):
        return Markup()
    axis = Axis(0, 100, _LEFT, _RIGHT)
    bottom = _TOP + _ROW * len(rows) - 12
    parts = [line(axis.place(tick), _TOP + 6, axis.place(tick), bottom, "grid") for tick in (0, 25, 50, 75, 100)]
    for index, (name, share) in enumerate(rows):
        parts += _share(axis, _TOP + _ROW * index, name, share, colour)
    parts += _scale(axis, (0, 25, 50, 75, 100), bottom, " %")
    spoken = "; ".join(f"{name}: {share_text(share)}" for name, share in rows)
    return svg(f"{label}. {spoken}.", WIDTH, bottom + 18, *parts)


def share_text(share: Proportion) -> str:
    """A share with its interval and n in words, e.g. `82.4 % [80.7, 84.0], n 2,000`."""
    if not share.n:
        return "not measured, n 0"
    low, high = share.interval
    return f"{share.value:.1f} % [{low:.1f}, {high:.1f}], n\N{NO-BREAK SPACE}{share.n:,}"


def latency_rows(label: str, rows: Sequence[LatencyRow]) -> Markup:
    """p50, p90 and p99 of each bundle with their intervals on one axis; nothing where nothing was measured."""
    values = [v for row in rows for _, lane in row.lanes for v in lane if math.isfinite(v) and v > 0]
    if not values:
        return Markup()
    log = max(values) / min(values) > _LOG_ABOVE
    low, high = (min(values) / 1.3, max(values) * 1.3) if log else (0.0, max(values) * 1.04)
    axis = Axis(low, high, _LEFT + 30, _RIGHT - 6, log=log)
    ticks = axis.ticks() if log else linear_ticks(low, high, 5)
    bottom = _TOP + _GROUP * len(rows) - 18
    parts = [line(axis.place(tick), _TOP + 6, axis.place(tick), bottom, "grid") for tick in ticks]
    for index, row in enumerate(rows):
        parts += _latency(axis, _TOP + _GROUP * index, row)
    parts += _scale(axis, ticks, bottom, " ms")
    spoken = "; ".join(f"{row.label}: {_spoken(row)}" for row in rows)
    return svg(f"{label}. {spoken}.", WIDTH, bottom + 18, *parts)


def _spoken(row: LatencyRow) -> str:
    return ", ".join(f"{name} {significant(lane[0])} ms" for name, lane in row.lanes)


def _share(axis: Axis, y: float, name: str, share: Proportion, colour: str) -> list[Markup]:
    top = y + 9
    track = tag("rect", x=axis.start, y=top, width=axis.end - axis.start, height=11, class_="track")
    if not share.n:
        return [text(_LEFT, y, shorten(name, 230)), text(_RIGHT, y, f"{DASH} n 0", anchor="end", class_="q"), track]
    low, high = share.interval
    numbers = f"[{low:.1f}, {high:.1f}] n {share.n:,}"
    room = WIDTH - 5.9 * len(numbers) - 46
    figures = tag(
        "text", tag("tspan", decimal(share.value), class_="strong"), " ", tag("tspan", numbers, class_="q"),
        x=_RIGHT, y=y, text_anchor="end",
    )  # fmt: skip
    bar = tag(
        "rect", x=axis.start, y=top, width=axis.place(share.value) - axis.start, height=11, fill=f"var(--{colour})",
        class_="bar",
    )  # fmt: skip
    return [text(_LEFT, y, shorten(name, room)), figures, track, bar, *_whisker(axis, top + 5.5, low, high)]


def _whisker(axis: Axis, y: float, low: float, high: float) -> list[Markup]:
    """An interval on a halo that keeps it apart from the bar below it, with a cap at each end that it has."""
    start, end = axis.place(low), axis.place(min(high, axis.high))
    caps = [line(x, y - 4, x, y + 4, "whisker") for x in ((start, end) if math.isfinite(high) else (start,))]
    return [line(start, y, end, y, "halo"), line(start, y, end, y, "whisker"), *caps]


def _latency(axis: Axis, y: float, row: LatencyRow) -> list[Markup]:
    numbers = " \N{MIDDLE DOT} ".join(significant(lane[0]) for _, lane in row.lanes) + " ms"
    parts = [
        text(_LEFT, y, shorten(row.label, WIDTH - 7 * len(numbers) - 16)),
        text(_RIGHT, y, numbers, anchor="end", class_="strong"),
    ]
    for index, (name, (value, low, high)) in enumerate(row.lanes):
        middle = y + 14 + _LANE * index
        parts.append(text(_LEFT, middle + 4, name, class_="q"))
        parts.append(line(axis.start, middle, axis.end, middle, "lane"))
        if math.isfinite(value) and value > 0:
            if low > 0:
                parts += _whisker(axis, middle, low, high)
            fill = "var(--acc)" if index == 0 else "var(--paper)"
            dot = {"fill": fill, "stroke": "var(--acc)", "class_": "dot"}
            parts.append(tag("circle", cx=axis.place(value), cy=middle, r=3.6, stroke_width=1.6, **dot))
    return parts


def _scale(axis: Axis, ticks: Sequence[float], y: float, unit: str) -> list[Markup]:
    """Tick labels below the rows; the last one carries the unit."""
    parts = []
    for tick, written in zip(ticks, tick_texts(ticks), strict=True):
        x, last = axis.place(tick), tick == ticks[-1]
        anchor = "start" if x < 14 else "end" if x > WIDTH - 22 else "middle"
        parts.append(text(x, y + 13, written + (unit if last else ""), anchor=anchor, class_="q"))
    return parts
