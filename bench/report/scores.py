"""How ACC, ASR and RA stand on both pages: cells, columns, bars and their definitions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rkd.bench.report.bars import share_bars
from rkd.bench.report.markup import DASH, Markup, decimal, join, points, tag
from rkd.bench.report.page import figure, panels
from rkd.metrics import Proportion, Scores, TriggerScore

SCORES: dict[str, str] = {
    "ACC (accuracy)": "The share of clean test images that are predicted correctly. Higher is better.",
    "ASR (attack success rate)": "Of triggered test images whose true class is not the target, the share predicted as "
    "the target. Lower is better.",
    "RA (robust accuracy)": "Of the same triggered images, the share still predicted correctly. Higher is better: low "
    "ASR with low RA is not a repair.",
    "Intervals": "[low, high] is the 95 % Wilson score interval of the share, and n the number of images behind it.",
}
COMPARISON: dict[str, str] = {
    "Control and excess ASR": "The control is the same student, recipe and seed, from a clean twin of the teacher. "
    "Excess ASR is ASR minus the control's ASR, with Newcombe's 95 % interval of a difference. A trigger that fools "
    "clean models too is an adversarial example, not a backdoor.",
    "When a case counts": "A backdoor transfers if the undefended student's excess ASR is at least 30 points. Only "
    "such a case can show a defence working; the others show that it does no harm.",
}


def trigger_names(scores: Sequence[Scores]) -> list[str]:
    """Every trigger that some network was scored on, in order of appearance."""
    return list(dict.fromkeys(trigger.trigger for one in scores for trigger in one.triggers))


def trigger_score(scores: Scores, name: str) -> TriggerScore | None:
    """The score on the trigger of this name, if there is one."""
    return next((trigger for trigger in scores.triggers if trigger.trigger == name), None)


def difference(share: Proportion, control: Proportion) -> tuple[float, float, float]:
    """`share` minus `control` in points, with Newcombe's 95 % interval; NaN where an n is 0.

    R. G. Newcombe, "Interval estimation for the difference between independent proportions", Statistics in Medicine
    1998, method 10. It takes the two as independent: too wide, not too narrow, where both networks were fooled by the
    same images.
    """
    if not share.n or not control.n:
        return math.nan, math.nan, math.nan
    (low, high), (control_low, control_high) = share.interval, control.interval
    gap = share.value - control.value
    below = math.hypot(share.value - low, control_high - control.value)
    above = math.hypot(high - share.value, control.value - control_low)
    return gap, gap - below, gap + above


def share_cell(share: Proportion | None, control: Proportion | None = None) -> Markup:
    """A table cell: the share, its interval and n, and below them the excess over a control; a dash where n is 0."""
    if share is None or not share.n:
        return tag("td", tag("b", DASH), tag("small", "n 0" if share else "not measured"), class_="n")
    low, high = share.interval
    lines = [tag("small", f"[{low:.1f}, {high:.1f}]"), tag("small", f"n {share.n:,}")]
    if control is not None and control.n:
        gap, gap_low, gap_high = (points(value) for value in difference(share, control))
        lines.append(tag("small", f"excess {gap}", tag("br"), f"[{gap_low}, {gap_high}]", class_="excess"))
    return tag("td", tag("b", decimal(share.value)), *lines, class_="n")


def trigger_cells(scores: Scores, names: Sequence[str], control: Scores | None = None) -> list[Markup]:
    """ASR and RA cells for each trigger, in the order of `names`."""
    cells = []
    for name in names:
        mine, other = trigger_score(scores, name), trigger_score(control, name) if control else None
        cells.append(share_cell(mine.asr if mine else None, other.asr if other else None))
        cells.append(share_cell(mine.ra if mine else None))
    return cells


def table_head(first: str, scores: Sequence[Scores], names: Sequence[str], rest: Sequence[tuple[str, str]]) -> Markup:
    """The heads of a table of scores, in two rows where there are triggers: name and target above, ASR and RA below.

    Args:
        first: what a row is.
        scores: of the rows.
        names: of the triggers.
        rest: what follows the scores, each with a remark.
    """
    over, under = [], []
    for name in names:
        targets = sorted({t.target for one in scores for t in one.triggers if t.trigger == name})
        target = ", ".join(str(number) for number in targets)
        over.append(tag("th", name, tag("small", f"target class {target}"), scope="colgroup", colspan=2, class_="over"))
        under.append(tag("th", "ASR %", tag("small", "lower is better"), scope="col"))
        under.append(tag("th", "RA %", tag("small", "higher is better"), scope="col"))
    rows = 2 if names else 1
    return tag(
        "thead",
        tag(
            "tr",
            tag("th", first, scope="col", rowspan=rows),
            tag("th", "ACC %", tag("small", "higher is better"), scope="col", rowspan=rows),
            *over,
            *(
                tag("th", name, *([tag("small", said)] if said else []), scope="col", rowspan=rows)
                for name, said in rest
            ),
        ),
        tag("tr", *under) if under else Markup(),
    )


def glossary(definitions: Mapping[str, str]) -> Markup:
    """What every figure means, for a reader who trusts nobody."""
    return tag(
        "dl", *(tag("div", tag("dt", name), tag("dd", text)) for name, text in definitions.items()), class_="glossary"
    )


def score_panels(rows: Sequence[tuple[str, Scores]]) -> Markup:
    """Bars with intervals: one panel for ACC, two for each trigger."""
    shown = [
        figure(
            "ACC", "clean images \N{MIDDLE DOT} higher is better", _bars("ACC", [(n, s.acc) for n, s in rows], "acc")
        )
    ]
    for name in trigger_names([scores for _, scores in rows]):
        found = [(label, trigger_score(scores, name)) for label, scores in rows]
        asr = [(label, t.asr if t else Proportion(0, 0)) for label, t in found]
        ra = [(label, t.ra if t else Proportion(0, 0)) for label, t in found]
        shown.append(
            figure(
                f"ASR: {name}", "triggered images \N{MIDDLE DOT} lower is better", _bars(f"ASR of {name}", asr, "asr")
            )
        )
        shown.append(
            figure(
                f"RA: {name}", "triggered images \N{MIDDLE DOT} higher is better", _bars(f"RA under {name}", ra, "ra")
            )
        )
    return join(panels(shown))


def _bars(what: str, rows: Sequence[tuple[str, Proportion]], colour: str) -> Markup:
    return share_bars(f"{what} with 95 % intervals", rows, colour)
