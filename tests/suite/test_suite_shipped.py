"""The suite files that rkd ships can be planned: every name and option in them exists."""

from __future__ import annotations

from pathlib import Path

import pytest

from rkd.suite.file import read_suite
from rkd.suite.plan import make_plan

SUITES = sorted((Path(__file__).parents[2] / "suites").glob("*.toml"))


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.name)
def test_a_shipped_suite_can_be_planned(path: Path) -> None:
    suite = read_suite(path)
    plan = make_plan(suite)
    assert {cell.attack for cell in plan.cells} == {"clean", *(entry.name for entry in suite.axes["attack"])}
    assert {cell.defence for cell in plan.cells} == {entry.name for entry in suite.axes["defence"]}


def test_there_are_four() -> None:
    assert [path.name for path in SUITES] == ["ablation.toml", "cpu.toml", "paper-gpu.toml", "smoke.toml"]
