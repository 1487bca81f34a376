"""Results on a terminal of 80 columns: one row a bundle, what the words mean, and why a row is not to be trusted.

A serial console without colour loses nothing: what colour says is also said in words.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from rkd.bench.quantiles import fewest_for_upper_end
from rkd.bench.report.entries import letters

NOT_REPORTED = "-"
_MOST_FLIPS = 5
_NUMBER = re.compile(r"(?<![\w.-])\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]\d+)?(?!\w)", re.ASCII)
_SLOT = "\0"  # where a number stood; no text of a result holds it


@dataclass(frozen=True)
class _Name:
    """A name that breaks behind its dots, else behind its dashes, and inside a word only where that has no room."""

    name: str
    marks: tuple[str, ...] = ()

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        least = max(map(len, (*_words(self.name, 0), *self.marks)), default=0)
        return Measurement(least, max(map(len, (self.name, *self.marks))))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = [""]
        for word in _words(self.name, options.max_width):
            if len(lines[-1]) + len(word.rstrip()) > options.max_width:
                lines.append("")
            lines[-1] += word
        yield Text("\n".join(line.rstrip() for line in lines if line), overflow="fold")
        for mark in self.marks:
            yield Text(mark, style="bold red")


def _words(name: str, width: int) -> list[str]:
    """A name's parts, those longer than `width` parted once more."""
    parts = re.findall(r"[^. ]*[. ]|[^. ]+", name)
    return [one for part in parts for one in ([part] if len(part) <= width else re.findall(r"[^-_]*[-_]|[^-_]+", part))]


def labels(entries: Sequence[dict[str, Any]]) -> list[str]:
    """What to call each entry: its bundle and board; behind the letter that it has on the page where two are alike."""
    names = [f"{e['bundle']['name']}{' on ' + e['host'] if e['host'] else ''}" for e in entries]
    alike = len(set(names)) < len(names)
    return [f"{letters(index)}: {name}" if alike else name for index, name in enumerate(names)]


def render(result: dict[str, Any]) -> Group:
    """The comparison of a verified result (`rkd.bench.result.verify`), for a rich console of 80 columns or more."""
    entries = [{**e, "label": label} for e, label in zip(result["entries"], labels(result["entries"]), strict=True)]
    several_triggers = any(len(entry["scores"]["triggers"]) > 1 for entry in entries if entry["scores"])
    parts: list[Table | Text] = [_figures(entries)]
    unknown: list[str] = []
    if any(entry["latency"] for entry in entries):
        parts.append(_latencies(entries))
    if any(latency["stages"] or entry["sweep"] for entry, latency in _measured(entries)):
        parts += _stages(entries, unknown)
    if any(entry["memory"] or entry["power"] for entry in entries):
        parts += _costs(entries, unknown)
    if several_triggers:
        parts.append(_triggers(entries))
    parts += [_classes(entry) for entry in entries if entry["classes"]]
    if unknown:
        parts.append(Text(f"Not reported: {', '.join(unknown)}."))
    parts += [Text(line) for line in _ratios(result["comparisons"], entries)]
    parts += [Text(line) for line in _legend(entries)]
    parts += [Text(line) for line in _software(entries)]
    parts += [Text(line) for line in _machine(entries)]
    parts += [Text(line, style="yellow") for line in _by_remark(entries)]
    return Group(*parts)


def _figures(entries: list[dict[str, Any]]) -> Table:
    table = _table("bundle")
    for name in ("p50 ms", "p90 ms", "p99 ms", "img/s", "MB", "ACC %", "ASR %", "RA %"):
        table.add_column(name, justify="right", no_wrap=True)
    for entry in entries:
        latency, scores = entry["latency"], entry["scores"]
        worst = max(scores["triggers"], key=_asr, default=None) if scores else None
        table.add_row(
            _title(entry),
            *(_short(latency[key]["ms"]) if latency else NOT_REPORTED for key in ("p50", "p90", "p99")),
            _short(latency["images_per_second"]) if latency else NOT_REPORTED,
            _megabytes(entry["memory"], "peak_bytes"),
            _proportion(scores["acc"] if scores else None),
            _proportion(worst["asr"] if worst else None),
            _proportion(worst["ra"] if worst else None),
        )
    return table


