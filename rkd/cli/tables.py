"""Results on standard output: tables for people, JSON for programs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rkd.errors import printable
from rkd.metrics import Proportion, Scores

if TYPE_CHECKING:
    from rkd.diagnosis import Finding
    from rkd.run import Model


def console() -> Console:
    """Standard output, wide enough for tables when it is not a terminal."""
    out = Console(highlight=False)
    if not out.is_terminal:
        out = Console(highlight=False, width=int(os.environ.get("COLUMNS", "0") or 0) or 120)
    return out


def print_json(value: Mapping[str, Any]) -> None:
    """One JSON document."""
    print(json.dumps(value, indent=2, allow_nan=False))  # noqa: T201


def print_models(rows: Sequence[Model]) -> None:
    """One line a network: ACC, ASR and RA of each trigger, and what the network costs."""
    table = _score_table([row.scores for row in rows])
    for heading in ("params", "MACs", "file"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        cells = (f"{row.parameters / 1e6:.2f} M", f"{row.macs / 1e6:.1f} M", f"{row.size_bytes / 1e6:.2f} MB")
        table.add_row(f"{row.role}\n[dim]{row.arch}[/dim]", *_score_cells(row.scores), *cells)
    console().print(table)
    console().print(_legend(rows[0].scores), style="dim")


def print_scores(rows: Sequence[tuple[str, Scores]]) -> None:
    """One line a network, scores only."""
    table = _score_table([scores for _, scores in rows])
    for role, scores in rows:
        table.add_row(role, *_score_cells(scores))
    console().print(table)
    console().print(_legend(rows[0][1]), style="dim")


def say_next(message: str) -> None:
    """What to do now."""
    console().print(printable(message), markup=False, soft_wrap=True)


def folding_table(*headings: str) -> Table:
    """A table of texts that wraps and never cuts."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _score_table(scores: Sequence[Scores]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("network", overflow="fold", min_width=12)
    table.add_column("ACC", justify="right", no_wrap=True)
    for trigger in scores[0].triggers:
        name = f" {trigger.trigger}" if len(scores[0].triggers) > 1 else ""
        table.add_column(f"ASR{name}", justify="right", no_wrap=not name)
        table.add_column(f"RA{name}", justify="right", no_wrap=not name)
    return table


def _score_cells(scores: Scores) -> list[str]:
    return [_cell(scores.acc), *(_cell(share) for t in scores.triggers for share in (t.asr, t.ra))]


def _cell(share: Proportion) -> str:
    low, high = share.interval
    return f"{share}\n[dim]{low:.1f}-{high:.1f}[/dim]"


def _legend(scores: Scores) -> str:
    """What the figures are, how many images they are of, and what was not tested."""
    explained = "ACC: accuracy on clean test images"
    if not scores.triggers:
        return (
            f"n = {scores.acc.n}. {explained}, percent, with 95 % Wilson interval. No trigger was given, so nothing is said "
            "about backdoors (--trigger FILE)."
        )
    counted = ", ".join(f"{t.asr.n} triggered ({t.trigger} to class {t.target})" for t in scores.triggers)
    return (
        f"n = {scores.acc.n} clean, {counted}. {explained}. ASR: share of triggered images (true class not the target) "
        "predicted as the target. RA: share of the same images still right. Percent, with 95 % Wilson intervals."
    )


def print_tree(title: str, value: Mapping[str, Any]) -> None:
    """A nested description."""
    out = console()
    out.print(title, style="bold", markup=False, soft_wrap=True)
    _branch(out, value, "  ")


def _branch(out: Console, value: Mapping[str, Any], indent: str) -> None:
    said = {key: item for key, item in value.items() if item not in (None, "", [], {})}
    width = max((len(str(key)) for key in said if not isinstance(said[key], Mapping)), default=0)
    for key, item in said.items():
        if isinstance(item, Mapping):
            out.print(f"{indent}{key}", markup=False, soft_wrap=True)
            _branch(out, item, indent + "  ")
        elif isinstance(item, list) and any(isinstance(part, Mapping | list) for part in item):
            out.print(f"{indent}{key}: {len(item)} entries", markup=False, soft_wrap=True)
        else:
            text = ", ".join(map(str, item)) if isinstance(item, list) else str(item)
            out.print(printable(f"{indent}{key!s:<{width}}  {text}"), markup=False, soft_wrap=True)


def print_findings(findings: Sequence[Finding]) -> None:
    """What `rkd doctor` found; things of which the same is said share a row."""
    table = folding_table("", "what", "seen", "needed for", "what to do")
    rows: dict[tuple[str, str, str, str], list[str]] = {}
    for finding in findings:
        rows.setdefault((finding.state, finding.detail, finding.needed_for, finding.remedy), []).append(finding.what)
    for (state, *said), whats in rows.items():
        table.add_row(*map(escape, (state, "\n".join(whats), *said)))
    console().print(table)
