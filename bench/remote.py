"""Measure on boards, from the workstation, through the system's OpenSSH with its configuration and its agent.

The bundles are copied into a new folder on each board, the board's own rkd measures them there, and its result comes
back; the folder is removed. Several boards work at once. Nothing asks for a password: a board that wants one is named.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

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
_NOT_FOUND, _SSH_FAILED = 127, 255
_QUICK_S, _COPY_S = 60, 1800
_LIMIT_BYTES = 64 * 2**20

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
    """
    for host in hosts:
        if not _HOST.fullmatch(host):
            raise ConfigError(f"--host {printable(host)!r}: expected user@board or a name from ~/.ssh/config")
    if len(set(hosts)) < len(hosts):
        raise ConfigError("--host: a board is there twice; it would disturb itself")
    if shutil.which("ssh") is None:
        raise RemoteError("there is no ssh on this machine; install OpenSSH's client, or run rkd bench on the board")
    with (
        tempfile.TemporaryDirectory(prefix="rkd-ssh-", dir=_SHORT) as sockets,
        ThreadPoolExecutor(len(hosts), thread_name_prefix="rkd-host") as pool,
    ):
        boards = [_Board(host, command, tell, sockets) for host in hosts]
        waiting = [pool.submit(board.bench, bundles, options, per_class=per_class) for board in boards]
        try:
            results = [future.result() for future in waiting if future.exception() is None]
        except KeyboardInterrupt:
            for board in boards:
                board.interrupt()
            results = [future.result() for future in waiting if future.exception() is None]
            if not results:
                raise
        errors = [str(error) for future in waiting if (error := future.exception()) is not None]
        unexpected = next((e for f in waiting if (e := f.exception()) and not isinstance(e, RkdError)), None)
    if unexpected:
        raise unexpected
    if not results:
        raise RemoteError("; ".join(errors))
    return _merge(results), errors


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
    """One board; all of its work is in one folder there."""

    host: str
    command: str
    tell: Say
    sockets: str
    _folder: str = ""
    _running: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def bench(self, bundles: Sequence[Bundle], options: BenchOptions, *, per_class: bool) -> dict[str, Any]:
        """Copy, measure, fetch, clean up.

        Raises:
            RemoteError: naming the board, what it lacks and what to do.
        """
        self.tell(f"{self.host}: connecting ...")
        self._folder = self._new_folder()
        try:
            self._check_rkd()
            names = [self._copy(bundle, number) for number, bundle in enumerate(bundles)]
            self._measure(names, options, per_class=per_class)
            return self._fetch()
        finally:
            self._ssh(f"rm -rf -- {shlex.quote(self._folder)}", _QUICK_S)
            subprocess.run(self._command("-O", "exit"), capture_output=True, check=False)  # noqa: S603 - as below

    def interrupt(self) -> None:
        """Ask the board's rkd to stop and save what it has."""
        if self._running and self._folder:
            self._ssh(f"kill -INT $(cat {shlex.quote(self._folder)}/pid)", _QUICK_S)

    def _new_folder(self) -> str:
        done = self._ssh("umask 077; mktemp -d", _QUICK_S)
        folder = done.stdout.decode(errors="replace").strip().splitlines()[-1:] or [""]
        if done.returncode:
            raise self._unreachable(done)
        if not re.fullmatch(r"/[\w./-]+", folder[0], re.ASCII):
            raise RemoteError(f"{self.host}: mktemp -d gave {printable(folder[0])!r}; is this a Linux board?")
        return folder[0]

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
        name = f"{number}-{bundle.path.name}"
        size_mb = bundle.path.stat().st_size / 1e6
        self.tell(f"{self.host}: copying {bundle.path.name}, {size_mb:.1f} MB ...")
        target = PurePosixPath(self._folder) / _plain(name)
        with bundle.path.open("rb") as file:
            done = self._ssh(f"cat > {shlex.quote(str(target))}", _COPY_S, stdin=file)
        if done.returncode:
            raise RemoteError(f"{self.host}: {bundle.path.name} could not be copied: {_last_line(done.stderr)}")
        return target.name

    def _measure(self, names: Sequence[str], options: BenchOptions, *, per_class: bool) -> None:
        arguments = [*names, "--out", "result.json", *_arguments(options, per_class=per_class)]
        line = " ".join(shlex.quote(argument) for argument in arguments)
        script = f"{_PATH}cd {shlex.quote(self._folder)} && echo $$ > pid && exec {self.command} bench {line}"
        self._running = True
        with subprocess.Popen(  # noqa: S603 - the system's ssh
            [*self._command(), f"sh -c {shlex.quote(script)}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is passed on by `interrupt`, not by the terminal
        ) as child:
            last = ""
            for raw in child.stderr or ():
                last = printable(raw.decode(errors="replace")).strip() or last
                if last:
                    self.tell(f"{self.host}: {last}")
            code = child.wait()
        self._running = False
        if code == _SSH_FAILED:
            raise RemoteError(f"{self.host}: the connection was lost while it measured; run it again")
        if code not in (0, 130, 143):
            raise RemoteError(f"{self.host}: rkd bench failed there: {last.removeprefix('rkd: ') or f'status {code}'}")

    def _fetch(self) -> dict[str, Any]:
        done = self._ssh(f"cat {shlex.quote(self._folder)}/result.json", _QUICK_S)
        if done.returncode or len(done.stdout) > _LIMIT_BYTES:
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
            entry["host"] = self.host.rpartition("@")[2]
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

    def _ssh(self, line: str, timeout_s: float, stdin: Any = subprocess.DEVNULL) -> subprocess.CompletedProcess[bytes]:
        try:
            return subprocess.run(  # noqa: S603 - the system's ssh
                [*self._command(), line],
                stdin=stdin,
                capture_output=True,
                timeout=timeout_s,
                check=False,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired as error:
            raise RemoteError(
                f"{self.host}: no answer within {timeout_s:g} s; is the board up and reachable?"
            ) from error

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
        "--seed", str(options.seed),
    ]  # fmt: skip


def _plain(name: str) -> str:
    """A file name that no shell and no option parser takes for anything else."""
    return re.sub(r"[^\w.-]", "_", name, flags=re.ASCII)


def _last_line(text: bytes) -> str:
    plain = text.decode(errors="replace").replace("\r", "")  # ssh ends its lines for a terminal
    lines = [line for line in printable(plain).splitlines() if line.strip()]
    return lines[-1].strip()[:500] if lines else ""
