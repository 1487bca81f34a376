"""Ctrl-C while `rkd bench --host` works: an ssh that runs its line on this machine, and hangs where it is told to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from rkd.bench import result

# Its last argument is the line. It opens two pipes: `here` says that it hangs, `on` lets it go.
SSH = """#!/bin/sh
for line; do :; done
case " $* " in *" -O exit "*) exit;; esac
printf '%s\\n' "$line" >> {folder}/lines
case "$line" in *"{hang}"*) echo > {folder}/here; read _ < {folder}/on;; esac
sh -c "$line"
code=$?
case "$line" in *"touch stop"*) {asked};; esac
exit $code
"""
# It saves what it has at SIGINT, as the real one does.
RKD = """#!{python}
import pathlib, shutil, signal, sys
if sys.argv[1] == "--version":
    sys.exit()
def stop(*_):
    shutil.copy("{folder}/partial.json", "result.json")
    sys.exit(130)
signal.signal(signal.SIGINT, stop)
pathlib.Path("{folder}/here").write_text("")
signal.pause()
"""


@dataclass
class Board:
    """A call of `rkd bench --host` in `folder`; the board's temporary folder is `board` in it."""

    folder: Path
    bundle: Path

    def stop_at(self, hang, asked=":"):
        """Start, send SIGINT once the line that holds `hang` is reached; exit code and standard error."""
        (self.folder / "bin").mkdir()
        (self.folder / "board").mkdir()
        for name in ("here", "on"):
            os.mkfifo(self.folder / name)
        self._program("bin/ssh", SSH.format(folder=self.folder, hang=hang, asked=asked))
        self._program("rkd", RKD.format(folder=self.folder, python=sys.executable))
        environment = {
            **os.environ,
            "PATH": f"{self.folder}/bin:{os.environ['PATH']}",
            "TMPDIR": str(self.folder / "board"),
        }
        child = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "rkd",
                "bench",
                str(self.bundle),
                "--host",
                "one",
                "--remote-rkd",
                f"{self.folder}/rkd",
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        (self.folder / "here").read_text()
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=120)
        return child.returncode, said

    @property
    def lines(self):
        return (self.folder / "lines").read_text().splitlines()

    def _program(self, name, text):
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o755)


@pytest.fixture
def board(folder, make_bundle):
    return Board(folder, make_bundle().path)


@pytest.mark.parametrize("step", ["mkdir", "--version", "linear.ort-cpu.rkd"])
def test_ctrl_c_before_the_board_measures_ends_the_step_and_no_other_begins(board, step):
    code, said = board.stop_at(step)
    assert code == 130
    assert said.splitlines()[-1] == "rkd: stopped"
    assert step in board.lines[-2]
    assert "rm -rf" in board.lines[-1]
    assert not [line for line in board.lines if " bench " in line]
    assert list((board.folder / "board").iterdir()) == []
    assert not (board.folder / "result.json").exists()


def test_ctrl_c_while_the_board_measures_brings_its_partial_result(board, measured):
    (board.folder / "partial.json").write_text(json.dumps(dict(measured, interrupted=True)))
    code, said = board.stop_at("nothing")
    assert code == 130
    assert "interrupted; what was measured is in result.json" in said
    assert result.read(board.folder / "result.json")["interrupted"] is True
    assert list((board.folder / "board").iterdir()) == []


def test_ctrl_c_just_before_the_board_begins_keeps_it_from_beginning(board):
    """The line is on its way, and the board has no process yet that could be interrupted."""
    code, said = board.stop_at("/rkd bench ", asked=f"echo > {board.folder}/on")
    assert code == 130
    assert said.splitlines()[-1] == "rkd: stopped"
    assert list((board.folder / "board").iterdir()) == []
