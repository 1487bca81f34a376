"""Text from strangers stays text, and numbers read the same everywhere."""

import math
from html.parser import HTMLParser

import pytest

from rkd.bench.report.markup import DASH, Markup, amount, coordinate, decimal, escape, join, significant, tag

HOSTILE = """<script>alert(1)</script>'"><img src=x onerror=alert(1)>&amp;"""


class Reader(HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.tags, self.text = [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def read(markup):
    reader = Reader()
    reader.feed(markup)
    reader.close()
    return reader


def test_hostile_text_comes_back_as_text_and_makes_no_element():
    found = read(tag("p", HOSTILE))
    assert found.text == HOSTILE
    assert found.tags == [("p", {})]


def test_hostile_text_in_an_attribute_stays_in_it():
    assert read(tag("img", alt=HOSTILE)).tags == [("img", {"alt": HOSTILE})]


def test_plain_text_added_to_markup_is_escaped_and_markup_is_not_escaped_twice():
    assert join(Markup("<br>") + "<b>") == "&lt;br&gt;&lt;b&gt;"
    assert join(tag("b", "a & b")) == "<b>a &amp; b</b>"


@pytest.mark.parametrize("mark", ["\x00", "\x1b", "\u202e", "\u2066", "\u200f", "\ud800", "\x85"])
def test_marks_that_would_repaint_the_page_are_replaced(mark):
    written = escape(f"a{mark}b")
    assert written == "a\ufffdb"
    written.encode()


def test_attribute_names_follow_html():
    assert tag("rect", stroke_width=2.0, class_="bar", fill=None) == '<rect stroke-width="2" class="bar"></rect>'


@pytest.mark.parametrize(("value", "text"), [(1.0, "1"), (2.345, "2.35"), (-0.5, "-0.5"), (120.10, "120.1")])
def test_coordinates_are_short(value, text):
    assert coordinate(value) == text


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_cannot_be_drawn_and_reads_as_a_dash(value):
    with pytest.raises(ValueError, match="cannot be drawn"):
        coordinate(value)
    assert decimal(value) == significant(value) == amount(value) == DASH


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.4121, "0.412"), (2.8749, "2.87"), (9.996, "10.0"), (1234.5, "1,234"), (1e-6, "1.00e-06")],
)
def test_measured_numbers_keep_three_digits(value, text):
    assert significant(value) == text


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(0, "", DASH), (714_000, "B", "714 kB"), (691_674, "", "692 k"), (999_999, "", "1 M"), (12, "B", "12 B")],
)
def test_amounts_use_decimal_prefixes_and_a_dash_where_unknown(value, unit, text):
    assert amount(value, unit).replace("\N{NO-BREAK SPACE}", " ") == text
