"""Measure on boards, from the workstation, through the system's OpenSSH with its configuration and its agent.

The bundles are copied into a new folder on each board, the board's own rkd measures them there, and its result comes
back; the folder is removed. Several boards work at once. Nothing asks for a password: a board that wants one is named.

Ctrl-C stops each board between two steps and ends the ssh of the present one; a board that measures is asked to stop and
to save, and its partial result is fetched. Ctrl-C again waits for no result.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from rkd.bench import result as bench_result
from rkd.bench.options import BenchOptions
from rkd.bundle import Bundle
from rkd.errors import ConfigError, RemoteError, RkdError, printable
from rkd.files import sha256
from rkd.progress import say

_SSH = ("-o", "BatchMode=yes", "-o", "ConnectTimeout=20", "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=8")
_HOST = re.compile(r"[A-Za-z0-9_][\w.@:%\[\]-]{0,254}", re.ASCII)
_PATH = 'PATH="$PATH:$HOME/.local/bin"; '  # a command over ssh reads no login files
_SHORT = "/tmp" if Path("/tmp").is_dir() else None  # noqa: S108 - a socket's path has at most 104 characters
_TEMPORARY = '"${TMPDIR:-/tmp}"'
_NOT_FOUND, _SSH_FAILED = 127, 255
_SAVED = (0, 129, 130, 143)  # done, or stopped by a signal after saving
_QUICK_S, _COPY_S, _CLEAN_S = 60, 1800, 10
_LOOK_UP_S = 0.5
_LIMIT_BYTES = 64 * 2**20
_LINE_BYTES = 64 * 2**10

Say = Callable[[str], None]


def bench_hosts(
    bundles: Sequence[Bundle],
    options: BenchOptions,
    hosts: Sequence[str],
    *,
    command: str = "rkd",
    per_class: bool = False,
    tell: Say = say,
) -> tuple[dict[str, Any], list[str]]:
    """Measure on every board at once.

    Args:
        bundles: to copy.
        options: what to measure; its `data` stays here.
        hosts: `user@board`, or names of the user's ssh configuration.
        command: how rkd is called on the boards.
        per_class: state ACC of each class.
        tell: told a line of progress, which begins with the board.

    Returns:
        One result with the entries of all boards that measured, in the order of `hosts` (comparisons are within a
        board), and what was wrong with the others.

    Raises:
        ConfigError: a host's name is none.
        RemoteError: no board measured.
        KeyboardInterrupt: Ctrl-C before any board had measured.
    """
    for host in hosts:
        if not _HOST.fullmatch(host):
            raise ConfigError(f"--host {printable(host)!r}: expected user@board or a name from ~/.ssh/config")
    boards_named = [host.rpartition("@")[2].lower() for host in hosts]
    if twice := [host for host, name in zip(hosts, boards_named, strict=True) if boards_named.count(name) > 1]:
        raise ConfigError(
            f"--host: {' and '.join(twice)} are one board named twice, which would disturb itself; name it once"
        )
    if shutil.which("ssh") is None:
        raise RemoteError("there is no ssh on this machine; install OpenSSH's client, or run rkd bench on the board")
    with (
        tempfile.TemporaryDirectory(prefix="rkd-ssh-", dir=_SHORT) as sockets,
        ThreadPoolExecutor(len(hosts), thread_name_prefix="rkd-host") as pool,
    ):
        boards = [_Board(host, command, tell, sockets) for host in hosts]
        waiting: list[Future[dict[str, Any]]] = []
        stopped = None
        try:
            waiting.extend(pool.submit(board.bench, bundles, options, per_class=per_class) for board in boards)
            _wait(waiting)
        except KeyboardInterrupt as interrupt:
            stopped = interrupt
            _stop(boards, waiting)
    results = [future.result() for future in waiting if future.exception() is None]
    errors = [error for future in waiting if (error := future.exception()) is not None]
    if unexpected := next((error for error in errors if not isinstance(error, RkdError)), None):
        raise unexpected
    if not results:
        raise stopped or RemoteError("; ".join(map(str, errors)))
    merged = _merge(results)
    merged["interrupted"] |= stopped is not None
    return merged, [str(error) for error in errors]


def _stop(boards: Sequence[_Board], waiting: Sequence[Future[dict[str, Any]]]) -> None:
    """Until all are done; another Ctrl-C interrupts all again."""
    done = False
    while not done:
        with suppress(KeyboardInterrupt):
            for board in boards:
                board.interrupt()
            _wait(waiting)
            done = True


def _wait(waiting: Sequence[Future[dict[str, Any]]]) -> None:
    """Until all are done, looking up now and then: a signal just before a lock is taken does not end the wait for it."""
    while wait(waiting, timeout=_LOOK_UP_S).not_done:
        pass


def _merge(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {
        "schema": bench_result.SCHEMA, "interrupted": any(one["interrupted"] for one in results),
        "comparisons": [], "entries": [],
    }  # fmt: skip
    for one in results:
        offset = len(merged["entries"])
        for pair in one["comparisons"]:
            merged["comparisons"].append({**pair, "first": pair["first"] + offset, "second": pair["second"] + offset})
        merged["entries"] += one["entries"]
    return merged


@dataclass
class _Board:
    """One board; all of its work is in one folder there, whose name is made here, so that it can always be removed."""

    host: str
    command: str
    tell: Say
    sockets: str
    _name: str = field(default_factory=lambda: f"rkd-{secrets.token_hex(16)}")
    _made: bool = False
    _measuring: bool = False
    _stopped: bool = False
    _child: subprocess.Popen[bytes] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)  # of the three above

    def bench(self, bundles: Sequence[Bundle], options: BenchOptions, *, per_class: bool) -> dict[str, Any]:
        """Copy, measure, fetch, clean up.

        Raises:
            RemoteError: naming the board, what it lacks and what to do.
        """
        self.tell(f"{self.host}: connecting ...")
        try:
            self._make_folder()
            self._check_rkd()
            names = [self._copy(bundle, number) for number, bundle in enumerate(bundles)]
            self._measure(names, options, per_class=per_class)
            return self._fetch()
        finally:
            self._clean_up()

    def interrupt(self) -> None:
        """Stop: the board's rkd is asked to save what it has; any other step, and it at the second call, is ended."""
        with self._lock:
            ask, self._stopped = self._measuring and not self._stopped, True
            if self._child and not ask:
                self._child.terminate()
        if ask:  # `stop` is for a board that has not yet begun
            with suppress(RkdError, OSError):
                self._ssh(self._there('touch stop; kill -INT "$(cat pid)"'), _CLEAN_S, aside=True)

    def _clean_up(self) -> None:
        """Leave nothing behind where the board can be reached; what went wrong before is what is told."""
        with suppress(RkdError, OSError, subprocess.TimeoutExpired):
            if self._measuring:  # the connection ended, not the board's rkd
                self._ssh(self._there('kill "$(cat pid)"'), _CLEAN_S, aside=True)
            if self._made or self._stopped:
                self._ssh(self._there(f"cd .. && rm -rf -- {self._name}"), _CLEAN_S, aside=True)
            command = self._command("-O", "exit")
            subprocess.run(command, capture_output=True, check=False, timeout=_CLEAN_S)  # noqa: S603 - as below

    def _there(self, line: str) -> str:
        """A line for the board's shell, in the folder."""
        return f"sh -c {shlex.quote(f'cd {_TEMPORARY}/{self._name} && {{ {line}; }}')}"

    def _make_folder(self) -> None:
        done = self._ssh(f"sh -c {shlex.quote(f'mkdir -m 700 {_TEMPORARY}/{self._name}')}", _QUICK_S)
        if done.returncode:
            raise self._unreachable(done)
        self._made = True

    def _check_rkd(self) -> None:
        done = self._ssh(f"{_PATH}{self.command} --version", _QUICK_S)
        if done.returncode == 0:
            self.tell(f"{self.host}: {_last_line(done.stdout)}")
            return
        if done.returncode == _SSH_FAILED:
            raise self._unreachable(done)
        python = self._ssh("python3 -c 'import sys; print(\"%d.%d\" % sys.version_info[:2])'", _QUICK_S)
        seen = f"it has Python {_last_line(python.stdout)}" if python.returncode == 0 else "it has no python3 either"
        said = "" if done.returncode == _NOT_FOUND else f" ({_last_line(done.stderr)})"
        raise RemoteError(
            f"{self.host}: the board has no working rkd: {shlex.quote(self.command)} does not run{said}; {seen}. Install "
            "it there (Python 3.10 or newer: pip install 'rkd-*.whl[ort]'), or say where it is, as in --remote-rkd "
            "/home/me/venv/bin/rkd"
        )

    def _copy(self, bundle: Bundle, number: int) -> str:
        name = _plain(f"{number}-{bundle.path.name}")
        size_mb = bundle.path.stat().st_size / 1e6
        self.tell(f"{self.host}: copying {bundle.path.name}, {size_mb:.1f} MB ...")
        with bundle.path.open("rb") as file:
            done = self._ssh(self._there(f"cat > {shlex.quote(name)}"), _COPY_S, stdin=file)
        if done.returncode:
            raise RemoteError(f"{self.host}: {bundle.path.name} could not be copied: {_last_line(done.stderr)}")
        return name

    def _measure(self, names: Sequence[str], options: BenchOptions, *, per_class: bool) -> None:
        arguments = [*names, "--out", "result.json", *_arguments(options, per_class=per_class)]
        line = " ".join(shlex.quote(argument) for argument in arguments)
        script = self._there(f"{_PATH}echo $$ > pid && [ ! -e stop ] && exec {self.command} bench {line}")
        with self._start(script, subprocess.DEVNULL, measuring=True) as child:
            last = ""
            for raw in iter(lambda: child.stderr.readline(_LINE_BYTES) if child.stderr else b"", b""):
                last = printable(raw.decode(errors="replace")).strip() or last
                if last:
                    self.tell(f"{self.host}: {last}")
            code = child.wait()
        with self._lock:
            self._measuring = code == _SSH_FAILED or code < 0
        self._check_stopped(unless=code in _SAVED)
        if code == _SSH_FAILED:
            raise RemoteError(f"{self.host}: the connection was lost while it measured; run it again")
        if code not in _SAVED:
            raise RemoteError(f"{self.host}: rkd bench failed there: {last.removeprefix('rkd: ') or f'status {code}'}")

    def _fetch(self) -> dict[str, Any]:
        done = self._ssh(self._there("cat result.json"), _QUICK_S, aside=True)
        self._check_stopped(unless=not done.returncode)
        if len(done.stdout) > _LIMIT_BYTES:
            raise RemoteError(f"{self.host}: its result has more than {_LIMIT_BYTES:,} bytes: not rkd bench's")
        if done.returncode:
            raise RemoteError(f"{self.host}: its result could not be fetched: {_last_line(done.stderr)}")
        try:
            value = json.loads(done.stdout)
        except (ValueError, RecursionError) as error:
            raise RemoteError(f"{self.host}: its result is not JSON ({error})") from error
        try:
            result = bench_result.verify(value, f"{self.host}: its result")
        except RkdError as error:
            raise RemoteError(f"{error}; install the same rkd there as here") from error
        for entry in result["entries"]:
            entry["host"] = self.host
        return result

    def _command(self, *more: str) -> list[str]:
        """One connection carries all commands: one login, one touch of a security key."""
        shared = (
            "-o",
            "ControlMaster=auto",
            "-o",
            "ControlPersist=120",
            "-o",
            f"ControlPath={self.sockets}/{sha256(self.host.encode())[:16]}",
        )
        return ["ssh", *_SSH, *shared, *more, "--", self.host]

    def _check_stopped(self, *, unless: bool = False) -> None:
        if self._stopped and not unless:
            raise RemoteError(f"{self.host}: stopped")

    def _start(self, line: str, stdin: Any, *, measuring: bool = False, aside: bool = False) -> subprocess.Popen[bytes]:
        """Start a line on the board; once stopped, only what is `aside` of the work."""
        with self._lock:
            self._check_stopped(unless=aside)
            child = subprocess.Popen(  # noqa: S603 - the system's ssh
                [*self._command(), line],
                stdin=stdin,
                stdout=subprocess.DEVNULL if measuring else subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is passed on by `interrupt`, not by the terminal
            )
            if not aside:
                self._child, self._measuring = child, measuring
        return child

    def _ssh(
        self, line: str, timeout_s: float, stdin: Any = subprocess.DEVNULL, *, aside: bool = False
    ) -> subprocess.CompletedProcess[bytes]:
        with self._start(line, stdin, aside=aside) as child:
            late = threading.Timer(timeout_s, _end, (child,))
            late.start()
            with ThreadPoolExecutor(2) as readers:
                out, err = readers.map(lambda stream: _read(stream, child), (child.stdout, child.stderr))
            child.wait()
            ended = late.is_alive()
            late.cancel()
        self._check_stopped(unless=aside)
        if not ended:
            raise RemoteError(f"{self.host}: no answer within {timeout_s:g} s; is the board up and reachable?")
        return subprocess.CompletedProcess(child.args, child.returncode, out, err)

    def _unreachable(self, done: subprocess.CompletedProcess[bytes]) -> RemoteError:
        said = _last_line(done.stderr) or f"status {done.returncode}"
        if re.search(r"permission denied|too many authentication", said, re.IGNORECASE):
            how = (
                "it wants a password or another key, and rkd asks for none: make a key work first "
                f"(ssh-copy-id {self.host}, or ssh-add), until `ssh {self.host} true` asks nothing"
            )
        elif re.search(r"host key", done.stderr.decode(errors="replace"), re.IGNORECASE):
            how = f"its host key is unknown or changed: log in once by hand with `ssh {self.host}` and look at it"
        elif re.search(r"resolve|name or service not known", said, re.IGNORECASE):
            how = "no such host: check the name, or add it to ~/.ssh/config"
        else:
            how = f"check that the board is up and `ssh {self.host} true` works"
        return RemoteError(f"{self.host}: {said}; {how}")


