"""The fuzzer's figures in CI: no parser raises anything but its error, takes 2 GiB or 5 s, blocks, or ends the process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FUZZER = Path(__file__).with_name("fuzz.py")
# Mutants of each that are promised; those that reliability.md names have 20,000. `make test` makes a few.
PROMISED = {
    **dict.fromkeys(("pt", "safetensors", "onnx", "rkd", "settings", "target"), 20_000),
    **dict.fromkeys(
        ("suite", "trigger", "data", "image", "private-key", "public-key", "result", "run", "run-log"), 4_000
    ),
}
A_FEW = 200
FEW = dict.fromkeys(PROMISED, A_FEW)
AMOUNTS = [pytest.param(FEW, id="few"), pytest.param(PROMISED, id="promised", marks=pytest.mark.promise)]
THROUGH_A_COMMAND = 40
MEMORY_BYTES = 2 * 2**30

Parts = dict[str, dict[str, dict[str, Any]]]


def fuzz(*arguments: str) -> Parts:
    done = subprocess.run(
        [sys.executable, str(FUZZER), *arguments], capture_output=True, text=True, check=False, cwd=FUZZER.parents[2]
    )
    assert done.returncode in (0, 1), done.stderr[-3000:]
    parts: Parts = json.loads(done.stdout.splitlines()[-1])
    return parts


@pytest.fixture(scope="module")
def made() -> Callable[[dict[str, int], int], Parts]:
    """Makes so many mutants of each parser that is to have so many; each once, with what was found before."""
    done: dict[tuple[int, int], Parts] = {}

    def made(amounts: dict[str, int], count: int) -> Parts:
        key = (id(amounts), count)
        if key not in done:
            names = [name for name, wanted in amounts.items() if wanted == count] + ["takes_3_gib"]
            chosen = [argument for name in names for argument in ("--parser", name)]
            done[key] = fuzz("--replay", "--count", str(count), *chosen)
        return done[key]

    return made


@pytest.mark.parametrize("amounts", AMOUNTS)
@pytest.mark.parametrize("parser", PROMISED)
@pytest.mark.timeout(1200)
def test_malformed_files_are_read_or_refused_and_nothing_else(
    parser: str, amounts: dict[str, int], made: Callable[[dict[str, int], int], Parts]
) -> None:
    count = amounts[parser]
    tally = made(amounts, count)["mutants"][parser]
    assert tally["findings"] == []
    assert tally["mutants"] == count
    assert count // 2 < tally["refused"] < count, (
        "the mutants reach what is behind the first check, and not only good files"
    )
    assert tally["peak_bytes"] < MEMORY_BYTES


def test_what_was_found_before_is_refused(made: Callable[[dict[str, int], int], Parts]) -> None:
    tallies = made(FEW, A_FEW)["corpus"]
    assert tallies
    for tally in tallies.values():
        assert tally["findings"] == []
        assert tally["refused"] == tally["mutants"]


def test_a_parser_that_takes_too_much_memory_is_a_finding(made: Callable[[dict[str, int], int], Parts]) -> None:
    (finding,) = made(FEW, A_FEW)["mutants"]["takes_3_gib"]["findings"]
    assert "memory ran out" in finding["what"]


@pytest.mark.slow  # half a minute of waiting
def test_a_parser_that_blocks_is_a_finding() -> None:
    (finding,) = fuzz("--parser", "blocks", "--count", "1")["mutants"]["blocks"]["findings"]
    assert "signal SIGALRM" in finding["what"]


@pytest.mark.promise
@pytest.mark.timeout(1200)
def test_malformed_files_end_each_command_that_reads_them_with_exit_1_and_one_line() -> None:
    tallies = fuzz("--commands", str(THROUGH_A_COMMAND))["commands"]
    assert {name.partition(":")[0] for name in tallies} == set(PROMISED)
    for name, tally in tallies.items():
        assert tally["findings"] == [], name
        assert tally["refused"] == THROUGH_A_COMMAND, name
        assert tally["peak_bytes"] < MEMORY_BYTES, name