def _latencies(entries: list[dict[str, Any]]) -> Table:
    """Each batch size: every percentile with its interval."""
    table = _table("bundle")
    for name in ("batch", "p50 ms", "p90 ms", "p99 ms", "p99.9 ms", "n"):
        table.add_column(name, justify="right", no_wrap=True)
    for entry, latency in _measured(entries):
        intervals = (_interval(latency[key]) for key in ("p50", "p90", "p99", "p999"))
        table.add_row(_Name(_name(entry)), f"{latency['batch']:,}", *intervals, f"{latency['n']:,}")
    return table


def _stages(entries: list[dict[str, Any]], unknown: list[str]) -> list[Table]:
    """Each batch size: the device's share of the time."""
    rows = []
    for entry, latency in _measured(entries):
        stages = latency["stages"]
        times = (_short(stages[key]["ms"]) if stages else NOT_REPORTED for key in ("h2d", "compute", "d2h"))
        figures = (f"{latency['batch']:,}", _short(latency["images_per_second"]), *times)
        rows.append((_name(entry), figures))
    return _reported(("batch", "img/s", "h2d", "comp", "d2h"), rows, unknown)


def _measured(entries: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Every entry's latency at every batch size that was measured."""
    return [(entry, one) for entry in entries if entry["latency"] for one in (entry["latency"], *entry["sweep"])]


def _costs(entries: list[dict[str, Any]], unknown: list[str]) -> list[Table]:
    """Memory in detail, and power."""
    rows = []
    for entry in entries:
        memory, power = entry["memory"], entry["power"]
        figures = (
            *(_megabytes(memory, f"{key}_bytes") for key in ("peak", "steady", "arena", "device", "growth")),
            _optional(power["watts"] if power else None),
            _optional(power["idle_watts"] if power else None),
            _optional(1e3 * power["joules"] if power and power["joules"] is not None else None),
        )
        rows.append((_name(entry), figures))
    return _reported(("peak MB", "steady", "arena", "device", "grew", "W", "idle W", "mJ"), rows, unknown)


def _reported(heads: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], unknown: list[str]) -> list[Table]:
    """The columns in which any bundle has a figure; the heads of the others go to `unknown`."""
    known = [i for i in range(len(heads)) if any(figures[i] != NOT_REPORTED for _, figures in rows)]
    unknown += [head for i, head in enumerate(heads) if i not in known]
    table = _table("bundle")
    for i in known:
        table.add_column(heads[i], justify="right", no_wrap=True)
    for name, figures in rows:
        table.add_row(_Name(name), *(figures[i] for i in known))
    return [table] if known else []


def _triggers(entries: list[dict[str, Any]]) -> Table:
    table = _table("bundle", "trigger")
    for name in ("ASR %", "RA %", "n"):
        table.add_column(name, justify="right")
    for entry in entries:
        for trigger in entry["scores"]["triggers"] if entry["scores"] else ():
            table.add_row(
                _Name(_name(entry)),
                Text(trigger["name"]),
                _proportion(trigger["asr"]),
                _proportion(trigger["ra"]),
                f"{trigger['asr']['n']:,}",
            )
    return table


def _classes(entry: dict[str, Any]) -> Table:
    table = _table(f"{_name(entry)}: class")
    for name in ("ACC %", "n"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in entry["classes"]:
        share = one["acc"]
        table.add_row(Text(one["name"]), _proportion(share).replace("\n", "  "), f"{share['n']:,}")
    return table


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)  # rich draws ASCII where a terminal has no more
    for heading in headings:
        table.add_column(Text(heading), overflow="fold", min_width=12)
    return table


def _title(entry: dict[str, Any]) -> _Name:
    validity = entry["validity"]
    spoiled = [word for word in ("timing", "scores") if not validity[word]]
    marks = [] if validity["valid"] else ["INVALID" + (f" {spoiled[0]}" if len(spoiled) == 1 else "")]
    return _Name(_name(entry), (*marks, *(["FORCED"] if entry["bundle"]["forced"] else [])))


def _name(entry: dict[str, Any]) -> str:
    return str(entry["label"])


def _ratios(comparisons: list[dict[str, Any]], entries: list[dict[str, Any]]) -> list[str]:
    """Pairs of bundles at the main batch size, from their interleaved rounds."""
    lines = []
    for pair in comparisons:
        first, second = entries[pair["first"]], entries[pair["second"]]
        if pair["batch"] == first["settings"]["batch"]:
            mark = "" if first["validity"]["timing"] and second["validity"]["timing"] else "INVALID timing: "
            interval = "(one round, no interval)"
            if pair["low"] is not None:
                interval = f"[{_ratio(pair['low'])}, {_ratio(pair['high'])}]"
            lines.append(
                f"{mark}{_name(second)} takes {_ratio(pair['ratio'])} {interval} times as long as {_name(first)}."
            )
    return lines


