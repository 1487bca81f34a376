"""Charts: what is drawn is where its number says."""

import math
import re
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from scipy.stats import binomtest

from rkd.bench.report.bars import LatencyRow, latency_rows, share_bars
from rkd.bench.report.scores import difference
from rkd.bench.report.spread import Spread, spreads
from rkd.bench.report.svg import (
    WIDTH,
    Series,
    Spot,
    line_chart,
    linear_ticks,
    profile,
    scatter,
    shorten,
    text_width,
    tick_texts,
)
from rkd.metrics import Proportion

NAN = math.nan


def parse(markup):
    return ET.fromstring(markup)  # noqa: S314 (our own output)


def by_class(root, name):
    return [node for node in root.iter() if node.get("class") == name]


def texts(root):
    return ["".join(node.itertext()) for node in root.iter("text")]


def horizontal(lines):
    return [line for line in lines if line.get("y1") == line.get("y2")]


def grid_scale(root, first, last):
    """From x in the drawing to the value, by the outermost vertical grid lines."""
    places = sorted(float(line.get("x1")) for line in by_class(root, "grid"))
    return lambda x: first + (float(x) - places[0]) / (places[-1] - places[0]) * (last - first)


def test_bars_and_whiskers_are_where_the_shares_and_their_intervals_are():
    shares = [Proportion(823, 1000), Proportion(0, 50), Proportion(50, 50), Proportion(1, 3)]
    root = parse(share_bars("ACC", [(f"m{i}", share) for i, share in enumerate(shares)], "acc"))
    value = grid_scale(root, 0, 100)
    bars, whiskers = by_class(root, "bar"), horizontal(by_class(root, "whisker"))
    for share, bar, whisker in zip(shares, bars, whiskers, strict=True):
        wilson = binomtest(share.hits, share.n).proportion_ci(0.95, "wilson")
        assert value(float(bar.get("x")) + float(bar.get("width"))) == pytest.approx(
            100 * share.hits / share.n, abs=0.01
        )
        assert value(whisker.get("x1")) == pytest.approx(100 * wilson.low, abs=0.01)
        assert value(whisker.get("x2")) == pytest.approx(100 * wilson.high, abs=0.01)


def test_a_bar_has_its_number_its_interval_and_its_n_beside_its_name():
    root = parse(share_bars("ACC", [("teacher", Proportion(1648, 2000))], "acc"))
    assert texts(root)[:2] == ["teacher", "82.4 [80.7, 84.0] n 2,000"]
    assert "teacher: 82.4 % [80.7, 84.0]" in root.get("aria-label")


def test_a_share_without_images_is_a_dash_and_no_bar():
    root = parse(share_bars("ACC", [("a", Proportion(1, 2)), ("b", Proportion(0, 0))], "acc"))
    assert len(by_class(root, "bar")) == 1
    assert "\N{EN DASH} n 0" in texts(root)
    assert share_bars("ACC", [("b", Proportion(0, 0))], "acc") == ""


def test_latency_dots_and_whiskers_are_where_the_milliseconds_are():
    rows = [
        LatencyRow("a", (2.0, 1.8, 2.3), (2.5, 2.4, 2.9), (3.5, 3.0, 4.0)),
        LatencyRow("b", (1.0, 0.9, 1.1), (NAN, NAN, NAN), (1.5, NAN, NAN)),
    ]
    root = parse(latency_rows("Latency", rows))
    ticks = sorted({float(line.get("x1")) for line in by_class(root, "grid")})
    value = grid_scale(root, 0, len(ticks) - 1)
    assert texts(root)[-len(ticks) :] == ["0", "1", "2", "3", "4 ms"]
    assert [value(dot.get("cx")) for dot in by_class(root, "dot")] == pytest.approx([2, 2.5, 3.5, 1, 1.5], abs=0.01)
    drawn = [(value(line.get("x1")), value(line.get("x2"))) for line in horizontal(by_class(root, "whisker"))]
    expected = [(1.8, 2.3), (2.4, 2.9), (3.0, 4.0), (0.9, 1.1)]
    np.testing.assert_allclose(drawn, expected, atol=0.01)


def test_an_interval_without_an_upper_end_goes_on_to_the_edge_and_has_one_cap():
    rows = [LatencyRow("a", (2.0, 1.8, 2.3), (2.5, 2.4, 2.9), (3.5, 3.0, math.inf))]
    root = parse(latency_rows("Latency", rows))
    *_, lane = horizontal(by_class(root, "lane"))
    *_, open_one = horizontal(by_class(root, "whisker"))
    assert open_one.get("x2") == lane.get("x2")
    assert len(by_class(root, "whisker")) - len(horizontal(by_class(root, "whisker"))) == 2 * 2 + 1


def test_a_wide_range_of_latencies_gets_a_logarithmic_axis():
    rows = [LatencyRow("a", (v, v, v), (v, v, v), (v, v, v)) for v in (1.0, 10.0, 100.0)]
    places = [float(dot.get("cx")) for dot in by_class(parse(latency_rows("Latency", rows)), "dot")][::3]
    assert places[1] - places[0] == pytest.approx(places[2] - places[1], abs=0.02)


def test_nothing_measured_draws_nothing():
    nothing = (NAN, NAN, NAN)
    assert latency_rows("Latency", [LatencyRow("a", nothing, nothing, nothing)]) == ""
    assert line_chart("loss", [Series("a", [1], [NAN])], "epoch") == ""
    assert scatter("s", [Spot(NAN, 1, 0.5, "a")], "x", "y") == ""
    assert profile("p", [NAN], 1, "channels") == ""


