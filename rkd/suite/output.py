"""The table as Markdown, CSV, JSON and a page, written beside the cells' results (no torch but to check the recipes)."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rkd.bench.report.markup import DASH, MINUS, points
from rkd.files import to_json, write_file
from rkd.suite.file import CLEAN
from rkd.suite.page import suite_page
from rkd.suite.plan import Cell, Plan
from rkd.suite.recipes import Kind, differences, distill_kind, teacher_kind
from rkd.suite.results import Record, read_records, same_code
from rkd.suite.table import TRANSFERS, Paired, Row, Spread, Standing, Table, comparable, excess_of, make_table

MARKDOWN, CSV, JSON, PAGE = "table.md", "table.csv", "table.json", "report.html"
_MOST_NAMED = 12

DEFINITIONS = (
    "ACC: share of clean test images that are right. ASR: of triggered test images whose true class is not the target, "
    "the share seen as the target. RA: of the same images, the share still right. Control: the same student, recipe and "
    "seed from the clean twin of the teacher. Excess ASR: ASR minus the control's, in points. A case transfers where an "
    f"undefended student's mean excess ASR is at least {TRANSFERS:g} points. Figures are means over seeds, in braces the "
    "lowest and the highest; n is the test images, the same for all seeds; brackets are 95 % intervals: over the images "
    "(Wilson's of a share, Newcombe's of a difference), and over the seeds as well where there are several (Student's, by "
    "square-and-add)."
)


@dataclass(frozen=True)
class Tables:
    """What was written, and what it is made of.

    Attributes:
        folder: `results/SUITE`.
        table: the figures.
        missing: planned cells without a result.
        notes: what a reader should know first.
    """

    folder: Path
    table: Table
    missing: tuple[Cell, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As it goes into table.json."""
        return table_json(self.table, self.missing, self.notes)


def write_tables(folder: Path, plan: Plan, failures: Mapping[str, str]) -> Tables:
    """Make the tables from the cells' results alone and write them.

    Args:
        folder: `results/SUITE`.
        plan: the whole suite's; what is not of it is left out.
        failures: why, by job, of what failed just now.

    Raises:
        RunError: a result is damaged.
        StorageError: the disk said no.
    """
    records, planned = read_records(folder), set(plan.cells)
    used = [record for record in records if record.cell in planned]
    missing = tuple(cell for cell in plan.cells if cell not in {record.cell for record in used})
    notes = (*_notes(records, used, missing, plan), *(f"{_named(job)} failed: {why}" for job, why in failures.items()))
    table = make_table(used, plan.suite.axes)
    tables = Tables(folder, table, missing, tuple(notes))
    write_file(folder / MARKDOWN, markdown(plan.suite.name, plan.suite.about, tables).encode())
    write_file(folder / CSV, table_csv(table).encode())
    write_file(folder / JSON, to_json(tables.to_json()))
    write_file(folder / PAGE, suite_page(plan.suite.name, plan.suite.about, table, notes, used).encode())
    return tables


def _named(job: str) -> str:
    return job.replace(":", " ", 1)


def _notes(records: Sequence[Record], used: Sequence[Record], missing: Sequence[Cell], plan: Plan) -> list[str]:
    notes = list[str]()
    if missing:
        notes.append(f"{len(missing)} of {len(plan.cells)} cells have no result yet: {_first(missing)}")
    if extra := len(records) - len(used):
        notes.append(f"{extra} results are of cells that the suite file does not have: left out")
    kinds = teacher_kind(), distill_kind()
    unlike = {record.cell.name: _unlike(record, plan, *kinds) for record in used}
    notes += [f"{name} was made with other settings: {'; '.join(why)}" for name, why in unlike.items() if why]
    waiting = [record.cell.name for record in used if record.cell.attack != CLEAN and record.control is None]
    if waiting:
        notes.append(f"{len(waiting)} cells have no control yet, so no excess ASR: {', '.join(waiting[:_MOST_NAMED])}")
    return [*notes, *_mixtures(used)]


