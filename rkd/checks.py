"""What a JSON document from outside must be: small checks that are put together.

    check = object_of({"name": text, "n": whole(1), "low": or_null(number)})
    problem = check(document)        # None, or ".n is not a whole number from 1"

A check tells what is wrong and where, as the end of a sentence, or None. Documents are what `json.loads` gives.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Any

from rkd.metrics import Proportion

Check = Callable[[Any], str | None]

LARGEST = 2**63  # what a whole number or a length stays below
_MOST_TEXT = 2000
_MOST_STRING = 2**20
_SHA256 = re.compile(r"[0-9a-f]{64}")


def object_of(fields: dict[str, Check], optional: Collection[str] = (), *, others: bool = False) -> Check:
    """These keys; those that are optional may be absent.

    Args:
        fields: the check of each key.
        optional: keys that need not be there.
        others: whether more keys may be there, which nobody reads.
    """

    def check(value: Any) -> str | None:
        if not isinstance(value, dict):
            return " is not an object"
        odd = set(fields) - set(value) - set(optional)
        odd |= set() if others else set(value) - set(fields)
        if odd:
            first = min(odd)
            return f": {first[:80]!r} is {'unknown' if first in value else 'missing'}"
        for key, one in value.items():
            if key in fields and (problem := fields[key](one)) is not None:
                return f".{key}{problem}"
        return None

    return check


def list_of(inner: Check, least: int = 0, most: int = LARGEST) -> Check:
    """From `least` to `most` values, each of which passes `inner`."""

    def check(value: Any) -> str | None:
        if not isinstance(value, list) or not least <= len(value) <= most:
            return f" is not a list of at least {least}" + (f" and at most {most}" if most < LARGEST else "")
        for i, one in enumerate(value):
            if (problem := inner(one)) is not None:
                return f"[{i}]{problem}"
        return None

    return check


def row_of(*inner: Check) -> Check:
    """As many values as there are checks, each of which passes its own."""

    def check(value: Any) -> str | None:
        if not isinstance(value, list) or len(value) != len(inner):
            return f" is not a list of {len(inner)}"
        for i, (one, passes) in enumerate(zip(value, inner, strict=True)):
            if (problem := passes(one)) is not None:
                return f"[{i}]{problem}"
        return None

    return check


def by_name(inner: Check) -> Check:
    """Any names, each with a value that passes `inner`."""

    def check(value: Any) -> str | None:
        if not isinstance(value, dict):
            return " is not an object"
        for key, one in value.items():
            if (problem := text(key) or inner(one)) is not None:
                return f".{key[:80]!r}{problem}"
        return None

    return check


def or_null(inner: Check) -> Check:
    """Null, or what passes `inner`."""
    return lambda value: None if value is None else inner(value)


def whole(low: int = 0) -> Check:
    """A whole number from `low`."""
    return lambda v: None if type(v) is int and low <= v < LARGEST else f" is not a whole number from {low}"


def whole_between(low: int, high: int) -> Check:
    """A whole number from `low` to `high`."""
    wanted = f"a whole number from {low} to {high}" if low < high else str(low)
    return lambda v: None if type(v) is int and low <= v <= high else f" is not {wanted}"


def number(value: Any) -> str | None:
    """A finite number from 0."""
    good = type(value) in (int, float) and 0 <= value < LARGEST  # false for NaN
    return None if good else " is not a number from 0"


def signed(value: Any, limit: float = LARGEST) -> str | None:
    """A finite number."""
    good = type(value) in (int, float) and abs(value) < limit
    return None if good else " is not a number"


def loss(value: Any) -> str | None:
    """A finite number; a diverging training's is beyond all whole numbers before it is infinite."""
    return signed(value, 1e300)


def one_of(*values: str) -> Check:
    """One of these words."""
    return lambda v: None if v in values else f" is none of {', '.join(values)}"


def flag(value: Any) -> str | None:
    """True or false."""
    return None if isinstance(value, bool) else " is neither true nor false"


def text(value: Any) -> str | None:
    """One line of printable text, of at most 2,000 characters."""
    good = isinstance(value, str) and len(value) <= _MOST_TEXT and value.isprintable()
    return None if good else " is not one line of text"


def string(value: Any) -> str | None:
    """Any text of at most 1 MiB, such as the name of a file."""
    return None if isinstance(value, str) and len(value) <= _MOST_STRING else " is not text"


def plain(value: Any) -> str | None:
    """A setting's value: null, a flag, a finite number, a text, or a list of these."""
    values = value if isinstance(value, list) else [value]
    good = all(v is None or isinstance(v, bool) or signed(v) is None or string(v) is None for v in values)
    return None if good else " is neither a number nor text"


def matching(pattern: re.Pattern[str], what: str) -> Check:
    """Text that `pattern` matches as a whole; `what` it then is."""
    return lambda v: None if isinstance(v, str) and pattern.fullmatch(v) else f" is not {what}"


digest = matching(_SHA256, "a SHA-256")


def proportion(value: Any) -> str | None:
    """What `Proportion.to_json` gives."""
    fields = object_of({"hits": whole(), "n": whole(), "percent": or_null(number), "low": number, "high": number})
    if (problem := fields(value)) is not None:
        return problem
    if value["hits"] > value["n"] or Proportion.from_json(value).to_json() != value:
        return ": percent, low and high do not follow from hits and n"
    return None


def scores_of(name: Check) -> Check:
    """What `Scores.to_json` gives; the triggers' names pass `name`."""
    trigger = object_of({"name": name, "target": whole(), "asr": proportion, "ra": proportion})
    return object_of({"acc": proportion, "triggers": list_of(trigger)})
