"""What an inference costs besides time: memory, power, heat; and what the machine did meanwhile."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rkd.bench.report.entries import Entry
from rkd.bench.report.markup import DASH, Markup, amount, decimal, significant
from rkd.bench.report.page import plain_table, section

NOT_REPORTED = "not reported"


def memory_section(entries: Sequence[Entry]) -> Markup:
    """Memory of every bundle in detail."""
    rows = [_memory_row(entry) for entry in entries if entry.data["memory"]]
    heads = ("Bundle", "Peak", "After loading", "Arena", "Device", "System", "Growth over the run")
    lead = (
        "Of a process that only loads and runs the model. Arena: what the first inferences added. Device: on a device "
        "of its own. System: by how much the machine's available memory fell, which tells what a GPU that shares it "
        "holds. Memory that grows all along is a leak."
    )
    return section("Memory", lead, plain_table("Memory of every bundle", heads, rows))


def _memory_row(entry: Entry) -> tuple[str, ...]:
    memory = entry.data["memory"]
    if memory["reason"]:
        return entry.label, memory["reason"], *[DASH] * 5
    grown = memory["growth_bytes"]
    growth = DASH if grown is None else f"{grown / 1e6:+.1f} MB in {memory['inferences']:,} inferences"
    kinds = ("peak_bytes", "loaded_bytes", "arena_bytes", "device_bytes", "system_bytes")
    figures = (_bytes(memory[kind]) for kind in kinds)
    return entry.label, *figures, f"{growth}, a leak" if memory["leak"] else growth


def power_section(entries: Sequence[Entry]) -> Markup:
    """Power and energy, or that no machine reports them."""
    timed = [entry for entry in entries if entry.data["latency"]]
    if not timed or all(not entry.data["conditions"] and not entry.data["power"] for entry in timed):
        return Markup()
    rows = [_power_row(entry) for entry in timed]
    lead = (
        "Mean power while the bundle was timed, of the rails that together are the board's or the processor's. Energy "
        "is that power times the mean latency: what idles is in it."
    )
    heads = ("Bundle", "Power", "Idle before", "Energy an inference", "Rails")
    return section("Power", lead, plain_table("Power of every bundle", heads, rows))


def _power_row(entry: Entry) -> tuple[str, ...]:
    power = entry.data["power"]
    if not power:
        return entry.label, NOT_REPORTED, NOT_REPORTED, NOT_REPORTED, ""
    rails = ", ".join(
        f"{name} {significant(watts)} W{'' if name in power['total'] else ' (not in the sum)'}"
        for name, watts in power["rails"].items()
    )
    joules = power["joules"]
    energy = NOT_REPORTED if joules is None else f"{significant(1e3 * joules)} mJ"
    return entry.label, _watts(power["watts"]), _watts(power["idle_watts"]), energy, rails


def conditions_section(entries: Sequence[Entry]) -> Markup:
    """Clocks, heat, throttling and other programs, once for each run."""
    seen: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.data["conditions"]:
            seen.setdefault(f"{entry.data['started']} {entry.data['host']} {entry.data['conditions']}", []).append(
                entry
            )
    rows = [row for group in seen.values() for row in _condition_rows(group)]
    lead = (
        "Read by another process, ten times a second. For clocks, during is the lowest; for heat, the highest; for "
        "counters of throttling, what was added."
    )
    heads = ("Bundles", "What", "Before", "During", "After")
    return section("The machine meanwhile", lead, plain_table("Clocks, heat and throttling", heads, rows))


def _condition_rows(group: Sequence[Entry]) -> list[tuple[str, ...]]:
    who, seen = ", ".join(entry.key for entry in group), group[0].data["conditions"]
    if seen["reason"]:
        return [(who, "sensors", NOT_REPORTED, seen["reason"], "")]
    rows: list[tuple[str, ...]] = [
        (who, f"clock: {name}", *_span(span, "Hz")) for name, span in seen["clocks_hz"].items()
    ]
    rows += [(who, f"heat: {name}", *_span(span, " \N{DEGREE SIGN}C")) for name, span in seen["celsius"].items()]
    rows += [(who, f"throttling, {name}", *_span(span, "")) for name, span in seen["throttle"].items()]
    for what in ("clock", "heat"):
        if not any(row[1].startswith(what) for row in rows):
            rows.append((who, what, NOT_REPORTED, NOT_REPORTED, NOT_REPORTED))
    if (gpu := seen["gpu_percent_before"]) is not None:
        rows.append((who, "GPU load", f"{decimal(gpu, 0)} %", "", ""))
    if others := seen["others"]:
        busy = f"{decimal(others['mean_cores'], 2)} cores on average, {decimal(others['highest_cores'], 2)} at worst"
        rows.append((who, "other programs", "", busy, ""))
    return rows


def _span(span: dict[str, Any], unit: str) -> tuple[str, str, str]:
    before, during, after = (_value(span[key], unit) for key in ("before", "during", "after"))
    return before, during, after


def _value(value: float | None, unit: str) -> str:
    if value is None:
        return NOT_REPORTED
    return amount(value, unit) if unit == "Hz" else f"{significant(value)}{unit}"


def _watts(value: float | None) -> str:
    return NOT_REPORTED if value is None or not math.isfinite(value) else f"{significant(value)} W"


def _bytes(value: int | None) -> str:
    return DASH if value is None else f"{value / 1e6:,.1f} MB"