def _mixtures(used: Sequence[Record]) -> list[str]:
    """Cells that do not belong together: of other data, or made by another state of the code or in another way."""
    notes = []
    for name in dict.fromkeys(record.cell.data for record in used):
        digests = {str(r.data["data"]["digest"])[:12] for r in used if r.cell.data == name}
        if len(digests) > 1:
            notes.append(f"the data set {name} was not the same for all cells: {', '.join(sorted(digests))}")
    by_name = {record.cell.name: record for record in used}
    attacked = [record for record in used if record.cell.attack != CLEAN and record.control]
    unlike = [r for r in attacked if not _belongs(r, by_name.get(r.data["control"]["cell"]))]
    notes += _listed("whose control was made by other code, or is not the one in the table", unlike)
    notes += _listed(
        "whose teacher was made by other code",
        [r for r in used if not same_code(r.data.get("code"), r.data["teacher"].get("code"))],
    )
    made: dict[tuple[Any, ...], set[str]] = {}
    for record in used:
        made.setdefault((*record.cell.case[:3], record.cell.seed), set()).add(record.teacher_sha256[:12])
    notes += [
        f"{'/'.join(key[:3])} of seed {key[3]} was made with {len(teachers)} teachers: {', '.join(sorted(teachers))}"
        for key, teachers in made.items()
        if len(teachers) > 1
    ]
    for what, found in (
        ("precision", {str(r.data["settings"].get("precision")) for r in used}),
        ("version of torch", {str(r.data.get("versions", {}).get("torch")) for r in used}),
    ):
        if len(found) > 1:
            notes.append(f"the students were not trained with one {what}: {', '.join(sorted(found))}")
    codes = {_code(record) for record in used}
    if len(codes) > 1:
        notes.append(f"the cells were made by {len(codes)} states of the code: {', '.join(sorted(codes))}")
    return notes


def _belongs(record: Record, control: Record | None) -> bool:
    """Whether a cell and its control are by the same code, and the control is the one that has a row of its own."""
    said = record.data["control"]
    if record.same_student:
        return True
    if control is not None and control.data["student"]["sha256"] != said["sha256"]:
        return False
    code = said.get("code") or (control.data.get("code") if control is not None else None)
    return same_code(record.data.get("code"), code)


def _listed(what: str, records: Sequence[Record]) -> list[str]:
    return [f"{len(records)} cells {what}: {_first([record.cell for record in records])}"] if records else []


def _first(cells: Sequence[Cell]) -> str:
    """The names of the first cells, and how many more there are."""
    names = ", ".join(cell.name for cell in cells[:_MOST_NAMED])
    return f"{names} and {len(cells) - _MOST_NAMED} more" if len(cells) > _MOST_NAMED else names


def _code(record: Record) -> str:
    code = record.data.get("code") or {}
    commit = str(code.get("commit") or "no commit")[:10]
    return f"rkd {code.get('rkd', '?')} {commit}{' with changes' if code.get('changed') else ''}"


def _unlike(record: Record, plan: Plan, teachers: Kind, students: Kind) -> list[str]:
    """How a result's recipe differs from what the suite file asks for."""
    cell, student, teacher = record.cell, plan.student(record.cell), plan.teacher(record.cell)
    found = differences(students, record.data["settings"], student.options, seed=cell.seed)
    of_teacher = differences(teachers, record.data["teacher"]["settings"], teacher.options, seed=cell.seed)
    return [*found, *(f"teacher's {line}" for line in of_teacher)]


# ------------------------------------------------------------------------------------------------------------ Markdown


