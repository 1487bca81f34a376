"""The tables are the records' figures: means, spreads, intervals and verdicts from formulas, from results/ alone."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rkd.errors import RunError
from rkd.metrics import Proportion
from rkd.suite.file import Entry
from rkd.suite.output import row_cells, standing_cells, table_csv, table_json
from rkd.suite.page import suite_page, verdict
from rkd.suite.plan import Cell
from rkd.suite.results import REPLACED, read_records, record_path, same_code, write_record
from rkd.suite.table import Averaged, Paired, Table, comparable, make_table

N_CLEAN, N_TRIGGERED = 1000, 900
AXES = {
    "data": [Entry("cifar10")],
    "pair": [Entry("wrn")],
    "attack": [Entry("strong"), Entry("weak")],
    "budget": [Entry("full")],
    "defence": [Entry("ofd", undefended=True), Entry("kd", undefended=True), Entry("ce"), Entry("ours")],
}  # fmt: skip
# attack, defence, seed: hits of ACC, ASR, RA; the control's ASR and RA
FIGURES: dict[tuple[str, str, int], tuple[int, ...]] = {
    ("clean", "ofd", 0): (830,),
    ("clean", "ours", 0): (825,),
    ("strong", "ofd", 0): (820, 700, 100, 100, 500),
    ("strong", "ofd", 1): (800, 600, 120, 90, 510),
    ("strong", "kd", 0): (810, 200, 400, 100, 500),
    ("strong", "ours", 0): (815, 120, 600, 110, 610),
    ("strong", "ours", 1): (805, 100, 610, 95, 620),
    ("strong", "ce", 0): (780, 150, 300, 150, 300),
    ("weak", "ofd", 0): (825, 130, 500, 100, 505),
    ("weak", "ours", 0): (822, 80, 620, 85, 615),
}


def share(hits: int, n: int) -> dict[str, Any]:
    return Proportion(hits, n).to_json()


def record(attack: str, defence: str, seed: int, hits: tuple[int, ...]) -> dict[str, Any]:
    attacked = attack != "clean"

    def measured(acc: int, asr: int = 0, ra: int = 0) -> dict[str, Any]:
        return {
            "acc": share(acc, N_CLEAN),
            "asr": share(asr, N_TRIGGERED) if attacked else None,
            "ra": share(ra, N_TRIGGERED) if attacked else None,
        }

    return {
        "schema": 1, "suite": "made-up",
        "cell": {"data": "cifar10", "pair": "wrn", "attack": attack, "budget": "full", "defence": defence, "seed": seed},
        "student": {**measured(*hits[:3]), "arch": "wrn-16-1", "sha256": "5" * 64},
        "control": {**measured(hits[0], *hits[3:]), "sha256": "4" * 64, "cell": "made-up"} if attacked else None,
        "same_student": defence == "ce" and attacked,
        "teacher": {**measured(860, 890, 5), "sha256": "7" * 64, "settings": {}, "name": "t"},
        "settings": {}, "data": {"name": "cifar10", "digest": "d" * 64, "classes": 10},
        "seconds": {"job": 100.0 + seed, "stages": {}}, "code": {"rkd": "0", "commit": "c" * 40, "changed": False},
        "versions": {"torch": "2"},
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for (attack, defence, seed), hits in FIGURES.items():
        write_record(tmp_path, record(attack, defence, seed, hits))
    return tmp_path


@pytest.fixture
def table(folder: Path) -> Table:
    return make_table(read_records(folder), AXES)


def row(table: Table, attack: str, defence: str) -> Any:
    return next(r for r in table.rows if r.case[2] == attack and r.defence == defence)


def test_excess_is_asr_minus_the_control_s_and_averages_over_seeds(table: Table) -> None:
    ours = row(table, "strong", "ours")
    per_seed = [100 * (120 - 110) / N_TRIGGERED, 100 * (100 - 95) / N_TRIGGERED]
    assert ours.excess.values == pytest.approx(per_seed)
    assert ours.excess.mean == pytest.approx(sum(per_seed) / 2)
    assert (ours.acc.low, ours.acc.high) == (80.5, 81.5)
    assert ours.excess.deviation == pytest.approx(abs(per_seed[0] - per_seed[1]) / math.sqrt(2))


def wilson(p: float, n: int) -> tuple[float, float]:
    """Wilson's interval, written out again."""
    z2 = 1.959963984540054**2
    half = math.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n)))
    return (p + z2 / (2 * n) - half) / (1 + z2 / n), (p + z2 / (2 * n) + half) / (1 + z2 / n)