def test_lines_are_named_at_their_end_and_told_apart_without_colour():
    series = [Series(f"run {i}", [1, 2, 3], [3 - i / 10, 2, 1 + i / 100]) for i in range(5)]
    root = parse(line_chart("loss", series, "epoch"))
    lines = by_class(root, "line")
    assert len({line.get("stroke-dasharray") for line in lines}) == 5
    named = sorted((float(n.get("y")), n.text) for n in root.iter("text") if (n.text or "").startswith("run"))
    assert [name for _, name in named] == [f"run {i}" for i in (4, 3, 2, 1, 0)]
    assert min(np.diff([y for y, _ in named])) >= 14


def test_a_value_that_is_not_finite_interrupts_the_line():
    root = parse(line_chart("loss", [Series("a", range(6), [1, 2, NAN, 3, 4, math.inf])], "epoch"))
    assert re.findall("[ML]", by_class(root, "line")[0].get("d")) == ["M", "L", "M", "L"]


@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0], [0.0, 0.0], [-3.0, -3.0], [1e-12, 1e12], [5e8, 5e8 + 1]])
def test_odd_ranges_are_drawn_inside_the_chart(values):
    root = parse(line_chart("x", [Series("a", range(len(values)), values), Series("b", [0], [values[0]])], "step"))
    for node in root.iter("circle"):
        assert 0 <= float(node.get("cx")) <= WIDTH


def test_scatter_labels_do_not_cover_each_other():
    spots = [Spot(1.0 + i / 50, 80 + i / 30, 0.1, f"{name} · ASR 9.5") for i, name in enumerate("ABCD")]
    root = parse(scatter("s", spots, "ms", "ACC"))
    places = [(float(n.get("x")), float(n.get("y"))) for n in root.iter("text") if "ASR" in (n.text or "")]
    for i, (x, y) in enumerate(places):
        assert all(abs(x - other[0]) > 70 or abs(y - other[1]) >= 12 for other in places[:i])


def test_scatter_draws_both_intervals_within_its_axes():
    spot = Spot(2.0, 99.0, 0.1, "A", x_ends=(1.0, 4.0), y_ends=(90.0, 99.9))
    root = parse(scatter("s", [spot, Spot(2.0, 99.5, 0.1, "B", hollow=True)], "ms", "ACC"))
    wide, tall = ([float(node.get(key)) for key in ("x1", "y1", "x2", "y2")] for node in by_class(root, "interval"))
    x, y = (float(by_class(root, "spot")[0].get(key)) for key in ("cx", "cy"))
    assert wide == pytest.approx([2 * x - wide[2], y, wide[2], y], abs=0.02)  # 1 and 4 are as far from 2
    assert (tall[0], tall[2]) == (x, x)
    assert (y - tall[1]) / (tall[3] - y) == pytest.approx(0.9 / 9, abs=0.01)
    assert 0 <= wide[0] < wide[2] <= WIDTH
    assert 0 <= tall[1] < tall[3] <= 268 - 40
    assert [disc.get("fill") for disc in by_class(root, "spot")] == ["var(--asr)", "none"]


@pytest.mark.parametrize("p99", [0.2, 0.21, 9.0])
def test_no_line_crosses_the_name_of_a_percentile(p99):
    root = parse(spreads("s", [Spread("a", 0.1, 10.0, [1, 5, 1], {"p50": 0.2, "p99": p99})]))
    lines = [[float(node.get(key)) for key in ("x1", "y1", "y2")] for node in by_class(root, "whisker")]
    names = [(float(n.get("x")), float(n.get("y"))) for n in root.iter("text") if n.text in ("p50", "p99")]
    assert len(names) == len(lines) == 2
    assert names[1][0] - names[0][0] >= 25
    for at, baseline in names:
        assert not [x for x, top, bottom in lines if abs(x - at) < 13 and top < baseline < bottom]


@pytest.mark.parametrize("letter", ["m", "W", "x", "i", "\N{CJK UNIFIED IDEOGRAPH-6F22}"])
def test_a_shortened_name_leaves_room_whatever_its_letters(letter):
    widths = {"m": 11.7, "W": 11.9, "x": 7.1, "i": 3.3}  # DejaVu Sans at 12 units
    assert len(shorten(letter * 300, 100)) * widths.get(letter, 12.0) <= 100 + 12
    assert text_width(shorten(letter * 300, 100)) <= 100


def test_a_profile_of_many_channels_keeps_its_extremes_and_stays_small():
    markup = profile("p", list(np.linspace(0, 0.9, 2048)), 0.9, "channels")
    outline = next(parse(markup).iter("path")).get("d")
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", outline)]
    assert heights[1] == min(heights)  # the largest channel reaches the top, the smallest the base line
    assert heights[-2] == heights[-1] == heights[0] == max(heights)
    assert len(markup) < 20_000


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 100, ["0", "25", "50", "75", "100"]), (0.31, 2.4, ["1", "2"]), (0, 0.0103, ["0.000", "0.005", "0.010"])],
)
def test_ticks_are_round_numbers_within_the_axis(low, high, ticks):
    assert tick_texts(linear_ticks(low, high)) == ticks


def test_long_names_keep_both_ends():
    assert shorten("short", 100) == "short"
    cut = shorten("a-very-long-name-of-a-student.jetson-fp16", 100)
    assert len(cut) <= 15
    assert cut.startswith("a-very")
    assert cut.endswith("fp16")


def test_difference_has_newcombes_interval():
    # Newcombe 1998, table II, example (a): 56/70 against 48/80, method 10: 0.0524 to 0.3339.
    gap, low, high = difference(Proportion(56, 70), Proportion(48, 80))
    assert (gap, low, high) == pytest.approx((20.0, 5.24, 33.39), abs=0.005)
    assert all(math.isnan(value) for value in difference(Proportion(0, 0), Proportion(1, 2)))
