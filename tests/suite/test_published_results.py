"""results/ and docs/results.md: what is published is what the records say."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from published import ABLATION, BLOCKS, CPU, PAGE, ROOT, Published, blocks, left, summary

from rkd.metrics import Proportion
from rkd.suite.command import SuiteOptions, rebuild
from rkd.suite.table import TRANSFERS

SUITES = [suite for suite in (CPU, ABLATION) if suite.records]


def value(share: Proportion | None) -> float:
    assert share is not None
    return 100 * share.hits / share.n


@pytest.mark.parametrize(("name", "said"), blocks(PAGE.read_text()), ids=lambda value: value[:10])
def test_a_table_of_the_page_is_what_the_records_say(name: str, said: str) -> None:
    assert said == BLOCKS[name](), "make results writes it anew"


def test_the_page_has_every_table() -> None:
    names = [name for name, _ in blocks(PAGE.read_text())]
    assert sorted(names) == sorted(name for name in BLOCKS if name != "ablation" or ABLATION.records)


def test_the_page_says_what_transfers_by_the_records_alone() -> None:
    for ofd, ours in CPU.pairs():
        assert ofd.excess is not None
        assert ofd.excess[0] == pytest.approx(value(ofd.student.asr) - value(ofd.control.asr if ofd.control else None))
        assert ours.teacher == ofd.teacher, "both were distilled from one teacher"
    assert all(ofd.excess and ofd.excess[0] >= TRANSFERS for ofd, _ in CPU.transferring())
    assert len({ofd.cell.case for ofd, _ in CPU.transferring()}) >= 4
    assert f"Over the {len(CPU.transferring())} rows" in summary()
    assert all(left(ours) > left(ofd) for ofd, ours in CPU.transferring())


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.name)
def test_the_table_is_what_the_suite_file_makes_of_the_records(suite: Published, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "results" / suite.name / "cells", tmp_path / suite.name / "cells")
    rebuild(SuiteOptions(ROOT / "suites" / f"{suite.name}.toml", results=tmp_path))
    assert (tmp_path / suite.name / "table.md").read_text() == (ROOT / "results" / suite.name / "table.md").read_text()