def newcombe(p1: float, p2: float, n: int) -> tuple[float, float]:
    """R. G. Newcombe 1998, method 10: how far below and above the difference its interval reaches."""
    (l1, u1), (l2, u2) = wilson(p1, n), wilson(p2, n)
    return math.hypot(p1 - l1, u2 - p2), math.hypot(u1 - p1, p2 - l2)


def test_the_interval_of_one_seed_s_excess_is_newcombe_s(table: Table) -> None:
    below, above = newcombe(80 / N_TRIGGERED, 85 / N_TRIGGERED, N_TRIGGERED)
    gap = -5 / N_TRIGGERED
    assert row(table, "weak", "ours").excess_interval == pytest.approx((100 * (gap - below), 100 * (gap + above)))


def test_the_interval_over_seeds_holds_the_seeds_as_well_as_the_images(table: Table) -> None:
    """The seeds share their test images: twice the seeds is not twice the images."""
    gaps = [10 / N_TRIGGERED, 5 / N_TRIGGERED]
    below, above = newcombe(110 / N_TRIGGERED, 102 / N_TRIGGERED, N_TRIGGERED)  # mean hits, rounded
    seeds = 12.706 * (gaps[0] - gaps[1]) / math.sqrt(2) / math.sqrt(2)
    low, high = row(table, "strong", "ours").excess_interval
    assert low == pytest.approx(100 * (sum(gaps) / 2 - math.hypot(below, seeds)), abs=1e-6)
    assert high == pytest.approx(100 * (sum(gaps) / 2 + math.hypot(above, seeds)), abs=1e-6)


def test_the_interval_of_an_excess_ends_where_an_excess_can(folder: Path) -> None:
    write_record(folder, record("strong", "ours", 1, (805, 890, 2, 5, 620)))
    low, high = row(make_table(read_records(folder), AXES), "strong", "ours").excess_interval
    assert (low, high) == (-100, 100), "two seeds, 1 and 98 points: Student's interval goes far beyond"


def test_three_seeds_that_differ_much_have_a_wide_interval() -> None:
    share = Averaged.of([Proportion(hits, 4500) for hits in (900, 1800, 2700)])
    assert (share.value, share.n) == (pytest.approx(40), 4500)
    low, high = share.interval
    assert low == 0
    assert high == pytest.approx(40 + 4.303 * 20 / math.sqrt(3), abs=0.1)
    one = Averaged.of([Proportion(1800, 4500)])
    assert one.interval == Proportion(1800, 4500).interval
    same = Averaged.of([Proportion(1800, 4500)] * 3)
    assert same.interval == pytest.approx(Proportion(1800, 4500).interval)


def test_a_case_transfers_by_the_strongest_undefended_student_alone(table: Table) -> None:
    assert [case[2] for case in table.transferring] == ["strong"]
    assert row(table, "strong", "kd").excess.mean < 30 < row(table, "strong", "ofd").excess.mean
    assert row(table, "weak", "ofd").excess.mean < 30


def test_a_defence_s_own_excess_does_not_make_a_case_transfer(folder: Path) -> None:
    write_record(folder, record("weak", "ours", 0, (822, 800, 20, 85, 615)))
    assert [case[2] for case in make_table(read_records(folder), AXES).transferring] == ["strong"]


