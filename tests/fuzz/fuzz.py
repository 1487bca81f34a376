"""Fuzz the parsers of files from outside.

    python tests/fuzz/fuzz.py --count 20000                # so many mutants of each parser
    python tests/fuzz/fuzz.py --seconds 600 --seed 1       # as many as go into ten minutes
    python tests/fuzz/fuzz.py --commands 40                # so many refused ones through each command that reads them
    python tests/fuzz/fuzz.py --replay                     # what was found before

These go together: a part that is asked for is done, and one process imports torch for all of them. Mutants are read in
a forked child whose data may take 2 GiB, each for at most 5 s of processor time and 30 s by the clock; the kernel ends
a child that goes beyond. A parser may return or raise `RkdError`, but not because an allocation failed; everything
else is a finding, is written to `--keep`, and makes the exit code 1. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))
import parsers
from limits import CPU_SECONDS, WALL_SECONDS, forked, set_timers
from parsers import Parser

ROUND = 20_000  # mutants between two looks at the clock
SHARED_MEMORY = Path("/dev/shm")
SELF_TESTS = ("takes_3_gib", "blocks")  # every file is a finding: one is enough


@dataclass
class Tally:
    """What came of one parser's, or one command's, files."""

    mutants: int = 0
    refused: int = 0
    findings: list[dict[str, Any]] = field(default_factory=list)
    peak_bytes: int = 0
    seconds: float = 0.0


def read_in_child(parser: Parser, content: Callable[[int], bytes], first: int, count: int, tally: Tally) -> None:
    """Read files `first` to `first + count - 1` and add what came of them; after a child that ended, a new one goes on."""
    end, started = first + count, time.monotonic()
    with (
        mmap.mmap(-1, 8) as place,  # shared with the child: which file it is at
        tempfile.TemporaryDirectory(dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None) as folder,
    ):
        while first < end:
            ended = forked(lambda: _read(parser, content, range(first, end), place, folder))  # noqa: B023  (at once)
            tally.peak_bytes = max(tally.peak_bytes, ended.peak_bytes)
            if ended.status == 0:
                answer = json.loads(ended.output)
                tally.findings += answer["findings"]
                tally.refused += answer["refused"]
                break
            first = int.from_bytes(place[:8], "little") + 1
            tally.findings.append({"number": first - 1, "what": f"the process ended: {_status(ended.status)}"})
    tally.mutants += count
    tally.seconds += time.monotonic() - started


def _read(
    parser: Parser, content: Callable[[int], bytes], numbers: Iterable[int], place: mmap.mmap, folder: str
) -> bytes:
    """In the child."""
    os.chdir(folder)  # a parser that writes somewhere writes here
    path, findings, refused = Path(parser.file), [], 0
    for number in numbers:
        place[:8] = number.to_bytes(8, "little")
        path.write_bytes(content(number))
        set_timers(CPU_SECONDS, WALL_SECONDS)
        try:
            refused += parsers.refused(parser, path)
        except Exception as error:
            findings.append({"number": number, "what": f"{type(error).__name__}: {str(error)[:300]}"})
        set_timers(0, 0)
    path.unlink(missing_ok=True)
    if strangers := sorted(other.name for other in Path().iterdir()):
        findings.append({"number": None, "what": f"wrote {strangers}"})
    return json.dumps({"findings": findings, "refused": refused}).encode()


def _status(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit {code}"


def read_mutants(known: dict[str, Parser], *, count: int, seconds: float, seed: int) -> dict[str, Tally]:
    """`count` mutants of each parser, or as many of each as go into `seconds` in all."""
    tallies = {name: Tally() for name in known}
    started = time.monotonic()

    def read(name: str, more: int) -> None:
        parser, tally = known[name], tallies[name]
        read_in_child(parser, lambda number: parser.mutant(seed, number), tally.mutants, more, tally)
        print(f"{time.monotonic() - started:.0f} s: {name}: {tally}", file=sys.stderr, flush=True)

    for name in known if count else ():
        read(name, 1 if name in SELF_TESTS else count)
    while not count and (left := seconds - (time.monotonic() - started)) > 0:
        name = min(known, key=lambda n: tallies[n].mutants)  # the same number of each
        rate = tallies[name].mutants / tallies[name].seconds if tallies[name].seconds else 500
        read(name, max(1, min(ROUND, int(rate * left))))
    return tallies


def replay(known: dict[str, Parser]) -> dict[str, Tally]:
    """Read what was found before."""
    tallies = {}
    for name, parser in known.items():
        kept = [path.read_bytes() for path in sorted((parsers.CORPUS / name).glob("*"))]
        if kept:
            read_in_child(parser, kept.__getitem__, 0, len(kept), tallies.setdefault(name, Tally()))
    return tallies


def run_commands(known: dict[str, Parser], count: int, seed: int) -> dict[str, Tally]:
    """Run each command, forked off this process, on `count` mutants that it must refuse."""
    from commands import all_commands, check_command, warm_up

    chosen = [command for command in all_commands() if command.parser in known]
    tallies: dict[str, Tally] = {}
    with tempfile.TemporaryDirectory(dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None) as folder:
        os.chdir(folder)
        warm_up(chosen)
        for command in chosen:
            tallies[command.name] = tally = Tally()
            number, started = 0, time.monotonic()
            while tally.mutants < count:
                seen = check_command(command, known[command.parser].mutant(seed, number))
                if seen is not None:
                    problem, ended = seen
                    tally.mutants += 1
                    tally.refused += not problem
                    tally.peak_bytes = max(tally.peak_bytes, ended.peak_bytes)
                    tally.findings += [{"number": number, "what": problem}] if problem else []
                number += 1
            tally.seconds = time.monotonic() - started
            print(f"{command.name}: {tally}", file=sys.stderr, flush=True)
        os.chdir("/")
    return tallies


def keep(folder: Path, seed: int, known: dict[str, Parser], tallies: dict[str, Tally]) -> None:
    """Write the mutants that were findings."""
    for title, tally in tallies.items():
        name = title.partition(":")[0]
        for finding in tally.findings[:100]:
            if finding["number"] is not None:
                (folder / name).mkdir(parents=True, exist_ok=True)
                (folder / name / f"{seed}-{finding['number']}").write_bytes(known[name].mutant(seed, finding["number"]))


def main() -> int:
    """Do what the command line says."""
    known = parsers.all_parsers() | parsers.self_tests()
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--parser", action="append", choices=list(known), help="only this one; may be repeated")
    options.add_argument("--count", type=int, default=0, help="mutants of each parser")
    options.add_argument("--seconds", type=float, default=0, help="time for the mutants of all parsers together")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--commands", type=int, default=0, help="refused mutants through each command")
    options.add_argument("--replay", action="store_true", help="read tests/fuzz/corpus")
    options.add_argument("--keep", type=Path, help="folder for the mutants that were findings")
    given = options.parse_args()
    chosen = {name: known[name] for name in given.parser or parsers.all_parsers()}
    kept = given.keep.resolve() if given.keep else None
    parts: dict[str, dict[str, Tally]] = {}
    if given.replay:
        parts["corpus"] = replay(chosen)
    if given.count or given.seconds:
        parts["mutants"] = read_mutants(chosen, count=given.count, seconds=given.seconds, seed=given.seed)
    if given.commands:
        parts["commands"] = run_commands(chosen, given.commands, given.seed)
    if kept is not None:
        for part in ("mutants", "commands"):
            keep(kept, given.seed, chosen, parts.get(part, {}))
    print(json.dumps({part: {n: vars(t) for n, t in tallies.items()} for part, tallies in parts.items()}))
    return 1 if any(tally.findings for tallies in parts.values() for tally in tallies.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
