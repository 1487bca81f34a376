"""HTML that is escaped unless it says otherwise (standard library only).

Names, captions and paths on a report come from strangers. `tag` escapes every plain `str`; only a `Markup`, which
nothing but `escape`, `tag`, `join` and `raw` makes, passes as it is. Whoever forgets something gets stray entities on
the page, not a hole in it.
"""

from __future__ import annotations

import html
import math
import re
from typing import Final

DASH: Final = "\N{EN DASH}"
MINUS: Final = "\N{MINUS SIGN}"

# Control characters, lone surrogates, and the marks that reorder text: a name must not repaint the page around it.
_UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_VOID = frozenset({"br", "img", "link", "meta"})


class Markup(str):
    """Text that is HTML already. Adding a plain `str` to it gives a plain `str`, which is escaped again."""

    __slots__ = ()


def escape(text: str) -> Markup:
    """Text as it may stand between tags or in a quoted attribute; what is invisible becomes U+FFFD."""
    return Markup(html.escape(_UNSAFE.sub("\N{REPLACEMENT CHARACTER}", text), quote=True))


def raw(text: str) -> Markup:
    """Vouch for a constant of this package: a style sheet, a doctype."""
    return Markup(text)


def join(*parts: str) -> Markup:
    """Put parts beside each other; plain text is escaped."""
    return Markup("".join(part if isinstance(part, Markup) else escape(part) for part in parts))


def tag(element: str, /, *children: str, **attributes: str | float | None) -> Markup:
    """One element.

    Args:
        element: its name, e.g. `td`.
        children: plain text is escaped, `Markup` is not.
        attributes: a trailing underscore is dropped and inner ones become hyphens (`class_`, `aria_label`); None
            leaves an attribute out.
    """
    pairs = [
        f' {key.rstrip("_").replace("_", "-")}="{escape(value if isinstance(value, str) else coordinate(value))}"'
        for key, value in attributes.items()
        if value is not None
    ]
    opening = f"<{element}{''.join(pairs)}>"
    return Markup(opening if element in _VOID else f"{opening}{join(*children)}</{element}>")


def coordinate(value: float) -> str:
    """A number in an attribute: at most two decimals, no trailing zeros.

    Raises:
        ValueError: not finite; a picture must leave such a point out.
    """
    if not math.isfinite(value):
        raise ValueError(f"{value} cannot be drawn")
    return f"{value:.2f}".rstrip("0").rstrip(".") if value % 1 else f"{int(value)}"


def decimal(value: float, places: int = 1) -> str:
    """A number to read, with thousands separated; a dash for NaN and infinities."""
    return f"{value:,.{places}f}" if math.isfinite(value) else DASH


def points(value: float) -> str:
    """A difference in percentage points, with its sign; a dash for NaN and infinities."""
    if not math.isfinite(value):
        return DASH
    rounded = round(value, 1) + 0.0
    return f"{'+' if rounded > 0 else MINUS if rounded < 0 else ''}{abs(rounded):.1f}"


def significant(value: float, digits: int = 3) -> str:
    """A measured number to `digits` significant digits; a dash for NaN and infinities."""
    if not math.isfinite(value):
        return DASH
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))
    if not -4 <= magnitude <= 8:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - magnitude)}f}"


def amount(value: float, unit: str = "") -> str:
    """A count or size with a decimal prefix, e.g. `1.71 M` or `6.86 MB`; a dash where it is unknown (not above 0)."""
    if not math.isfinite(value) or value <= 0:
        return DASH
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor * 0.9995:
            return f"{value / factor:.3g}\N{NO-BREAK SPACE}{prefix}{unit}"
    return f"{value:g}\N{NO-BREAK SPACE}{unit}".rstrip("\N{NO-BREAK SPACE}")