OURS = (81.5 - 100 * 10 / N_TRIGGERED, 80.5 - 100 * 5 / N_TRIGGERED)  # by seed
OFD = (82.0 - 100 * 600 / N_TRIGGERED, 80.0 - 100 * 510 / N_TRIGGERED)


def test_the_figures_of_a_defence_are_over_the_transferring_cases(table: Table) -> None:
    ours = next(standing for standing in table.standings if standing.defence == "ours")
    assert ours.score == pytest.approx(sum(OURS) / 2)
    assert (ours.cases, ours.of) == (1, 1)
    assert ours.lost_mean == pytest.approx(((820 - 815) + (800 - 805)) / 2 / 10)
    assert ours.ra_lost_mean == pytest.approx(((610 - 600) + (620 - 610)) / 2 / 9)
    assert ours.clean_lost == pytest.approx(0.5)


def test_a_student_that_is_its_own_control_has_no_excess_and_no_interval(table: Table) -> None:
    free = row(table, "strong", "ce")
    assert (free.excess.mean, free.excess_interval) == (0.0, (0.0, 0.0))
    assert free.seconds.values == ()


def test_defences_are_ranked_by_what_they_have_met_with_the_one_that_has_met_most(folder: Path) -> None:
    write_record(folder, record("weak", "ofd", 0, (825, 800, 20, 100, 505)))
    write_record(folder, record("strong", "ofd", 2, (800, 600, 120, 90, 510)))
    table = make_table(read_records(folder), AXES)
    assert [case[2] for case in table.transferring] == ["strong", "weak"]
    assert {s.defence: s.cases for s in table.standings} == {"ofd": 2, "ours": 2, "kd": 1, "ce": 1}
    assert {standing.yardstick for standing in table.standings} == {"ours"}, (
        "undefended ones only where there is no other"
    )
    ranked = [standing for standing in table.standings if standing.defence != "ours"]
    assert [s.against.mean for s in ranked] == sorted((s.against.mean for s in ranked), reverse=True)
    assert table.standings[0].defence == "ours", "all others are behind it"
    assert "the yardstick, ours, the defence that has met the most cases" in comparable(table, "full")


def test_a_defence_may_be_ahead_of_the_yardstick(folder: Path) -> None:
    write_record(folder, record("strong", "kd", 0, (830, 100, 800, 95, 800)))
    write_record(folder, record("weak", "kd", 0, (832, 700, 20, 100, 505)))
    table = make_table(read_records(folder), AXES)
    assert (table.standings[0].defence, table.standings[0].yardstick) == ("ours", "ours")
    kd = next(standing for standing in table.standings if standing.defence == "kd")
    assert kd.against.values[0] == pytest.approx(83.0 - 100 * 5 / N_TRIGGERED - OURS[0])
    write_record(folder, record("weak", "kd", 0, (832, 80, 20, 100, 505)))
    write_record(folder, record("weak", "ofd", 0, (832, 700, 20, 100, 505)))
    table = make_table(read_records(folder), AXES)
    assert (table.standings[0].defence, table.standings[0].yardstick) == ("kd", "ours")
    assert table.standings[0].against.values[1] == pytest.approx(83.2 - 82.2), "less than the control is no merit"


