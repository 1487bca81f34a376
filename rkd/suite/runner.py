"""Work through a plan: what is done is skipped, what fails is noted, the rest goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from rkd.errors import RkdError, RunError
from rkd.files import storage_errors
from rkd.run import Run
from rkd.suite.file import CLEAN
from rkd.suite.launch import Launcher, Outcome, Task
from rkd.suite.place import DONE, FRESH, RESUME, STALE, Place, Standing
from rkd.suite.plan import Cell, Job, Plan, Score, Student, Teacher
from rkd.suite.recipes import command_line, differences, distill_kind, teacher_kind
from rkd.suite.results import code_version, collect, read_record, record_path, same_code, set_aside, write_record

_WAIT_S = 0.5
_MIXED = {"sources": None, "changed": True}  # of several codes
STALE_CHOICES = ("refuse", "keep", "redo")


def recorded(plan: Plan, place: Place, results: Path) -> frozenset[Cell]:
    """The cells that were finished elsewhere: their results are there, made with the settings wanted, their runs are not.

    Args:
        plan: all that is wanted.
        place: the suite's folder.
        results: `results/SUITE`.

    Raises:
        RunError: a result is damaged.
    """
    teachers, students = teacher_kind(), distill_kind()
    found = set()
    for cell in plan.cells:
        path, student, teacher = record_path(results, cell), plan.student(cell), plan.teacher(cell)
        made_here = place.run_folder(student).exists() or place.state(Job(student.job, student)).get("code")
        if not path.is_file() or made_here:
            continue
        made = read_record(path)
        if cell.attack != CLEAN and not made.control:
            continue
        other = differences(students, made.data["settings"], student.options, seed=cell.seed)
        other += differences(teachers, made.data["teacher"]["settings"], teacher.options, seed=teacher.seed)
        if not other:
            found.add(cell)
    return frozenset(found)


class Watcher(Protocol):
    """Who is told what happens."""

    def started(self, job: Job) -> None:
        """A job was started."""
        ...

    def ended(self, job: Job, outcome: Outcome) -> None:
        """A job ended, whichever way."""
        ...

    def blocked(self, job: Job, why: str) -> None:
        """A job cannot be started, because of another one."""
        ...

    def tick(self) -> None:
        """Time passes."""
        ...


@dataclass
class Progress:
    """What has become of the jobs.

    Attributes:
        done: made now or found done.
        found: of these, found done.
        failed: why, by job.
        blocked: on what, by job.
        kept: what of the kept ones is not as the suite wants it, by job.
        moved: what was moved out of the way, by job.
    """

    done: set[str] = field(default_factory=set)
    found: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    blocked: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    moved: dict[str, Path] = field(default_factory=dict)

    def settled(self, job: str) -> bool:
        """Whether nothing more will happen to a job."""
        return job in self.done or job in self.failed or job in self.blocked


class Runner:
    """Runs a plan's jobs.

    Args:
        plan: what to do.
        place: where.
        sources: what `--data` takes, absolute, by the data set's entry.
        results: `results/SUITE`.
        launcher: what runs the jobs.
        memory_mib: of one job; 0 for no limit.
        stale: what to do with what was made with other settings: `refuse`, `keep` it, or `redo` it.
    """

    def __init__(
        self,
        plan: Plan,
        place: Place,
        sources: Mapping[str, str],
        results: Path,
        launcher: Launcher,
        *,
        memory_mib: int = 0,
        stale: str = "refuse",
    ) -> None:
        self.plan, self.place, self.sources, self.results = plan, place, sources, results
        self.launcher, self.memory_mib, self.stale = launcher, memory_mib, stale
        self.progress = Progress()
        self._waiting = dict(plan.jobs)
        self._running: dict[str, Job] = {}
        self._made_by: dict[str, dict[str, Any] | None] = {}

    def look(self) -> None:
        """Find out what is done already, before anything is started.

        Raises:
            RunError: something was made with other settings, and `stale` is `refuse`.
        """
        stale: list[str] = []
        for job in self.plan.jobs.values():
            standing = self.place.standing(job)
            if standing.state == STALE and self.stale == "refuse":
                stale.append(f"{job.name.partition(':')[2]} ({standing.why})")
        if stale:
            more = f" and {len(stale) - 1} more" if len(stale) > 1 else ""
            raise RunError(
                f"{self.place.out}: made with other settings: {stale[0]}{more}; give --stale redo to make them again (the "
                "old ones are kept in replaced/), --stale keep to take them as they are, or another --out"
            )
        for job in self._ready():
            self._skip_if_done(job)

    def run(self, watcher: Watcher, asked_to_stop: Callable[[], bool]) -> Progress:
        """Work until everything is settled, or until asked to stop and the running jobs have saved.

        Raises:
            StorageError: the disk said no to what is noted of a job.
            Exception: whatever else went wrong; in any case once the others have saved what they could.
        """
        try:
            return self._run(watcher, asked_to_stop)
        except Exception:
            self._let_them_save()
            raise

    def _let_them_save(self) -> None:
        """Ask what still runs to save, and wait for it; nothing is noted or shown of it any more."""
        self.launcher.stop()
        while self._running:
            self._ended()

    def _run(self, watcher: Watcher, asked_to_stop: Callable[[], bool]) -> Progress:
        stopping = False
        while True:
            if not stopping and asked_to_stop():
                stopping = True
                self.launcher.stop()
            if not stopping:
                self._fill(watcher)
            if not self._running:
                break
            for job, outcome in self._ended():
                self._settle(job, outcome, watcher, stopping=stopping)
            watcher.tick()
        return self.progress

    def _ended(self) -> list[tuple[Job, Outcome]]:
        """The jobs that ended; all are out of the running before the first is settled, which may fail."""
        return [(self._running.pop(outcome.job), outcome) for outcome in self.launcher.ended(_WAIT_S)]

    def _fill(self, watcher: Watcher) -> None:
        """Start what can be started; what an earlier one's end made impossible is put aside."""
        progressed = True
        while progressed:
            progressed = False
            for job in list(self._waiting.values()):
                broken = [n for n in job.needs if n in self.progress.failed or n in self.progress.blocked]
                if broken:
                    del self._waiting[job.name]
                    self.progress.blocked[job.name] = broken[0]
                    watcher.blocked(job, f"{broken[0].replace(':', ' ', 1)} failed")
                    progressed = True
            for job in self._ready():
                if len(self._running) >= self.launcher.slots:
                    break
                progressed = self._skip_if_done(job) or self._begin(job, watcher) or progressed

    def _ready(self) -> Iterator[Job]:
        for job in list(self._waiting.values()):
            needs_met = all(name in self.progress.done for name in job.needs)
            if needs_met and all(self.progress.settled(name) for name in job.after):
                yield job

    def _skip_if_done(self, job: Job) -> bool:
        standing = self.place.standing(job)
        if standing.state == STALE and self.stale == "keep" and self._usable(job):
            self.progress.kept[job.name] = standing.why
        elif standing.state != DONE:
            return False
        del self._waiting[job.name]
        if why := self._record(job):
            self.progress.failed[job.name] = why
            return True
        self.progress.done.add(job.name)
        self.progress.found.add(job.name)
        return True

    def _usable(self, job: Job) -> bool:
        """Whether a stale job's result is finished at all."""
        try:
            if isinstance(job.work, Teacher):
                run = self.place.teacher_run(job.work)
                return run is not None and run.finished and self.place.teacher_file(job.work).is_file()
            return isinstance(job.work, Student) and self.place.student_run(job.work).finished
        except RkdError:
            return False

    def _begin(self, job: Job, watcher: Watcher) -> bool:
        """Start a job; False where that failed at once."""
        del self._waiting[job.name]
        try:
            standing = self.place.standing(job)
            if standing.state == STALE:
                if self.stale != "redo":
                    kept = "which cannot be kept" if self.stale == "keep" else "which may be kept with --stale keep"
                    raise RunError(f"{standing.why}, {kept}; give --stale redo to make it again")
                self.progress.moved[job.name] = self._move_aside(job)
                standing = Standing(FRESH)
            task = self._task(job, standing)
            self._note_code(job, standing)
            self.launcher.start(task)
        except RkdError as error:
            self._running[job.name] = job
            self._settle(self._running.pop(job.name), Outcome(job.name, 1, 0.0, str(error)), watcher, stopping=False)
            return True
        self._running[job.name] = job
        watcher.started(job)
        return False

    def _note_code(self, job: Job, standing: Standing) -> None:
        """Remember by what code a job is made, over all attempts: what two codes made was made by neither."""
        now, noted = code_version(), self.place.state(job)
        before = noted.get("begun_by") or _MIXED if standing.state == RESUME else now
        if standing.run is not None and Run.open(standing.run).finished:  # only what lies beside the run is made again
            self._made_by[job.name] = noted.get("code")
        self.place.note(job, begun_by=now if same_code(before, now) else {**now, **_MIXED})

    def _move_aside(self, job: Job) -> Path:
        """Move what a job made out of the way, with what was noted and recorded of it: none of it counts any more."""
        goal = self.place.move_aside(job)
        if isinstance(job.work, Student):
            for cell in self.plan.cells:
                if self.plan.student(cell).job == job.name:
                    set_aside(self.results, cell)
        self.place.note(job, seconds=0, attempts=0, code=None)
        return goal

    def _settle(self, job: Job, outcome: Outcome, watcher: Watcher, *, stopping: bool) -> None:
        state = self.place.state(job)
        noted = {
            "seconds": round(float(state.get("seconds") or 0) + outcome.seconds, 2),
            "attempts": int(state.get("attempts") or 0) + 1,
            "host": outcome.host or None,
        }
        if outcome.code == 0:
            self.place.note(job, **noted, code=self._code_of(job), failure=None)
            if why := self._unlike(job) or self._record(job):
                outcome = Outcome(outcome.job, 1, outcome.seconds, why, outcome.host)
        if outcome.code == 0:
            self.progress.done.add(job.name)
        elif stopping:  # it saved and will go on, or had not begun
            outcome = replace(outcome, said="")
            self.place.note(job, **noted, failure=None)
        else:
            self.progress.failed[job.name] = outcome.said
            self.place.note(job, **noted, failure={"exit_code": outcome.code, "said": outcome.said})
        watcher.ended(job, outcome)

    def _code_of(self, job: Job) -> dict[str, Any] | None:
        """The code that a job that just ended was made by; not known by its sources where these changed meanwhile."""
        if job.name in self._made_by:
            return self._made_by[job.name]
        begun_by, now = self.place.state(job).get("begun_by"), code_version()
        return now if same_code(begun_by, now) else {**now, **_MIXED}

    def _unlike(self, job: Job) -> str:
        """How what a job made differs from what it was for, though it says that it ended well."""
        standing = self.place.standing(job)
        if standing.state == DONE:
            return ""
        return f"it ended well, but its result is {standing.state}{': ' if standing.why else ''}{standing.why}"

    def _record(self, job: Job) -> str:
        """Write the results of the cells that a finished job completes; why that failed, if it did."""
        ended = self.progress.done | {job.name}
        if isinstance(job.work, Student):
            cells = [job.work.cell]
        elif isinstance(job.work, Score):
            control = job.work.control.cell
            cells = [cell for cell in self.plan.cells if cell.control == control]
        else:
            return ""
        try:
            for cell in cells:
                if self.plan.student(cell).job in ended and self.plan.teacher(cell).job in ended:
                    record = collect(self.place, self.plan, cell)
                    if record is not None:
                        write_record(self.results, record)
        except RkdError as error:
            return f"its result could not be kept: {error}"
        return ""

    def _task(self, job: Job, standing: Standing) -> Task:
        common: dict[str, Any] = {"job": job.name, "log": str(self.place.log_file(job)), "memory_mib": self.memory_mib}
        if isinstance(job.work, Teacher):
            return self._teacher_task(job.work, standing, common)
        if isinstance(job.work, Student):
            return self._student_task(job.work, standing, common)
        return self._score_task(job.work, common)

    def _teacher_task(self, teacher: Teacher, standing: Standing, common: dict[str, Any]) -> Task:
        folder = self.place.teacher_folder(teacher)
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        threads = int(teacher.options.get("threads", 1))
        if standing.state == RESUME and standing.run is not None:
            run = str(standing.run.relative_to(folder))
            argv: tuple[str, ...] = (
                "teacher",
                f"--resume={run}",
                f"--data={self.sources[teacher.data]}",
                f"--out={self.place.teacher_file(teacher).name}",
                "--overwrite",
            )
            return Task(**common, folder=str(folder), argv=argv, wait_for=run, threads=threads)
        decided: dict[str, Any] = {"data": self.sources[teacher.data], "seed": teacher.seed}
        if teacher.clean is not None:
            decided["clean"] = str(self.place.teacher_file(teacher.clean))
        words = command_line(teacher_kind(), {**teacher.options, **decided})
        argv = ("teacher", *words, f"--out={self.place.teacher_file(teacher).name}", "--overwrite")
        return Task(**common, folder=str(folder), argv=argv, threads=threads)

    def _student_task(self, student: Student, standing: Standing, common: dict[str, Any]) -> Task:
        out, run = self.place.out, str(self.place.run_folder(student).relative_to(self.place.out))
        threads = int(student.options.get("threads", 1))
        source = self.sources[student.cell.data]
        if standing.state == RESUME:
            argv: tuple[str, ...] = ("distill", f"--resume={run}", f"--data={source}")
            return Task(**common, folder=str(out), argv=argv, wait_for=run, threads=threads)
        words = command_line(distill_kind(), {**student.options, "data": source, "seed": student.cell.seed})
        teacher = str(self.place.teacher_file(student.teacher).relative_to(out))
        return Task(**common, folder=str(out), argv=("distill", teacher, *words, f"--out={run}"), threads=threads)

    def _score_task(self, score: Score, common: dict[str, Any]) -> Task:
        control = score.control
        missing = self.place.missing_scores(score)
        threads = int(control.options.get("threads", 1))
        arguments = {
            "run": str(self.place.run_folder(control).relative_to(self.place.out)),
            "data": self.sources[control.cell.data],
            "out": str(self.place.score_file(score).relative_to(self.place.out)),
            "triggers": {a: str(self.place.trigger_file(t).relative_to(self.place.out)) for a, t in missing.items()},
            "threads": threads,
        }
        return Task(**common, folder=str(self.place.out), score=arguments, threads=threads)
