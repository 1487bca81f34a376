"""The process that one job of a suite runs in: `python -m rkd.suite.child`, with the task as JSON on its first line.

Standard input is its leash. As long as the parent holds it, the job works; when it is let go, on purpose or because
the parent was killed, the job gets one SIGTERM, saves and ends. A child in its own session sees no Ctrl-C itself.
"""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from rkd.errors import RunError

_PATIENCE_S = 60.0  # for the process of a killed suite to save and leave


def run(task: dict[str, Any]) -> None:
    """Do a task in this process; like a command, it leaves by SystemExit where it does not end well.

    Args:
        task: `argv` of an rkd command, or `score`, the arguments of `rkd.suite.scoring.score_control`; and `wait_for`,
            a run directory that another process may still be leaving.
    """
    from rkd.cli.app import guarded

    @guarded
    def work() -> None:
        if task.get("wait_for"):
            wait_until_free(Path(task["wait_for"]), _PATIENCE_S)
        if task.get("score"):
            from rkd.suite.scoring import score_control

            score_control(**task["score"])

    import typer

    try:
        work()
    except typer.Exit as left:
        raise SystemExit(left.exit_code) from None
    if task.get("argv"):
        from rkd.cli import main

        sys.argv = ["rkd", *task["argv"]]
        main()


def wait_until_free(path: Path, patience_s: float) -> None:
    """Wait until no other process works in a run directory.

    Raises:
        RunError: one still does after `patience_s`.
    """
    if not path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        ends = time.monotonic() + patience_s
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > ends:
                    raise RunError(f"{path}: another process is working in this run; stop it") from None
                time.sleep(0.2)
            else:
                return
    finally:
        os.close(descriptor)


def _limit_memory(limit_mib: int) -> None:
    """Bound what the process may allocate; an allocation beyond it fails, which is an ordinary error."""
    if limit_mib:
        limit_bytes = limit_mib * 2**20
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        wanted = limit_bytes if hard == resource.RLIM_INFINITY else min(limit_bytes, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (wanted, hard))


def _obey(leash: int) -> None:
    """Wait in a thread for the leash to be let go, then ask this very process to stop."""

    def watch() -> None:
        while os.read(leash, 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _first_line(descriptor: int) -> bytes:
    """Up to the first newline, and not a byte more than it takes."""
    line = b""
    while not line.endswith(b"\n"):
        piece = os.read(descriptor, 1)
        if not piece:
            raise SystemExit(2)
        line += piece
    return line


if __name__ == "__main__":
    given = json.loads(_first_line(0))
    _obey(0)
    _limit_memory(int(given.get("memory_mib", 0)))
    run(given)
