"""The page of a distillation: what was distilled from what, and whether the backdoor came along."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rkd.bench.report.markup import DASH, Markup, amount, decimal, join, significant, tag
from rkd.bench.report.page import command, figure, folded, panels, plain_table, provenance, scroller, section, shell
from rkd.bench.report.panels import MaskPanel, TriggerPanel, mask_panels, trigger_panel
from rkd.bench.report.scores import (
    COMPARISON,
    SCORES,
    glossary,
    score_panels,
    share_cell,
    table_head,
    trigger_cells,
    trigger_names,
)
from rkd.bench.report.svg import Series, line_chart
from rkd.metrics import Scores

__all__ = ["Curve", "MaskPanel", "ModelRow", "RunReport", "TriggerPanel", "run_page"]


@dataclass(frozen=True)
class ModelRow:
    """One network of the comparison.

    Attributes:
        role: what it is here, unique on the page, e.g. `teacher`, `undefended student`, `RobustKD student`.
        arch: its architecture, e.g. `wrn-16-2`.
        scores: what it does on the evaluation set.
        parameters, macs, size_bytes: its cost; 0 where unknown.
        note: a few words below its name.
        control: role of the row that is its control, to show its excess ASR; empty for none.
    """

    role: str
    arch: str
    scores: Scores
    parameters: int = 0
    macs: int = 0
    size_bytes: int = 0
    note: str = ""
    control: str = ""


@dataclass(frozen=True)
class Curve:
    """One line of a training chart.

    Attributes:
        name: which network.
        kind: which chart it belongs to, e.g. `loss` or `accuracy (%)`.
        x: epochs.
        y: values; NaN interrupts the line.
    """

    name: str
    kind: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class RunReport:
    """Everything that the page of a run, or of several runs side by side, shows. Any part may be empty.

    Attributes:
        title: main heading.
        verdict: one paragraph in plain words.
        created: when, as it should read.
        command: the command line that made it.
        models: rows of the table and bars of the charts.
        curves: training history.
        triggers: what each trigger looks like.
        masks: the detox mask of each tap.
        detox_history: (step, lambda, points of accuracy lost, share of variance that remains) of each check.
        settings: (name, value, where it came from).
        provenance: (name, value): digests, seeds, versions.
        notes: what a reader should know before relying on the figures.
    """

    title: str
    verdict: str = ""
    created: str = ""
    command: str = ""
    models: Sequence[ModelRow] = ()
    curves: Sequence[Curve] = ()
    triggers: Sequence[TriggerPanel] = ()
    masks: Sequence[MaskPanel] = ()
    detox_history: Sequence[tuple[int, float, float, float]] = ()
    settings: Sequence[tuple[str, str, str]] = ()
    provenance: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()


def run_page(report: RunReport) -> str:
    """The whole page as HTML; every text of the report is escaped."""
    facts = [report.created, command(report.command)]
    return shell(
        report.title,
        "Distillation report",
        report.verdict,
        [join(fact) for fact in facts if fact],
        [
            _comparison(report.models),
            _notes(report.notes),
            _figures(report.models),
            _triggers(report.triggers),
            _training(report.curves),
            _detox(report.masks, report.detox_history),
            _settings(report.settings),
            section("Provenance", "What these figures were made from.", provenance(report.provenance)),
        ],
    )


def _comparison(models: Sequence[ModelRow]) -> Markup:
    if not models:
        return Markup()
    scores = [model.scores for model in models]
    names = trigger_names(scores)
    head = table_head("Model", scores, names, (("Parameters", ""), ("MACs", ""), ("Size", "")))
    by_role = {model.role: model for model in models}
    body = tag("tbody", *(_row(model, names, by_role.get(model.control)) for model in models))
    table = tag("table", head, body, class_="pin wide")
    return section(
        "Results", "", scroller("Results of every model", table, wide=True), glossary({**SCORES, **COMPARISON})
    )


def _row(model: ModelRow, names: Sequence[str], control: ModelRow | None) -> Markup:
    details = [text for text in (model.arch, model.note, f"control: {control.role}" if control else "") if text]
    return tag(
        "tr",
        tag("th", model.role, *(tag("small", text) for text in details), scope="row"),
        share_cell(model.scores.acc),
        *trigger_cells(model.scores, names, control.scores if control else None),
        tag("td", amount(model.parameters), class_="n"),
        tag("td", amount(model.macs), class_="n"),
        tag("td", amount(model.size_bytes, "B"), class_="n"),
    )


def _notes(notes: Sequence[str]) -> Markup:
    return section("Before relying on this", "", tag("ul", *(tag("li", note) for note in notes)) if notes else Markup())


def _figures(models: Sequence[ModelRow]) -> Markup:
    lead = "Bars are measured shares in percent; the thin line on each is its 95 % Wilson interval."
    return section("Accuracy and attack success", lead, score_panels([(model.role, model.scores) for model in models]))


def _triggers(shown: Sequence[TriggerPanel]) -> Markup:
    lead = "What the attacker adds. Differences are enlarged eight times around grey: grey is no change."
    return section("Triggers", lead, *(trigger_panel(panel) for panel in shown))


def _training(curves: Sequence[Curve]) -> Markup:
    charts, rows = [], []
    for kind in dict.fromkeys(curve.kind for curve in curves):
        members = [Series(curve.name, curve.x, curve.y) for curve in curves if curve.kind == kind]
        charts.append(figure(kind[:1].upper() + kind[1:], "", line_chart(f"{kind} by epoch", members, "epoch")))
        rows += [(one.name, kind, *_extremes(one.y)) for one in members]
    table = plain_table("Training figures", ("Series", "Kind", "First", "Lowest", "Highest", "Last"), rows)
    shown = panels(charts, broad=True)
    return section("Training", "", shown, folded("The same in numbers", table)) if shown else Markup()


def _extremes(values: Sequence[float]) -> tuple[str, str, str, str]:
    finite = [value for value in values if abs(value) < float("inf")]
    if not finite:
        return DASH, DASH, DASH, DASH
    return (
        significant(values[0]),
        significant(min(finite)),
        significant(max(finite)),
        significant(values[-1]),
    )


def _detox(masks: Sequence[MaskPanel], history: Sequence[tuple[int, float, float, float]]) -> Markup:
    lead = (
        "At each tap the mask replaces what the teacher's features can lose without costing clean accuracy. "
        "Left: mean over channels at each position. Right: mean of each channel, sorted."
    )
    steps = [float(check[0]) for check in history]
    charts = [
        _history(
            "Weight \N{GREEK SMALL LETTER LAMDA}",
            "raised while the accuracy budget allows",
            steps,
            [c[1] for c in history],
        ),
        _history("Accuracy lost", "points, on held-out clean images", steps, [c[2] for c in history]),
        _history("Variance left", "share of the features' variance that remains", steps, [c[3] for c in history]),
    ]
    rows = [(str(c[0]), significant(c[1]), decimal(c[2], 2), significant(c[3])) for c in history]
    heads = ("Step", "\N{GREEK SMALL LETTER LAMDA}", "Points lost", "Variance left")
    table = folded("Every check in numbers", plain_table("Detox checks", heads, rows))
    return section("Detoxification", lead if masks else "", mask_panels(masks), panels(charts), table)


def _history(heading: str, caption: str, steps: Sequence[float], values: Sequence[float]) -> Markup:
    return figure(
        heading, caption, line_chart(f"{heading} by step", [Series("", steps, values)], "step") if steps else Markup()
    )


def _settings(settings: Sequence[tuple[str, str, str]]) -> Markup:
    chosen = sum(1 for _, _, origin in settings if origin != "default")
    table = plain_table("Settings", ("Setting", "Value", "From"), settings)
    return section("Settings", "", folded(f"{len(settings)} settings, {chosen} of them not at their default", table))
