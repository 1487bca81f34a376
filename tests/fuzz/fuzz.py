"""Fuzz the parsers of files from outside.

    python tests/fuzz/fuzz.py --count 20000                # so many mutants of each parser
    python tests/fuzz/fuzz.py --seconds 600 --seed 1       # as many as go into ten minutes
    python tests/fuzz/fuzz.py --cli 40                     # so many refused ones of each through the command line
    python tests/fuzz/fuzz.py --replay                     # what was found before

The mutants are read in a child whose data may take 2 GiB, each for at most 5 s of processor time and 30 s by the
clock; the kernel ends a child that goes beyond. A parser may return or raise `RkdError`, but not because an allocation
failed; everything else is a finding, is written to `--keep`, and makes the exit code 1. The last line is JSON.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))
from limits import CPU_SECONDS, MEMORY_BYTES, OUT_OF_MEMORY, WALL_SECONDS, limit_this_process, set_timers

ROUND = 20_000  # mutants between two looks at the clock
SHARED_MEMORY = Path("/dev/shm")
NAMES = ("pt", "safetensors", "onnx", "rkd", "toml", "trigger")
SELF_TESTS = ("takes_3_gib", "blocks")  # every file is a finding


@dataclass
class Tally:
    """What came of one parser's mutants."""

    mutants: int = 0
    refused: int = 0
    findings: list[dict[str, Any]] = field(default_factory=list)
    peak_bytes: int = 0
    seconds: float = 0.0


# ------------------------------------------------------------------------------------------------------------- child


