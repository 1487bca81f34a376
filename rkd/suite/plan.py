"""From a suite file to jobs: which teachers, students and controls there are, and what waits for what.

For each seed, data set and pair: the clean twin, the attacked teachers, and for each budget and defence the control
(the student from the clean twin), the students of the attacked teachers, and the control's score under each trigger.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import product
from typing import Any

from rkd.errors import ConfigError
from rkd.suite.file import AXES, CLEAN, Entry, Suite
from rkd.suite.recipes import Kind, digest, distill_kind, teacher_kind

_MOST_COMBINATIONS, _MOST_CELLS = 100_000, 10_000
_LONGEST_NAME = 200  # a file system takes 255
_SAME_AS_TWIN = ("arch", "normalize", "image_size", "split_seed")


@dataclass(frozen=True, order=True)
class Cell:
    """The coordinates of one student; a control is the cell whose attack is `clean`."""

    data: str
    pair: str
    attack: str
    budget: str
    defence: str
    seed: int

    @property
    def name(self) -> str:
        """`data/pair/attack/budget/defence/sSEED`: its run directory below the suite's."""
        return "/".join((self.data, self.pair, self.attack, self.budget, self.defence, f"s{self.seed}"))

    @property
    def control(self) -> Cell:
        """The same student from the clean twin."""
        return Cell(self.data, self.pair, CLEAN, self.budget, self.defence, self.seed)

    @property
    def case(self) -> tuple[str, str, str, str]:
        """What defences are compared on: data, pair, attack, budget."""
        return self.data, self.pair, self.attack, self.budget


@dataclass(frozen=True)
class Teacher:
    """One teacher to train.

    Attributes:
        data: the data set's entry.
        attack: the attack's entry.
        seed: of everything in it.
        options: of `rkd teacher`, without what the suite decides.
        clean: its clean twin; None where it is one.
    """

    data: str
    attack: str
    seed: int
    options: Mapping[str, Any] = field(hash=False)
    clean: Teacher | None = None

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that decides it."""
        twin = self.clean.digest if self.clean else ""
        return digest({"data": self.data, "seed": self.seed, "options": self.options, "clean": twin})

    @cached_property
    def name(self) -> str:
        """Its folder: readable, and another one for another recipe."""
        arch = re.sub(r"[^A-Za-z0-9.-]", "-", str(self.options.get("arch", "teacher")))
        return f"{self.data}-{arch}-{self.attack}-s{self.seed}-{self.digest[:8]}"

    @property
    def job(self) -> str:
        """Name of the job that trains it."""
        return f"teacher:{self.name}"


@dataclass(frozen=True)
class Student:
    """One student to distil: a cell's own, or a control.

    Attributes:
        cell: where it stands.
        teacher: what it is distilled from.
        options: of `rkd distill`, without what the suite decides.
    """

    cell: Cell
    teacher: Teacher
    options: Mapping[str, Any] = field(hash=False)

    @property
    def job(self) -> str:
        """Name of the job that distils it."""
        return f"student:{self.cell.name}"


@dataclass(frozen=True)
class Score:
    """A control to be scored under the triggers of several attacked teachers, by the attack's name."""

    control: Student
    teachers: Mapping[str, Teacher] = field(hash=False)

    @property
    def job(self) -> str:
        """Name of the job that scores it."""
        return f"score:{self.control.cell.name}"


@dataclass(frozen=True)
class Job:
    """One piece of work.

    Attributes:
        name: unique.
        work: what is to be made.
        needs: jobs that must have succeeded.
        after: jobs that must have ended, whichever way.
    """

    name: str
    work: Teacher | Student | Score
    needs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()

    @property
    def data(self) -> str:
        """The data set's entry."""
        if isinstance(self.work, Teacher):
            return self.work.data
        return (self.work.cell if isinstance(self.work, Student) else self.work.control.cell).data


@dataclass(frozen=True)
class Plan:
    """Everything that a suite is to do.

    Attributes:
        suite: the file's content.
        jobs: by name, in the order of work.
        cells: what the table is about, controls among them.
    """

    suite: Suite
    jobs: Mapping[str, Job]
    cells: tuple[Cell, ...]

    def teacher(self, cell: Cell) -> Teacher:
        """The teacher of a cell."""
        return self._teachers[cell.data, cell.pair, cell.attack, cell.seed]

    def student(self, cell: Cell) -> Student:
        """What is distilled for a cell: its control's student where its defence takes nothing from the teacher."""
        work = (self.jobs.get(f"student:{cell.name}") or self.jobs[f"student:{cell.control.name}"]).work
        assert isinstance(work, Student)  # noqa: S101  (by the job's name)
        return work

    @cached_property
    def _teachers(self) -> dict[tuple[str, str, str, int], Teacher]:
        return {
            (cell.data, cell.pair, attack, cell.seed): teacher
            for job in self.jobs.values()
            if isinstance(job.work, Score)
            for cell in (job.work.control.cell,)
            for attack, teacher in {CLEAN: job.work.control.teacher, **job.work.teachers}.items()
        }


