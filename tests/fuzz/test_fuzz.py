"""The fuzzer's figures in CI: no parser raises anything but its error, takes 2 GiB or 5 s, blocks, or ends the process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FUZZER = Path(__file__).with_name("fuzz.py")
PARSERS = ("pt", "safetensors", "onnx", "rkd", "toml", "trigger")
MUTANTS, THROUGH_THE_COMMAND_LINE = 20_000, 40
MEMORY_BYTES = 2 * 2**30


def fuzz(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, str(FUZZER), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=FUZZER.parents[2])
    assert done.returncode in (0, 1), done.stderr[-3000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.mark.parametrize("parser", PARSERS)
@pytest.mark.timeout(1200)
def test_malformed_files_are_read_or_refused_and_nothing_else(parser: str) -> None:
    tally = fuzz("--parser", parser, "--count", str(MUTANTS))[parser]
    assert tally["findings"] == []
    assert tally["mutants"] == MUTANTS
    assert MUTANTS // 2 < tally["refused"] < MUTANTS, (
        "the mutants reach what is behind the first check, and not only good files"
    )
    assert tally["peak_bytes"] < MEMORY_BYTES


@pytest.mark.parametrize(
    ("parser", "what"),
    [
        ("takes_3_gib", "memory ran out"),
        pytest.param("blocks", "signal SIGALRM", marks=pytest.mark.slow),  # half a minute
    ],
)
def test_a_parser_that_takes_too_much_memory_or_time_is_a_finding(parser: str, what: str) -> None:
    (finding,) = fuzz("--parser", parser, "--count", "1")[parser]["findings"]
    assert what in finding["what"]


@pytest.mark.slow  # 240 programs are started: minutes
@pytest.mark.timeout(1200)
def test_malformed_files_end_the_command_line_with_exit_1_and_one_line() -> None:
    tallies = fuzz("--cli", str(THROUGH_THE_COMMAND_LINE))
    assert set(tallies) == set(PARSERS)
    for tally in tallies.values():
        assert tally["findings"] == []
        assert tally["refused"] == THROUGH_THE_COMMAND_LINE
        assert tally["peak_bytes"] < MEMORY_BYTES


def test_what_was_found_before_is_refused() -> None:
    tallies = fuzz("--replay")
    assert sum(tally["mutants"] for tally in tallies.values()) >= 1
    for tally in tallies.values():
        assert tally["findings"] == []
        assert tally["refused"] == tally["mutants"]
