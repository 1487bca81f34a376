"""results/SUITE/cells/*.json: what each finished cell was measured to do, small enough to commit (no torch).

The table is made from these files alone. No path of a machine is in them; teacher, trigger, student, data and recipe
are there by their digests.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rkd import __version__
from rkd.bench.report.scores import difference
from rkd.checks import Check, flag, list_of, number, object_of, or_null, proportion, string, text
from rkd.errors import RkdError, RunError
from rkd.files import move, read_json, to_json, write_file
from rkd.metrics import Proportion
from rkd.run import Model, Run, free_name, models_of
from rkd.suite.file import CLEAN
from rkd.suite.place import Place, file_digest
from rkd.suite.plan import Cell, Job, Plan, Score, flat
from rkd.suite.recipes import NOT_COMPARED, digest

SCHEMA = 1
CELLS, REPLACED = "cells", "replaced"  # below results/SUITE
_LIMIT_BYTES = 2**20
_OBJECT = object_of({}, others=True)
_CODE_FIELDS: dict[str, Check] = {
    "rkd": text, "sources": or_null(text), "commit": or_null(text), "changed": or_null(flag)
}  # fmt: skip
_CODE = or_null(object_of(_CODE_FIELDS, optional=_CODE_FIELDS, others=True))
_FIGURES: dict[str, Check] = {"acc": proportion, "asr": or_null(proportion), "ra": or_null(proportion)}
_RECORD = object_of(
    {
        "student": object_of({**_FIGURES, "sha256": string}, others=True),
        "control": or_null(
            object_of({**_FIGURES, "sha256": string, "cell": string, "code": _CODE}, optional=["code"], others=True)
        ),
        "teacher": object_of(
            {**_FIGURES, "sha256": string, "name": string, "settings": _OBJECT, "code": _CODE},
            optional=["code"],
            others=True,
        ),
        "treated_teachers": list_of(object_of({**_FIGURES, "role": text})),
        "fooling": or_null(object_of({"fooled": proportion, "towards": string, "together": proportion}, others=True)),
        "same_student": flag,
        "seconds": object_of({"job": or_null(number)}, others=True),
        "data": object_of({"digest": string}, others=True),
        "settings": _OBJECT,
        "versions": _OBJECT,
        "code": _CODE,
    },
    optional=["versions", "code", "treated_teachers", "fooling"],
    others=True,
)


@dataclass(frozen=True)
class Measured:
    """One network's figures.

    Attributes:
        acc: on clean test images.
        asr, ra: under the cell's trigger; None on a clean case.
    """

    acc: Proportion
    asr: Proportion | None = None
    ra: Proportion | None = None

    def to_json(self) -> dict[str, Any]:
        """`{acc, asr, ra}`, each with hits, n, percent and interval."""
        return {
            "acc": self.acc.to_json(),
            "asr": self.asr.to_json() if self.asr else None,
            "ra": self.ra.to_json() if self.ra else None,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Measured:
        """Inverse of `to_json`."""
        asr, ra = value["asr"], value["ra"]
        return cls(
            Proportion.from_json(value["acc"]),
            Proportion.from_json(asr) if asr else None,
            Proportion.from_json(ra) if ra else None,
        )


@dataclass(frozen=True)
class Record:
    """One finished cell, as a file in results/ has it.

    Attributes:
        cell: which.
        student: its figures.
        control: its control's under the same trigger; None where there is none yet.
        teacher: its teacher's.
        seconds: wall time of its own run; None where it was not noted.
        same_student: whether control and student are one network, because its method takes nothing from the teacher.
        data: the whole content.
    """

    cell: Cell
    student: Measured
    control: Measured | None
    teacher: Measured
    seconds: float | None
    same_student: bool
    data: Mapping[str, Any]

    @property
    def excess(self) -> tuple[float, float, float] | None:
        """ASR minus the control's in points, with Newcombe's 95 % interval; None on a clean case or without control."""
        if self.student.asr is None or self.control is None or self.control.asr is None:
            return None
        return (0.0, 0.0, 0.0) if self.same_student else difference(self.student.asr, self.control.asr)

    @property
    def score(self) -> float | None:
        """Of ACC and excess ASR, see `score`; None where there is no excess."""
        return score(self.student.acc.value, self.excess[0]) if self.excess is not None else None

    @property
    def teacher_sha256(self) -> str:
        """The digest of its teacher's file."""
        return str(self.data["teacher"]["sha256"])


def score(acc: float, excess: float) -> float:
    """ACC - excess ASR in points; a negative excess counts as nought: a control that obeys more is no merit."""
    return acc - max(excess, 0.0)


