"""The page of `rkd bench`: how fast, how large and how safe each bundle is on the machine that it is meant for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rkd.bench.latency import STAGES
from rkd.bench.report.bars import LatencyRow, latency_rows, share_text
from rkd.bench.report.costs import conditions_section, memory_section, power_section
from rkd.bench.report.entries import Entry, best, read_entries, verdict
from rkd.bench.report.examples import examples_section
from rkd.bench.report.markup import DASH, Markup, amount, decimal, join, significant, tag
from rkd.bench.report.page import command as command_line
from rkd.bench.report.page import figure, folded, panels, plain_table, provenance, scroller, section, shell
from rkd.bench.report.scores import (
    SCORES,
    glossary,
    score_panels,
    share_cell,
    table_head,
    trigger_cells,
    trigger_names,
)
from rkd.bench.report.spread import Spread, spreads
from rkd.bench.report.svg import Series, Spot, line_chart, scatter
from rkd.metrics import Proportion, Scores

_PERCENTILES = ("p50", "p90", "p99", "p999")
_NAMES = {"p50": "p50", "p90": "p90", "p99": "p99", "p999": "p99.9"}
_X_LABEL = "p50 latency, ms, logarithmic"
_SPOILS = {"all": "all figures", "timing": "latency, memory and power", "scores": "ACC, ASR and RA"}
_COST = {
    "p50": "The median latency of one batch; its interval and the other percentiles are explained under Latency.",
    "Memory": "Peak resident memory of a process that only loads and runs the model; 1 MB is 1,000,000 bytes.",
}
_LATENCY = {
    "Latency (p50, p90, p99, p99.9)": "Wall time of one batch, from uint8 images in host memory to float32 logits in "
    "host memory. p99: 99 % of the batches took at most this long. p99.9 needs 1,000 batches.",
    "Closed loop": "The next inference starts when the last has returned. Images/s is what that loop reached, not the "
    "most that the device could do with several at once.",
    "Latency intervals": "[low, high] is the 95 % interval of the percentile, between two of the n timed batches after "
    "the warm-up, whatever their distribution. 'At least low' alone: too few batches for an upper end (p99 "
    "needs 368, p99.9 3,688). The batches are taken as independent; latencies drift and come in bursts, so it is the least "
    "uncertainty there is.",
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
            _gates(entries),
            _latency(entries),
            _pairs(results, entries),
            _shares(entries),
            examples_section(entries),
            _trade(entries),
            memory_section(entries),
            power_section(entries),
            _classes(entries),
            _against_host(entries),
            conditions_section(entries),
            _where(entries),
            section("Provenance", "What these figures were made from.", provenance(_digests(entries))),
        ],
    )


def _warnings(entries: Sequence[Entry]) -> Markup:
    """Reasons against figures, and what else to know, each once and with the bundles that it is about."""
    against: dict[tuple[str, str], list[str]] = {}
    notes: dict[tuple[str, str], list[str]] = {}
    for entry in entries:
        for reason in entry.data["validity"]["reasons"]:
            against.setdefault((_SPOILS[reason["affects"]], reason["text"]), []).append(entry.key)
        for text in entry.data["bundle"]["forced"]:
            notes.setdefault(("exported by force although", text), []).append(entry.key)
        for finding in entry.data["findings"]:
            notes.setdefault(("", finding["text"]), []).append(entry.key)
    parts = []
    if against:
        heading = tag("h2", "\N{WARNING SIGN} Not valid as evidence")
        parts.append(tag("div", heading, _listed(against), class_="warning"))
    if notes:
        parts.append(tag("div", tag("h2", "To know"), _listed(notes), class_="note"))
    return tag("section", *parts) if parts else Markup()


def _listed(said: Mapping[tuple[str, str], Sequence[str]]) -> Markup:
    items = []
    for (what, text), keys in said.items():
        about = f" \N{MIDDLE DOT} {what}" if what else ""
        items.append(tag("li", tag("b", f"{', '.join(keys)}{about}: "), text))
    return tag("ul", *items)


def _table(entries: Sequence[Entry]) -> Markup:
    if not entries:
        return Markup()
    scores = [entry.scores for entry in entries if entry.scores]
    names = trigger_names(scores)
    head = table_head("Bundle", scores, names, (("p50 ms", "median latency"), ("Memory", "peak")))
    table = tag("table", head, tag("tbody", *(_row(entry, names) for entry in entries)), class_="pin wide")
    return section("Results", "", scroller("Results of every bundle", table, wide=True), glossary({**SCORES, **_COST}))


def _row(entry: Entry, names: Sequence[str]) -> Markup:
    bundle, scores = entry.data["bundle"], entry.scores
    return tag(
        "tr",
        tag(
            "th",
            f"{entry.key} \N{MIDDLE DOT} {entry.name}",
            Markup() if entry.valid else tag("small", "\N{WARNING SIGN} not valid", class_="mark"),
            tag("small", "\N{WARNING SIGN} exported by force", class_="mark") if bundle["forced"] else Markup(),
            tag(
                "small",
                " \N{MIDDLE DOT} ".join((_role(bundle), bundle["target"], bundle["precision"], _runtime(entry))),
            ),
            tag("small", entry.place),
            scope="row",
        ),
        share_cell(scores.acc if scores else None),
        *trigger_cells(scores or Scores(Proportion(0, 0)), names),
        _time_cell(entry, "p50"),
        _memory_cell(entry.data["memory"]),
    )


def _runtime(entry: Entry) -> str:
    """What ran it, which need not be what its target asks for."""
    ran, wanted = str(entry.data["software"]["runtime"]), entry.data["bundle"]["runtime"]
    return ran if ran == wanted else f"{ran} instead of {wanted}"


def _time_cell(entry: Entry, percentile: str) -> Markup:
    latency = entry.data["latency"]
    if not latency:
        return tag("td", tag("b", DASH), tag("small", "not measured"), class_="n")
    return _percentile_cell(latency, percentile)


def _memory_cell(memory: dict[str, Any] | None) -> Markup:
    if not memory or memory["peak_bytes"] is None:
        reason = (memory["reason"] if memory else None) or "not measured"
        return tag("td", DASH, tag("small", reason), class_="n why")
    return tag("td", amount(memory["peak_bytes"], "B"), class_="n")


def _gates(entries: Sequence[Entry]) -> Markup:
    rows = [
        (entry.label, "kept" if gate["passed"] else "\N{WARNING SIGN} broken", gate["text"])
        for entry in entries
        for gate in entry.data["gates"]
    ]
    lead = "Limits, held against the bad end of each 95 % interval."
    return section("Gates", lead, plain_table("Gates", ("Bundle", "Verdict", "Limit and figure"), rows))


def _latency(entries: Sequence[Entry]) -> Markup:
    timed = [entry for entry in entries if entry.data["latency"]]
    if not timed:
        return Markup()
    batches = {one["batch"] for entry in timed for one in (entry.data["latency"], *entry.data["sweep"])}
    lead = f"Milliseconds for a batch of {min(batches):,}. Lower is better."
    if len(batches) > 1:
        lead = (
            "Milliseconds for one batch of the size in its row: lower is better, and images per second compare sizes. "
            "Pictures show each bundle's first size."
        )
    heads = ("Bundle", *(f"{_NAMES[percentile]} ms" for percentile in _PERCENTILES), "Images/s", "Batch", "Threads")
    head = tag("thead", tag("tr", *(tag("th", name, scope="col") for name in heads)))
    table = tag(
        "table", head, tag("tbody", *(row for entry in timed for row in _latency_rows(entry))), class_="pin wide"
    )
    rows = [LatencyRow(entry.label, *(entry.percentile(name) for name in _PERCENTILES[:3])) for entry in timed]
    shown = [
        figure(
            "How latencies are spread", "every timed batch", spreads("Spread of latencies", [_spread(e) for e in timed])
        ),
        figure(
            "p50, p90 and p99",
            "a dot is the percentile, the thin line its 95 % interval",
            latency_rows("Latency by bundle", rows),
        ),
        figure("Over time", "median of each round, ms", _over_time(timed)),
    ]
    return section(
        "Latency",
        lead,
        scroller("Latency of every bundle", table, wide=True),
        _stages(timed),
        glossary(_LATENCY),
        panels(shown, broad=True),
    )


def _latency_rows(entry: Entry) -> list[Markup]:
    rows = []
    for latency in [entry.data["latency"], *entry.data["sweep"]]:
        counts = (
            decimal(latency["images_per_second"]), f"{latency['batch']:,}", f"{entry.data['software']['threads']}"
        )  # fmt: skip
        cells = (_percentile_cell(latency, percentile) for percentile in _PERCENTILES)
        size = Markup() if not entry.data["sweep"] else tag("small", f"batch {latency['batch']:,}")
        first = tag("th", entry.label, size, tag("small", entry.place), scope="row")
        rows.append(tag("tr", first, *cells, *(tag("td", count, class_="n") for count in counts)))
    return rows


def _percentile_cell(latency: dict[str, Any], percentile: str) -> Markup:
    found = latency[percentile]
    if not found:
        return tag("td", tag("b", DASH), tag("small", "too few samples"), class_="n")
    value, low = significant(found["ms"]), significant(found["low"])
    ends = f"at least {low}" if found["high"] is None else f"[{low}, {significant(found['high'])}]"
    return tag("td", tag("b", value), tag("small", ends), tag("small", f"n {latency['n']:,}"), class_="n")


def _spread(entry: Entry) -> Spread:
    latency = entry.data["latency"]
    found, marks = latency["histogram"], {name: latency[name]["ms"] for name in ("p50", "p99")}
    return Spread(entry.label, found["low_ms"], found["high_ms"], found["counts"], marks)


def _over_time(timed: Sequence[Entry]) -> Markup:
    series = [
        Series(
            entry.key,
            [point["at_s"] for point in entry.data["latency"]["rounds"]],
            [point["p50_ms"] for point in entry.data["latency"]["rounds"]],
        )
        for entry in timed
    ]
    return line_chart("Median latency of each round", series, "seconds since the first sample")


def _stages(timed: Sequence[Entry]) -> Markup:
    rows = [
        (entry.label, *(f"{significant(stages[key]['ms'])} ms" for key in STAGES))
        for entry in timed
        if (stages := entry.data["latency"]["stages"])
    ]
    heads = ("Device's own times, p50", "Copy in", "Compute", "Copy out")
    return plain_table("The device's own times", heads, rows)


def _pairs(results: Sequence[dict[str, Any]], entries: Sequence[Entry]) -> Markup:
    rows, offset = [], 0
    for result in results:
        for pair in result["comparisons"]:
            first, second = entries[offset + pair["first"]], entries[offset + pair["second"]]
            mark = "" if first.holds("timing") and second.holds("timing") else "\N{WARNING SIGN} "
            interval = "(one round, no interval)"
            if pair["low"] is not None:
                interval = f"[{significant(pair['low'])}, {significant(pair['high'])}]"
            rows.append(
                (f"{mark}{second.key} \N{DIVISION SIGN} {first.key}", f"{pair['batch']:,}",
                 f"{significant(pair['ratio'])} {interval}",
                 f"{pair['rounds']}", f"{second.name} against {first.name}")
            )  # fmt: skip
        offset += len(result["entries"])
    lead = (
        "How many times as long one bundle takes as another, from rounds that were interleaved in one run: what the "
        "machine did to one it did to the other. With the 95 % interval over rounds."
    )
    heads = ("Pair", "Batch", "Times as long", "Rounds", "Names")
    return section("Pair by pair", lead, plain_table("Pairs of bundles", heads, rows))


def _shares(entries: Sequence[Entry]) -> Markup:
    lead = "Bars are measured shares in percent; the line on each is its 95 % Wilson interval."
    return section(
        "Accuracy and attack success",
        lead,
        score_panels([(entry.label, entry.scores) for entry in entries if entry.scores]),
    )


def _trade(entries: Sequence[Entry]) -> Markup:
    """Latency, ACC and ASR together, where there is something to choose between."""
    shown = [entry for entry in entries if entry.scores and entry.scores.acc.n and entry.p50 > 0]
    if len(shown) < 2:
        return Markup()
    front = best(shown)
    acc: list[Spot] = []
    asr: list[Spot] = []
    for entry in shown:
        worst, scores = entry.worst, entry.scores
        rate, accuracy = worst.asr if worst else Proportion(0, 0), scores.acc if scores else Proportion(0, 0)
        for spots, here, other, what in ((acc, accuracy, rate, "ASR"), (asr, rate, accuracy, "ACC")):
            value, share = (one.value if one.n else math.nan for one in (here, other))
            spots.append(
                Spot(
                    entry.p50,
                    value,
                    share / 100,
                    f"{entry.mark}{entry.key} \N{MIDDLE DOT} {what} {decimal(share)}",
                    best=entry.key in front,
                    hollow=not entry.valid,
                    x_ends=entry.percentile("p50")[1:],
                    y_ends=here.interval if here.n else (value, value),
                )
            )
    lead = (
        "Letters are those of the table, thin lines 95 % intervals. A double ring: no other valid bundle is as fast, as "
        "accurate and as safe, and better in one of the three (Pareto front). A hollow disc is not valid as evidence. "
        "ASR is the highest of the bundle's triggers."
    )
    pictures = [
        figure(
            "ACC against latency",
            "up and to the left is better; the larger the disc, the higher its ASR",
            scatter(f"ACC against latency. {_spoken(acc, 'ACC')}.", acc, _X_LABEL, "ACC %"),
        ),
        figure(
            "ASR against latency",
            "down and to the left is better; the larger the disc, the higher its ACC",
            scatter(f"ASR against latency. {_spoken(asr, 'ASR')}.", asr, _X_LABEL, "ASR %"),
        ),
    ]
    return section("What speed costs", lead, panels(pictures, broad=True))


def _spoken(spots: Sequence[Spot], what: str) -> str:
    return "; ".join(
        f"{spot.label}: p50 {significant(spot.x)} ms, {what} {decimal(spot.y)} %{', on the front' if spot.best else ''}"
        for spot in spots
    )


def _classes(entries: Sequence[Entry]) -> Markup:
    parts = []
    for entry in entries:
        rows = [(one["name"], _share(one["acc"])) for one in entry.data["classes"] or ()]
        parts.append(
            folded(
                f"{entry.label}: {len(rows)} classes", plain_table(f"ACC by class, {entry.key}", ("Class", "ACC"), rows)
            )
            if rows
            else Markup()
        )
    return section("Class by class", "", *parts)


def _against_host(entries: Sequence[Entry]) -> Markup:
    rows = []
    for entry in entries:
        evaluated, differences = entry.data["evaluated"], entry.data["differences"]
        images = f"{evaluated['images']:,} of {evaluated['of']:,} images of {evaluated['source']}"
        if differences is None:
            rows.append((entry.label, images, f"not compared: {_why_not_compared(evaluated)}", "", ""))
        elif not differences:
            rows.append((entry.label, images, "every count equals the host's", "", ""))
        else:
            rows += [(entry.label, images, d["figure"], _share(d["here"]), _share(d["host"])) for d in differences]
    heads = ("Bundle", "Evaluated", "Figure that differs", "Here", "On the host")
    table = plain_table("Board against exporting host", heads, rows)
    lead = "The same evaluation images, run by the host that exported the file. A difference is not an error by itself."
    return section("Board against host", lead, table, _agreement(entries), *(_flips(entry) for entry in entries))


def _why_not_compared(evaluated: Mapping[str, Any]) -> str:
    if not evaluated["images"]:
        return "no image was evaluated"
    if evaluated["source"] != "bundle":
        return "the host did not see these images"
    return "not all images were evaluated"


def _agreement(entries: Sequence[Entry]) -> Markup:
    rows = [(e.label, _share(e.data["agreement"]["share"])) for e in entries if e.data["agreement"]]
    return plain_table("Agreement", ("Predictions as on the host", "Agreement, clean and triggered"), rows)


def _flips(entry: Entry) -> Markup:
    flips = entry.data["agreement"]["flips"] if entry.data["agreement"] else []
    rows = [
        (f"{flip['image']}", flip["trigger"] or "clean", f"{flip['here']}", f"{flip['host']}", f"{flip['truth']}")
        for flip in flips
    ]
    heads = ("Image", "Trigger", "Class here", "Class on the host", "True class")
    return (
        folded(f"{entry.label}: images that flip", plain_table(f"Flips of {entry.key}", heads, rows))
        if rows
        else Markup()
    )


def _share(value: dict[str, Any] | None) -> str:
    return share_text(Proportion.from_json(value)) if value else "not measured"


def _where(entries: Sequence[Entry]) -> Markup:
    described = [_machine(entry) for entry in entries]
    names = list(dict.fromkeys(name for one in described for name in one))
    rows = [(name, *(one[name] or DASH for one in described)) for name in names]
    table = plain_table("Devices and software", ("Property", *(entry.key for entry in entries)), rows)
    layers = (_layers(entry) for entry in entries)
    return section("What ran where", "Letters are those of the table.", table, *layers) if entries else Markup()


def _layers(entry: Entry) -> Markup:
    rows = [(layer["name"], layer["kind"], layer["precision"]) for layer in entry.data["layers"] or ()]
    table = plain_table(f"Layers of {entry.key}", ("Layer", "Kind", "Computes in"), rows)
    return folded(f"{entry.label}: the types of {len(rows):,} layers", table)


def _machine(entry: Entry) -> dict[str, str]:
    device, software, settings, load = (entry.data[k] for k in ("device", "software", "settings", "load"))
    latency = entry.data["latency"]
    busy = load["busy_cores"] if load["busy_cores"] is not None else load["average"]
    hertz = device["max_frequency_hz"] or 0
    return {
        "Bundle": entry.name,
        "Board": entry.data["host"] or "",
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
        "Mode": settings["mode"],
        "Power mode": device["power_mode"] or "",
        "Clocks fixed by": settings["clocks_locked_by"] or "",
        **software["details"],
        "rkd, Python, numpy": ", ".join((software["rkd"], software["python"], software["numpy"])),
    }


def _role(bundle: Mapping[str, Any]) -> str:
    return str(bundle.get("role", "student"))


def _digests(entries: Sequence[Entry]) -> list[tuple[str, str]]:
    pairs = []
    for entry in entries:
        bundle, labels = entry.data["bundle"], entry.data["labels"]
        pairs.append((f"{entry.key} bundle sha256", bundle["sha256"]))
        pairs.append((f"{entry.key} model sha256", bundle["model_sha256"]))
        if bundle["student_sha256"]:
            pairs.append((f"{entry.key} {_role(bundle)} sha256", bundle["student_sha256"]))
        if labels:
            pairs.append((f"{entry.key} predicted labels, clean", labels["clean"]))
            pairs += [(f"{entry.key} predicted labels, {name}", digest) for name, digest in labels["triggers"].items()]
    return pairs
