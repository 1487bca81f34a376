"""Charts as SVG, drawn so that they read on a phone, on paper and without colour.

Every chart is 360 units wide, about the width of a phone, so that its text keeps its size there. A series has a
colour, a dash pattern, a marker and its name at its end; a bar has its number beside its name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from rkd.bench.report.markup import Markup, coordinate, decimal, join, significant, tag

WIDTH: Final = 360.0
_GLYPH = 7.0  # a generous width of one letter at 12 units, to keep names inside the chart
_WIDE, _NARROW = (
    frozenset("mwMW@%\N{WARNING SIGN}\N{HORIZONTAL ELLIPSIS}"),
    frozenset(" .,:;'|-\N{MIDDLE DOT}ijlftr[]()"),
)
_DASHES = (None, "7 3", "2 3", "9 3 2 3", "4 2", "1 3")
_MARKED = 6  # markers along one line
_COLOURS = 6
Box = tuple[float, float, float, float]  # left, top, right, bottom
_LARGEST = 1.15  # how far a chart may grow on a wide page, so that its text stays text-sized


@dataclass(frozen=True)
class Series:
    """One line of a chart; a point whose x or y is not finite interrupts it."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Spot:
    """One point of a scatter.

    Attributes:
        x, y: its place.
        size: its share of the largest marker's area, 0 to 1.
        label: beside it.
        best: whether no other point is better in every respect; it gets a second ring.
        hollow: whether it must not be used as evidence.
        x_ends, y_ends: of its intervals; NaN where there is none.
    """

    x: float
    y: float
    size: float
    label: str
    best: bool = False
    hollow: bool = False
    x_ends: tuple[float, float] = (math.nan, math.nan)
    y_ends: tuple[float, float] = (math.nan, math.nan)


@dataclass(frozen=True)
class Axis:
    """A scale from data to drawing.

    Attributes:
        low, high: the data at both ends; positive where `log`.
        start, end: the drawing coordinates of both ends.
        log: whether equal ratios take equal room.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def place(self, value: float) -> float:
        """Where a value is drawn."""
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, count: int = 4) -> list[float]:
        """About `count` round values on the axis."""
        return _log_ticks(self.low, self.high) if self.log else linear_ticks(self.low, self.high, count)


def linear_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Multiples of 1, 2, 2.5 or 5 times a power of ten within [low, high], about `count` of them."""
    wanted = (high - low) / count
    power = 10.0 ** math.floor(math.log10(wanted))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= wanted * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def tick_texts(ticks: Sequence[float]) -> list[str]:
    """The ticks of one axis, written with as many decimals as the finest of them needs."""
    if any(tick and not 1e-4 <= abs(tick) < 1e7 for tick in ticks):
        return [f"{tick:.3g}" for tick in ticks]
    places = max((len(f"{tick:.6f}".rstrip("0").partition(".")[2]) for tick in ticks), default=0)
    return [decimal(tick, places) for tick in ticks]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if math.log10(high / low) < 2.5 else (1,)
    ticks = [factor * 10.0**decade for decade in decades for factor in factors]
    return [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]


def svg(label: str, width: float, height: float, *parts: Markup) -> Markup:
    """A drawing that a screen reader announces as `label`."""
    return tag(
        "svg",
        *parts,
        viewBox=f"0 0 {coordinate(width)} {coordinate(height)}",
        role="img",
        aria_label=label,
        style=f"max-width:{coordinate(width * _LARGEST)}px",
    )


def text(x: float, y: float, content: str, *, anchor: str | None = None, class_: str | None = None) -> Markup:
    """A line of text on its baseline."""
    return tag("text", content, x=x, y=y, text_anchor=anchor, class_=class_)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """A straight line."""
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def shorten(name: str, width: float) -> str:
    """A name that fits into `width` units, cut in its middle if it must be."""
    if text_width(name) <= width:
        return name
    cut = name
    for room in range(min(len(name) - 1, int(width / 4)), 3, -1):
        tail = room // 3
        cut = f"{name[: room - tail]}\N{HORIZONTAL ELLIPSIS}{name[len(name) - tail :]}"
        if text_width(cut) <= width:
            break
    return cut


