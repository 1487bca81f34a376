"""The whole main job on the built-in digits, as a stranger runs it first: what it ends in is a claim, and is held to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rkd.demo import run_demo
from rkd.metrics import Scores
from rkd.reporting import excess_asr


@pytest.mark.promise
def test_the_demos_backdoor_survives_plain_distillation_and_robustkd_takes_it_away(tmp_path: Path) -> None:
    result = run_demo(tmp_path / "demo", seed=0, jobs=0, overwrite=False)
    scores: dict[str, Scores] = dict(result.rows)
    carried, _, _ = excess_asr(scores["undefended (OFD)"], scores["control (OFD)"])
    left, _, highest = excess_asr(scores["RobustKD"], scores["control (RobustKD)"])
    assert carried >= 30
    assert left <= 8
    assert highest < carried / 2
    assert scores["RobustKD"].acc.value >= scores["undefended (OFD)"].acc.value - 1
    assert scores["RobustKD"].triggers[0].ra.value >= scores["undefended (OFD)"].triggers[0].ra.value + 30
    assert all(page.is_file() for page in result.pages)
