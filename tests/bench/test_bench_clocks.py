from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from rkd.bench.sensors.clocks import locked_clocks
from rkd.errors import RuntimeUnavailableError


@pytest.fixture
def board(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()
    return tmp_path


def governor(root, core, text=None):
    file = root / f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_governor"
    if text is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return file.read_text()


def tool(root, body):
    path = root / "bin/jetson_clocks"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_governors_come_back_also_after_an_error(board):
    governor(board, 0, "schedutil\n"), governor(board, 1, "ondemand\n")
    with pytest.raises(ZeroDivisionError), locked_clocks([0, 1], board) as done:
        assert done == "governor performance"
        assert governor(board, 0) == governor(board, 1) == "performance"
        raise ZeroDivisionError
    assert (governor(board, 0), governor(board, 1)) == ("schedutil", "ondemand")


def test_a_jetson_stores_sets_and_restores(board):
    log = board / "log"
    tool(board, f'echo "$1" >> {log}')
    with locked_clocks([0], board) as done:
        assert done == "jetson_clocks"
        assert log.read_text() == "--store\n\n"
    assert log.read_text() == "--store\n\n--restore\n"


def test_a_tool_that_refuses_is_one_line_that_says_what_to_do(board):
    tool(board, "echo 'Error: Run this script as a root user' >&2; exit 1")
    with (
        pytest.raises(RuntimeUnavailableError, match="Run this script as a root user; run rkd bench as root"),
        locked_clocks([0], board),
    ):
        pytest.fail("measured")


def test_a_machine_without_governors_says_so(board):
    with pytest.raises(RuntimeUnavailableError, match="no clock governor"), locked_clocks([0], board):
        pytest.fail("measured")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anything")
def test_without_permission_nothing_is_changed(board, capsys):
    governor(board, 0, "schedutil")
    (board / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").chmod(0o444)
    with pytest.raises(RuntimeUnavailableError, match="as root"), locked_clocks([0], board):
        pytest.fail("measured")
    assert governor(board, 0) == "schedutil"
    assert capsys.readouterr().err == ""


def test_every_core_is_set_back_also_after_one_that_refuses(board, capsys):
    cores = [0, 1, 2]
    for core in cores:
        governor(board, core, "schedutil")
    with pytest.raises(ZeroDivisionError), locked_clocks(cores, board):
        refusing = board / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"
        refusing.unlink()
        refusing.mkdir()
        raise ZeroDivisionError
    assert (governor(board, 1), governor(board, 2)) == ("schedutil", "schedutil")
    said = capsys.readouterr().err
    assert said.count("the clocks are not as they were") == 1
    assert str(refusing) in said


STOPPED_TWICE = """
import os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests may ignore it, as nohup does
from rkd.bench.sensors.clocks import locked_clocks
from rkd.signals import stop_requests
try:
    with stop_requests(), locked_clocks([0]):
        os.kill(os.getpid(), {number})
except KeyboardInterrupt:
    print("stopped")
"""


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_again_while_the_clocks_come_back_waits_until_they_are_back(board, stop):
    """The tool itself sends it, many times, while it restores, as a terminal does, to the whole group of the bench."""
    log = board / "log"
    press = f"i=0; while [ $i -lt 20000 ]; do kill -s {stop.name[3:]} -- -$PPID; i=$((i + 1)); done"
    tool(board, f'if [ "$1" = --restore ]; then {press}; fi\necho "did $1" >> {log}')
    done = subprocess.run(
        [sys.executable, "-c", STOPPED_TWICE.format(number=int(stop))],
        capture_output=True,
        text=True,
        start_new_session=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "stopped\n", "")
    assert log.read_text() == "did --store\ndid \ndid --restore\n"
