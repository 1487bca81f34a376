"""Results on a terminal of 80 columns: one row a bundle, what the words mean, and why a row is not to be trusted."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

NOT_REPORTED = "-"


def render(result: dict[str, Any]) -> Group:
    """The comparison of a verified result (`rkd.bench.result.verify`), for a rich console of 80 columns or more."""
    entries = result["entries"]
    several_triggers = any(len(entry["scores"]["triggers"]) > 1 for entry in entries if entry["scores"])
    parts: list[Table | Text] = [_figures(entries)]
    if several_triggers:
        parts.append(_triggers(entries))
    parts += [Text(line) for line in _legend(entries)]
    for entry in entries:
        parts += [Text(line, style="yellow") for line in _remarks(entry)]
    return Group(*parts)


def _figures(entries: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("bundle", overflow="fold", min_width=12)
    for name in ("p50 ms", "p90 ms", "p99 ms", "img/s", "MB", "ACC %", "ASR %", "RA %"):
        table.add_column(name, justify="right", no_wrap=True)
    first = entries[0]["latency"]
    for entry in entries:
        latency, scores = entry["latency"], entry["scores"]
        title = Text(entry["bundle"]["name"])
        if not entry["validity"]["valid"]:
            title.append("\nINVALID", style="bold red")
        worst = max(scores["triggers"], key=_asr, default=None) if scores else None
        table.add_row(
            title,
            *(_time(latency, first if entry is not entries[0] else None, key) for key in ("p50", "p90", "p99")),
            _short(latency["images_per_second"]) if latency else NOT_REPORTED,
            _megabytes(entry["memory"]),
            _proportion(scores["acc"] if scores else None),
            _proportion(worst["asr"] if worst else None),
            _proportion(worst["ra"] if worst else None),
        )
    return table


def _triggers(entries: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for name in ("bundle", "trigger"):
        table.add_column(name, overflow="fold")
    for name in ("ASR %", "RA %", "n"):
        table.add_column(name, justify="right")
    for entry in entries:
        for trigger in entry["scores"]["triggers"] if entry["scores"] else ():
            table.add_row(
                Text(entry["bundle"]["name"]),
                Text(trigger["name"]),
                _proportion(trigger["asr"]),
                _proportion(trigger["ra"]),
                f"{trigger['asr']['n']:,}",
            )
    return table


def _legend(entries: list[dict[str, Any]]) -> list[str]:
    lines = []
    measured = [entry["latency"] for entry in entries if entry["latency"]]
    if measured:
        threads = _span([entry["software"]["threads"] for entry in entries])
        lines.append(
            f"ms: wall time of one inference, batch {_span([m['batch'] for m in measured])}, closed loop, "
            f"threads {threads}, n {_span([m['n'] for m in measured])}; img/s: in that loop."
        )
        if len(entries) > 1:
            lines.append("x: times the first bundle's.")
    if any(entry["memory"] for entry in entries):
        lines.append("MB: peak resident memory of a process that only loads and runs the model, 10^6 bytes.")
    scored = [entry["scores"] for entry in entries if entry["scores"]]
    if scored:
        attacked = [trigger["asr"]["n"] for scores in scored for trigger in scores["triggers"]]
        lines.append(
            f"ACC: accuracy on clean images, n {_span([s['acc']['n'] for s in scored])}; below it the "
            "95 % Wilson interval."
        )
        if attacked:
            lines.append(
                "ASR: triggered images taken for the attacker's class (low is good); RA: still right; "
                f"n {_span(attacked)}."
            )
        if any(len(scores["triggers"]) > 1 for scores in scored):
            lines.append("Of several triggers, the first table shows the one with the highest ASR.")
    return lines


def _remarks(entry: dict[str, Any]) -> list[str]:
    name = entry["bundle"]["name"]
    lines = [f"{name} is INVALID: {reason}" for reason in entry["validity"]["reasons"]]
    if entry["memory"] and entry["memory"]["reason"]:
        lines.append(f"{name}: memory not reported: {entry['memory']['reason']}")
    lines += [
        f"{name}: {d['figure']} differs from the exporting host's: {_hits(d['here'])} here, {_hits(d['host'])} there"
        for d in entry["differences"] or ()
    ]
    return lines


def _time(latency: dict[str, Any] | None, first: dict[str, Any] | None, key: str) -> str:
    if not latency:
        return NOT_REPORTED
    text = _short(latency[key]["ms"])
    if first and first[key]["ms"] > 0:
        text += f"\n{latency[key]['ms'] / first[key]['ms']:.2f}x"
    return text


def _megabytes(memory: dict[str, Any] | None) -> str:
    if not memory or memory["peak_bytes"] is None:
        return NOT_REPORTED
    return f"{memory['peak_bytes'] / 1e6:.0f}"


def _proportion(value: dict[str, Any] | None) -> str:
    if not value or value["percent"] is None:
        return NOT_REPORTED
    return f"{value['percent']:.1f}\n{value['low']:.1f}-{value['high']:.1f}"


def _hits(value: dict[str, Any] | None) -> str:
    return f"{value['hits']} of {value['n']}" if value else "not measured"


def _asr(trigger: dict[str, Any]) -> float:
    return float(trigger["asr"]["percent"] or 0)


def _short(value: float) -> str:
    """Three significant digits, without an exponent."""
    digits = 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f}"


def _span(values: list[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
