"""The suite files that rkd ships can be planned: every name and option in them exists."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from rkd.cli import app
from rkd.metrics import Proportion
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


@pytest.mark.promise
def test_the_papers_pairs_go_from_end_to_end_where_all_is_shortened(
    tmp_path: Path, here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """paper-gpu.toml itself, on twenty images and one epoch: teachers, RobustKD students, their scores, a table."""
    monkeypatch.chdir(tmp_path)
    long = (Path(__file__).parents[2] / "suites" / "paper-gpu.toml").read_text()
    short = re.sub(r"(epochs|threads) = \d+", r"\1 = 1", re.sub(r"batch = \d+", "batch = 10", long))
    short = short.replace(
        "[data.cifar10]", '[data.cifar10]\nteacher = { device = "cpu" }\ndistill = { device = "cpu" }'
    )
    (tmp_path / "paper-gpu.toml").write_text(short.replace("seeds = [0, 1, 2]", "seeds = [0]"))
    rng = np.random.default_rng(0)
    train, test = (rng.integers(0, 256, (n, 16, 16, 3), dtype=np.uint8) for n in (20, 10))
    np.savez(tmp_path / "cifar10.npz", x=train, y=np.arange(20) % 10, x_test=test, y_test=np.arange(10))
    for module in ("rkd.distill.inputs", "rkd.attacks.session"):  # a teacher of four steps is no better than chance
        monkeypatch.setattr(f"{module}.choose_teacher", lambda found, *_: (found[0], Proportion(1, 1)))
    only = [f"cifar10/{pair}/badnets/*/robustkd/s0" for pair in ("wrn28-wrn16", "resnet50-mobilenet")]
    only.append("cifar10/pyramid-wrn28/clean/*/ofd/s0")  # whose search for perturbations takes minutes here
    options = [word for pattern in only for word in ("--only", pattern)]
    done = CliRunner().invoke(app, ["suite", "paper-gpu.toml", "--data-root", ".", *options])
    assert done.exit_code == 0, done.output
    assert sum(job.startswith("student:") for job in here.done) == 5, "two with their controls, and a control"
    rows = json.loads((tmp_path / "results/paper-gpu/table.json").read_text())["rows"]
    assert {(row["pair"], row["student"]) for row in rows} == {
        ("wrn28-wrn16", "wrn-16-4"), ("pyramid-wrn28", "wrn-28-4"), ("resnet50-mobilenet", "mobilenet"),
    }  # fmt: skip