def _legend(entries: list[dict[str, Any]]) -> list[str]:
    lines = []
    measured = [entry["latency"] for entry in entries if entry["latency"]]
    if measured:
        threads = _span([entry["software"]["threads"] for entry in entries])
        lines.append(
            f"ms: wall time of one inference, batch {_span([m['batch'] for m in measured])}, closed loop, "
            f"threads {threads}, n {_span([m['n'] for m in measured])}, with 95 % intervals as of "
            "independent inferences; img/s: in that loop."
        )
        if any(m["p999"] is None for m in measured):
            lines.append("p99.9 needs 1,000 samples.")
        if any(m[key] and m[key]["high"] is None for m in measured for key in ("p50", "p90", "p99", "p999")):
            lines.append(
                f">=: too few inferences for an upper end; p99 takes {fewest_for_upper_end(99):,}, p99.9 "
                f"{fewest_for_upper_end(99.9):,}."
            )
        if any(m["stages"] for m in measured):
            lines.append("h2d, comp, d2h: the device's own p50 of copy in, compute and copy out, in ms.")
    if any(entry["memory"] for entry in entries):
        lines.append(
            "MB: peak resident memory of a process that only loads and runs the model, 10^6 bytes; arena: what the "
            "first inferences added; device: on a device of its own; grew: over the run."
        )
    if any(entry["power"] for entry in entries):
        lines.append("W: mean power while the bundle was timed; mJ: that times its mean latency, idle power included.")
    return lines + _score_legend([entry["scores"] for entry in entries if entry["scores"]])


def _score_legend(scored: list[dict[str, Any]]) -> list[str]:
    if not scored:
        return []
    attacked = [trigger["asr"]["n"] for scores in scored for trigger in scores["triggers"]]
    lines = [
        f"ACC: accuracy on clean images, n {_span([s['acc']['n'] for s in scored])}; below it the 95 % Wilson interval."
    ]
    if attacked:
        lines.append(
            f"ASR: triggered images taken for the attacker's class (low is good); RA: still right; n {_span(attacked)}."
        )
    if any(len(scores["triggers"]) > 1 for scores in scored):
        lines.append("Of several triggers, the first table shows the one with the highest ASR.")
    return lines


def _software(entries: list[dict[str, Any]]) -> list[str]:
    """What ran the bundles, once for all that it ran."""
    found: dict[str, list[str]] = {}
    for entry in entries:
        software, device = entry["software"], entry["device"]
        runtime = f"{software['runtime']} {software['runtime_version'] or '(version not reported)'}"
        where = device["model"] or device["cpu"] or device["architecture"]
        providers = ", ".join(filter(None, software["providers"])) or "provider not reported"
        line = f"{runtime}, {providers}, threads {software['threads']}, on {where}"
        found.setdefault(line, []).append(_name(entry))
    return [
        f"Ran {f'{_all(names, entries)} ' if len(entries) > 1 else ''}with {line}." for line, names in found.items()
    ]


def _all(names: list[str], entries: list[dict[str, Any]]) -> str:
    return "every bundle" if len(names) == len(entries) > 1 else ", ".join(names)


def _machine(entries: list[dict[str, Any]]) -> list[str]:
    """Clocks and heat, once a machine."""
    lines: dict[str, None] = {}
    for entry in entries:
        seen, device = entry["conditions"], entry["device"]
        if not seen:
            continue
        if seen["reason"]:
            lines[f"Sensors: not reported: {seen['reason']}."] = None
            continue
        cpu, gpu = (seen["clocks_hz"].get(name) for name in ("cpu", "gpu"))
        hottest = [span["during"] for span in seen["celsius"].values() if span["during"] is not None]
        facts = [
            f"mode {device['power_mode']}" if device["power_mode"] else "",
            f"governor {device['governor'] or 'not reported'}",
            f"CPU {_clock(cpu)}",
            f"GPU {_clock(gpu)}" if gpu else "",
            f"hottest {max(hottest):.0f} C" if hottest else "heat not reported",
            f"others {seen['others']['mean_cores']:.2f} cores" if seen["others"] else "",
        ]
        lines[f"While timed: {', '.join(filter(None, facts))}."] = None
    return list(lines)


def _clock(span: dict[str, Any] | None) -> str:
    if not span or span["during"] is None:
        return "clock not reported"
    return f"at least {span['during'] / 1e6:,.0f} MHz"