def make_plan(suite: Suite, only: Sequence[str] = (), without: Collection[Cell] = ()) -> Plan:
    """Plan a suite.

    Args:
        suite: the file's content.
        only: patterns of the cells' names; empty for all. Controls come along with their cells.
        without: cells that are known already.

    Raises:
        ConfigError: a recipe is impossible, a pattern fits no cell, or nothing is left to do.
    """
    planner = _Planner(suite, teacher_kind(), distill_kind())
    cells: dict[Cell, None] = {}
    most = math.prod(len(suite.axes[axis]) for axis in AXES)
    if most > _MOST_COMBINATIONS:
        raise ConfigError(
            f"suite {suite.name}: its tables have {most:,} combinations, expected at most {_MOST_COMBINATIONS:,}; make two suites"
        )
    for names in _combinations(suite):
        for seed in planner.seeds(names):
            cells[Cell(**names, seed=seed)] = None
    if not cells:
        raise ConfigError(f"suite {suite.name}: [[exclude]] and `only` leave no cell at all")
    if only:
        named = {one: None for cell in cells for one in (cell, cell.control)}
        for pattern in only:
            if not any(fnmatchcase(cell.name, pattern) for cell in named):
                raise ConfigError(
                    f"--only {pattern}: no cell of suite {suite.name} is called so; names are {'/'.join(AXES)}/sSEED, "
                    f"e.g. {next(iter(cells)).name}"
                )
        cells = {cell: None for cell in named if any(fnmatchcase(cell.name, pattern) for pattern in only)}
    left = [one for cell in cells for one in (cell, cell.control) if one not in without]
    cells = {one: None for cell in left for one in (cell, cell.control)}  # what is left needs its control, known or not
    if len(cells) > _MOST_CELLS:
        raise ConfigError(
            f"suite {suite.name}: {len(cells):,} cells, expected at most {_MOST_CELLS:,}; make two suites"
        )
    for cell in cells:
        if len(flat(cell.name)) > _LONGEST_NAME:
            raise ConfigError(
                f"suite {suite.name}: the name {cell.name} has {len(flat(cell.name))} letters, expected at most {_LONGEST_NAME}: files go "
                "by it; shorten the names of its parts"
            )
    rank = {axis: {entry.name: i for i, entry in enumerate(entries)} for axis, entries in suite.axes.items()}
    first = sorted({cell.seed for cell in cells}, key=lambda seed: _seed_rank(suite, seed))

    def order(cell: Cell) -> tuple[int, ...]:
        places = [rank[axis].get(getattr(cell, axis), -1) for axis in ("data", "pair", "budget", "defence", "attack")]
        return first.index(cell.seed), *places

    ordered = tuple(sorted(cells, key=order))
    jobs = planner.jobs(ordered)
    return Plan(suite, {job.name: job for job in jobs}, ordered)


def flat(name: str) -> str:
    """A job's or cell's name as the name of a file."""
    return name.replace("/", "__").replace(":", "__")


def _seed_rank(suite: Suite, seed: int) -> tuple[int, int]:
    """Seeds in the order in which the file has them: an interrupted suite has all of its first seed first."""
    lists = [suite.seeds, *(e.seeds for entries in suite.axes.values() for e in entries if e.seeds)]
    return min(seeds.index(seed) for seeds in lists if seed in seeds) if any(seed in s for s in lists) else 99, seed


def _combinations(suite: Suite) -> list[dict[str, str]]:
    found = []
    for entries in product(*(suite.axes[axis] for axis in AXES)):
        names = {axis: entry.name for axis, entry in zip(AXES, entries, strict=True)}
        allowed = all(names[axis] in chosen for entry in entries for axis, chosen in entry.only.items())
        if allowed and not any(rule.covers(names) for rule in suite.excludes):
            found.append(names)
    return found


