"""How latencies are spread: the histogram of each bundle, one above the other, on one axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rkd.bench.report.markup import Markup, significant, tag
from rkd.bench.report.svg import WIDTH, Axis, apart, line, linear_ticks, shorten, svg, text, tick_texts

_ROW, _HILL, _TOP = 76.0, 34.0, 16.0
_MARK = 26.0  # a generous width of a percentile's name
_LEFT, _RIGHT = 4.0, WIDTH - 6
_LOG_ABOVE = 4.0  # an axis with a wider ratio than this is logarithmic


@dataclass(frozen=True)
class Spread:
    """The histogram of one bundle.

    Attributes:
        label: its name.
        low_ms, high_ms: the fastest and the slowest sample.
        counts: of samples in bins of equal ratio between them.
        marks: percentiles to mark, by name, in milliseconds.
    """

    label: str
    low_ms: float
    high_ms: float
    counts: Sequence[int]
    marks: dict[str, float]


def spreads(label: str, rows: Sequence[Spread], colours: int = 6) -> Markup:
    """A hill for each bundle, its highest bin as high as any other's; nothing where there is none."""
    rows = [row for row in rows if row.low_ms > 0 and any(row.counts)]
    if not rows:
        return Markup()
    low, high = min(row.low_ms for row in rows), max(row.high_ms for row in rows)
    low, high = (low * 0.95, high * 1.05) if high / low < 1.05 else (low, high)
    log = high / low > _LOG_ABOVE
    axis = Axis(low, high, _LEFT, _RIGHT, log=log)
    bottom = _TOP + _ROW * len(rows) - 8
    ticks = axis.ticks() if log else linear_ticks(low, high, 5)
    parts = [line(axis.place(tick), _TOP + 6, axis.place(tick), bottom, "grid") for tick in ticks]
    for index, row in enumerate(rows):
        parts += _hill(axis, _TOP + _ROW * index, row, f"var(--s{index % colours})")
    for tick, written in zip(ticks, tick_texts(ticks), strict=True):
        x = axis.place(tick)
        anchor = "start" if x < 16 else "end" if x > WIDTH - 26 else "middle"
        parts.append(text(x, bottom + 14, written + (" ms" if tick == ticks[-1] else ""), anchor=anchor, class_="q"))
    spoken = "; ".join(
        f"{row.label}: {significant(row.low_ms)} to {significant(row.high_ms)} ms, "
        + ", ".join(f"{name} {significant(value)}" for name, value in row.marks.items())
        for row in rows
    )
    return svg(f"{label}. {spoken}.", WIDTH, bottom + 20, *parts)


def _hill(axis: Axis, y: float, row: Spread, colour: str) -> list[Markup]:
    base, edges = y + 20 + _HILL, _edges(row)
    highest = max(row.counts)
    points = [f"M{axis.place(edges[0]):.2f} {base:.2f}"]
    for index, count in enumerate(row.counts):
        top = base - _HILL * count / highest
        points += [f"L{axis.place(edges[index]):.2f} {top:.2f}", f"L{axis.place(edges[index + 1]):.2f} {top:.2f}"]
    points.append(f"L{axis.place(edges[-1]):.2f} {base:.2f}Z")
    parts = [
        text(_LEFT, y, shorten(row.label, _RIGHT - 20)),
        tag("path", d="".join(points), fill=colour, fill_opacity="0.8"),
        line(axis.start, base, axis.end, base, "axis"),
    ]
    marks = sorted((axis.place(min(max(value, axis.low), axis.high)), name) for name, value in row.marks.items())
    places = apart([x for x, _ in marks], _MARK, axis.start + _MARK / 2, axis.end - _MARK / 2)
    for (x, name), at in zip(marks, places, strict=True):  # names above the hill, where no line crosses them
        parts.append(line(x, base - _HILL - 2, x, base + 3, "whisker"))
        parts.append(text(at, base - _HILL - 5, name, anchor="middle", class_="q"))
    return parts


def _edges(row: Spread) -> list[float]:
    n = len(row.counts)
    if n == 1:
        return [row.low_ms * 0.997, row.high_ms * 1.003]
    step = math.log(row.high_ms / row.low_ms) / n
    inner = [row.low_ms * math.exp(step * i) for i in range(1, n)]
    return [row.low_ms, *inner, row.high_ms]