def text_width(name: str) -> float:
    """About how wide a name is at 12 units in a wide face: what holds it has at least this room."""
    return sum(
        12.0 if c in _WIDE or ord(c) > 0x2E7F else 5.0 if c in _NARROW else 9.5 if c.isupper() else 7.6 for c in name
    )


def marker(index: int, x: float, y: float, radius: float = 3.4) -> Markup:
    """The marker of the series with this index: disc, square, triangle, diamond, ring or cross."""
    r, colour = radius, f"var(--s{index % _COLOURS})"
    shape = index % 6
    if shape in (0, 4):
        ring = {"fill": "var(--paper)", "stroke": colour, "stroke-width": "1.6"} if shape else {"fill": colour}
        return tag("circle", cx=x, cy=y, r=r, **ring)
    if shape == 5:
        return _path(((x - r, y - r, x + r, y + r), (x - r, y + r, x + r, y - r)), stroke=colour, stroke_width=2.0)
    corners = {
        1: (x - r, y - r, x + r, y - r, x + r, y + r, x - r, y + r, x - r, y - r),
        2: (x, y - 1.25 * r, x + 1.2 * r, y + r, x - 1.2 * r, y + r, x, y - 1.25 * r),
        3: (x, y - 1.4 * r, x + 1.4 * r, y, x, y + 1.4 * r, x - 1.4 * r, y, x, y - 1.4 * r),
    }[shape]
    return _path((corners,), fill=colour)


def line_chart(label: str, series: Sequence[Series], x_label: str) -> Markup:
    """Lines over a common x, each named at its end if there are several; nothing where no point is finite.

    Args:
        label: what the chart shows; the last value of every series is added to it for a screen reader.
        series: the lines.
        x_label: below the x axis.
    """
    runs = [_finite_runs(one) for one in series]
    points = [point for found in runs for run in found for point in run]
    if not points:
        return Markup()
    named = len(series) > 1
    room = min(142.0, max(len(one.name) for one in series) * _GLYPH + 20) if named else 8.0
    low, high = _padded([y for _, y in points])
    left = 10 + 6.4 * max(map(len, tick_texts(linear_ticks(low, high))))
    height = max(208.0, 18.0 * len(series) + 60)
    across = Axis(*_spread([x for x, _ in points]), left, WIDTH - room - 12)
    down = Axis(low, high, height - 40, 12)
    parts = [_frame(across, down, x_label, height)]
    ends: list[tuple[float, float, int]] = []
    for index, found in enumerate(runs):
        if not found:
            continue
        drawn = [[(across.place(x), down.place(y)) for x, y in run] for run in found]
        parts.append(_curve(index, drawn))
        ends.append((drawn[-1][-1][1], drawn[-1][-1][0], index))
    ends = sorted(ends) if named else []
    for (y, x, index), at in zip(ends, apart([y for y, _, _ in ends], 15.0, 12.0, height - 40), strict=True):
        edge = WIDTH - room
        parts.append(_path(((x + 4, y, edge - 3, at),), class_="leader"))
        parts.append(marker(index, edge + 4, at))
        parts.append(text(edge + 13, at + 4, shorten(series[index].name, room - 13)))
    last = [f"{one.name} ends at {significant(run[-1][-1][1])}" for one, run in zip(series, runs, strict=True) if run]
    return svg(f"{label}. {'; '.join(last)}.", WIDTH, height, *parts)


