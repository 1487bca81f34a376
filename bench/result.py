"""result.json: what `rkd bench` measured, one entry a bundle.

    write(path, result); read(path) == result

A result comes from someone else's board, so it is read as a stranger's file: every key and no other, every value of its
type and in its range, text without control characters, percentages that follow from their hits, percentiles in order,
ratios inside of their intervals, verdicts of gates that follow from the figures. Reports read these files and nothing else.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from rkd.bench.examples import unpack
from rkd.bench.gates import parse_gates
from rkd.bench.latency import STAGES
from rkd.bench.tensorrt_layers import MOST_LAYERS, MOST_NAME
from rkd.bench.validity import CODES, FINDINGS
from rkd.checks import (
    LARGEST,
    by_name,
    digest,
    flag,
    list_of,
    matching,
    number,
    object_of,
    one_of,
    or_null,
    proportion,
    scores_of,
    signed,
    text,
    whole,
)
from rkd.errors import ConfigError, RkdError
from rkd.files import open_regular, storage_errors, to_json, write_file

SCHEMA = 4
MOST_FORCED = 100  # lines of what was wrong with a bundle
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,200}")
_STARTED = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", re.ASCII)
_LIMIT_BYTES = 64 * 2**20
_MAX_PIXELS = 4 * 96 * 96 + 4  # characters of base64
_MAX_BINS = 1000


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
    with storage_errors(path), open_regular(path) as file:
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
        raise RkdError(f"{origin} is not a result of rkd bench: {problem.removeprefix(': ')}; bench again")
    checked: dict[str, Any] = value
    return checked


def _name(value: Any) -> str | None:
    return text(value) or (f" is longer than {MOST_NAME} characters" if len(value) > MOST_NAME else None)


def _quantile(value: Any) -> str | None:
    if (problem := object_of({"ms": number, "low": number, "high": or_null(number)})(value)) is not None:
        return problem
    high = value["ms"] if value["high"] is None else value["high"]
    return None if value["low"] <= value["ms"] <= high else ": ms is not between low and high"


def _validity(value: Any) -> str | None:
    reason = object_of({"code": one_of(*CODES), "affects": one_of("all", "timing", "scores"), "text": text})
    fields = object_of({"valid": flag, "timing": flag, "scores": flag, "reasons": list_of(reason)})
    if (problem := fields(value)) is not None:
        return problem
    spoiled = {reason["affects"] for reason in value["reasons"]}
    expected = (not spoiled, not spoiled & {"all", "timing"}, not spoiled & {"all", "scores"})
    agree = (value["valid"], value["timing"], value["scores"]) == expected
    return None if agree else ": valid and reasons contradict each other"


def _pixels(value: Any) -> str | None:
    fields = object_of({"height": whole(1), "width": whole(1), "rgb": _base64})
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
    fields = object_of({"low_ms": number, "high_ms": number, "counts": list_of(whole(), 1)})
    if (problem := fields(value)) is not None:
        return problem
    good = value["low_ms"] <= value["high_ms"] and len(value["counts"]) <= _MAX_BINS
    return None if good else ": its bins are none"


def _consistent_latency(value: Any) -> str | None:
    if (problem := _latency_fields(value)) is not None:
        return problem
    ms = [value[key]["ms"] for key in ("p50", "p90", "p99", "p999") if value[key]]
    if ms != sorted(ms):
        return ": a higher percentile is below a lower one"
    counts = (sum(value["histogram"]["counts"]), sum(one["n"] for one in value["rounds"]))
    return None if counts == (value["n"],) * 2 else ": the histogram or the rounds do not hold n samples"


def _evaluated(value: Any) -> str | None:
    if (problem := object_of({"source": text, "images": whole(), "of": whole()})(value)) is not None:
        return problem
    return None if value["images"] <= value["of"] else ": more images than there are"


def _measured_entry(value: Any) -> str | None:
    """Gates are judged again: whoever reads a verdict need not believe it."""
    if (problem := _entry_fields(value)) is not None:
        return problem
    for i, said in enumerate(value["gates"]):
        try:
            (gate,) = parse_gates([said["gate"]])
        except (ValueError, ConfigError):
            return f".gates[{i}].gate is no gate"
        found = gate.judge(value)
        if (found["value"], found["passed"]) != (said["value"], said["passed"]):
            return f".gates[{i}]: its value and verdict do not follow from the figures"
    return None


_scores = scores_of(text)
_bundle = object_of(
    {
        "name": matching(_NAME, "a name"),
        "sha256": digest,
        "model_sha256": digest,
        "student_sha256": or_null(digest),
        "target": text,
        "runtime": text,
        "precision": text,
        "forced": list_of(text, most=MOST_FORCED),
        "role": one_of("student", "teacher"),
    },
    optional=["role"],
)
_device = object_of(
    {
        "model": or_null(text),
        "cpu": or_null(text),
        "architecture": text,
        "cores": whole(1),
        "physical_cores": whole(1),
        "memory_bytes": or_null(whole(1)),
        "os": or_null(text),
        "kernel": text,
        "python": text,
        "governor": or_null(text),
        "power_mode": or_null(text),
        "max_frequency_hz": or_null(whole()),
        "container": or_null(text),
        "emulator": or_null(text),
    }
)
_software = object_of(
    {
        "rkd": text,
        "python": text,
        "numpy": text,
        "runtime": text,
        "runtime_version": or_null(text),
        "providers": list_of(text),
        "threads": whole(1),
        "details": by_name(text),
    }
)
_settings = object_of(
    {
        "mode": one_of("quick", "default", "mlperf"),
        "batch": whole(1),
        "sweep": list_of(whole(1)),
        "threads": or_null(whole(1)),
        "seconds": number,
        "min_samples": whole(1),
        "cap_seconds": number,
        "warm_up_cap_seconds": number,
        "rounds": whole(1),
        "latency": flag,
        "memory": flag,
        "accuracy": flag,
        "sensors": flag,
        "lock_clocks": flag,
        "clocks_locked_by": or_null(text),
    }
)
_latency_fields = object_of(
    {
        "p50": _quantile,
        "p90": _quantile,
        "p99": _quantile,
        "p999": or_null(_quantile),
        "mean_ms": number,
        "n": whole(1),
        "batch": whole(1),
        "seconds": number,
        "images_per_second": number,
        "warm_up": whole(),
        "stationary": flag,
        "first_third_ms": or_null(number),
        "last_third_ms": or_null(number),
        "histogram": _histogram,
        "rounds": list_of(object_of({"at_s": number, "p50_ms": number, "n": whole(1)}), 1),
        "stages": or_null(object_of(dict.fromkeys(STAGES, _quantile))),
    }
)
_memory = object_of(
    {
        "peak_bytes": or_null(whole()),
        "steady_bytes": or_null(whole()),
        "growth_bytes": or_null(whole(-LARGEST)),
        "leak": or_null(flag),
        "before_bytes": or_null(whole()),
        "loaded_bytes": or_null(whole()),
        "arena_bytes": or_null(whole()),
        "device_bytes": or_null(whole()),
        "system_bytes": or_null(whole()),
        "inferences": whole(),
        "reason": or_null(text),
    }
)
_power = object_of(
    {
        "rails": by_name(signed),
        "total": list_of(text),
        "watts": or_null(signed),
        "idle_watts": or_null(signed),
        "joules": or_null(signed),
        "samples": whole(),
    }
)
_span = {"before": or_null(signed), "during": or_null(signed), "after": or_null(signed)}
_conditions = object_of(
    {
        "samples": whole(),
        "interval_s": number,
        "clocks_hz": by_name(object_of({**_span, "first_third": or_null(number), "last_third": or_null(number)})),
        "celsius": by_name(object_of(_span)),
        "throttle": by_name(object_of(_span)),
        "others": or_null(
            object_of(
                {
                    "mean_cores": number,
                    "highest_cores": number,
                    "busy_seconds": whole(),
                    "seconds": whole(),
                    "limit_cores": number,
                }
            )
        ),
        "gpu_percent_before": or_null(number),
        "reason": or_null(text),
    }
)
_example = object_of(
    {
        "trigger": text,
        "target": whole(),
        "images": list_of(
            object_of({"before": _pixels, "after": _pixels, "truth": text, "clean": text, "triggered": text})
        ),
    }
)
_flip = object_of({"image": whole(), "trigger": text, "truth": whole(), "host": whole(), "here": whole()})
_gate = object_of({"gate": text, "value": or_null(signed), "passed": flag, "text": text})
_entry_fields = object_of(
    {
        "bundle": _bundle,
        "host": or_null(text),
        "started": matching(_STARTED, "a UTC time"),
        "device": _device,
        "load": object_of({"busy_cores": or_null(number), "average": or_null(number)}),
        "software": _software,
        "layers": or_null(list_of(object_of({"name": _name, "kind": _name, "precision": text}), most=MOST_LAYERS)),
        "settings": _settings,
        "latency": or_null(_consistent_latency),
        "sweep": list_of(_consistent_latency),
        "memory": or_null(_memory),
        "power": or_null(_power),
        "conditions": or_null(_conditions),
        "scores": or_null(_scores),
        "classes": or_null(list_of(object_of({"name": text, "acc": proportion}))),
        "evaluated": _evaluated,
        "labels": or_null(object_of({"clean": digest, "triggers": by_name(digest)})),
        "agreement": or_null(object_of({"share": proportion, "flips": list_of(_flip)})),
        "examples": list_of(_example),
        "exported_scores": _scores,
        "differences": or_null(
            list_of(object_of({"figure": text, "here": or_null(proportion), "host": or_null(proportion)}))
        ),
        "gates": list_of(_gate),
        "findings": list_of(object_of({"code": one_of(*FINDINGS), "text": text})),
        "validity": _validity,
    }
)
_comparison_fields = object_of(
    {
        "first": whole(),
        "second": whole(),
        "batch": whole(1),
        "ratio": number,
        "low": or_null(number),
        "high": or_null(number),
        "rounds": whole(1),
    }
)


def _comparison(value: Any) -> str | None:
    if (problem := _comparison_fields(value)) is not None:
        return problem
    if value["first"] >= value["second"]:
        return ": first is not before second"
    low, high = value["low"], value["high"]
    if value["rounds"] == 1:
        return None if low is None and high is None else ": one round has no interval"
    good = low is not None and high is not None and low <= value["ratio"] <= high
    return None if good else ": ratio is not between low and high"


def _known_entries(value: Any) -> str | None:
    """Comparisons are between entries that are there."""
    count = len(value["entries"])
    good = all(pair["first"] < count and pair["second"] < count for pair in value["comparisons"])
    return None if good else ".comparisons: there is no such entry"


_FIELDS = object_of(
    {
        "schema": whole(1),
        "interrupted": flag,
        "comparisons": list_of(_comparison),
        "entries": list_of(_measured_entry, 1),
    }
)


def _result(value: Any) -> str | None:
    return _FIELDS(value) or _known_entries(value)
