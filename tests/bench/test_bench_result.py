from __future__ import annotations

import copy
import json
import math
from contextlib import contextmanager

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from rkd.bench import result
from rkd.bench.gates import parse_gates
from rkd.bench.table import render
from rkd.errors import RkdError, StorageError

GARBAGE = [
    None,
    True,
    -1,
    0.5,
    1e308,
    math.inf,
    math.nan,
    10**30,
    10**5000,
    "",
    "a\nb",
    "\x1b[31m",
    "x" * 5000,
    [],
    {},
    [None],
]


def paths(value, at=()):
    """Every key of a JSON value, and the first item of every list: all items are checked alike."""
    inner = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, one in inner:
        yield (*at, key)
        yield from paths(one, (*at, key))


@contextmanager
def replaced(value, path, by):
    """`value` with another thing at `path`, for a moment: copies of a whole result are slow."""
    place = holder(value, path)
    before, place[path[-1]] = place[path[-1]], by
    try:
        yield
    finally:
        place[path[-1]] = before


def holder(value, path):
    for key in path[:-1]:
        value = value[key]
    return value


def pair(**changes):
    return {"first": 0, "second": 1, "batch": 1, "ratio": 2, "low": 1, "high": 3, "rounds": 5} | changes


def test_a_ratio_of_one_round_without_an_interval_is_read(measured):
    measured["comparisons"] = [pair(), pair(low=None, high=None, rounds=1)]
    result.verify(measured, "r.json")


def test_what_was_written_is_read(measured, tmp_path):
    result.write(tmp_path / "result.json", measured)
    assert result.read(tmp_path / "result.json") == measured


def test_garbage_at_every_key_is_one_line_or_harmless(measured):
    messages = []
    for path in list(paths(measured)):
        for garbage in GARBAGE:
            with replaced(measured, path, garbage):
                try:
                    result.verify(measured, "r.json")
                except RkdError as error:
                    messages.append(str(error))
    assert len(messages) > 1000
    assert not [message for message in messages if "\n" in message or len(message) > 500]


def test_every_key_is_needed_and_no_other_is_known(measured):
    named = [
        path
        for path in paths(measured)
        if isinstance(path[-1], str)
        and not {"triggers", "details", "celsius", "clocks_hz", "throttle"} & {*path[-2:-1]}
        and path[-2:] != ("bundle", "role")
    ]
    for path in named:
        place = holder(measured, path)
        kept = place.pop(path[-1])
        with pytest.raises(RkdError, match="missing"):
            result.verify(measured, "r.json")
        place[path[-1]] = kept
    for path in [(), ("entries", 0), ("entries", 0, "latency"), ("entries", 0, "scores", "acc")]:
        changed = copy.deepcopy(measured)
        holder(changed, (*path, "new"))["new"] = 1
        with pytest.raises(RkdError, match="'new' is unknown"):
            result.verify(changed, "r.json")


def test_a_missing_part_is_one_plain_sentence():
    with pytest.raises(RkdError) as caught:
        result.verify({"schema": result.SCHEMA, "interrupted": False, "entries": []}, "r.json")
    assert str(caught.value) == "r.json is not a result of rkd bench: 'comparisons' is missing; bench again"


def test_a_verdict_that_follows_from_the_figures_is_read(measured):
    entry = measured["entries"][0]
    entry["gates"] = [gate.judge(entry) for gate in parse_gates(["acc>=50, acc>=99.9, p99<=9s"])]
    result.verify(measured, "r.json")
    entry["gates"][1]["passed"] = True
    with pytest.raises(RkdError, match=r"gates\[1\]: its value and verdict do not follow"):
        result.verify(measured, "r.json")


def test_an_older_result_without_roles_is_read_and_no_other_role_is_known(measured):
    bundle = measured["entries"][0]["bundle"]
    bundle["role"] = "judge"
    with pytest.raises(RkdError, match=r"bundle\.role"):
        result.verify(measured, "r.json")
    del bundle["role"]
    result.verify(measured, "r.json")