def test_the_verdict_says_whether_the_first_can_be_told_from_the_next(folder: Path) -> None:
    write_record(folder, record("strong", "kd", 0, (830, 100, 800, 95, 800)))
    table = make_table(read_records(folder), AXES)
    assert "kd is 2.1 ahead of ours on the 1 case of both, which cannot tell them apart." in verdict(table)
    (folder / "cells" / "cifar10__wrn__strong__full__kd__s0.json").unlink()
    (folder / "cells" / "cifar10__wrn__strong__full__ce__s0.json").unlink()
    write_record(folder, record("weak", "ofd", 0, (825, 800, 20, 100, 505)))
    told = verdict(make_table(read_records(folder), AXES))
    gaps = [sum(OURS) / 2 - sum(OFD) / 2, 82.2 - (82.5 - 100 * 700 / N_TRIGGERED)]
    half = 12.706 * abs(gaps[0] - gaps[1]) / 2
    assert half > sum(gaps) / 2
    assert f"ours and ofd are not told apart: the first is ahead by {sum(gaps) / 2:.1f} [" in told
    for attack in ("third", "fourth"):
        write_record(folder, record(attack, "ofd", 0, (825, 750, 20, 100, 505)))
        write_record(folder, record(attack, "ours", 0, (822, 80, 620, 85, 615)))
    assert "ours is ahead of ofd, by " in verdict(make_table(read_records(folder), AXES))


def test_how_far_a_defence_is_ahead_is_over_the_cases_and_seeds_that_both_have_met(table: Table, folder: Path) -> None:
    by_name = {standing.defence: standing for standing in table.standings}
    assert by_name["ours"].against.values == ()
    strong = sum(its - mine for its, mine in zip(OFD, OURS, strict=True)) / 2
    assert by_name["ofd"].against.values == pytest.approx([strong]), "two seeds of one case are one"
    assert by_name["kd"].against.values == pytest.approx([81.0 - 100 * 100 / N_TRIGGERED - OURS[0]])
    assert not by_name["ofd"].against.separated, "one case cannot tell"
    write_record(folder, record("weak", "ofd", 0, (825, 800, 20, 100, 505)))
    against = next(s for s in make_table(read_records(folder), AXES).standings if s.defence == "ofd").against
    weak = 82.5 - 100 * 700 / N_TRIGGERED - 82.2
    assert against.values == pytest.approx([strong, weak])
    half = 12.706 * abs(strong - weak) / 2
    assert against.interval == pytest.approx(((strong + weak) / 2 - half, (strong + weak) / 2 + half))
    assert not Paired((1.0, -1.0)).separated
    assert Paired((1.0, 1.1, 0.9)).separated
    assert Paired((-1.0, -1.1, -0.9)).separated


def test_students_of_different_teachers_are_not_compared(folder: Path) -> None:
    one = record("strong", "ours", 0, FIGURES["strong", "ours", 0])
    one["teacher"]["sha256"] = "8" * 64
    write_record(folder, one)
    ours = next(
        row
        for row in make_table(read_records(folder), AXES).rows
        if row.case[2:] == ("strong", "full") and row.defence == "ours"
    )
    assert ours.seeds == (0, 1)
    undefended = FIGURES["strong", "ofd", 1]
    assert ours.lost.values == pytest.approx((100 * (undefended[0] - FIGURES["strong", "ours", 1][0]) / N_CLEAN,))
    standings = {standing.defence: standing for standing in make_table(read_records(folder), AXES).standings}
    assert standings["ce"].yardstick == "ours"
    assert standings["ce"].against.values == (), "both have seed 0 alone, from two teachers"
    other = record("strong", "ours", 1, FIGURES["strong", "ours", 1])
    other["teacher"]["sha256"] = "8" * 64
    write_record(folder, other)
    said = "No other defence has met a case of ours's from the same teachers"
    assert said in verdict(make_table(read_records(folder), AXES))


def test_a_standing_is_told_in_every_form(table: Table) -> None:
    told = {standing["defence"]: standing for standing in table_json(table, [], [])["standings"]}
    assert told["ours"]["against"] == {"mean": None, "low": None, "high": None, "n": 0}
    assert told["kd"]["against"]["n"] == 1
    assert told["kd"]["yardstick"] == "ours"
    assert told["kd"]["score"] == pytest.approx(81.0 - 100 * 100 / N_TRIGGERED, abs=1e-3)
    cells = {standing.defence: standing_cells(standing) for standing in table.standings}
    assert cells["ours"][:3] == ["ours", "1 of 1", "yardstick"]
    assert cells["kd"][2] == f"\N{MINUS SIGN}{OURS[0] - 81.0 + 100 * 100 / N_TRIGGERED:.1f} n=1"
    page = suite_page("made-up", "", table, [], [])
    assert "<small>yardstick</small>" in page
    assert f"<b>\N{MINUS SIGN}{OURS[0] - 81.0 + 100 * 100 / N_TRIGGERED:.1f}</b><small>n 1</small>" in page


