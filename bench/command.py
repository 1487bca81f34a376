"""What `rkd bench` does: find and verify bundles, measure here or on boards, save, print, hold against limits."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from rkd.bench import result as bench_result
from rkd.bench import table
from rkd.bench.gates import parse_gates
from rkd.bench.options import BenchOptions
from rkd.bench.remote import bench_hosts
from rkd.bench.session import run
from rkd.bench.validity import BUDGETS
from rkd.bundle import Bundle, read_bundle
from rkd.errors import (
    BundleError,
    ConfigError,
    GateError,
    PartialError,
    RemoteError,
    RkdError,
    StoppedError,
    StorageError,
)
from rkd.files import check_output, check_writable
from rkd.progress import say, stage_lines
from rkd.signals import stop_requests


@dataclass(frozen=True)
class Request:
    """One call of `rkd bench`.

    Attributes:
        bundles: files; empty for the newest in this folder.
        options: what to measure.
        gates: limits, as text.
        require_valid: whether an invalid result, or one beyond the target's budgets, fails.
        per_class: state ACC of each class.
        hosts: boards to measure on; empty for this machine.
        remote_rkd: how rkd is called there.
        out: where the result goes.
        json_output: print the result as JSON instead of a table.
    """

    bundles: tuple[Path, ...] = ()
    options: BenchOptions = field(default_factory=BenchOptions)
    gates: tuple[str, ...] = ()
    require_valid: bool = False
    per_class: bool = False
    hosts: tuple[str, ...] = ()
    remote_rkd: str = "rkd"
    out: Path = Path("result.json")
    json_output: bool = False


def bench_command(request: Request) -> dict[str, Any]:
    """Measure bundles and write the result.

    Raises:
        BundleError: no bundle, or one that does not verify.
        ConfigError: a gate that cannot be read, options that contradict each other, or `out` is an input.
        RkdError: after the partial result was written: what made the measurement fail half-way.
        GateError: after the result was written: a limit is broken, or the result is invalid or beyond its budgets where it must not be.
        RemoteError: a board cannot be reached or cannot measure; the others' results were written.
        StoppedError: Ctrl-C, after the partial result was written.
        StorageError: the result cannot be written; it is on standard output.
    """
    gates = parse_gates(request.gates)
    paths = request.bundles or (newest_bundle(Path()),)
    check_output(request.out, [*paths, *filter(None, [request.options.data])])
    bundles = [read_bundle(path) for path in paths]
    check_writable(request.out)
    failed: list[str] = []
    failure: BaseException | None = None
    with stop_requests() as stop:
        if request.hosts:
            measured, failed = _on_boards(bundles, request)
        else:
            try:
                with stage_lines() as tell:
                    measured = run(bundles, request.options, tell, per_class=request.per_class)
            except PartialError as partial:
                measured, failure = partial.measured, partial.__cause__
    for entry in measured["entries"]:
        entry["gates"] = [gate.judge(entry) for gate in gates]
    try:
        _show(measured, request)
    finally:  # standard output may be full or closed
        _save(measured, request)
    if failure:
        _fail(failure, request.out)
    if measured["interrupted"]:
        raise StoppedError(
            f"interrupted; what was measured is in {request.out}, marked invalid", stop.signal_number or signal.SIGINT
        )
    if failed:
        raise RemoteError("; ".join(failed))
    _require(measured, request)
    return measured


def newest_bundle(folder: Path) -> Path:
    """The `.rkd` file that was written last.

    Raises:
        BundleError: there is none.
    """
    found = [path for path in folder.glob("*.rkd") if path.is_file()]
    if not found:
        raise BundleError(
            f"no bundle (.rkd) in {folder.resolve()}: name one, or make one on the workstation with rkd export"
        )
    newest = max(found, key=lambda path: (path.stat().st_mtime_ns, path.name))
    if len(found) > 1:
        say(f"{newest.name} is the newest of {len(found)} bundles here; name several to compare them")
    return newest


def _on_boards(bundles: list[Bundle], request: Request) -> tuple[dict[str, Any], list[str]]:
    if request.options.data is not None:
        raise ConfigError("--data is a folder of this machine: log in to the board and run rkd bench --data there")
    return bench_hosts(bundles, request.options, request.hosts, command=request.remote_rkd, per_class=request.per_class)


def _fail(failure: BaseException, out: Path) -> None:
    """Raise what ended a measurement, after its partial result was written."""
    if not isinstance(failure, RkdError):
        raise failure
    raise RkdError(f"{failure}; what was measured before is in {out}, marked invalid") from failure


def _show(measured: dict[str, Any], request: Request) -> None:
    if request.json_output:
        print(json.dumps(measured, indent=2))  # noqa: T201
        return
    Console(highlight=False).print(table.render(measured))


def _save(measured: dict[str, Any], request: Request) -> None:
    """Write the result; to standard output where the disk does not take it."""
    try:
        bench_result.write(request.out, measured)
    except StorageError:
        if not request.json_output:
            print(json.dumps(measured, indent=2))  # noqa: T201
        raise
    if not request.json_output:
        line = f"wrote {request.out}; next: rkd report {request.out}"
        Console(highlight=False).print(line, markup=False, soft_wrap=True)


def _require(measured: dict[str, Any], request: Request) -> None:
    named = list(zip(table.labels(measured["entries"]), measured["entries"], strict=True))
    said = "text" if request.json_output else "gate"  # the table has told the rest
    broken = [f"{name}: {gate[said]}" for name, entry in named for gate in entry["gates"] if not gate["passed"]]
    if broken:
        raise GateError(f"{len(broken)} gate{'s' if len(broken) > 1 else ''} failed: {'; '.join(broken)}")
    invalid = [
        f"{name}: {reason['code']}: {reason['text']}"
        for name, entry in named
        for reason in (
            *entry["validity"]["reasons"],
            *(finding for finding in entry["findings"] if finding["code"] in BUDGETS),
        )
    ]
    if request.require_valid and invalid:
        raise GateError(f"the result is not valid: {'; '.join(invalid)}")