def code_version() -> dict[str, Any]:
    """What code is at work: rkd's version, its deciding sources, and the commit where it is run from a git checkout."""
    root = Path(__file__).resolve().parents[2]
    found: dict[str, Any] = {"rkd": __version__, "sources": _sources(root / "rkd"), "commit": None, "changed": None}
    if not (root / ".git").exists():
        return found
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return {**found, "commit": commit, "changed": bool(_git(root, "status", "--porcelain", "--", "*.py"))}
    except (OSError, subprocess.SubprocessError):
        return found


def _sources(package: Path) -> str:
    """SHA-256 of the sources that decide what a teacher or a student becomes, and of nothing that only shows it."""
    shown = {"bench", "cli", "export", "suite", "targets"}
    files = [path for path in sorted(package.rglob("*.py")) if path.relative_to(package).parts[0] not in shown]
    return digest({str(path.relative_to(package)): file_digest(path) for path in files})


def same_code(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> bool:
    """Whether two things were made by the same code, as far as that is known; an older record has no sources."""
    if not one or not other:
        return True
    if one.get("sources") and other.get("sources"):
        return bool(one["sources"] == other["sources"])
    return bool(one.get("commit") == other.get("commit") and not one.get("changed") and not other.get("changed"))


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=30)  # noqa: S603, S607
    return done.stdout.strip()


def collect(place: Place, plan: Plan, cell: Cell) -> dict[str, Any] | None:
    """The record of a cell whose student and teacher are finished; None where its trigger was not tried on it yet.

    Raises:
        RunError: a run that it needs is missing or damaged.
    """
    student, teacher = plan.student(cell), plan.teacher(cell)
    run = place.student_run(student)
    _, *treated, row = models_of(run)
    if run.summary["teacher"]["sha256"] != file_digest(place.teacher_file(student.teacher)):
        raise RunError(f"{run.path} was distilled from another teacher than the suite's; make it again: --stale redo")
    if not place.of_one_data(run, teacher):
        raise RunError(f"{run.path}: its teacher was trained on other data; make both again: --stale redo")
    score_job = plan.jobs[f"score:{cell.control.name}"]
    assert isinstance(score_job.work, Score)  # noqa: S101  (by its name)
    under = place.scores(score_job.work) if place.run_folder(score_job.work.control).is_dir() else {}
    attacked = cell.attack != CLEAN
    trigger = file_digest(place.trigger_file(teacher)) if attacked else None
    if under.get(cell.attack, {}).get("trigger") != trigger:  # a teacher made again has another trigger: not tried yet
        under = {}
    own = student.cell == cell
    control = _control(under, cell)
    measured = _measured(row) if own or not attacked else control
    if measured is None:
        return None
    record = Record(cell, measured, control if attacked else None, _teacher(place, plan, cell), None, not own, {})
    state = place.state(Job(student.job, student))
    return {
        "schema": SCHEMA,
        "suite": plan.suite.name,
        "cell": dict(vars(cell)),
        "student": {**measured.to_json(), "arch": row.arch, "parameters": row.parameters, "macs": row.macs,
                    "size_bytes": row.size_bytes, "sha256": run.summary["student"]["sha256"]},
        "control": None if record.control is None else {**record.control.to_json(), "cell": cell.control.name,
                    "sha256": place.student_run(score_job.work.control).summary["student"]["sha256"],
                    "code": place.state(Job(score_job.work.control.job, score_job.work.control)).get("code")},
        "same_student": record.same_student,
        "excess_asr": _excess(record),
        "teacher": {**record.teacher.to_json(), "arch": run.summary["teacher"]["arch"],
                    "sha256": file_digest(place.teacher_file(teacher)), "name": teacher.name,
                    "settings": _settings(place.teacher_run(teacher)), "clean_twin": _twin(place, plan, cell),
                    "code": place.state(Job(teacher.job, teacher)).get("code")},
        "trigger": {"sha256": trigger} if attacked else None,
        "treated_teachers": [{"role": model.role, **_measured(model).to_json()} for model in treated] if own else [],
        "fooling": run.summary.get("fooling") if own else None,
        "settings": _settings(run),
        "config_sha256": digest(_settings(run)),
        "data": {key: run.summary["data"][key] for key in ("name", "digest")} | {"classes": len(run.summary["data"]["classes"])},
        "seconds": {"job": state.get("seconds"), "stages": {k: v["seconds"] for k, v in run.summary.get("timings", {}).items()}},
        "attempts": state.get("attempts"),
        "code": state.get("code"),
        "versions": run.summary.get("versions", {}),
        "finished": run.summary.get("finished"),
    }  # fmt: skip


def _measured(model: Model) -> Measured:
    """A network of a finished run, under the trigger that it was tested with."""
    first = model.scores.triggers[0] if model.scores.triggers else None
    return Measured(model.scores.acc, first.asr if first else None, first.ra if first else None)


def _control(under: Mapping[str, Any], cell: Cell) -> Measured | None:
    return Measured.from_json(under[cell.attack]) if cell.attack in under else None


