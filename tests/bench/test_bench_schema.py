"""docs/result.schema.json says what rkd writes and reads: both accept and refuse the same results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from rkd.bench import result
from rkd.bench.validity import CODES, FINDINGS
from rkd.errors import RkdError

SCHEMA = json.loads((Path(__file__).parents[2] / "docs/result.schema.json").read_text(encoding="utf-8"))
GARBAGE = [None, True, -1, "x", [], {}]
OF_VALUES = ("valid", "reasons", "timing", "scores", "percent", "low", "high", "ms", "first", "second", "hits", "n", "low_ms", "high_ms",
             "height", "width", "rgb", "started")  # fmt: skip


@pytest.fixture(scope="module")
def validator():
    Draft202012Validator.check_schema(SCHEMA)
    return Draft202012Validator(SCHEMA)


def paths(value, at=()):
    inner = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, one in inner:
        yield (*at, key)
        yield from paths(one, (*at, key))


def test_the_schema_is_of_this_version():
    assert SCHEMA["properties"]["schema"]["const"] == result.SCHEMA


def test_the_schema_and_the_page_list_every_validity_code():
    reason = SCHEMA["$defs"]["entry"]["properties"]["validity"]["properties"]["reasons"]["items"]
    assert sorted(reason["properties"]["code"]["enum"]) == sorted(CODES)
    page = (Path(__file__).parents[2] / "docs/formats.md").read_text(encoding="utf-8")
    listed = page.partition("Validity codes:")[2].partition(";")[0]
    assert sorted(re.findall(r"`([a-z-]+)`", listed)) == sorted(CODES)


def test_the_schema_lists_every_finding():
    finding = SCHEMA["$defs"]["entry"]["properties"]["findings"]["items"]
    assert sorted(finding["properties"]["code"]["enum"]) == sorted(FINDINGS)


def test_a_real_result_is_valid(validator, measured):
    validator.validate(measured)


def test_every_object_of_a_real_result_is_closed(validator, measured):
    measured["entries"] = measured["entries"][:1]
    measured["comparisons"] = []
    for path in [(), *paths(measured)]:
        place = measured
        for key in path:
            place = place[key]
        if isinstance(place, dict) and not {"details", "celsius", "clocks_hz", "throttle", "triggers", "rails"} & {
            *path[-1:]
        }:
            place["new key"] = 1
            assert not validator.is_valid(measured), path
            del place["new key"]


def accepted(value):
    try:
        result.verify(value, "r")
    except RkdError:
        return False
    return True


def test_schema_and_reader_agree_on_garbage_at_every_key(validator, measured):
    """Where they may differ is what a schema cannot say: figures that must fit each other."""
    only = {**measured, "entries": measured["entries"][:1], "comparisons": []}
    disagreements = []
    for path in list(paths(only)):
        if path[-1] in OF_VALUES:
            continue
        place = only
        for key in path[:-1]:
            place = place[key]
        kept = place[path[-1]]
        for garbage in GARBAGE:
            place[path[-1]] = garbage
            if accepted(only) != validator.is_valid(only):
                disagreements.append((path, garbage))
        place[path[-1]] = kept
    assert disagreements == []