def child() -> int:
    """Serve requests from standard input, one JSON line each: read mutants, answer with one line."""
    import parsers

    known = parsers.all_parsers() | parsers.self_tests()
    limit_this_process()
    with tempfile.TemporaryDirectory(dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None) as folder:
        os.chdir(folder)  # a parser that writes somewhere writes here
        for line in sys.stdin:
            answer = serve(json.loads(line), known)
            answer["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            print(json.dumps(answer), flush=True)
    return 0


def serve(request: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """Read the mutants of one request; where the process is is always the last line of the progress file."""
    import parsers

    parser = known[request["parser"]]
    path = Path(parser.file)
    place = os.open(request["place"], os.O_WRONLY)
    findings, refused = [], 0
    for number in range(request["first"], request["first"] + request["count"]):
        os.pwrite(place, b"%020d" % number, 0)
        path.write_bytes(parser.mutant(request["seed"], number))
        set_timers(CPU_SECONDS, WALL_SECONDS)
        try:
            refused += parsers.refused(parser, path)
        except Exception as error:
            findings.append({"number": number, "what": f"{type(error).__name__}: {str(error)[:300]}"})
        set_timers(0, 0)
    os.close(place)
    if strangers := [name for name in sorted(p.name for p in Path().iterdir()) if name != path.name]:
        findings.append({"number": request["first"], "what": f"wrote {strangers}"})
    path.unlink(missing_ok=True)
    return {"findings": findings, "refused": refused}


class Child:
    """A process that reads mutants; started again where one ended it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        with tempfile.NamedTemporaryFile(delete=False) as file:
            self.place = Path(file.name)

    def ask(self, parser: str, seed: int, first: int, count: int, tally: Tally) -> None:
        """Read mutants `first` to `first + count - 1` of a parser and add what came of them."""
        end, started = first + count, time.monotonic()
        while first < end:
            answer = self._once({"parser": parser, "seed": seed, "first": first, "count": end - first})
            if answer is not None:
                tally.findings += answer["findings"]
                tally.refused += answer["refused"]
                tally.peak_bytes = max(tally.peak_bytes, answer["peak_bytes"])
                break
            first = int(self.place.read_bytes()) + 1
            tally.findings.append({"number": first - 1, "what": f"the process ended: {self._status()}"})
        tally.mutants += count
        tally.seconds += time.monotonic() - started

    def _once(self, request: dict[str, Any]) -> dict[str, Any] | None:
        if self._process is None:
            command = [sys.executable, __file__, "--child"]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({**request, "place": str(self.place)}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        return json.loads(line) if line else None

    def _status(self) -> str:
        assert self._process is not None
        code = self._process.wait()
        self._process.stdout.close()  # type: ignore[union-attr]
        self._process = None
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit {code}"

    def close(self) -> None:
        if self._process is not None:
            self._process.stdin.close()  # type: ignore[union-attr]
            self._process.wait()
            self._process.stdout.close()  # type: ignore[union-attr]
        self.place.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------- command line


def through_command_line(names: list[str], count: int, seed: int) -> dict[str, Tally]:
    """Run rkd, forked off a process that has imported it, on `count` mutants of each parser that it must refuse."""
    import parsers

    import rkd.bench.command
    import rkd.cli
    import rkd.inspection

    _ = rkd.cli, rkd.inspection, rkd.bench.command
    known, tallies = parsers.all_parsers(), {}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for name in names:
            tallies[name] = tally = Tally()
            parser, number = known[name], 0
            while tally.mutants < count:
                data = parser.mutant(seed, number)
                if problem := command_line_problem(parser, data, tally):
                    tally.findings.append({"number": number, "what": problem})
                number += 1
        os.chdir("/")
    return tallies


def command_line_problem(parser: Any, data: bytes, tally: Tally) -> str | None:
    """What is wrong about how rkd refuses `data`; None also where it is not to be refused."""
    import parsers

    path = Path(parser.file)
    path.write_bytes(data)
    try:
        if not parsers.refused(parser, path):
            return None
    except Exception as error:
        return f"in process: {type(error).__name__}: {str(error)[:300]}"
    finally:
        path.unlink()
    tally.mutants += 1
    for name, content in arranged(parser, data).items():
        Path(name).write_bytes(content)
    status, usage, said = forked(
        [*parser.command, *(n for n in arranged(parser, data) if n != "rkd.toml")] or ["targets"]
    )
    left = [name for name in sorted(p.name for p in Path().iterdir()) if name not in arranged(parser, data)]
    for name in sorted(p.name for p in Path().iterdir()):
        Path(name).unlink()
    tally.refused += status == 1
    tally.peak_bytes = max(tally.peak_bytes, usage.ru_maxrss * 1024)
    seconds = usage.ru_utime + usage.ru_stime
    if OUT_OF_MEMORY.search(said):
        return f"ran out of memory: {said[-300:]!r}"
    if status != 1:
        return f"exit {status}: {said[-300:]!r}"
    if not said.startswith("rkd: ") or said.count("\n") != 1 or "internal error" in said or not said[:-1].isprintable():
        return f"said {said[-300:]!r}"
    if left or seconds > CPU_SECONDS or usage.ru_maxrss * 1024 > MEMORY_BYTES:
        return f"left {left}, took {seconds:.1f} s and {usage.ru_maxrss / 1024:.0f} MiB"
    return None


def arranged(parser: Any, data: bytes) -> dict[str, bytes]:
    """The files to lay out for the command; an ONNX file comes in a bundle with right digests."""
    import parsers

    if parser.name == "onnx":
        return {"x.ort-cpu.rkd": parsers.forge(parsers.bundle_members(data))}
    return {parser.file: data}


def forked(arguments: list[str]) -> tuple[int, resource.struct_rusage, str]:
    """Exit code (negative for a signal), resources and output of `rkd ARGUMENTS` in a limited child."""
    with tempfile.TemporaryFile() as output:
        number = os.fork()
        if number == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            code = 70
            try:
                resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS + 1, CPU_SECONDS + 1))
                limit_this_process()
                signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
                sys.stdout, sys.stderr = (
                    io.TextIOWrapper(io.FileIO(1, "w", closefd=False), write_through=True),
                    io.TextIOWrapper(io.FileIO(2, "w", closefd=False), write_through=True),
                )
                sys.argv = ["rkd", *arguments]
                import rkd.cli

                rkd.cli.main()
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(code)
        _, status, usage = os.wait4(number, 0)
        output.seek(0)
        return os.waitstatus_to_exitcode(status), usage, output.read().decode(errors="replace")


# ------------------------------------------------------------------------------------------------------------ corpus


def replay(names: list[str]) -> dict[str, Tally]:
    """Read what was found before, each in the same limits."""
    import parsers

    known, tallies = parsers.all_parsers(), {}
    limit_this_process()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for name in names:
            tallies[name] = tally = Tally()
            for kept in sorted((parsers.CORPUS / name).glob("*")):
                path = Path(known[name].file)
                path.write_bytes(kept.read_bytes())
                set_timers(CPU_SECONDS, WALL_SECONDS)
                tally.mutants += 1
                try:
                    tally.refused += parsers.refused(known[name], path)
                except Exception as error:
                    tally.findings.append({"number": kept.name, "what": f"{type(error).__name__}: {str(error)[:300]}"})
                set_timers(0, 0)
        os.chdir("/")
    return tallies


def keep(folder: Path, seed: int, tallies: dict[str, Tally]) -> None:
    """Write the mutants that were findings."""
    import parsers

    known = parsers.all_parsers() | parsers.self_tests()
    for name, tally in tallies.items():
        for finding in tally.findings[:100]:
            if isinstance(finding["number"], int):
                (folder / name).mkdir(parents=True, exist_ok=True)
                (folder / name / f"{seed}-{finding['number']}").write_bytes(known[name].mutant(seed, finding["number"]))


# -------------------------------------------------------------------------------------------------------------- main


def read_mutants(names: list[str], *, count: int, seconds: float, seed: int) -> dict[str, Tally]:
    """`count` mutants of each parser, or as many of each as go into `seconds` in all."""
    tallies = {name: Tally() for name in names}
    process, started = Child(), time.monotonic()
    try:
        if count:
            for name in names:
                process.ask(name, seed, 0, count, tallies[name])
                print(f"{name}: {tallies[name]}", file=sys.stderr, flush=True)
        while not count and (left := seconds - (time.monotonic() - started)) > 0:
            name = min(names, key=lambda n: tallies[n].mutants)  # the same number of each
            rate = tallies[name].mutants / tallies[name].seconds if tallies[name].seconds else 500
            process.ask(name, seed, tallies[name].mutants, max(1, min(ROUND, int(rate * left))), tallies[name])
            print(f"{time.monotonic() - started:.0f} s: {name}: {tallies[name]}", file=sys.stderr, flush=True)
    finally:
        process.close()
    return tallies


def main() -> int:
    """Do what the command line says."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--parser", action="append", choices=NAMES + SELF_TESTS, help="only this one; may be repeated")
    options.add_argument("--count", type=int, default=0, help="mutants of each parser")
    options.add_argument("--seconds", type=float, default=60, help="time for all parsers, where --count is not given")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--cli", type=int, default=0, help="refused mutants of each parser through the command line")
    options.add_argument("--replay", action="store_true", help="read tests/fuzz/corpus")
    options.add_argument("--keep", type=Path, help="folder for the mutants that were findings")
    options.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.child:
        return child()
    names, kept = given.parser or list(NAMES), given.keep.resolve() if given.keep else None
    if given.replay:
        tallies = replay(names)
    elif given.cli:
        tallies = through_command_line(names, given.cli, given.seed)
    else:
        tallies = read_mutants(names, count=given.count, seconds=given.seconds, seed=given.seed)
    if kept is not None:
        keep(kept, given.seed, tallies)
    print(json.dumps({name: vars(tally) for name, tally in tallies.items()}))
    return 1 if any(tally.findings for tally in tallies.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