def _teacher(place: Place, plan: Plan, cell: Cell) -> Measured:
    """The teacher's figures as `rkd teacher` measured them on the whole test set."""
    run = place.teacher_run(plan.teacher(cell))
    return _teacher_row(run, "teacher")


def _teacher_row(run: Run | None, role: str) -> Measured:
    try:
        found = run.summary["results"][role] if run is not None else None
        triggers = found["triggers"]  # type: ignore[index]
        asr, ra = (Proportion.from_json(triggers[0][key]) if triggers else None for key in ("asr", "ra"))
        return Measured(Proportion.from_json(found["acc"]), asr, ra)  # type: ignore[index]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise RunError(f"{run.path if run else 'a teacher'}: its results are missing or damaged: {error}") from error


def _twin(place: Place, plan: Plan, cell: Cell) -> dict[str, Any] | None:
    """The clean twin under the same trigger, where the teacher's run measured it."""
    try:
        return _teacher_row(place.teacher_run(plan.teacher(cell)), "clean twin").to_json()
    except RunError:
        return None


def _settings(run: Run | None) -> dict[str, Any]:
    """Every setting that decides a result, without paths."""
    settings = run.summary["settings"] if run is not None else {}
    return {name: s["value"] for name, s in settings.items() if name not in NOT_COMPARED}


def _excess(record: Record) -> dict[str, float] | None:
    excess = record.excess
    return dict(zip(("points", "low", "high"), (round(v, 4) for v in excess), strict=True)) if excess else None


def write_record(folder: Path, record: Mapping[str, Any]) -> Path:
    """Write a cell's file below `results/SUITE`, unless it is there already; one of another student is set aside.

    Raises:
        StorageError: the disk said no.
    """
    cell = Cell(**record["cell"])
    path, data = record_path(folder, cell), to_json(record)
    if not path.is_file() or path.read_bytes() != data:
        if _student(path) != record["student"]["sha256"]:
            set_aside(folder, cell)
        write_file(path, data)
    return path


def set_aside(folder: Path, cell: Cell) -> None:
    """Move a cell's file, where there is one, to `results/SUITE/replaced`: hours of somebody's work may be in it.

    Raises:
        StorageError: the disk said no.
    """
    path = record_path(folder, cell)
    if path.exists():
        move(path, free_name(folder / REPLACED, path.name))


def _student(path: Path) -> str:
    """The digest of the student that a cell's file is of; empty where there is no such file, or a damaged one."""
    try:
        return read_record(path).data["student"]["sha256"] if path.exists() else ""
    except (RkdError, KeyError):
        return ""


def record_path(folder: Path, cell: Cell) -> Path:
    """The file of a cell below `results/SUITE`."""
    return folder / CELLS / f"{flat(cell.name)}.json"


def read_records(folder: Path) -> list[Record]:
    """All finished cells of a suite, by name.

    Args:
        folder: `results/SUITE`.

    Raises:
        RunError: a file is damaged, of another schema, or of another cell than its name says.
    """
    found = sorted((folder / CELLS).glob("*.json"))
    return [read_record(path) for path in found if not path.name.startswith(".")]  # what a kill in a write left


def read_record(path: Path) -> Record:
    """One finished cell.

    Raises:
        RunError: the file is damaged, of another schema, or of another cell than its name says.
    """
    try:
        if path.stat().st_size > _LIMIT_BYTES:
            raise RunError(f"{path} is larger than {_LIMIT_BYTES:,} bytes: not a cell's result")
        content = read_json(path)
        if content["schema"] != SCHEMA:
            raise RunError(f"{path} has schema {content['schema']!r}, this rkd reads {SCHEMA}")
        names = {key: str(content["cell"][key]) for key in ("data", "pair", "attack", "budget", "defence")}
        cell = Cell(**names, seed=int(content["cell"]["seed"]))
        if (problem := _RECORD(content)) is not None:
            raise RunError(f"{path} is damaged: result{problem}; restore it or remove it")
        control = content["control"]
        seconds = content["seconds"]["job"]
        record = Record(
            cell,
            Measured.from_json(content["student"]),
            Measured.from_json(control) if control else None,
            Measured.from_json(content["teacher"]),
            float(seconds) if seconds is not None else None,
            bool(content["same_student"]),
            content,
        )
    except RkdError:
        raise
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, OSError) as error:
        raise RunError(f"{path} is damaged: {type(error).__name__}: {error}; restore it or remove it") from error
    if path.name != f"{flat(cell.name)}.json":
        raise RunError(f"{path} holds the cell {cell.name}; restore it or remove it")
    if record.cell.attack != CLEAN and (record.student.asr is None or record.student.ra is None):
        raise RunError(f"{path} is damaged: an attacked cell without ASR or RA; restore it or remove it")
    return record
