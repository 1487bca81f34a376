"""`rkd suite`, from its options to its exit code."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rkd.errors import ConfigError, RkdError, RunError, StoppedError
from rkd.files import check_writable, storage_errors
from rkd.progress import say
from rkd.signals import StopRequest, stop_requests
from rkd.suite.display import Display, display, shown, title
from rkd.suite.estimate import Costs, Estimator, measure_costs
from rkd.suite.file import Suite, read_suite
from rkd.suite.launch import Launcher, LocalLauncher
from rkd.suite.output import Tables, write_tables
from rkd.suite.place import DONE, STALE, Place
from rkd.suite.plan import Job, Plan, Score, Student, Teacher, make_plan
from rkd.suite.results import CELLS, read_records
from rkd.suite.runner import STALE_CHOICES, Progress, Runner, recorded
from rkd.suite.sources import Facts, facts_of, find_sources, ready_sources

LAUNCHERS = ("local", "ray")
_LEAST_MIB, _MOST_MIB = 800, 2**43


@dataclass(frozen=True)
class SuiteOptions:
    """What `rkd suite` was asked for.

    Attributes:
        file: the suite file.
        out: the suite's folder; None for runs/NAME.
        results: the folder that holds results/NAME.
        data_root: where the data sets are; None for the working folder.
        only: patterns of the cells to work on; empty for all.
        jobs: at once; 0 for one a CPU, fewer where memory is short.
        memory_mib: of one job; None for a fair share of the machine's, 0 for no limit.
        launcher: `local` or `ray`.
        stale: `refuse`, `keep` or `redo` what was made with other settings.
    """

    file: Path
    out: Path | None = None
    results: Path = Path("results")
    data_root: Path | None = None
    only: Sequence[str] = ()
    jobs: int = 0
    memory_mib: int | None = None
    launcher: str = "local"
    stale: str = "refuse"

    def __post_init__(self) -> None:
        if self.launcher not in LAUNCHERS:
            raise ConfigError(f"--launcher {self.launcher!r}: expected {' or '.join(LAUNCHERS)}")
        if self.stale not in STALE_CHOICES:
            raise ConfigError(f"--stale {self.stale!r}: expected one of {', '.join(STALE_CHOICES)}")
        if self.jobs < 0:
            raise ConfigError(f"--jobs {self.jobs}: expected 0 for one a CPU, or how many")
        if self.memory_mib and not _LEAST_MIB <= self.memory_mib < _MOST_MIB:
            raise ConfigError(
                f"--memory {self.memory_mib}: expected 0 for no limit, or from {_LEAST_MIB} MiB, which PyTorch alone needs, to {_MOST_MIB - 1}"
            )
        for path in filter(None, (self.out, self.results, self.data_root)):
            with storage_errors(path):
                path.exists()
        if self.data_root is not None and not self.data_root.is_dir():
            raise ConfigError(f"--data-root {self.data_root}: no such folder")


@dataclass(frozen=True)
class _Work:
    """A suite that was read, planned and looked at."""

    suite: Suite
    plan: Plan
    place: Place
    known: int
    found: Mapping[str, Path | str]
    facts: Mapping[str, Facts]
    alike: tuple[Job, ...]  # the suite's on the plan's data sets, in the plan or not: what these took is a guide
    costs: Costs

    @classmethod
    def open(cls, options: SuiteOptions) -> _Work:
        suite = read_suite(options.file)
        plan = make_plan(suite, options.only)
        out = (options.out or Path("runs") / suite.name).absolute()
        known = recorded(plan, Place(out, plan), options.results.absolute() / suite.name)
        plan = make_plan(suite, options.only, known)
        used = {cell.data for cell in plan.cells}
        found = find_sources(suite, options.data_root, used)
        sizes = {
            name: max((int(j.work.options.get("image_size", 0)) for j in plan.jobs.values()
                       if isinstance(j.work, Teacher) and j.work.data == name), default=0)
            for name in found
        }  # fmt: skip
        facts = {name: facts_of(source, sizes[name]) for name, source in found.items()}
        alike = tuple(job for job in make_plan(suite).jobs.values() if job.data in facts)
        return cls(suite, plan, Place(out, plan), len(known), found, facts, alike, measure_costs(alike, facts))

    def estimator(self) -> Estimator:
        """Guesses from what this suite's finished jobs took, those that `only` leaves out included."""
        estimator = Estimator(self.plan, self.costs, self.facts)
        for job in self.alike:
            state = self.place.state(job)
            if state.get("code") and state.get("seconds"):
                estimator.learn(job, float(state["seconds"]))
        return estimator


