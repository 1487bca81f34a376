"""Where a suite keeps its work, and what of it is there already.

    suite.json                 whose folder this is
    teachers/NAME/             teacher.safetensors, its trigger, and the run directory that made it
    cells/DATA/PAIR/ATTACK/BUDGET/DEFENCE/sSEED/       the run directory of a student (attack `clean`: of a control)
    scores/NAME.json           a control under the triggers of the attacked teachers
    state/NAME.json            what each job took, and why it failed if it did
    logs/NAME.log              what each job printed
    data/NAME/                 data sets that came as a .tar
    replaced/                  what --stale redo moved out of the way

A job's result is believed only after a look at it: its settings, its teacher's digest and its own must be what the suite
wants. Folders and files appear whole or not at all (`rkd.files`), so that a kill at any moment loses the step at most.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from rkd.checks import number, object_of, or_null, proportion, string, whole
from rkd.errors import RkdError, RunError, StorageError
from rkd.files import file_sha256, move, read_json, remove_temporaries, storage_errors, to_json, write_file
from rkd.intake import trigger_beside
from rkd.run import CLEAN as TWIN
from rkd.run import STUDENT, SUMMARY, TEACHER, TRIGGER, Run, free_name
from rkd.suite.file import CLEAN
from rkd.suite.plan import Job, Plan, Score, Student, Teacher, flat
from rkd.suite.recipes import Kind, Options, differences, distill_kind, teacher_kind

SCHEMA = 1
TEACHER_FILE = "teacher.safetensors"
_OBJECT = object_of({}, others=True)
_STATE = object_of(
    {"seconds": or_null(number), "attempts": or_null(whole()), "code": or_null(_OBJECT), "begun_by": or_null(_OBJECT)},
    optional=["seconds", "attempts", "code", "begun_by"],
    others=True,
)
_SCORE = object_of({"trigger": string, "acc": proportion, "asr": proportion, "ra": proportion})
FRESH, RESUME, DONE, STALE = "fresh", "resume", "done", "stale"


@dataclass(frozen=True)
class Standing:
    """How far a job is.

    Attributes:
        state: `fresh`, `resume`, `done`, or `stale`: made with other settings or from another teacher, or damaged.
        why: of what is stale, in words.
        run: the run directory to go on with.
    """

    state: str
    why: str = ""
    run: Path | None = None


class Place:
    """The folder of one suite.

    Args:
        out: the folder.
        plan: what is to be made in it.
    """

    def __init__(self, out: Path, plan: Plan) -> None:
        self.out, self.plan = out, plan

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Make the folder, or see that it is this suite's; keep a second process of the same suite out.

        Raises:
            RunError: it is another suite's, not a suite's at all, or in use.
            StorageError: the disk said no.
        """
        with storage_errors(self.out):
            self._check_marker(self.out / "suite.json")
            descriptor = os.open(self.out, os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(f"{self.out}: another rkd suite is at work here; wait for it or stop it") from None
            for folder in ("scores", "state"):  # what a kill in the middle of a write left there
                if (self.out / folder).is_dir():
                    remove_temporaries(self.out / folder)
            yield
        finally:
            os.close(descriptor)

    def _check_marker(self, marker: Path) -> None:
        """See whose folder this is by its suite.json, or write that into a new one."""
        ours = {"schema": SCHEMA, "name": self.plan.suite.name}
        if not marker.is_file():
            if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
                raise RunError(f"{self.out} exists and is not a suite's folder; choose another --out")
            write_file(marker, to_json(ours))
            return
        found = _read(marker)
        if not {"schema", "name"} <= set(found):
            raise RunError(
                f"{marker} is damaged; if this is the folder of the suite {ours['name']}, write {json.dumps(ours)} into it, "
                "otherwise choose another --out"
            )
        if found["name"] != ours["name"]:
            raise RunError(f"{self.out} belongs to the suite {found['name']!r}; choose another --out")
        if found["schema"] != SCHEMA:
            raise RunError(f"{marker} has schema {found['schema']!r}, this rkd knows {SCHEMA}; choose another --out")

    def teacher_folder(self, teacher: Teacher) -> Path:
        """Where a teacher is made."""
        return self.out / "teachers" / teacher.name

    def teacher_file(self, teacher: Teacher) -> Path:
        """A teacher's checkpoint."""
        return self.teacher_folder(teacher) / TEACHER_FILE

    def trigger_file(self, teacher: Teacher) -> Path:
        """The trigger of an attacked teacher."""
        return trigger_beside(self.teacher_file(teacher))

    def run_folder(self, student: Student) -> Path:
        """The run directory of a student."""
        return self.out / "cells" / student.cell.name

    def score_file(self, score: Score) -> Path:
        """A control's scores under the triggers."""
        return self.out / "scores" / f"{flat(score.control.cell.name)}.json"

    def log_file(self, job: Job) -> Path:
        """What a job prints."""
        return self.out / "logs" / f"{flat(job.name)}.log"

    def teacher_run(self, teacher: Teacher) -> Run | None:
        """The run that made a teacher, or is making it.

        Raises:
            RunError: it is damaged, or there are several.
        """
        found = [p for p in self.teacher_folder(teacher).glob(f"runs/*/{SUMMARY}") if not p.parent.name.startswith(".")]
        if len(found) > 1:
            raise RunError(f"{self.teacher_folder(teacher)} holds {len(found)} runs, expected one")
        return Run.open(found[0].parent) if found else None

    def student_run(self, student: Student) -> Run:
        """The run of a student.

        Raises:
            RunError: it is missing or damaged.
        """
        return Run.open(self.run_folder(student))

    def standing(self, job: Job) -> Standing:
        """How far a job is; of a job whose inputs are not there yet, what can be known."""
        try:
            if isinstance(job.work, Teacher):
                return self._teacher_standing(job.work)
            if isinstance(job.work, Student):
                return self._student_standing(job.work)
            return self._score_standing(job.work)
        except RkdError as error:
            return Standing(STALE, str(error))

    def missing_scores(self, score: Score) -> dict[str, Teacher]:
        """The attacks, of those whose teachers are there, under which a control has not been scored yet."""
        there = {a: t for a, t in score.teachers.items() if self.trigger_file(t).is_file()}
        found = self.scores(score)
        return {a: t for a, t in there.items() if found.get(a, {}).get("trigger") != file_digest(self.trigger_file(t))}

    def scores(self, score: Score) -> dict[str, dict[str, Any]]:
        """By attack, what a control was measured to do under its trigger; nothing that another student did."""
        student = self.student_run(score.control).summary.get("student", {}).get("sha256", "")
        return read_scores(self.score_file(score), student)

    def move_aside(self, job: Job) -> Path:
        """Move what a job made earlier out of its way; nothing is deleted."""
        if isinstance(job.work, Score):
            path, name = self.score_file(job.work), f"{flat(job.name)}.json"
        elif isinstance(job.work, Teacher):
            path, name = self.teacher_folder(job.work), flat(job.name)
        else:
            path, name = self.run_folder(job.work), flat(job.name)
        goal = free_name(self.out / "replaced", name)
        move(path, goal)
        return goal

    def state(self, job: Job) -> dict[str, Any]:
        """What was noted of a job: seconds, attempts, code (who made it), failure."""
        path = self._state_file(job)
        if not path.is_file():
            return {}
        try:
            found = _read(path)
        except StorageError:  # a note only: what it says is measured again or left open
            return {}
        return found if _STATE(found) is None else {}

    def note(self, job: Job, **facts: Any) -> None:
        """Add to what was noted of a job.

        Raises:
            StorageError: the disk said no.
        """
        write_file(self._state_file(job), to_json({**self.state(job), **facts}))

    def _state_file(self, job: Job) -> Path:
        return self.out / "state" / f"{flat(job.name)}.json"

    @cached_property
    def _kinds(self) -> tuple[Kind, Kind]:
        return teacher_kind(), distill_kind()

    def _teacher_standing(self, teacher: Teacher) -> Standing:
        run = self.teacher_run(teacher)
        if run is None:
            return Standing(FRESH)
        wanted = _unlike(self._kinds[0], run, teacher.options, teacher.seed)
        twin = self._made(teacher.clean) if teacher.clean is not None else None
        if twin is not None and not _same(twin, run.path / TWIN):
            wanted.append("it was made from another clean twin")
        if wanted:
            return Standing(STALE, "; ".join(wanted))
        # What was put beside the run is as it was measured, or is taken from the run again.
        there = _whole(self.teacher_file(teacher), run.path / TEACHER)
        if teacher.attack != CLEAN:
            there = there and _whole(self.trigger_file(teacher), run.path / TRIGGER)
        return Standing(DONE, run=run.path) if run.finished and there else _begun(self._kinds[0], run)

    def _student_standing(self, student: Student) -> Standing:
        folder = self.run_folder(student)
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return Standing(FRESH)
        run = Run.open(folder)
        wanted = _unlike(self._kinds[1], run, student.options, student.cell.seed)
        wanted += self._other_recipe(run, student.teacher)
        teacher = self._made(student.teacher)
        if not wanted and teacher is not None and run.summary.get("teacher", {}).get("sha256") != file_digest(teacher):
            wanted.append("it was distilled from another teacher")
        if not wanted and not self.of_one_data(run, student.teacher):
            wanted.append("its teacher was trained on other data")
        if wanted:
            return Standing(STALE, "; ".join(wanted))
        if not run.finished:
            return _begun(self._kinds[1], run)
        if run.summary.get("student", {}).get("sha256") != file_digest(folder / STUDENT):
            return Standing(STALE, f"{STUDENT} is not the one that was measured")
        return Standing(DONE, run=folder)

    def _made(self, teacher: Teacher) -> Path | None:
        """The teacher that a finished run made; what is beside the run may have been damaged since."""
        run = self.teacher_run(teacher)
        found = [run.path / TEACHER] if run is not None and run.finished else []
        return next((path for path in (*found, self.teacher_file(teacher)) if path.is_file()), None)

    def of_one_data(self, run: Run, teacher: Teacher) -> bool:
        """Whether a student's data is its teacher's, as far as that is known."""
        other = self.teacher_run(teacher)
        data = [one.summary.get("data", {}).get("digest") for one in (run, other) if one is not None]
        return None in data or len(set(data)) < 2

    def _other_recipe(self, run: Run, teacher: Teacher) -> list[str]:
        """In words, that a student is of a teacher of another recipe, which may not have been made yet."""
        made_from = Path(str(_values(run).get("teacher", ""))).parent.name
        return [] if made_from == teacher.name else [f"its teacher was {made_from}, wanted {teacher.name}"]

    def _score_standing(self, score: Score) -> Standing:
        if not (self.run_folder(score.control) / STUDENT).is_file():
            return Standing(FRESH)
        return Standing(RESUME if self.missing_scores(score) else DONE)


def read_scores(path: Path, student: str) -> dict[str, dict[str, Any]]:
    """What a control was measured to do, by attack; nothing of another student's, and nothing that is damaged.

    Args:
        path: the file, which may not be there.
        student: the control's digest.

    Raises:
        StorageError: it cannot be read.
    """
    content = _read(path) if path.is_file() else {}
    found = content.get("triggers")
    if content.get("student") != student or not isinstance(found, dict):
        return {}
    return {attack: score for attack, score in found.items() if _SCORE(score) is None}


def _whole(path: Path, made: Path) -> bool:
    """Whether a file is there, and is what its run made."""
    return path.is_file() and _same(path, made)


def _same(one: Path, other: Path) -> bool:
    """Whether two files are the same, as far as both are there."""
    return not one.is_file() or not other.is_file() or file_digest(one) == file_digest(other)


def file_digest(path: Path) -> str:
    """SHA-256 of a file.

    Raises:
        StorageError: it cannot be read.
    """
    with storage_errors(path):
        return file_sha256(path)


def _values(run: Run) -> dict[str, Any]:
    return {
        name: setting.get("value") for name, setting in run.summary["settings"].items() if isinstance(setting, Mapping)
    }


def _begun(kind: Kind, run: Run) -> Standing:
    """How an unfinished run stands: one that an older rkd began cannot be gone on with where it lacks a setting."""
    there = _values(run)
    lacking = [f.name.replace("_", "-") for f in fields(kind.settings) if f.name not in there]
    if lacking and not run.finished:
        return Standing(STALE, f"it was begun by another rkd, without {', '.join(lacking)}")
    return Standing(RESUME, run=run.path)


def _unlike(kind: Kind, run: Run, options: Options, seed: int) -> list[str]:
    """How a run's settings differ from what is wanted, those that somebody gave (not the run found out) included."""
    given = frozenset(
        name
        for name, setting in run.summary["settings"].items()
        if isinstance(setting, Mapping) and setting.get("origin") not in ("default", "teacher")
    )
    return differences(kind, _values(run), options, given=given, seed=seed)


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where the file is damaged: what is missing is for its reader to tell.

    Raises:
        StorageError: it cannot be read.
    """
    try:
        content = read_json(path)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
