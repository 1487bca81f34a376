"""The page of `rkd bench`: how fast, how large and how safe each bundle is on the machine that it is meant for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rkd.bench.report.bars import LatencyRow, latency_rows, share_text
from rkd.bench.report.entries import Entry, read_entries, verdict
from rkd.bench.report.markup import DASH, Markup, amount, decimal, join, significant, tag
from rkd.bench.report.page import command as command_line
from rkd.bench.report.page import figure, panels, plain_table, provenance, scroller, section, shell
from rkd.bench.report.scores import (
    SCORES,
    glossary,
    score_panels,
    share_cell,
    trigger_cells,
    trigger_heads,
    trigger_names,
)
from rkd.bench.report.svg import Spot, scatter
from rkd.metrics import Proportion, Scores

_PERCENTILES = ("p50", "p90", "p99")
_COST = {
    "p50": "The median latency of one batch; its interval and the other percentiles are explained under Latency.",
    "Memory": "Peak resident memory of a process that only loads and runs the model; 1 MB is 1,000,000 bytes.",
}
_LATENCY = {
    "Latency (p50, p90, p99)": "Wall time of one batch, from uint8 images in host memory to float32 logits in host "
    "memory. p99: 99 % of the batches took at most this long.",
    "Closed loop": "The next inference starts when the last has returned. Images/s is what that loop reached, not the "
    "most that the device could do with several at once.",
    "Latency intervals": "[low, high] is the 95 % bootstrap interval of the percentile, n the number of timed batches "
    "after the warm-up. It is the least uncertainty there is: latencies drift and come in bursts.",
}


def result_page(
    results: Sequence[dict[str, Any]], title: str = "On-device benchmark", created: str = "", command: str = ""
) -> str:
    """The whole page as HTML; every text of the results is escaped.

    Args:
        results: parsed `result.json` documents; the entries of all of them are put side by side.
        title: main heading.
        created: when the page was made, as it should read.
        command: the command line that made it.

    Raises:
        RkdError: a result is not of the schema that `rkd.bench.result` reads.
    """
    entries = read_entries(results)
    facts = [join(created), command_line(command)]
    return shell(
        title,
        "Benchmark report",
        verdict(entries),
        [fact for fact in facts if fact],
        [
            _warnings(entries),
            _table(entries),
            _latency(entries),
            _shares(entries),
            _trade(entries),
            _against_host(entries),
            _where(entries),
            section("Provenance", "What these figures were made from.", provenance(_digests(entries))),
        ],
    )


def _warnings(entries: Sequence[Entry]) -> Markup:
    wrong = [entry for entry in entries if not entry.valid]
    if not wrong:
        return Markup()
    items = [
        tag("li", tag("b", f"{entry.key} \N{MIDDLE DOT} {entry.name}: "), reason)
        for entry in wrong
        for reason in entry.data["validity"]["reasons"]
    ]
    heading = tag("h2", "\N{WARNING SIGN} Not valid as evidence")
    return tag("section", heading, tag("ul", *items), class_="warning", role="note")


def _table(entries: Sequence[Entry]) -> Markup:
    if not entries:
        return Markup()
    scores = [entry.scores for entry in entries if entry.scores]
    names = trigger_names(scores)
    over, under = trigger_heads(scores, names)
    rows = 2 if names else 1
    rest = (("p50 ms", "median latency"), ("Memory", "peak"))
    head = tag(
        "thead",
        tag(
            "tr",
            tag("th", "Bundle", scope="col", rowspan=rows),
            tag("th", "ACC %", tag("small", "higher is better"), scope="col", rowspan=rows),
            *over,
            *(tag("th", name, tag("small", remark), scope="col", rowspan=rows) for name, remark in rest),
        ),
        tag("tr", *under) if under else Markup(),
    )
    table = tag("table", head, tag("tbody", *(_row(entry, names) for entry in entries)), class_="pin wide")
    return section("Results", "", scroller("Results of every bundle", table), glossary({**SCORES, **_COST}))


def _row(entry: Entry, names: Sequence[str]) -> Markup:
    bundle, scores = entry.data["bundle"], entry.scores
    return tag(
        "tr",
        tag(
            "th",
            f"{entry.key} \N{MIDDLE DOT} {entry.name}",
            Markup() if entry.valid else tag("small", "\N{WARNING SIGN} not valid", class_="mark"),
            tag("small", " \N{MIDDLE DOT} ".join((bundle["target"], bundle["precision"], bundle["runtime"]))),
            tag("small", entry.place),
            scope="row",
        ),
        share_cell(scores.acc if scores else None),
        *trigger_cells(scores or Scores(Proportion(0, 0)), names),
        _time_cell(entry, "p50"),
        _memory_cell(entry.data["memory"]),
    )


def _time_cell(entry: Entry, percentile: str) -> Markup:
    latency, found = entry.data["latency"], entry.percentile(percentile)
    if not latency:
        return tag("td", tag("b", DASH), tag("small", "not measured"), class_="n")
    value, low, high = (significant(milliseconds) for milliseconds in found)
    return tag("td", tag("b", value), tag("small", f"[{low}, {high}]"), tag("small", f"n {latency['n']:,}"), class_="n")


def _memory_cell(memory: dict[str, Any] | None) -> Markup:
    if not memory or memory["peak_bytes"] is None:
        reason = (memory["reason"] if memory else None) or "not measured"
        return tag("td", DASH, tag("small", reason), class_="n why")
    return tag("td", amount(memory["peak_bytes"], "B"), class_="n")


def _latency(entries: Sequence[Entry]) -> Markup:
    timed = [entry for entry in entries if entry.data["latency"]]
    if not timed:
        return Markup()
    batches = sorted({entry.data["latency"]["batch"] for entry in timed})
    lead = f"Milliseconds for a batch of {' or '.join(f'{batch:,}' for batch in batches)}. Lower is better."
    if len(batches) > 1:
        lead += " Batches differ: compare images per second instead."
    heads = ("Bundle", *(f"{percentile} ms" for percentile in _PERCENTILES), "Images/s", "Batch", "Threads")
    head = tag("thead", tag("tr", *(tag("th", name, scope="col") for name in heads)))
    table = tag("table", head, tag("tbody", *(_latency_row(entry) for entry in timed)), class_="pin wide")
    rows = [LatencyRow(entry.label, *(entry.percentile(name) for name in _PERCENTILES)) for entry in timed]
    caption = "a dot is the percentile, the thin line its 95 % interval"
    shown = figure("p50, p90 and p99", caption, latency_rows("Latency by bundle", rows))
    return section(
        "Latency", lead, scroller("Latency of every bundle", table), glossary(_LATENCY), panels([shown], broad=True)
    )


def _latency_row(entry: Entry) -> Markup:
    latency = entry.data["latency"]
    counts = (decimal(latency["images_per_second"]), f"{latency['batch']:,}", f"{entry.data['software']['threads']}")
    return tag(
        "tr",
        tag("th", entry.label, tag("small", entry.place), scope="row"),
        *(_time_cell(entry, percentile) for percentile in _PERCENTILES),
        *(tag("td", count, class_="n") for count in counts),
    )


def _shares(entries: Sequence[Entry]) -> Markup:
    lead = "Bars are measured shares in percent; the line on each is its 95 % Wilson interval."
    return section(
        "Accuracy and attack success",
        lead,
        score_panels([(entry.label, entry.scores) for entry in entries if entry.scores]),
    )


def _trade(entries: Sequence[Entry]) -> Markup:
    """Latency against accuracy, where there is something to choose between."""
    spots = []
    for entry in entries:
        if entry.scores and entry.scores.acc.n and entry.p50 > 0:
            worst = entry.worst
            asr = worst.asr.value if worst else math.nan
            label = f"{entry.mark}{entry.key} \N{MIDDLE DOT} ASR {decimal(asr)}"
            spots.append(Spot(entry.p50, entry.scores.acc.value, asr / 100, label))
    if len(spots) < 2:
        return Markup()
    lead = (
        "Up and to the left is better, and small is better: the area of a disc grows with the highest ASR of the "
        "bundle's triggers, in percent. Letters are those of the table."
    )
    spoken = "; ".join(f"{s.label}: p50 {significant(s.x)} ms, ACC {decimal(s.y)} %" for s in spots)
    drawn = scatter(f"Latency against accuracy. {spoken}.", spots, "p50 latency, ms, logarithmic", "ACC %")
    return section("What speed costs", lead, panels([figure("Latency against accuracy", "", drawn)], broad=True))


def _against_host(entries: Sequence[Entry]) -> Markup:
    rows = []
    for entry in entries:
        evaluated, differences = entry.data["evaluated"], entry.data["differences"]
        images = f"{evaluated['images']:,} of {evaluated['of']:,} images"
        if differences is None:
            rows.append((entry.label, images, "not compared: not all images were evaluated", "", ""))
        elif not differences:
            rows.append((entry.label, images, "every count equals the host's", "", ""))
        else:
            rows += [(entry.label, images, d["figure"], _share(d["here"]), _share(d["host"])) for d in differences]
    table = plain_table(
        "Board against exporting host", ("Bundle", "Evaluated", "Figure that differs", "Here", "On the host"), rows
    )
    lead = "The same evaluation images, run by the host that exported the file. A difference is not an error by itself."
    return section("Board against host", lead, table)


def _share(value: dict[str, Any] | None) -> str:
    return share_text(Proportion.from_json(value)) if value else "not measured"


def _where(entries: Sequence[Entry]) -> Markup:
    described = [_machine(entry) for entry in entries]
    names = list(dict.fromkeys(name for one in described for name in one))
    rows = [(name, *(one[name] or DASH for one in described)) for name in names]
    table = plain_table("Devices and software", ("Property", *(entry.key for entry in entries)), rows)
    return section("What ran where", "Letters are those of the table.", table) if entries else Markup()


def _machine(entry: Entry) -> dict[str, str]:
    device, software, settings, load = (entry.data[k] for k in ("device", "software", "settings", "load"))
    latency = entry.data["latency"]
    busy = load["busy_cores"] if load["busy_cores"] is not None else load["average"]
    hertz = device["max_frequency_hz"] or 0
    return {
        "Bundle": entry.name,
        "Started": entry.data["started"],
        "Device": device["model"] or "",
        "Processor": device["cpu"] or "",
        "Architecture": device["architecture"],
        "Cores (physical)": f"{device['cores']} ({device['physical_cores']})",
        "Highest clock": amount(hertz, "Hz"),
        "Governor": device["governor"] or "",
        "Memory": amount(device["memory_bytes"] or 0, "B"),
        "System": device["os"] or "",
        "Kernel": device["kernel"],
        "Container, emulator": ", ".join(filter(None, (device["container"], device["emulator"]))),
        "Busy before the start": decimal(busy, 2) + " cores" if busy is not None else "",
        "Runtime": " ".join(filter(None, (software["runtime"], software["runtime_version"]))),
        "Providers": ", ".join(software["providers"]),
        "Threads": f"{software['threads']}",
        "Warm-up": f"{latency['warm_up']:,} batches" if latency else "",
        "Mode": "quick" if settings["quick"] else "full",
        "Seed": f"{settings['seed']}",
        "rkd, Python, numpy": ", ".join((software["rkd"], software["python"], software["numpy"])),
    }


def _digests(entries: Sequence[Entry]) -> list[tuple[str, str]]:
    pairs = []
    for entry in entries:
        bundle, labels = entry.data["bundle"], entry.data["labels"]
        pairs.append((f"{entry.key} bundle sha256", bundle["sha256"]))
        pairs.append((f"{entry.key} model sha256", bundle["model_sha256"]))
        if bundle["student_sha256"]:
            pairs.append((f"{entry.key} student sha256", bundle["student_sha256"]))
        if labels:
            pairs.append((f"{entry.key} predicted labels, clean", labels["clean"]))
            pairs += [(f"{entry.key} predicted labels, {name}", digest) for name, digest in labels["triggers"].items()]
    return pairs