def test_whatever_is_optional_can_be_shown_as_not_reported(measured):
    for path in list(paths(measured)):
        with replaced(measured, path, None):
            try:
                result.verify(measured, "r.json")
            except RkdError:
                continue
            with Console(width=80, quiet=True) as console:
                console.print(render(measured))


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("entries", 0, "scores", "acc", "hits"), 1, "do not follow from hits"),
        (("entries", 0, "scores", "acc", "percent"), 99.9, "do not follow from hits"),
        (
            ("entries", 0, "validity"),
            {
                "valid": True,
                "timing": True,
                "scores": True,
                "reasons": [{"code": "leak", "affects": "all", "text": "a"}],
            },
            "none of interrupted",
        ),
        (
            ("entries", 0, "validity"),
            {
                "valid": False,
                "timing": False,
                "scores": False,
                "reasons": [{"code": "throttled", "affects": "timing", "text": "a"}],
            },
            "contradict",
        ),
        (("comparisons", 0, "second"), 7, "no such entry"),
        (("comparisons", 0, "second"), 0, "first is not before second"),
        (("comparisons", 0), pair(ratio=0.1, low=5, high=0.01), "ratio is not between low and high"),
        (("comparisons", 0), pair(ratio=0.1, low=0.2, high=0.3), "ratio is not between"),
        (("comparisons", 0), pair(low=None), "ratio is not between"),
        (("comparisons", 0), pair(rounds=1), "one round has no interval"),
        (("entries", 0, "evaluated"), {"source": "bundle", "images": 900, "of": 5}, "more images than there are"),
        (("entries", 0, "latency", "p99"), {"ms": 0, "low": 0, "high": 0}, "a higher percentile is below a lower one"),
        (("entries", 0, "latency", "histogram", "counts"), [9050], "do not hold n samples"),
        (
            ("entries", 0, "latency", "rounds"),
            [{"at_s": 0, "p50_ms": 1, "n": 1}],
            "do not hold n samples",
        ),
        (
            ("entries", 0, "gates"),
            [{"gate": "acc>=90", "value": 10, "passed": True, "text": "a"}],
            "do not follow from the figures",
        ),
        (("entries", 0, "gates"), [{"gate": "better", "value": 1, "passed": True, "text": "a"}], "is no gate"),
        (("entries", 0, "examples", 0, "images", 0, "before", "height"), 9, "bytes for 9 x 8 pixels"),
        (("entries", 0, "latency", "p50"), {"ms": 1, "low": 2, "high": 3}, "not between"),
        (("entries", 0, "latency", "p50"), {"ms": 1, "low": 2, "high": None}, "not between"),
        (("entries", 0, "bundle", "sha256"), "AB" * 32, "not a SHA-256"),
        (("entries", 0, "bundle", "name"), "a b", "not a name"),
        (("entries", 0, "started"), "yesterday", "not a UTC time"),
        (("schema",), 1, "schema 1, this rkd reads 4"),
        (("entries",), [], "at least 1"),
    ],
)
def test_a_lie_is_named(measured, path, value, words):
    holder(measured, path)[path[-1]] = value
    with pytest.raises(RkdError, match=words):
        result.verify(measured, "r.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=12,
)


@given(JSON)
@settings(max_examples=300, deadline=None)
def test_any_json_is_refused(value):
    with pytest.raises(RkdError):
        result.verify(value, "r.json")
    with pytest.raises(RkdError):
        result.verify({"schema": 4, "interrupted": False, "comparisons": [], "entries": [value]}, "r.json")


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_refused(tmp_path, data):
    (tmp_path / "r.json").write_bytes(data)
    with pytest.raises(RkdError):
        result.read(tmp_path / "r.json")


def test_deep_nesting_and_huge_numbers_are_refused(tmp_path):
    for text in ("[" * 100_000, '{"schema": 4' + "0" * 5000 + "}"):
        (tmp_path / "r.json").write_text(text)
        with pytest.raises(RkdError):
            result.read(tmp_path / "r.json")


def test_a_wrong_result_is_not_written(measured, tmp_path):
    del measured["entries"][0]["device"]
    with pytest.raises(RkdError):
        result.write(tmp_path / "result.json", measured)
    assert not list(tmp_path.iterdir())


def test_a_missing_file_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError):
        result.read(tmp_path / "none.json")


def test_the_file_is_plain_json(measured, tmp_path):
    result.write(tmp_path / "result.json", measured)
    assert json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))["schema"] == 4


def test_inspect_says_whether_a_result_counts(measured, tmp_path):
    from rkd.inspection import inspect_path

    measured["entries"][0]["validity"] = {
        "valid": False, "timing": False, "scores": True,
        "reasons": [{"code": "throttled", "affects": "timing", "text": "it was hot"}],
    }  # fmt: skip
    result.write(tmp_path / "result.json", measured)
    found = inspect_path(tmp_path / "result.json")
    assert found["1: linear.ort-cpu"]["valid"] == "NO: throttled: it was hot"