def _by_remark(entries: list[dict[str, Any]]) -> list[str]:
    """What is to be said, once, and of which bundles: one line a code, figures that differ as a range."""
    said: dict[tuple[str, str, str], tuple[dict[str, None], list[list[str]]]] = {}
    for entry in entries:
        for head, code, text in _remarks(entry):
            key = (head, code, _NUMBER.sub(_SLOT, text) if code else text)
            names, numbers = said.setdefault(key, ({}, []))
            names[_name(entry)] = None
            numbers.append(_NUMBER.findall(text) if code else [])
    lines: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}
    for (head, code, template), (names, numbers) in said.items():
        text = template
        for figures in zip(*numbers, strict=True):
            text = text.replace(_SLOT, _range(figures), 1)
        lines.setdefault((head, code or text, tuple(names)), []).append(text)
    return [f"{_all([*names], entries)}{head}{'; '.join(texts)}" for (head, _, names), texts in lines.items()]


def _range(numbers: tuple[str, ...]) -> str:
    low, high = (end(numbers, key=lambda number: float(number.replace(",", ""))) for end in (min, max))
    return low if low == high else f"{low} to {high}"


def _remarks(entry: dict[str, Any]) -> list[tuple[str, str, str]]:
    """How each begins; its code, where those of several bundles may be merged; the rest."""
    found = [(f" is INVALID ({r['code']}): ", r["code"], r["text"]) for r in entry["validity"]["reasons"]]
    found += [(" was exported by force (FORCED) although: ", "", text) for text in entry["bundle"]["forced"]]
    for one in entry["findings"]:
        if one["code"] != "flips":
            found.append(
                (": ", one["code"] if one["code"] != "classes-missing" else "", one["text"])
            )  # names of classes
    if entry["memory"] and entry["memory"]["reason"]:
        found.append((": memory not reported: ", "memory", entry["memory"]["reason"]))
    return found + [("", "", line) for line in _own_remarks(entry)]


def _own_remarks(entry: dict[str, Any]) -> list[str]:
    """What is said of one bundle alone, figure by figure."""
    lines = []
    if agreement := entry["agreement"]:
        share = agreement["share"]
        if share["n"]:
            counted = f"{share['hits']:,} of {share['n']:,} ({share['percent']:.2f} %)"
            lines.append(f": {counted} predictions agree with the exporting host's")
        lines += [f": {_flip(flip)}" for flip in agreement["flips"][:_MOST_FLIPS]]
        if len(agreement["flips"]) > _MOST_FLIPS:
            lines.append(f": ... {len(agreement['flips']) - _MOST_FLIPS} more in the result")
    lines += [
        f": {d['figure']} differs from the exporting host's: {_hits(d['here'])} here, {_hits(d['host'])} there"
        for d in entry["differences"] or ()
    ]
    return lines + [f": gate {'kept' if g['passed'] else 'BROKEN'}: {g['text']}" for g in entry["gates"]]


def _flip(flip: dict[str, Any]) -> str:
    what = f"with {flip['trigger']}" if flip["trigger"] else "clean"
    return f"image {flip['image']} ({what}) is class {flip['here']} here, {flip['host']} there, truly {flip['truth']}"


def _interval(found: dict[str, Any] | None) -> str:
    if not found:
        return NOT_REPORTED
    low = _short(found["low"])
    return f"{_short(found['ms'])}\n{f'>={low}' if found['high'] is None else f'{low}-' + _short(found['high'])}"


def _megabytes(memory: dict[str, Any] | None, key: str) -> str:
    if not memory or memory[key] is None:
        return NOT_REPORTED
    value = memory[key] / 1e6
    return f"{value:.0f}" if abs(value) >= 10 else f"{value:.1f}"


def _optional(value: float | None) -> str:
    return NOT_REPORTED if value is None else _short(value)


def _proportion(value: dict[str, Any] | None) -> str:
    if not value or value["percent"] is None:
        return NOT_REPORTED
    return f"{value['percent']:.1f}\n{value['low']:.1f}-{value['high']:.1f}"


def _hits(value: dict[str, Any] | None) -> str:
    return f"{value['hits']} of {value['n']}" if value else "not measured"


def _asr(trigger: dict[str, Any]) -> float:
    return float(trigger["asr"]["percent"] or 0)


def _ratio(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _short(value: float) -> str:
    """Three significant digits, without an exponent."""
    digits = 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f}"


def _span(values: list[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