def test_a_result_of_another_student_is_set_aside_before_its_place_is_taken(folder: Path) -> None:
    old = record_path(folder, read_records(folder)[0].cell)
    made = read_records(folder)[0].data
    write_record(folder, made | {"attempts": 2})
    assert not (folder / REPLACED).exists(), "the same student, told anew"
    again = made | {"student": made["student"] | {"sha256": "6" * 64}}
    write_record(folder, again)
    old.write_bytes(b"{")
    write_record(folder, again)
    kept = sorted(path.read_bytes() for path in (folder / REPLACED).iterdir())
    assert kept[0] == b"{"
    assert [json.loads(data)["attempts"] for data in kept[1:]] == [2]
    assert json.loads(old.read_bytes())["student"]["sha256"] == "6" * 64


def test_what_has_met_nothing_together_with_the_yardstick_comes_last(folder: Path) -> None:
    for name in ("strong__full__kd", "weak__full__ofd", "weak__full__ours"):
        (folder / "cells" / f"cifar10__wrn__{name}__s0.json").unlink()
    write_record(folder, record("weak", "kd", 0, (820, 800, 20, 100, 505)))
    last = make_table(read_records(folder), AXES).standings[-1]
    assert (last.defence, last.cases, last.yardstick, last.against.values) == ("kd", 1, "ours", ())
    assert last.score == pytest.approx(82.0 - 100 * 700 / N_TRIGGERED)


def test_where_nothing_is_known_nothing_is_ranked(folder: Path) -> None:
    for path in (folder / "cells").glob("*strong*"):
        path.unlink()
    table = make_table(read_records(folder), AXES)
    assert not any(standing.yardstick or standing.against.values for standing in table.standings)
    assert "not ranked" in comparable(table, "full")


@pytest.mark.parametrize(("kind", "asr", "took"), [("wanet", 300, False), ("wanet", 600, True), ("oscar", 3, True)])
def test_an_attack_that_its_own_teacher_hardly_obeys_did_not_take(
    folder: Path, kind: str, asr: int, *, took: bool
) -> None:
    for defence in ("ofd", "ours"):
        made = record("weak", defence, 0, FIGURES["weak", defence, 0])
        made["teacher"] |= {"asr": share(asr, N_TRIGGERED), "settings": {"attack": kind}}
        write_record(folder, made)
    table = make_table(read_records(folder), AXES)
    assert ([case[2] for case in table.asleep] == []) == took
    assert ("the attack did not take" in verdict(table)) != took


def test_without_a_control_nothing_is_said_about_transfer(folder: Path) -> None:
    lone = record("weak", "ofd", 0, (825, 800, 20, 100, 505)) | {"control": None}
    write_record(folder, lone)
    table = make_table(read_records(folder), AXES)
    assert [case[2] for case in table.untested] == ["weak"]
    assert row(table, "weak", "ofd").excess.values == ()
    assert "2 of" not in verdict(table)


