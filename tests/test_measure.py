"""How many threads a command takes."""

from __future__ import annotations

import os

import pytest
import torch

from rkd.measure import use_threads

CORES = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("variable", "threads", "wanted"),
    [
        (None, 0, CORES),
        ("1", 0, 1),
        ("0", 0, CORES),
        ("4,2", 0, CORES),
        ("", 0, CORES),
        ("99999999999999999999", 0, CORES),
        (str(CORES + 5), 0, CORES),
        ("1", 2, 2),
    ],
)
def test_threads_are_those_asked_for_or_the_environments_or_all(
    monkeypatch: pytest.MonkeyPatch, variable: str | None, threads: int, wanted: int
) -> None:
    if variable is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    use_threads(threads)
    assert torch.get_num_threads() == wanted
