"""Run jobs in processes of their own, on this machine; `rkd.suite.ray_launcher` does it on a cluster."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from rkd.files import open_log, storage_errors

_TAIL_BYTES = 16_384
_TURN_S = 60.0


@dataclass(frozen=True)
class Task:
    """What a job's process is told.

    Attributes:
        job: the job's name.
        folder: where it works, absolute.
        log: where its output goes, absolute; it is appended.
        argv: of an rkd command; empty for a score.
        score: arguments of `rkd.suite.scoring.score_control`; None for a command.
        wait_for: a run directory, relative to `folder`, that another process may still be leaving.
        memory_mib: what it may allocate; 0 for no limit.
        threads: CPU threads.
    """

    job: str
    folder: str
    log: str
    argv: tuple[str, ...] = ()
    score: Mapping[str, Any] | None = None
    wait_for: str = ""
    memory_mib: int = 0
    threads: int = 1


@dataclass(frozen=True)
class Outcome:
    """How a job's process ended.

    Attributes:
        job: the job's name.
        code: its exit code; negative for the signal that killed it.
        seconds: wall time.
        said: why it failed, in its own words where it had some.
        host: the machine it ran on.
    """

    job: str
    code: int
    seconds: float
    said: str = ""
    host: str = ""


class Launcher(Protocol):
    """Where jobs run."""

    @property
    def slots(self) -> int:
        """Jobs at once."""
        ...

    def start(self, task: Task) -> None:
        """Start a job; `ended` will tell of it."""
        ...

    def ended(self, timeout_s: float) -> list[Outcome]:
        """The jobs that ended, after waiting for one at most so long."""
        ...

    def stop(self) -> None:
        """Ask all jobs to save and end; `ended` will tell of them."""
        ...

    def kill(self) -> None:
        """End all jobs at once."""
        ...

    def close(self) -> None:
        """Let go of whatever is held."""
        ...


class Leash:
    """Holds a child process: `release` asks it to stop, once; a leash that was released holds nobody."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._released = False
        self._lock = threading.Lock()

    def hold(self, process: subprocess.Popen[bytes]) -> None:
        """Take a process on the leash."""
        with self._lock:
            self._process = process
            released = self._released
        if released:
            self._let_go(process)

    def release(self) -> None:
        """Ask the process to save and end."""
        with self._lock:
            process, self._released = self._process, True
        if process is not None:
            self._let_go(process)

    def kill(self) -> None:
        """End the process at once."""
        self._released = True
        if self._process is not None:
            self._process.kill()

    def _let_go(self, process: subprocess.Popen[bytes]) -> None:
        try:
            if process.stdin is not None:
                process.stdin.close()
        except OSError:  # it is gone already
            return


def run_task(task: Task, leash: Leash) -> Outcome:
    """Run one job to its end in a process of its own.

    Raises:
        StorageError: its log cannot be written.
    """
    started = time.monotonic()
    log = Path(task.log)
    with open_log(log) as output:
        begin = output.tell()
        output.write(f"$ {_shown(task)}\n".encode())
        output.flush()
        with storage_errors(Path(task.folder)):
            process = subprocess.Popen(
                [sys.executable, "-m", "rkd.suite.child"], cwd=task.folder, env=_environment(task.threads),
                stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
    try:
        if process.stdin is not None:
            process.stdin.write(json.dumps(asdict(task)).encode() + b"\n")
            process.stdin.flush()
    except OSError:  # it ended before it read its task; its exit code and its log say why
        pass
    leash.hold(process)
    try:
        code = _ended(process)
    except BaseException:
        leash.release()
        process.wait()
        raise
    finally:
        leash.release()
    said = explain(code, _tail(log, begin), task.memory_mib) if code else ""
    return Outcome(task.job, code, time.monotonic() - started, said, os.uname().nodename)


def _ended(process: subprocess.Popen[bytes]) -> int:
    """Wait for the exit code. With a timeout Python waits in small steps, between which a Ray task is cancelled."""
    while True:
        try:
            return process.wait(_TURN_S)
        except subprocess.TimeoutExpired:
            continue


def explain(code: int, printed: str, memory_mib: int) -> str:
    """Why a job failed, in one line.

    Args:
        code: its exit code; negative for a signal.
        printed: the end of what it printed.
        memory_mib: its limit.
    """
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    last = lines[-1].removeprefix("rkd: ") if lines else "it printed nothing"
    limit = f" (its limit was {memory_mib:,} MiB: --memory)" if memory_mib else ""
    if code == -signal.SIGKILL:
        return f"killed, most likely because this machine ran out of memory: fewer --jobs need less{limit}"
    if re.search(r"out of memory|failed to map segment|MemoryError|bad_alloc|[Cc]annot allocate memory", last):
        return f"out of memory{limit}" + ("" if last.startswith("internal error") else f": {last}")
    if code < 0:
        name = signal.Signals(-code).name if -code in {int(s) for s in signal.Signals} else str(-code)
        return f"killed by {name}; the last it printed: {last}"
    return last


class LocalLauncher:
    """Jobs on this machine, each held by a thread."""

    def __init__(self, jobs: int) -> None:
        self.slots = jobs
        self._ended: queue.Queue[Outcome] = queue.Queue()
        self._leashes: dict[str, Leash] = {}

    def start(self, task: Task) -> None:
        """See `Launcher`."""
        leash = self._leashes[task.job] = Leash()

        def work() -> None:
            try:
                self._ended.put(run_task(task, leash))
            except Exception as error:  # noqa: BLE001  (whatever it is, the suite goes on with the others)
                self._ended.put(Outcome(task.job, 1, 0.0, str(error)))

        threading.Thread(target=work, daemon=True).start()

    def ended(self, timeout_s: float) -> list[Outcome]:
        """See `Launcher`."""
        found = take_all(self._ended.get, self._ended.get_nowait, timeout_s)
        for outcome in found:
            del self._leashes[outcome.job]
        return found

    def stop(self) -> None:
        """See `Launcher`."""
        for leash in self._leashes.values():
            leash.release()

    def kill(self) -> None:
        """See `Launcher`."""
        for leash in self._leashes.values():
            leash.kill()

    def close(self) -> None:
        """See `Launcher`."""


def take_all(first: Callable[..., Outcome], more: Callable[[], Outcome], timeout_s: float) -> list[Outcome]:
    """Wait for one outcome, then take what else is there."""
    found: list[Outcome] = []
    try:
        found.append(first(timeout=timeout_s))
        while True:
            found.append(more())
    except queue.Empty:
        return found


def _environment(threads: int) -> dict[str, str]:
    """The parent's, with this very rkd importable from any folder, and so many threads."""
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "COLUMNS": "120", "PYTHONUNBUFFERED": "1"}
    if "site-packages" not in root and "dist-packages" not in root:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", ""))))
    return environment


def _shown(task: Task) -> str:
    import shlex

    return f"rkd {shlex.join(task.argv)}" if task.argv else f"score {task.job.partition(':')[2]}"


def _tail(log: Path, begin: int) -> str:
    """The end of what this attempt printed."""
    with storage_errors(log), log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(begin, size - _TAIL_BYTES))
        return file.read().decode(errors="replace")


__all__: Sequence[str] = ("Launcher", "Leash", "LocalLauncher", "Outcome", "Task", "explain", "run_task")