def test_a_figure_that_some_seeds_lack_says_of_how_many_it_is(folder: Path) -> None:
    (folder / "cells" / "cifar10__wrn__strong__full__ofd__s1.json").unlink()
    lacking = record("strong", "ours", 1, FIGURES["strong", "ours", 1])
    write_record(folder, {**lacking, "control": None})
    table = make_table(read_records(folder), AXES)
    ours = next(
        line for line in csv.DictReader(table_csv(table).splitlines())
        if (line["attack"], line["defence"]) == ("strong", "ours")
    )  # fmt: skip
    assert ours["acc_lost_by_seed"] == f"{82 - 81.5:.4f} -"
    assert ours["excess_asr_by_seed"].endswith(" -")
    assert row_cells(row(table, "strong", "ours"))[-2].endswith(", 1 of 2 seeds")
    assert suite_page("x", "", table, [], []).count("1 of 2 seeds") == 3
    full = make_table(read_records(folder)[:-1], AXES)
    assert "seeds" not in "".join(row_cells(row(full, "weak", "ofd")))


def test_an_excess_that_only_seeds_scatter_about_nought_costs_nothing(folder: Path) -> None:
    for seed, asr in ((0, 110 + 30), (1, 95 - 30)):
        hits = FIGURES["strong", "ours", seed]
        write_record(folder, record("strong", "ours", seed, (hits[0], asr, *hits[2:])))
    ours = next(s for s in make_table(read_records(folder), AXES).standings if s.defence == "ours")
    assert ours.excess_mean == pytest.approx(0)
    assert ours.score == pytest.approx((81.5 + 80.5) / 2)


def test_of_two_that_met_as_many_cases_the_first_of_the_file_is_the_yardstick(folder: Path) -> None:
    theirs = {**AXES, "defence": [Entry("ofd", undefended=True), Entry("theirs"), Entry("ours")]}
    write_record(folder, record("strong", "theirs", 0, (815, 120, 600, 110, 610)))
    table = make_table(read_records(folder), theirs)
    assert [r.defence for r in table.of(table.cases[0])] == ["ofd", "ours"], (
        "the clean case, which comes first, lacks it"
    )
    assert {standing.yardstick for standing in table.standings} == {"theirs"}


def test_where_no_undefended_student_has_a_control_it_is_not_known_what_transfers(folder: Path) -> None:
    for path in (folder / "cells").iterdir():
        if path.name.split("__")[4] in ("ofd", "kd"):
            path.unlink()
    table = make_table(read_records(folder), AXES)
    assert "not known yet which cases transfer" in comparable(table, "full")


def test_csv_and_json_hold_the_same_figures(table: Table) -> None:
    lines = list(csv.DictReader(table_csv(table).splitlines()))
    rows = table_json(table, [Cell("cifar10", "wrn", "weak", "full", "kd", 0)], ["a note"])["rows"]
    assert len(lines) == len(rows) == len(table.rows)
    for line, one in zip(lines, rows, strict=True):
        for name, value in one.items():
            if isinstance(value, float):
                assert float(line[name]) == value
    ours = next(line for line in lines if (line["attack"], line["defence"]) == ("strong", "ours"))
    assert [float(value) for value in ours["acc_by_seed"].split()] == [81.5, 80.5]
    assert float(ours["acc_deviation"]) == pytest.approx(1 / math.sqrt(2), abs=1e-4)
    assert float(ours["acc_ci_low"]) < 80.5
    assert {line["transfers"] for line in lines if line["attack"] == "strong"} == {"True"}


def test_json_has_no_nan(table: Table) -> None:
    json.dumps(table_json(table, [], []), allow_nan=False)


def test_the_page_stands_alone_and_escapes(table: Table, folder: Path) -> None:
    page = suite_page("<b>x</b>", "<script>", table, ["<i>note</i>"], read_records(folder))
    assert "<script" not in page
    assert "&lt;i&gt;note" in page
    assert "http-equiv" in page
    assert not [word for word in ("http://", "https://", 'src="/', "url(") if word in page]
    assert verdict(table) in page.replace("&#x27;", "'")
    for defence in ("ofd", "kd", "ce", "ours"):
        assert defence in page