@dataclass(frozen=True)
class _Planner:
    suite: Suite
    teachers: Kind
    students: Kind

    def seeds(self, names: Mapping[str, str]) -> tuple[int, ...]:
        """What the last one who says anything says: suite, data, pair, attack, budget, defence, overrides."""
        found = self.suite.seeds
        for entry in self._entries(names):
            found = entry.seeds or found
        for rule in self.suite.overrides:
            found = (rule.seeds or found) if rule.covers(names) else found
        return found

    def jobs(self, cells: tuple[Cell, ...]) -> list[Job]:
        """The jobs of these cells, teachers before students."""
        jobs: dict[str, Job] = {}
        groups: dict[Cell, list[Cell]] = {}
        for cell in cells:
            groups.setdefault(cell.control, []).append(cell)
        for control, members in groups.items():
            clean = self._teacher(control, None)
            jobs.setdefault(clean.job, Job(clean.job, clean))
            attacked = {c.attack: self._teacher(c, clean) for c in members if c.attack != CLEAN}
            for teacher in attacked.values():
                jobs.setdefault(teacher.job, Job(teacher.job, teacher, needs=(clean.job,)))
            base = Student(control, clean, self._options(control, clean))
            jobs[base.job] = Job(base.job, base, needs=(clean.job,))
            if self.students.make(base.options).uses_teacher:
                for cell in members:
                    if cell.attack != CLEAN:
                        teacher = attacked[cell.attack]
                        student = Student(cell, teacher, base.options)
                        jobs[student.job] = Job(student.job, student, needs=(teacher.job,))
            score = Score(base, attacked)
            jobs[score.job] = Job(score.job, score, needs=(base.job,), after=tuple(t.job for t in attacked.values()))
        return list(jobs.values())

    def _entries(self, names: Mapping[str, str]) -> list[Entry]:
        return [
            entry for axis in AXES for entry in self.suite.axes[axis] if entry.name == names.get(axis)
        ]  # the clean attack of a control may have no entry

    def _teacher(self, cell: Cell, clean: Teacher | None) -> Teacher:
        """The cell's teacher; an attack's own options and rules do not touch its clean twin."""
        names = {"data": cell.data, "pair": cell.pair} | ({"attack": cell.attack} if clean else {})
        options: dict[str, Any] = {"threads": 1, **self.suite.teacher}
        for entry in self._entries(names):
            options |= entry.teacher
        for rule in self.suite.overrides:
            options |= rule.teacher if rule.covers(names) else {}
        whose = "" if clean else " (a clean twin: what is an attack's goes to [attacks.NAME])"
        self.teachers.make(options, f"suite {self.suite.name}, teacher of {cell.name}{whose}")
        if clean is None and options.get("attack", self.teachers.default("attack")) != self.teachers.default("attack"):
            raise ConfigError(f"suite {self.suite.name}: only [attacks.NAME] may give an attack: clean twins have none")
        if clean is not None:
            self._check_twin(cell.attack, options, clean.options)
        return Teacher(cell.data, cell.attack if clean else CLEAN, cell.seed, options, clean)

    def _check_twin(self, attack: str, options: Mapping[str, Any], clean: Mapping[str, Any]) -> None:
        """Refuse an attack whose teacher is another kind of network than its clean twin, or learns from other images."""
        for name in _SAME_AS_TWIN:
            mine, twin = (given.get(name, self.teachers.default(name)) for given in (options, clean))
            if mine != twin:
                spelled = name.replace("_", "-")
                raise ConfigError(
                    f"suite {self.suite.name}: the attack {attack} has {spelled} {mine}, its clean twin {twin}: that is no "
                    f"twin; give {spelled} in [teacher], to the data or to the pair"
                )

    def _options(self, cell: Cell, clean: Teacher) -> dict[str, Any]:
        """The cell's recipe for students; it is its control's as well."""
        names = {axis: getattr(cell, axis) for axis in AXES if axis != "attack"}
        options: dict[str, Any] = {"threads": 1, **self.suite.distill}
        for entry in self._entries(names):
            options |= entry.distill
        for rule in self.suite.overrides:
            options |= rule.distill if rule.covers(names) else {}
        where = f"suite {self.suite.name}, cell {cell.name}"
        if "student" not in options:
            raise ConfigError(f"{where}: no student; give distill = {{ student = ... }} to its pair")
        split = clean.options.get("split_seed", self.teachers.default("split_seed"))
        if options.setdefault("split_seed", split) != split:
            raise ConfigError(
                f"{where}: teacher and student have different split-seeds: one would train on the other's test"
            )
        self.students.make(options, where)
        return options