def scatter(label: str, spots: Sequence[Spot], x_label: str, y_label: str) -> Markup:
    """Named points over a logarithmic x; nothing where no point can be placed."""
    shown = [spot for spot in spots if math.isfinite(spot.x) and math.isfinite(spot.y) and spot.x > 0]
    if not shown:
        return Markup()
    height = 268.0
    xs = [x for spot in shown for x in (spot.x, *spot.x_ends) if math.isfinite(x) and x > 0]
    ys = [y for spot in shown for y in (spot.y, *spot.y_ends) if math.isfinite(y)]
    across = Axis(min(xs) / 1.5, max(xs) * 1.5, 38.0, WIDTH - 6, log=True)
    down = Axis(*_padded(ys), height - 40, 36.0)
    parts = [_frame(across, down, x_label, height), text(0, 12, y_label, class_="q")]
    discs = []
    crosses = [_cross(across, down, spot) for spot in shown]
    for spot in shown:
        share = min(1.0, max(0.0, spot.size)) if math.isfinite(spot.size) else 0.0
        discs.append((across.place(spot.x), down.place(spot.y), 4 + 8 * math.sqrt(share)))
    for spot, (x, y, r), cross in zip(shown, discs, crosses, strict=True):
        if spot.best:
            parts.append(tag("circle", cx=x, cy=y, r=r + 3, fill="none", stroke="var(--ink)", stroke_width=1.2))
        fill = {"fill": "none", "stroke_dasharray": "3 2"} if spot.hollow else {"fill": "var(--asr)"}
        parts.append(tag("circle", cx=x, cy=y, r=r, class_="spot", fill_opacity=0.35, stroke="var(--ink)", **fill))
        parts += [line(*ends, "interval") for ends in cross]
    discs = [(x, y, r + 3 if spot.best else r) for spot, (x, y, r) in zip(shown, discs, strict=True)]
    taken: list[Box] = [(across.start, down.start - 1, across.end, down.start + 1)]
    taken += [(x - r, y - r, x + r, y + r) for x, y, r in discs]
    taken += [(x1 - 1, y1 - 1, x2 + 1, y2 + 1) for cross in crosses for x1, y1, x2, y2 in cross]
    for spot, (x, y, r) in zip(shown, discs, strict=True):
        box = _free_place(x, y, r, len(spot.label) * _GLYPH, taken)
        taken.append(box)
        parts.append(text(box[0], box[3] - 3, spot.label))
    return svg(label, WIDTH, height, *parts)


def _cross(across: Axis, down: Axis, spot: Spot) -> list[Box]:
    """Both intervals of a spot, as lines."""
    x, y, (left, right), (low, high) = across.place(spot.x), down.place(spot.y), spot.x_ends, spot.y_ends
    parts: list[Box] = []
    if left > 0 and math.isfinite(right):
        parts.append((across.place(left), y, across.place(right), y))
    if math.isfinite(low) and math.isfinite(high):
        parts.append((x, down.place(high), x, down.place(low)))
    return parts


def _free_place(x: float, y: float, r: float, width: float, taken: Sequence[Box]) -> Box:
    """A box of `width` for the label of a disc: beside, above or below it, where it covers least."""
    tall, gap = 14.0, r + 4
    corners = [(x + gap, y - tall / 2), (x - gap - width, y - tall / 2), (x - width / 2, y - gap - tall)]
    corners += [(x - width / 2, y + gap - 2), (x + gap, y - gap - tall / 2), (x + gap, y + gap - tall / 2)]
    corners += [(x - gap - width, y - gap - tall / 2), (x - gap - width, y + gap - tall / 2)]
    boxes = [(left, top, left + width, top + tall) for left, top in corners]

    def covered(box: Box) -> float:
        outside = max(0.0, -box[0]) + max(0.0, box[2] - WIDTH)
        return outside * tall + sum(_overlap(box, other) for other in taken)

    return min(boxes, key=covered)


def _overlap(one: Box, other: Box) -> float:
    wide = min(one[2], other[2]) - max(one[0], other[0])
    tall = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, wide) * max(0.0, tall)


