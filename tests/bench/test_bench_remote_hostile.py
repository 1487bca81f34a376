"""A board that answers `rkd bench --host` with more than any answer: an ssh of the test's own stands for it."""

from __future__ import annotations

import os

import pytest

from rkd.bench import remote
from rkd.bench.options import BenchOptions
from rkd.errors import RemoteError

ENDLESS = """#!/bin/sh
case "$*" in
  *"cat result.json"*) exec cat /dev/zero;;
  *" bench "*) head -c 3000000 /dev/zero >&2;;
  *"cat >"*) cat > /dev/null;;
esac
"""
SILENT = """#!/bin/sh
case "$*" in *mkdir*) sleep 1000 & sleep 1000;; esac
"""


@pytest.fixture
def board(tmp_path, monkeypatch):
    def answers(script):
        ssh = tmp_path / "bin/ssh"
        ssh.parent.mkdir()
        ssh.write_text(script)
        ssh.chmod(0o755)
        monkeypatch.setenv("PATH", f"{ssh.parent}:{os.environ['PATH']}")

    return answers


def test_a_result_without_end_is_refused_and_no_line_of_progress_is_longer_than_a_block(
    board, make_bundle, monkeypatch
):
    monkeypatch.setattr(remote, "_LIMIT_BYTES", 2**20)
    board(ENDLESS)
    told = []
    with pytest.raises(RemoteError, match="its result has more than 1,048,576 bytes"):
        remote.bench_hosts([make_bundle()], BenchOptions(mode="quick"), ["me@board"], tell=told.append)
    assert max(map(len, told)) <= 65_536 + 100


def test_a_board_that_is_silent_is_given_up_though_a_child_holds_its_pipes(board, make_bundle, monkeypatch):
    monkeypatch.setattr(remote, "_QUICK_S", 0.5)
    monkeypatch.setattr(remote, "_CLEAN_S", 0.5)
    board(SILENT)
    with pytest.raises(RemoteError, match=r"no answer within 0\.5 s"):
        remote.bench_hosts([make_bundle()], BenchOptions(mode="quick"), ["me@board"])
