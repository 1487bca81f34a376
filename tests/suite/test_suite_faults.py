"""Wherever the disk fails while a suite writes, one line says so and the same command makes the same tables."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from disk import MIXED, Disk, check_refusal, rkd


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.promise
def test_wherever_the_disk_fails_results_are_whole_and_the_same_command_makes_them_all(
    resumed: Path, here: Any
) -> None:
    """The students are there, their results are not: what is left is to write."""
    results = resumed / "results"
    wanted = contents(results)
    shutil.rmtree(results)
    whole = Disk()
    assert rkd(whole, "suite", "tiny.toml").exit_code == 0
    assert contents(results) == wanted
    assert whole.counts["replace"] >= 8  # four cells, four outputs
    for disk in whole.failing(MIXED):
        shutil.rmtree(results)
        check_refusal(disk, rkd(disk, "suite", "tiny.toml"), resumed)
        cells = {name: data for name, data in contents(results).items() if "/cells/" in name}
        assert cells.items() <= wanted.items(), disk
        assert rkd(Disk(), "suite", "tiny.toml").exit_code == 0, disk
        assert contents(results) == wanted, disk
    assert here.done == []