def markdown(name: str, about: str, tables: Tables) -> str:
    """The whole report as Markdown."""
    table = tables.table
    parts = [f"# {name}\n", *([f"{about}\n"] if about else []), f"{DEFINITIONS}\n"]
    if tables.notes:
        parts += ["## Before relying on this\n", "\n".join(f"- {note}" for note in tables.notes) + "\n"]
    for budget in table.budgets:
        chosen = table.ranking(budget)
        heading, said = "Defences over the cases that transfer", f"{comparable(table, budget)}\n"
        parts += [
            f"## {heading}{f', budget {budget}' if len(table.budgets) > 1 else ''}\n",
            *([] if said in parts else [said]),
            _grid(STANDING_HEADS, map(standing_cells, chosen)),
        ]
    attacked = [case for case in table.cases if case[2] != CLEAN]
    if attacked:
        undefended = table.undefended
        heads = (
            "data",
            "pair",
            "attack",
            "budget",
            "teacher ACC",
            "teacher ASR",
            *(f"excess, {d}" for d in undefended),
            "outcome",
        )
        parts += [
            "## Which cases transfer\n",
            _grid(heads, (_case_cells(table, case, undefended) for case in attacked)),
        ]
    parts.append("## Every case\n")
    for case in table.cases:
        parts += [f"### {' / '.join(case)}\n", _grid(ROW_HEADS, map(row_cells, table.of(case)))]
    return "\n".join(parts)


STANDING_HEADS = (
    "defence", "cases", "ahead of the yardstick", "ACC - excess ASR", "excess ASR, mean", "worst", "ACC lost, mean", "worst", "RA below control",
    "ACC lost, clean teacher", "s a cell",
)  # fmt: skip
ROW_HEADS = ("defence", "seeds", "ACC", "ASR", "RA", "control ASR", "excess ASR", "ACC lost", "s a cell")


def standing_cells(standing: Standing) -> list[str]:
    """A defence's line."""
    return [
        standing.defence, f"{standing.cases} of {standing.of}",
        "yardstick" if standing.defence == standing.yardstick else paired(standing.against), number(standing.score),
        points(standing.excess_mean), points(standing.excess_worst), points(standing.lost_mean), points(standing.lost_worst),
        points(standing.ra_lost_mean), points(standing.clean_lost), number(standing.seconds, 0),
    ]  # fmt: skip


def row_cells(row: Row) -> list[str]:
    """The line of a defence on a case."""
    low, high = row.excess_interval
    interval = f" [{points(low)}, {points(high)}]" if row.excess.values else ""
    return [
        row.defence, ", ".join(map(str, row.seeds)),
        f"{spread(row.acc)} {_wilson(row.acc_share)}",
        f"{spread(row.asr)} {_wilson(row.asr_share)}".strip(), f"{spread(row.ra)} {_wilson(row.ra_share)}".strip(),
        of_seeds(row.control_asr, row), of_seeds(row.excess, row, interval, signed=True), of_seeds(row.lost, row, signed=True),
        number(row.seconds.mean, 0),
    ]  # fmt: skip


def _wilson(share: Any) -> str:
    if not share.n:
        return ""
    low, high = share.interval
    return f"[{low:.1f}, {high:.1f}] n={share.n:,}"


def _case_cells(table: Table, case: tuple[str, str, str, str], undefended: Sequence[str]) -> list[str]:
    rows = table.of(case)
    excess = [points(excess_of(table, case, defence)) for defence in undefended]
    return [*case, number(rows[0].teacher_acc.mean), number(rows[0].teacher_asr.mean), *excess, table.outcome(case)]


