"""results/ and docs/results.md: what is published is what the records say."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from published import ABLATION, BLOCKS, CPU, PAGE, README, ROOT, Published, blocks, command, excess, figures

from rkd.metrics import Proportion
from rkd.suite.command import SuiteOptions, rebuild
from rkd.suite.plan import Cell
from rkd.suite.results import Measured, Record
from rkd.suite.table import basis

PUBLISHED = [block for page in (README, PAGE) for block in blocks(page.read_text())]
SUITES = [suite for suite in (CPU, ABLATION) if suite.records]


def value(share: Proportion | None) -> float:
    assert share is not None
    return 100 * share.hits / share.n


@pytest.mark.parametrize(("name", "said"), PUBLISHED, ids=lambda value: value[:10])
def test_a_table_of_the_page_is_what_the_records_say(name: str, said: str) -> None:
    assert said == BLOCKS[name](), "make results writes it anew"


def test_the_pages_have_every_table() -> None:
    names = [name for name, _ in PUBLISHED]
    assert sorted(names) == sorted(name for name in BLOCKS if name != "ablation" or ABLATION.records)


def test_the_page_says_what_transfers_by_the_records_alone() -> None:
    for ofd, ours in CPU.pairs():
        assert ofd.excess is not None
        assert ofd.excess[0] == pytest.approx(value(ofd.student.asr) - value(ofd.control.asr if ofd.control else None))
        assert basis(ours) == basis(ofd), "both were distilled from one teacher"
    assert len({ofd.cell.case for ofd, _ in CPU.transferring()}) >= 4
    for ofd, ours in CPU.transferring():
        assert ofd.score is not None
        assert ours.score is not None
        assert ours.score > ofd.score


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.name)
def test_the_table_is_what_the_suite_file_makes_of_the_records(suite: Published, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "results" / suite.name / "cells", tmp_path / suite.name / "cells")
    rebuild(SuiteOptions(ROOT / "suites" / f"{suite.name}.toml", results=tmp_path))
    assert (tmp_path / suite.name / "table.md").read_text() == (ROOT / "results" / suite.name / "table.md").read_text()


def made_up(*, method: str = "ofd", precision: str = "bf16", purify: str | None = None, same: bool = False) -> Record:
    settings = {"method": method, "variant": "default", "purify": purify, "precision": precision}
    student = Measured(Proportion(801, 1000), Proportion(45, 900), Proportion(630, 900))
    control = Measured(Proportion(805, 1000), Proportion(54, 900), Proportion(640, 900))
    cell = Cell("cifar10", "wrn", "backweak", "full", method, 0)
    return Record(cell, student, control, Measured(Proportion(1, 1)), 1.0, same, {"settings": settings})


def test_a_record_is_told_in_points() -> None:
    assert figures(made_up()) == "80.1, 5.0, 70.0 (6.0)"
    assert figures(made_up(precision="fp32")) == "*80.1, 5.0, 70.0 (6.0)*"
    assert excess(made_up()).startswith("-1.0 [-3.1, +1.1"), "Newcombe's interval of 45 and 54 of 900"
    assert excess(made_up(same=True)) == "0 by definition"
    assert made_up().score == pytest.approx(80.1), "a control that obeys more is no merit"


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (made_up(method="kd"), "`--method kd`"),
        (made_up(method="robustkd", purify="finetune"), "`--method robustkd`"),
        (made_up(method="robustkd", purify="none"), "`--method robustkd --purify none`"),
        (made_up(method="robustkd+kd", precision="fp32"), "`--method robustkd+kd --purify none`, FP32"),
    ],
)
def test_a_method_is_told_by_its_options(record: Record, said: str) -> None:
    assert command(record) == said
