"""The page of a suite, in the style of rkd's other reports: one file, no script, nothing from the network."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from rkd.bench.report.bars import share_bars
from rkd.bench.report.markup import DASH, MINUS, Markup, decimal, join, points, tag
from rkd.bench.report.page import figure, folded, panels, plain_table, provenance, scroller, section, shell
from rkd.bench.report.scores import COMPARISON, SCORES, glossary
from rkd.metrics import Proportion
from rkd.suite.file import CLEAN
from rkd.suite.results import Record
from rkd.suite.table import TRANSFERS, Case, Paired, Row, Spread, Standing, Table, comparable, excess_of

_DOT = " \N{MIDDLE DOT} "


def suite_page(name: str, about: str, table: Table, notes: Sequence[str], records: Sequence[Record]) -> str:
    """The whole page as HTML; every text is escaped.

    Args:
        name: of the suite.
        about: what the suite is for.
        table: its figures.
        notes: what to know before relying on them.
        records: the finished cells, for the provenance.
    """
    seeds = sorted({record.cell.seed for record in records})
    facts = [tag("span", about)] if about else []
    facts.append(tag("span", f"{len(records)} finished cells{_DOT}seeds {', '.join(map(str, seeds)) or DASH}"))
    warning = tag("ul", *(tag("li", note) for note in notes)) if notes else Markup()
    return shell(
        name,
        "Suite report",
        verdict(table),
        facts,
        [
            section("Before relying on this", "", warning),
            *(_standings(table, budget) for budget in table.budgets),
            _transfers(table),
            *(_case(table, case) for case in (*table.transferring, *(c for c in table.cases if c not in table.transferring))),
            section("What the figures mean", "", glossary({**SCORES, **COMPARISON, **_MORE})),
            section("Provenance", "What these figures were made from.", folded("Digests and versions", _provenance(records))),
        ],
    )  # fmt: skip


_MORE = {
    "Seeds": "A figure is the mean over seeds; below it the lowest and the highest. A seed decides the teacher, the "
    "attack, the student's start, the order of the images and their augmentation. Intervals are over the test images, "
    "and over the seeds too where there are several.",
    "ACC lost": "ACC of the undefended student of the same teacher and seed, minus this student's: how much clean "
    "accuracy the defence costs.",
    "ACC \N{MINUS SIGN} excess ASR": "One number for a defence: clean accuracy minus what is left of the backdoor (0 where "
    "less is left than in its control), as the mean over the cases that transfer and that it has met itself. Defences that "
    "have met different cases are not compared by it.",
    "Ahead of the yardstick": "How far a defence is ahead of the one that has met the most cases, by that figure: the mean "
    "over the cases that both have met (n), each over the seeds of both and from the same teachers, and Student's 95 % interval "
    "over the cases. An interval with zero in it: the two are not told apart. A dash: there is no such case.",
}


def verdict(table: Table) -> str:
    """What the figures say, in plain words."""
    attacked = [case for case in table.cases if case[2] != CLEAN and case not in table.untested]
    if not attacked:
        return "No attacked case has been compared with its control yet."
    text = f"{len(table.transferring)} of {len(attacked)} attacked cases transfer by plain distillation."
    if table.asleep:
        text += f" In {len(table.asleep)} of the others the attack did not take: its own teacher hardly obeys it."
    best = next((s for s in table.standings if s.yardstick), None)
    if best is None:
        return f"{text} So nothing here can show that a defence works; it can show that one does no harm."
    return (
        f"{text} {_lead(table, best)} On the {best.cases} of {best.of} cases that {best.defence} has met it leaves "
        f"{points(best.excess_mean)} points of excess ASR on average and {points(best.excess_worst)} at worst"
        f"{f', and {points(-best.lost_mean)} points of ACC against {table.reference}' if table.reference and math.isfinite(best.lost_mean) else ''}."
    )  # fmt: skip


def _lead(table: Table, best: Standing) -> str:
    """How far the first is ahead of the yardstick, or as the yardstick of the next, and whether that can be told from nothing."""
    where = f" (budget {best.budget})" if len(table.budgets) > 1 else ""
    rivals = [standing for standing in table.ranking(best.budget) if standing.against.values]
    if not rivals:
        return f"No other defence has met a case of {best.defence}'s from the same teachers{where}."
    if best.defence == best.yardstick:
        other, gap = rivals[0].defence, Paired(tuple(-value for value in rivals[0].against.values))
    else:
        other, gap = best.yardstick, best.against
    n = f"{len(gap.values)} case{'s' if len(gap.values) > 1 else ''} of both"
    low, high = gap.interval
    figure = f"ACC {MINUS} excess ASR{where}"
    if math.isnan(low):
        return f"By {figure} {best.defence} is {decimal(gap.mean)} ahead of {other} on the {n}, which cannot tell them apart."
    seen = f"{decimal(gap.mean)} [{points(low)}, {points(high)}] on the {n}"
    if gap.separated:
        return f"By {figure} {best.defence} is ahead of {other}, by {seen}."
    return f"By {figure} {best.defence} and {other} are not told apart: the first is ahead by {seen}."


def _standings(table: Table, budget: str) -> Markup:
    chosen = table.ranking(budget)
    heads = (
        ("Defence", ""), ("Ahead of the yardstick", "mean difference"), (f"ACC {MINUS} excess ASR", "mean"), ("Excess ASR", "mean and worst case"),
        ("ACC lost", "mean and worst case"), ("RA below control", "mean"), ("ACC lost, clean teacher", "worst case"),
        ("Time", "a cell"),
    )  # fmt: skip
    head = tag("thead", tag("tr", *(_head(*one) for one in heads)))
    body = tag("tbody", *(_standing_row(standing) for standing in chosen))
    title = f"Defences{f', budget {budget}' if len(table.budgets) > 1 else ''}"
    return section(
        title,
        f"Over the cases that transfer: the only ones that can show a defence working. {comparable(table, budget)}",
        scroller(f"{title}, over the cases that transfer", tag("table", head, body, class_="pin wide"), wide=True),
    )


def _standing_row(standing: Standing) -> Markup:
    cases = tag("small", f"{standing.cases} of {standing.of} cases")
    return tag(
        "tr",
        tag("th", standing.defence, cases, scope="row"),
        _against_cell(standing),
        tag("td", decimal(standing.score), class_="n"),
        _pair_cell(standing.excess_mean, standing.excess_worst),
        _pair_cell(standing.lost_mean, standing.lost_worst),
        _pair_cell(standing.ra_lost_mean),
        _pair_cell(standing.clean_lost),
        tag("td", f"{decimal(standing.seconds, 0)} s" if math.isfinite(standing.seconds) else DASH, class_="n"),
    )


def _transfers(table: Table) -> Markup:
    attacked = [case for case in table.cases if case[2] != CLEAN]
    rows = []
    for case in attacked:
        one = table.of(case)[0]
        excess = [points(excess_of(table, case, defence)) for defence in table.undefended]
        rows.append(
            (_title(case), decimal(one.teacher_acc.mean), decimal(one.teacher_asr.mean), *excess, table.outcome(case))
        )
    heads = ("Case", "Teacher ACC %", "Teacher ASR %", *(f"Excess ASR, {d}" for d in table.undefended), "Outcome")
    lead = f"A case transfers from {TRANSFERS:g} points of excess ASR of an undefended student on."
    return section("Which cases transfer", lead, plain_table("Which cases transfer", heads, rows))


def _case(table: Table, case: Case) -> Markup:
    rows = table.of(case)
    attacked = case[2] != CLEAN
    heads: list[tuple[str, str]] = [("Defence", ""), ("ACC %", "higher is better")]
    if attacked:
        heads += [("ASR %", "lower is better"), ("RA %", "higher is better"), ("Control ASR %", ""), ("Excess ASR", "")]
    heads += [("ACC lost", "points"), ("Time", "a cell")]
    head = tag("thead", tag("tr", *(_head(*one) for one in heads)))
    body = tag("tbody", *(_row(row, attacked=attacked) for row in rows))
    kind = table.outcome(case) if attacked else ""
    lead = _DOT.join(filter(None, (f"student {rows[0].student}", kind)))
    bars = [_bars("ACC", "clean images", [(row.defence, row.acc_share) for row in rows], "acc")]
    if attacked:
        bars.append(_bars("ASR", "triggered images", [(row.defence, row.asr_share) for row in rows], "asr"))
        bars.append(_bars("RA", "triggered images", [(row.defence, row.ra_share) for row in rows], "ra"))
    grid = scroller(_title(case), tag("table", head, body, class_="pin wide"), wide=True)
    return section(_title(case), lead, grid, folded("The same as bars", panels(bars)))


def _row(row: Row, *, attacked: bool) -> Markup:
    seeds = tag("small", f"seed{'s' if len(row.seeds) > 1 else ''} {', '.join(map(str, row.seeds))}")
    cells = [tag("th", row.defence, seeds, scope="row"), _spread_cell(row.acc, row.acc_share)]
    if attacked:
        low, high = row.excess_interval
        excess = [tag("small", f"[{points(low)}, {points(high)}]")] if row.excess.values else []
        cells += [
            _spread_cell(row.asr, row.asr_share),
            _spread_cell(row.ra, row.ra_share),
            _spread_cell(row.control_asr, more=_few(row.control_asr, row)),
        ]
        cells.append(_spread_cell(row.excess, signed=True, more=[*excess, *_few(row.excess, row)]))
    seconds = f"{decimal(row.seconds.mean, 0)} s" if row.seconds.values else DASH
    return tag(
        "tr", *cells, _spread_cell(row.lost, signed=True, more=_few(row.lost, row)), tag("td", seconds, class_="n")
    )


def _few(spread: Spread, row: Row) -> list[Markup]:
    """Of how many of the row's seeds a figure is, where some are missing."""
    few = spread.few(row.seeds)
    return [tag("small", few)] if few else []


