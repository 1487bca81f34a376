"""results/ and docs/results.md: what is published is what the records say."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest

from rkd.metrics import Proportion
from rkd.suite.command import SuiteOptions, rebuild
from rkd.suite.plan import Cell
from rkd.suite.results import Record, read_records

ROOT = Path(__file__).resolve().parents[2]
RECORDS = {record.cell: record for record in read_records(ROOT / "results" / "cpu")}
PAGE = (ROOT / "docs" / "results.md").read_text()


def rows(heading: str) -> list[list[str]]:
    """The cells of a table of the page, by the first words of its head; no emphasis and no footnotes."""
    lines = PAGE[PAGE.index(heading) :].partition("\n\n")[0].splitlines()[2:]
    return [[re.sub(r"\*\*|( \[\d\])+$", "", part.strip()) for part in line.strip("|").split("|")] for line in lines]


def excess(record: Record) -> str:
    assert record.excess is not None
    points, low, high = map(signed, record.excess)
    return f"{points} [{low}, {high}]"


def signed(value: float) -> str:
    return f"{value:+.1f}" if round(value, 1) else "0.0"


def share(value: Proportion | None) -> str:
    assert value is not None
    return f"{value.value:.1f}"


def interval(value: Proportion | None) -> str:
    assert value is not None
    return f"{value.value:.1f} [{value.interval[0]:.1f}, {value.interval[1]:.1f}]"


def figures(record: Record) -> list[str]:
    assert record.control is not None
    student = ", ".join(map(share, (record.student.acc, record.student.asr, record.student.ra)))
    return [f"{student} ({share(record.control.asr)})", excess(record)]


def pair(case: str) -> tuple[Record, Record]:
    """The undefended student of a case, and RobustKD's."""
    named = re.search(r"`([a-z-]+)`", case)
    assert named
    data, budget = "gtsrb" if case.startswith("GTSRB") else "cifar10", "labels-5" if "5 % of the" in case else "full"
    seed = re.search(r", seed (\d)$", case)
    ofd, ours = (
        RECORDS[Cell(data, "wrn", named[1], budget, defence, int(seed[1]) if seed else 0)]
        for defence in ("ofd", "robustkd")
    )
    return ofd, ours


CASES = rows("| case | undefended")


@pytest.mark.parametrize("row", [*CASES, *rows("| seed | undefended")], ids=lambda row: row[0][:40])
def test_a_case_of_the_page_is_what_its_records_say(row: list[str]) -> None:
    ofd, ours = pair(row[0])
    assert row[1:] == [*figures(ofd), *figures(ours)]


@pytest.mark.parametrize("row", rows("| case | RobustKD | NAD"), ids=lambda row: row[0][:40])
def test_the_baselines_of_a_case_are_what_their_records_say(row: list[str]) -> None:
    cell = pair(row[0])[0].cell
    for defence, said in zip(("robustkd", "nad+ofd", "prune+ofd"), row[1:], strict=True):
        record = RECORDS.get(replace(cell, defence=defence))
        if record is None:
            assert said == "", "what has no record has no figures"
        else:
            assert record.excess is not None
            assert said == f"{figures(record)[0]}, {record.student.acc.value - max(record.excess[0], 0.0):.1f}"


def test_the_summary_of_the_cases_is_what_their_records_say() -> None:
    pairs = [pair(row[0]) for row in CASES if "does not transfer" not in row[0]]
    lost = [ofd.student.acc.value - ours.student.acc.value for ofd, ours in pairs]
    extra = [ours.excess[0] for _, ours in pairs if ours.excess]
    said = (
        f"Over the {len(pairs)} rows that transfer RobustKD's ACC is {mean(lost):.1f} points below the undefended student's on "
        f"average, {max(lost):.1f} at worst; its excess ASR is {signed(mean(extra))} on average, {signed(max(extra))} at worst. In "
        f"{sum(points < 0 for points in extra)} of them its student obeys the trigger less than its own control does; with nought "
        f"in their place the average is {signed(mean(max(points, 0) for points in extra))}."
    )
    assert said in " ".join(PAGE.split())
    assert f"finished so far ({len(RECORDS)} of" in PAGE
    assert all(ofd.excess and ofd.excess[0] >= 30 for ofd, _ in pairs)


METHODS = [
    row
    for row in rows("| | ACC | ASR | RA | excess ASR |\n|---|---|---|---|---|\n| clean twin, same")
    if "--method" in row[0] and "--purify" not in row[0]
]


@pytest.mark.parametrize("row", METHODS, ids=lambda row: row[0])
def test_a_method_of_the_page_is_what_its_records_say(row: list[str]) -> None:
    named = re.search(r"--method ([a-z+]+)", row[0])
    assert named
    defence = "robustkd-paper" if "--variant paper" in row[0] else named[1]
    record = RECORDS[Cell("cifar10", "wrn", "backweak", "full", defence, 0)]
    of_control = row[0].startswith("control")
    measured = record.control if of_control else record.student
    assert measured is not None
    assert row[1:4] == [interval(measured.acc), interval(measured.asr), interval(measured.ra)]
    assert of_control or row[4] == excess(record) or named[1] == "ce"


def test_the_table_is_what_the_suite_file_makes_of_the_records(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "results" / "cpu" / "cells", tmp_path / "cpu" / "cells")
    rebuild(SuiteOptions(ROOT / "suites" / "cpu.toml", results=tmp_path))
    assert (tmp_path / "cpu" / "table.md").read_text() == (ROOT / "results" / "cpu" / "table.md").read_text()