@dataclass(frozen=True)
class Line:
    """A job of a plan.

    Attributes:
        job: what it makes.
        state: `fresh`, `resume`, `done` or `stale`.
        seconds: that it will take, or took.
        options: that the suite file gives it.
    """

    job: str
    state: str
    seconds: float
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Planned:
    """What a suite would do.

    Attributes:
        suite: its name.
        lines: its jobs, in order.
        slots: jobs at once.
        seconds: until what is not done yet is done.
        notes: what the estimate does not know.
    """

    suite: str
    lines: tuple[Line, ...]
    slots: int
    seconds: float
    notes: tuple[str, ...]


def show_plan(options: SuiteOptions) -> Planned:
    """What would be done, with an estimate of the time; nothing is written.

    Raises:
        RkdError: the suite file, a data set or a network is not what it should be.
    """
    work = _Work.open(options)
    estimator, slots = work.estimator(), options.jobs or at_once()
    standings = {j.name: work.place.standing(j) for j in work.plan.jobs.values()}
    lines = tuple(
        Line(title(job), standings[job.name].state, round(estimator.seconds(job), 1), _options_of(job))
        for job in work.plan.jobs.values()
    )
    notes = [
        f"{n}: not on this machine yet, counted as {f.train:,} images" for n, f in work.facts.items() if not f.known
    ]
    notes += [f"{name.replace(':', ' ', 1)} is stale: {s.why}" for name, s in standings.items() if s.state == STALE]
    notes += [_known(work, options)] if work.known else []
    left = [job for job in work.plan.jobs.values() if standings[job.name].state != DONE]
    return Planned(work.suite.name, lines, slots, estimator.left(left, slots), tuple(notes))


def run_suite(options: SuiteOptions) -> tuple[Tables, RkdError | None]:
    """Do what is left of a suite and make its tables.

    Returns:
        The tables, and the error that says what failed, if something did: the rest is done and in the tables.

    Raises:
        StoppedError: stopped by a signal, after saving; the tables are written.
        RkdError: something of the input is wrong.
    """
    with stop_requests() as stop:
        stop.hint = f"go on with the same command: {command_of(options)}"
        work = _Work.open(options)
        results = options.results.absolute() / work.suite.name
        if work.known:
            say(_known(work, options))
        with work.place.claimed():
            sources = ready_sources(work.found, work.place.out / "data")
            _check_results(results)
            launcher = _launcher(options, work.place.out)
            try:
                runner = Runner(
                    work.plan, work.place, sources, results, launcher, memory_mib=_memory(options, launcher), stale=options.stale
                )  # fmt: skip
                runner.look()
                progress = _work_through(work, runner, launcher, stop)
            finally:
                launcher.close()
            failed = failure(progress, f"{shown(work.place.out / 'logs')} has the logs; {_AGAIN}")
            try:
                tables = write_tables(results, make_plan(work.suite), progress.failed)
            except RkdError as error:
                raise RkdError(f"{error}; {failed}" if failed else str(error)) from error
    if stop.signal_number is not None:
        students = {job.name for job in work.plan.jobs.values() if isinstance(job.work, Student)}
        raise StoppedError(
            f"stopped and saved: {len(progress.done & students)} of {len(students)} students are done; {stop.hint}",
            stop.signal_number,
        )
    return tables, failed


def command_of(options: SuiteOptions) -> str:
    """The command that these options were given by."""
    words = ["rkd", "suite", str(options.file)]
    for field in fields(options)[1:]:
        value = getattr(options, field.name)
        option = f"--{field.name.removesuffix('_mib').replace('_', '-')}"
        if value != field.default:
            for one in value if isinstance(value, tuple) else [value]:
                words += [option, str(one)]
    return shlex.join(words)