def _bars(name: str, what: str, rows: Sequence[tuple[str, Proportion]], colour: str) -> Markup:
    return figure(name, what, share_bars(f"{name} with 95 % intervals", rows, colour))


def _head(text: str, below: str) -> Markup:
    return tag("th", text, tag("small", below) if below else Markup(), scope="col")


def _spread_cell(
    spread: Spread, share: Proportion | None = None, *, signed: bool = False, more: Iterable[Markup] = ()
) -> Markup:
    """A mean, its range over seeds, and the interval and n of the images behind it."""
    if not spread.values:
        return tag("td", DASH, class_="n")
    show = points if signed else decimal
    lines = [tag("b", show(spread.mean))]
    if len(spread.values) > 1:
        lines.append(tag("small", f"{show(spread.low)} to {show(spread.high)}"))
    if share is not None and share.n:
        low, high = share.interval
        lines += [tag("small", f"[{low:.1f}, {high:.1f}]"), tag("small", f"n {share.n:,}")]
    return tag("td", *lines, *more, class_="n")


def _against_cell(standing: Standing) -> Markup:
    if standing.defence == standing.yardstick:
        return tag("td", tag("small", "yardstick"), class_="n")
    if not standing.against.values:
        return tag("td", DASH, class_="n")
    low, high = standing.against.interval
    between = tag("small", f"[{points(low)}, {points(high)}]") if math.isfinite(low) else Markup()
    n = tag("small", f"n {len(standing.against.values)}")
    return tag("td", tag("b", points(standing.against.mean)), between, n, class_="n")


def _pair_cell(mean: float, worst: float | None = None) -> Markup:
    below = tag("small", f"worst {points(worst)}") if worst is not None and math.isfinite(worst) else Markup()
    return tag("td", tag("b", points(mean)), below, class_="n")


def _title(case: Case) -> str:
    data, pair, attack, budget = case
    return _DOT.join((data, pair, "clean teacher" if attack == CLEAN else attack, budget))


def _provenance(records: Sequence[Record]) -> Markup:
    seen: dict[tuple[str, str], None] = {}
    for record in records:
        code, data = record.data.get("code") or {}, record.data["data"]
        seen[f"data {record.cell.data}", str(data["digest"])] = None
        seen["code", f"rkd {code.get('rkd', '?')}, commit {code.get('commit') or DASH}"] = None
        for package, version in record.data.get("versions", {}).items():
            seen[package, str(version)] = None
        seen[f"teacher {record.data['teacher']['name']}", record.teacher_sha256] = None
    return join(provenance(sorted(seen)))