def profile(label: str, values: Sequence[float], high: float, x_label: str) -> Markup:
    """Many values, sorted from the largest, as one filled outline between 0 and `high`; nothing where there is none."""
    ordered = sorted((value for value in values if math.isfinite(value)), reverse=True)
    if not ordered:
        return Markup()
    shown = [ordered[round(i * (len(ordered) - 1) / 255)] for i in range(256)] if len(ordered) > 256 else ordered
    width, height = 240.0, 128.0
    across = Axis(0, len(shown), 34, width - 4)
    down = Axis(0, high if high > 0 else 1.0, height - 24, 10)
    outline = [across.start, down.start]
    for index, value in enumerate(shown):
        y = down.place(value)
        outline += [across.place(index), y, across.place(index + 1), y]
    outline += [across.end, down.start]
    parts = [_path((tuple(outline),), fill="var(--s0)"), *_levels(across, down, 2)]
    parts.append(line(across.start, down.start, across.end, down.start, "axis"))
    parts.append(text((across.start + across.end) / 2, height - 6, x_label, anchor="middle", class_="q"))
    return svg(label, width, height, *parts)


def _frame(across: Axis, down: Axis, x_label: str, height: float) -> Markup:
    """Grid lines, axis and tick labels."""
    parts = _levels(across, down, 4)
    parts.append(line(across.start, down.start, across.end, down.start, "axis"))
    ticks = across.ticks()
    for tick, written in zip(ticks, tick_texts(ticks), strict=True):
        x = across.place(tick)
        parts.append(line(x, down.start, x, down.start + 4, "axis"))
        parts.append(text(x, down.start + 16, written, anchor="middle", class_="q"))
    parts.append(text((across.start + across.end) / 2, height - 6, x_label, anchor="middle", class_="q"))
    return join(*parts)


def _levels(across: Axis, down: Axis, count: int) -> list[Markup]:
    """Horizontal grid lines and what they stand for."""
    ticks, parts = down.ticks(count), []
    for tick, written in zip(ticks, tick_texts(ticks), strict=True):
        y = down.place(tick)
        parts.append(line(across.start, y, across.end, y, "grid"))
        parts.append(text(across.start - 6, y + 4, written, anchor="end", class_="q"))
    return parts


def _curve(index: int, runs: Sequence[Sequence[tuple[float, float]]]) -> Markup:
    paths = tuple(tuple(value for point in run for value in point) for run in runs if len(run) > 1)
    parts = []
    if paths:
        stroke = f"var(--s{index % _COLOURS})"
        parts.append(_path(paths, class_="line", stroke=stroke, stroke_dasharray=_DASHES[index % len(_DASHES)]))
    points = [point for run in runs for point in run]
    count = min(_MARKED, len(points))
    chosen = {round(i * (len(points) - 1) / max(1, count - 1)) for i in range(count)} | {len(points) - 1}
    return join(*parts, *(marker(index, *points[i]) for i in sorted(chosen)))


def _path(runs: Sequence[Sequence[float]], **attributes: str | float | None) -> Markup:
    """Straight segments through (x, y) pairs laid out flat, one polyline a run."""
    d = "".join(
        "".join(
            f"{'L' if i else 'M'}{coordinate(x)} {coordinate(y)}"
            for i, (x, y) in enumerate(zip(run[::2], run[1::2], strict=True))
        )
        for run in runs
    )
    return tag("path", d=d, **attributes)


def _finite_runs(series: Series) -> list[list[tuple[float, float]]]:
    """The series cut where a point is not finite; empty runs are dropped."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(series.x, series.y, strict=True):
        if math.isfinite(x) and math.isfinite(y):
            runs[-1].append((float(x), float(y)))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _spread(values: Sequence[float]) -> tuple[float, float]:
    """Both ends of the values, with room where they are one."""
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 1, high + 1)


def _padded(values: Sequence[float]) -> tuple[float, float]:
    """Both ends with a little air; never below 0 where no value is."""
    low, high = min(values), max(values)
    air = 0.06 * (high - low) or max(abs(high) * 0.1, 1e-6)
    return (low - air if low < 0 else max(0.0, low - air)), high + air


def apart(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move sorted places as little as needed so that neighbours are `gap` apart, within [low, high] where they fit."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + gap if moved else low))
    limit = max(high, low + gap * (len(moved) - 1))
    for index in range(len(moved) - 1, -1, -1):
        moved[index] = min(moved[index], limit)
        limit = moved[index] - gap
    return moved