def _check_results(folder: Path) -> None:
    """See, before hours of work, that results can be written and that those that are there can be read.

    Raises:
        StorageError: the disk says no.
        RunError: one is damaged.
    """
    cells = folder / CELLS
    with storage_errors(cells):
        cells.mkdir(parents=True, exist_ok=True)
    for path in (cells / "one.json", folder / "table.md"):
        check_writable(path)
    read_records(folder)


def _known(work: _Work, options: SuiteOptions) -> str:
    return f"{work.known} cells were made elsewhere: {options.results / work.suite.name} has their results"


_AGAIN = "the same command tries again what failed"


def rebuild(options: SuiteOptions) -> Tables:
    """The tables from results/NAME alone.

    Raises:
        RkdError: the suite file or a result is not what it should be, or there is no result.
    """
    suite = read_suite(options.file)
    folder = options.results.absolute() / suite.name
    if not (folder / CELLS).is_dir():
        raise RunError(f"{shown(folder)} holds no results of the suite; run it first, or give --results")
    return write_tables(folder, make_plan(suite), {})


def failure(progress: Progress, hint: str) -> RkdError | None:
    """The error that ends a suite of which not all could be done; None where all is."""
    if not progress.failed:
        return None
    first, why = next(iter(progress.failed.items()))
    more = f" (and {len(progress.failed) - 1} more)" if len(progress.failed) > 1 else ""
    waiting = f"; {len(progress.blocked)} that need them were not begun" if progress.blocked else ""
    return RkdError(
        f"{len(progress.failed)} of the suite's jobs failed: {first.replace(':', ' ', 1)}: {why}{more}{waiting}; "
        f"{len(progress.done)} are done; {hint}"
    )


def _work_through(work: _Work, runner: Runner, launcher: Launcher, stop: StopRequest) -> Progress:
    waiting = {name: job for name, job in work.plan.jobs.items() if name not in runner.progress.done}
    with stop.finishing_steps(), display(work.plan, work.place, work.estimator(), launcher.slots, waiting) as watcher:
        say(
            f"suite {work.suite.name}: {len(work.plan.jobs)} jobs, {len(runner.progress.found)} done already, "
            f"{launcher.slots} at once; everything goes to {shown(work.place.out)}"
        )
        for name, why in runner.progress.kept.items():
            say(f"kept as it is: {name.replace(':', ' ', 1)} ({why})")
        try:
            return runner.run(watcher, _told(stop, watcher))
        except BaseException:
            launcher.kill()
            raise


def _told(stop: StopRequest, watcher: Display) -> Callable[[], bool]:
    def asked() -> bool:
        if stop:
            watcher.say_stopping()
        return bool(stop)

    return asked


def _launcher(options: SuiteOptions, out: Path) -> Launcher:
    if options.launcher == "ray":
        from rkd.suite.ray_launcher import RayLauncher

        return RayLauncher(options.jobs, options.memory_mib or 0, out)
    return LocalLauncher(options.jobs or at_once())


def _memory(options: SuiteOptions, launcher: Launcher) -> int:
    """MiB that one job may use: what was asked for, or its share of nine tenths of this machine's memory.

    On a machine with a GPU there is no limit by default: drivers map far more than they use.
    """
    if options.memory_mib is not None:
        return options.memory_mib
    if options.launcher != "local" or Path("/dev/nvidiactl").exists():
        return 0
    share = _machines_mib() // launcher.slots
    if share < _LEAST_MIB:
        raise ConfigError(
            f"{launcher.slots} cells at once leave {share:,} MiB each, and PyTorch alone needs {_LEAST_MIB}; give fewer --jobs, or "
            "--memory 0 for no limit"
        )
    return share


def _machines_mib() -> int:
    """Nine tenths of this machine's memory."""
    return int(0.9 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) // 2**20


def at_once() -> int:
    """Jobs at once where nobody says: one a CPU that this process may use, fewer where memory is short."""
    return max(1, min(len(os.sched_getaffinity(0)), _machines_mib() // (2 * _LEAST_MIB)))


def _options_of(job: Job) -> Mapping[str, Any]:
    work = job.work
    if isinstance(work, Score):
        return {"triggers": ", ".join(work.teachers)}
    return work.options


__all__ = ["Line", "Planned", "SuiteOptions", "failure", "rebuild", "run_suite", "show_plan"]