def _arguments(options: BenchOptions, *, per_class: bool) -> list[str]:
    """The options of the board's `rkd bench`."""
    flags = {
        "--quick": options.mode == "quick",
        "--mlperf": options.mode == "mlperf",
        "--lock-clocks": options.lock_clocks,
        "--per-class": per_class,
    }
    return [
        *(flag for flag, given in flags.items() if given),
        "--batch", ",".join(map(str, options.batches)),
        "--threads", str(options.threads or 0),
    ]  # fmt: skip


def _plain(name: str) -> str:
    """A file name that no shell and no option parser takes for anything else."""
    return re.sub(r"[^\w.-]", "_", name, flags=re.ASCII)


def _read(stream: IO[bytes] | None, child: subprocess.Popen[bytes]) -> bytes:
    """What a child says, and its end where that has more than 64 MiB."""
    said = stream.read(_LIMIT_BYTES + 1) if stream else b""
    if len(said) > _LIMIT_BYTES:
        _end(child)
    return said


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill a child and its children, which could hold its pipes open."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def _last_line(text: bytes) -> str:
    plain = text.decode(errors="replace").replace("\r", "")  # ssh ends its lines for a terminal
    lines = [line for line in printable(plain).splitlines() if line.strip()]
    return lines[-1].strip()[:500] if lines else ""