def test_every_table_of_the_page_has_a_name_of_its_own(folder: Path) -> None:
    """Whoever cannot see the page goes from one landmark to the next by their names."""
    for (attack, defence, seed), hits in FIGURES.items():
        one = record(attack, defence, seed, hits)
        one["cell"]["budget"] = "labels-5"
        write_record(folder, one)
    table = make_table(read_records(folder), AXES | {"budget": [Entry("full"), Entry("labels-5")]})
    labels = re.findall('role="region" aria-label="([^"]*)"', suite_page("x", "", table, [], []))
    assert len(labels) > len(table.cases)
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text[:-40], "not JSON"),
        (lambda text: text.replace('"schema": 1', '"schema": 2'), "schema 2"),
        (
            lambda text: text.replace('"hits": 815', '"hits": 8150'),
            "student.acc: percent, low and high do not follow from hits and n",
        ),
        (lambda text: text.replace('"defence": "ours"', '"defence": "theirs"'), "holds the cell"),
        (lambda text: text.replace('"student"', '"pupil"'), "damaged"),
        (lambda text: "[]", "damaged"),
    ],
)
def test_a_damaged_result_is_named(folder: Path, damage: Callable[[str], str], said: str) -> None:
    path = folder / "cells" / "cifar10__wrn__strong__full__ours__s0.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises((RunError, ValueError)) as caught:
        read_records(folder)
    assert isinstance(caught.value, RunError)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


IDENTITIES = ["student.sha256", "teacher.sha256", "teacher.name", "control.sha256", "control.cell", "data.digest"]
OBJECTS = ["settings", "teacher.settings", "versions", "code", "teacher.code", "control.code"]
UNSAID = [(name, value) for name in (*IDENTITIES, *OBJECTS) for value in (1, [], True)]
UNSAID += [(name, None) for name in (*IDENTITIES, "settings", "teacher.settings", "versions")]


@pytest.mark.parametrize(("name", "value"), UNSAID)
def test_a_result_that_does_not_say_what_it_is_of_is_named(folder: Path, name: str, value: Any) -> None:
    said = changed(folder, name, value)
    with pytest.raises(RunError, match=re.escape(said) + ".*" + name.rpartition(".")[2]):
        read_records(folder)


@pytest.mark.parametrize("name", [*IDENTITIES, "settings", "teacher.settings"])
def test_a_result_without_what_it_is_of_is_named(folder: Path, name: str) -> None:
    said = changed(folder, name, ...)
    with pytest.raises(RunError, match=re.escape(said) + ".*" + name.rpartition(".")[2]):
        read_records(folder)


def changed(folder: Path, name: str, value: Any) -> str:
    """Change one entry of a result, or remove it; returns how the line about it begins."""
    path = folder / "cells" / "cifar10__wrn__strong__full__ours__s0.json"
    content = json.loads(path.read_text())
    *above, key = name.split(".")
    inside = content[above[0]] if above else content
    inside[key] = value
    if value is ...:
        del inside[key]
    path.write_text(json.dumps(content))
    return f"{path} is damaged: "


def test_no_results_make_an_empty_table_not_an_error() -> None:
    table = make_table([], AXES)
    assert table.rows == ()
    assert "No attacked case" in verdict(table)
    assert suite_page("empty", "", table, [], [])


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"sources": "a", "commit": "1", "changed": True}, {"sources": "a", "commit": "2", "changed": False}, True),
        ({"sources": "a", "commit": "1"}, {"sources": "b", "commit": "1"}, False),
        ({"commit": "1", "changed": False}, {"sources": "b", "commit": "1", "changed": False}, True),
        ({"commit": "1", "changed": True}, {"sources": "b", "commit": "1", "changed": False}, False),
        ({"sources": None, "commit": "1", "changed": True}, {"sources": "b", "commit": "1", "changed": False}, False),
        (None, {"sources": "a"}, True),
    ],
)
def test_code_is_the_same_where_its_deciding_sources_are(one: Any, other: Any, *, same: bool) -> None:
    assert same_code(one, other) == same_code(other, one) == same