def _grid(heads: Sequence[str], rows: Any) -> str:
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    lines += [f"| {' | '.join(cell or DASH for cell in row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def spread(figure: Spread, *, signed: bool = False) -> str:
    """Mean over seeds, with the lowest and the highest where there are several."""
    if not figure.values:
        return ""
    show = points if signed else number
    mean = show(figure.mean)
    return mean if len(figure.values) < 2 else f"{mean} {{{show(figure.low)}, {show(figure.high)}}}"


def of_seeds(figure: Spread, row: Row, interval: str = "", *, signed: bool = False) -> str:
    """A spread, and of how many of the row's seeds it is where some are missing."""
    return ", ".join(filter(None, (f"{spread(figure, signed=signed)}{interval}", figure.few(row.seeds))))


def paired(against: Paired) -> str:
    """A mean difference, with its interval where there are several pairs, and how many there are."""
    if not against.values:
        return ""
    low, high = against.interval
    between = f" [{points(low)}, {points(high)}]" if len(against.values) > 1 else ""
    return f"{points(against.mean)}{between} n={len(against.values)}"


def number(value: float, places: int = 1) -> str:
    """A number to read; empty where it is not known."""
    return f"{value:.{places}f}".replace("-", MINUS) if math.isfinite(value) else ""


# ----------------------------------------------------------------------------------------------------------------- CSV


def table_csv(table: Table) -> str:
    """One line a case and defence."""
    rows = [_flat_row(row, table) for row in table.rows]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]) if rows else ["data"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _flat_row(row: Row, table: Table) -> dict[str, Any]:
    data, pair, attack, budget = row.case
    low, high = row.excess_interval
    transfers = "" if attack == CLEAN or row.case in table.untested else row.case in table.transferring
    figures = {
        "acc": row.acc, "asr": row.asr, "ra": row.ra, "control_asr": row.control_asr, "control_ra": row.control_ra,
        "excess_asr": row.excess, "acc_lost": row.lost, "seconds": row.seconds,
    }  # fmt: skip
    flat: dict[str, Any] = {
        "data": data, "pair": pair, "attack": attack, "budget": budget, "defence": row.defence, "student": row.student,
        "transfers": transfers, "seeds": " ".join(map(str, row.seeds)), "n_clean": row.acc_share.n,
        "n_triggered": row.asr_share.n,
    }  # fmt: skip
    for name, figure in figures.items():
        for part in ("mean", "low", "high", "deviation"):
            flat[f"{name}_{part}"] = _rounded(getattr(figure, part), "")
        known = dict(zip(figure.seeds, figure.values, strict=True))
        flat[f"{name}_by_seed"] = " ".join(f"{known[s]:.4f}" if s in known else "-" for s in row.seeds)
    for name, share in (("acc", row.acc_share), ("asr", row.asr_share), ("ra", row.ra_share)):
        ends = share.interval if share.n else (math.nan, math.nan)
        flat |= {f"{name}_ci_{end}": _rounded(value, "") for end, value in zip(("low", "high"), ends, strict=True)}
    return {**flat, "excess_asr_ci_low": _rounded(low, ""), "excess_asr_ci_high": _rounded(high, "")}


def _rounded(value: float, unknown: Any = None) -> Any:
    return round(value, 4) if math.isfinite(value) else unknown


# ---------------------------------------------------------------------------------------------------------------- JSON


def table_json(table: Table, missing: Sequence[Cell], notes: Sequence[str]) -> dict[str, Any]:
    """The whole table; a figure that is not known is null."""
    rows = []
    for row in table.rows:
        flat = _flat_row(row, table)
        rows.append({key: None if value == "" else value for key, value in flat.items()} | {"seeds": list(row.seeds)})
    return {
        "schema": 2,
        "reference": table.reference or None,
        "standings": [_standing_json(standing) for standing in table.standings],
        "transferring": [list(case) for case in table.transferring],
        "untested": [list(case) for case in table.untested],
        "asleep": [list(case) for case in table.asleep],
        "rows": rows,
        "missing": [cell.name for cell in missing],
        "notes": list(notes),
    }


def _standing_json(standing: Standing) -> dict[str, Any]:
    values = {name: _rounded(value) if isinstance(value, float) else value for name, value in vars(standing).items()}
    low, high = map(_rounded, standing.against.interval)
    against = {"mean": _rounded(standing.against.mean), "low": low, "high": high, "n": len(standing.against.values)}
    return values | {"against": against}
