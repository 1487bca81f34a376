"""result.json: what `rkd bench` measured, one entry a bundle.

    write(path, result); read(path) == result

A result comes from someone else's board, so it is read as a stranger's file: every key and no other, every value of its
type and in its range, text without control characters, percentages that follow from their hits. Reports read these
files and nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from rkd.bench.examples import unpack
from rkd.bench.latency import STAGES
from rkd.bench.tensorrt_layers import MOST_LAYERS, MOST_NAME
from rkd.bench.validity import CODES, FINDINGS
from rkd.errors import RkdError
from rkd.files import storage_errors, to_json, write_file
from rkd.metrics import Proportion

SCHEMA = 3
MOST_FORCED = 100  # lines of what was wrong with a bundle
SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,200}")
_STARTED = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", re.ASCII)
_LIMIT_BYTES = 64 * 2**20
_MAX_TEXT = 2000
_MAX_NUMBER = 2**63
_MAX_PIXELS = 4 * 96 * 96 + 4  # characters of base64
_MAX_BINS = 1000

Check = Callable[[Any], str | None]  # what is wrong, or None


def write(path: Path, result: dict[str, Any]) -> None:
    """Write a result.

    Raises:
        RkdError: it is not what `read` would accept.
        StorageError: the disk said no.
    """
    verify(result, str(path))
    write_file(path, to_json(result))


def read(path: Path) -> dict[str, Any]:
    """Read and verify a result.

    Raises:
        RkdError: it is not a result of this schema.
        StorageError: it cannot be read.
    """
    with storage_errors(path), path.open("rb") as file:
        data = file.read(_LIMIT_BYTES + 1)
    if len(data) > _LIMIT_BYTES:
        raise RkdError(f"{path}: larger than {_LIMIT_BYTES:,} bytes; this is not a result of rkd bench")
    try:
        value = json.loads(data)
    except Exception as error:  # ValueError, UnicodeDecodeError, RecursionError
        raise RkdError(f"{path} is not a result of rkd bench: not JSON ({error})") from error
    return verify(value, str(path))


def verify(value: Any, origin: str) -> dict[str, Any]:
    """Check a result; `origin` names it in errors.

    Raises:
        RkdError: it is not a result of this schema.
    """
    if isinstance(value, dict) and "schema" in value and value["schema"] != SCHEMA:
        seen = value["schema"]
        shown = seen if type(seen) is int and abs(seen) < 10**6 else "of another kind"
        raise RkdError(f"{origin}: schema {shown}, this rkd reads {SCHEMA}; bench again with it")
    problem = _result(value)
    if problem:
        raise RkdError(f"{origin} is not a result of rkd bench: {problem}; bench again")
    checked: dict[str, Any] = value
    return checked


def _object(fields: dict[str, Check], optional: Collection[str] = ()) -> Check:
    """Exactly these keys; those that are optional may be absent."""

    def check(value: Any) -> str | None:
        if not isinstance(value, dict):
            return " is not an object"
        if odd := sorted((set(value) ^ set(fields)) - (set(optional) - set(value))):
            return f": {odd[0][:80]!r} is {'unknown' if odd[0] in value else 'missing'}"
        for key, one in value.items():
            if (problem := fields[key](one)) is not None:
                return f".{key}{problem}"
        return None

    return check


def _list(inner: Check, least: int = 0, most: int = _MAX_NUMBER) -> Check:
    def check(value: Any) -> str | None:
        if not isinstance(value, list) or not least <= len(value) <= most:
            return f" is not a list of at least {least}" + (f" and at most {most}" if most < _MAX_NUMBER else "")
        for i, one in enumerate(value):
            if (problem := inner(one)) is not None:
                return f"[{i}]{problem}"
        return None

    return check


def _by_name(inner: Check) -> Check:
    def check(value: Any) -> str | None:
        if not isinstance(value, dict):
            return " is not an object"
        for key, one in value.items():
            if (problem := _text(key) or inner(one)) is not None:
                return f".{key[:80]!r}{problem}"
        return None

    return check


def _optional(inner: Check) -> Check:
    return lambda value: None if value is None else inner(value)


def _whole(low: int = 0) -> Check:
    return lambda v: None if type(v) is int and low <= v < _MAX_NUMBER else f" is not a whole number from {low}"


def _number(value: Any) -> str | None:
    good = type(value) in (int, float) and 0 <= value < _MAX_NUMBER  # false for NaN
    return None if good else " is not a number from 0"


def _signed(value: Any) -> str | None:
    good = type(value) in (int, float) and abs(value) < _MAX_NUMBER
    return None if good else " is not a number"


def _one_of(*values: str) -> Check:
    return lambda v: None if v in values else f" is none of {', '.join(values)}"


def _flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else " is neither true nor false"


def _text(value: Any) -> str | None:
    good = isinstance(value, str) and len(value) <= _MAX_TEXT and value.isprintable()
    return None if good else " is not one line of text"


def _name(value: Any) -> str | None:
    return _text(value) or (f" is longer than {MOST_NAME} characters" if len(value) > MOST_NAME else None)


def _matching(pattern: re.Pattern[str], what: str) -> Check:
    return lambda v: None if isinstance(v, str) and pattern.fullmatch(v) else f" is not {what}"


def _proportion(value: Any) -> str | None:
    fields = _object({"hits": _whole(), "n": _whole(), "percent": _optional(_number), "low": _number, "high": _number})
    if (problem := fields(value)) is not None:
        return problem
    if value["hits"] > value["n"] or Proportion.from_json(value).to_json() != value:
        return ": percent, low and high do not follow from hits and n"
    return None


def _quantile(value: Any) -> str | None:
    if (problem := _object({"ms": _number, "low": _number, "high": _number})(value)) is not None:
        return problem
    return None if value["low"] <= value["ms"] <= value["high"] else ": ms is not between low and high"


def _validity(value: Any) -> str | None:
    reason = _object({"code": _one_of(*CODES), "affects": _one_of("all", "timing", "scores"), "text": _text})
    fields = _object({"valid": _flag, "timing": _flag, "scores": _flag, "reasons": _list(reason)})
    if (problem := fields(value)) is not None:
        return problem
    spoiled = {reason["affects"] for reason in value["reasons"]}
    expected = (not spoiled, not spoiled & {"all", "timing"}, not spoiled & {"all", "scores"})
    agree = (value["valid"], value["timing"], value["scores"]) == expected
    return None if agree else ": valid and reasons contradict each other"


def _pixels(value: Any) -> str | None:
    fields = _object({"height": _whole(1), "width": _whole(1), "rgb": _base64})
    if (problem := fields(value)) is not None:
        return problem
    try:
        unpack(value)
    except ValueError as error:
        return f": {error}"
    return None


def _base64(value: Any) -> str | None:
    good = isinstance(value, str) and len(value) <= _MAX_PIXELS and value.isascii()
    return None if good else " is not the pixels of a small image"


def _histogram(value: Any) -> str | None:
    fields = _object({"low_ms": _number, "high_ms": _number, "counts": _list(_whole(), 1)})
    if (problem := fields(value)) is not None:
        return problem
    good = value["low_ms"] <= value["high_ms"] and len(value["counts"]) <= _MAX_BINS
    return None if good else ": its bins are none"


_digest = _matching(SHA256, "a SHA-256")
_scores = _object(
    {
        "acc": _proportion,
        "triggers": _list(_object({"name": _text, "target": _whole(), "asr": _proportion, "ra": _proportion})),
    }
)
_bundle = _object(
    {
        "name": _matching(_NAME, "a name"),
        "sha256": _digest,
        "model_sha256": _digest,
        "student_sha256": _optional(_digest),
        "target": _text,
        "runtime": _text,
        "precision": _text,
        "forced": _list(_text, most=MOST_FORCED),
        "role": _one_of("student", "teacher"),
    },
    optional=["role"],
)
_device = _object(
    {
        "model": _optional(_text),
        "cpu": _optional(_text),
        "architecture": _text,
        "cores": _whole(1),
        "physical_cores": _whole(1),
        "memory_bytes": _optional(_whole(1)),
        "os": _optional(_text),
        "kernel": _text,
        "python": _text,
        "governor": _optional(_text),
        "power_mode": _optional(_text),
        "max_frequency_hz": _optional(_whole()),
        "container": _optional(_text),
        "emulator": _optional(_text),
    }
)
_software = _object(
    {
        "rkd": _text,
        "python": _text,
        "numpy": _text,
        "runtime": _text,
        "runtime_version": _optional(_text),
        "providers": _list(_text),
        "threads": _whole(1),
        "details": _by_name(_text),
    }
)
_settings = _object(
    {
        "mode": _one_of("quick", "default", "mlperf"),
        "batch": _whole(1),
        "sweep": _list(_whole(1)),
        "threads": _optional(_whole(1)),
        "seconds": _number,
        "min_samples": _whole(1),
        "cap_seconds": _number,
        "warm_up_cap_seconds": _number,
        "rounds": _whole(1),
        "seed": _whole(),
        "latency": _flag,
        "memory": _flag,
        "accuracy": _flag,
        "sensors": _flag,
        "lock_clocks": _flag,
        "clocks_locked_by": _optional(_text),
    }
)
_latency = _object(
    {
        "p50": _quantile,
        "p90": _quantile,
        "p99": _quantile,
        "p999": _optional(_quantile),
        "mean_ms": _number,
        "n": _whole(1),
        "batch": _whole(1),
        "images_per_second": _number,
        "warm_up": _whole(),
        "stationary": _flag,
        "first_third_ms": _optional(_number),
        "last_third_ms": _optional(_number),
        "histogram": _histogram,
        "rounds": _list(_object({"at_s": _number, "p50_ms": _number, "n": _whole(1)})),
        "stages": _optional(_object(dict.fromkeys(STAGES, _quantile))),
    }
)
_memory = _object(
    {
        "peak_bytes": _optional(_whole()),
        "steady_bytes": _optional(_whole()),
        "growth_bytes": _optional(_whole(-_MAX_NUMBER)),
        "leak": _optional(_flag),
        "before_bytes": _optional(_whole()),
        "loaded_bytes": _optional(_whole()),
        "arena_bytes": _optional(_whole()),
        "device_bytes": _optional(_whole()),
        "system_bytes": _optional(_whole()),
        "inferences": _whole(),
        "reason": _optional(_text),
    }
)
_power = _object(
    {
        "rails": _by_name(_signed),
        "total": _list(_text),
        "watts": _optional(_signed),
        "idle_watts": _optional(_signed),
        "joules": _optional(_signed),
        "samples": _whole(),
    }
)
_span = {"before": _optional(_signed), "during": _optional(_signed), "after": _optional(_signed)}
_conditions = _object(
    {
        "samples": _whole(),
        "interval_s": _number,
        "clocks_hz": _by_name(_object({**_span, "first_third": _optional(_number), "last_third": _optional(_number)})),
        "celsius": _by_name(_object(_span)),
        "throttle": _by_name(_object(_span)),
        "others": _optional(
            _object(
                {
                    "mean_cores": _number,
                    "highest_cores": _number,
                    "busy_seconds": _whole(),
                    "seconds": _whole(),
                    "limit_cores": _number,
                }
            )
        ),
        "reason": _optional(_text),
    }
)
_example = _object(
    {
        "trigger": _text,
        "target": _whole(),
        "images": _list(
            _object({"before": _pixels, "after": _pixels, "truth": _text, "clean": _text, "triggered": _text})
        ),
    }
)
_flip = _object({"image": _whole(), "trigger": _text, "truth": _whole(), "host": _whole(), "here": _whole()})
_gate = _object({"gate": _text, "value": _optional(_signed), "passed": _flag, "text": _text})
_entry = _object(
    {
        "bundle": _bundle,
        "host": _optional(_text),
        "started": _matching(_STARTED, "a UTC time"),
        "device": _device,
        "load": _object({"busy_cores": _optional(_number), "average": _optional(_number)}),
        "software": _software,
        "layers": _optional(_list(_object({"name": _name, "kind": _name, "precision": _text}), most=MOST_LAYERS)),
        "settings": _settings,
        "latency": _optional(_latency),
        "sweep": _list(_latency),
        "memory": _optional(_memory),
        "power": _optional(_power),
        "conditions": _optional(_conditions),
        "scores": _optional(_scores),
        "classes": _optional(_list(_object({"name": _text, "acc": _proportion}))),
        "evaluated": _object({"source": _text, "images": _whole(), "of": _whole()}),
        "labels": _optional(_object({"clean": _digest, "triggers": _by_name(_digest)})),
        "agreement": _optional(_object({"share": _proportion, "flips": _list(_flip)})),
        "examples": _list(_example),
        "exported_scores": _scores,
        "differences": _optional(
            _list(_object({"figure": _text, "here": _optional(_proportion), "host": _optional(_proportion)}))
        ),
        "gates": _list(_gate),
        "findings": _list(_object({"code": _one_of(*FINDINGS), "text": _text})),
        "validity": _validity,
    }
)
_comparison = _object(
    {
        "first": _whole(),
        "second": _whole(),
        "batch": _whole(1),
        "ratio": _number,
        "low": _number,
        "high": _number,
        "rounds": _whole(1),
    }
)


def _known_entries(value: Any) -> str | None:
    """Comparisons are between entries that are there."""
    count = len(value["entries"])
    good = all(pair["first"] < count and pair["second"] < count for pair in value["comparisons"])
    return None if good else ".comparisons: there is no such entry"


_FIELDS = _object(
    {"schema": _whole(1), "interrupted": _flag, "comparisons": _list(_comparison), "entries": _list(_entry, 1)}
)


def _result(value: Any) -> str | None:
    return _FIELDS(value) or _known_entries(value)
