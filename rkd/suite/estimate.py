"""How long a suite will take: from multiply-accumulates at first, from what its jobs took as soon as some are done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median

import torch

from rkd.distill.settings import share_of
from rkd.errors import ConfigError, RkdError
from rkd.measure import choose_precision, count_macs
from rkd.models import build
from rkd.network import Network, Normalisation
from rkd.suite.plan import Job, Plan, Student, Teacher
from rkd.suite.recipes import distill_kind, teacher_kind
from rkd.suite.sources import Facts

_MACS_PER_S = {"bf16": 60e9, "fp32": 25e9}  # of one CPU core that distils into a small network; only the first guess
_TEACHER_SPEEDUP = 2.0  # wider layers, and one network alone
_EVALUATION_SPEEDUP = 2.0  # forward passes alone run nearer to a core's peak
_START_S = 12.0  # to import torch and to decode the images


@dataclass(frozen=True)
class Costs:
    """What a plan's networks cost: multiply-accumulates of one image, by data set and network."""

    macs: Mapping[tuple[str, str], int]

    def of(self, data: str, arch: str) -> int:
        """One image's forward pass."""
        return self.macs[data, arch]


def measure_costs(jobs: Iterable[Job], facts: Mapping[str, Facts]) -> Costs:
    """Make every network of some jobs once, for its cost, and to see that it exists.

    Raises:
        ConfigError: one does not exist; the message names who asks for it.
    """
    macs: dict[tuple[str, str], int] = {}
    for job in jobs:
        for data, arch, whose in _networks(job):
            if (data, arch) not in macs:
                macs[data, arch] = _macs(arch, facts[data].size, whose)
    return Costs(macs)


def _networks(job: Job) -> list[tuple[str, str, str]]:
    if isinstance(job.work, Teacher):
        arch = str(job.work.options.get("arch", teacher_kind().default("arch")))
        return [(job.work.data, arch, f"teacher {job.work.name}")]
    if isinstance(job.work, Student):
        return [(job.work.cell.data, str(job.work.options["student"]), f"cell {job.work.cell.name}")]
    return []


def _macs(arch: str, size: tuple[int, int], whose: str) -> int:
    try:
        with torch.device("meta"):
            module = build(arch, 10, size)
            return count_macs(Network(module, arch, tuple("0123456789"), size, Normalisation((0.5,) * 3, (0.25,) * 3)))
    except RkdError as error:
        raise ConfigError(f"{whose}: {error}") from error


class Estimator:
    """Guesses the seconds of jobs.

    Args:
        plan: whose jobs.
        costs: of the networks of its jobs and of those that it learns from.
        facts: of their data sets.
    """

    def __init__(self, plan: Plan, costs: Costs, facts: Mapping[str, Facts]) -> None:
        self._plan, self._costs, self._facts = plan, costs, facts
        self._ratios: dict[str, list[float]] = {}

    def learn(self, job: Job, seconds: float) -> None:
        """Take note of what a job of this suite took, one that is not in the plan included."""
        model = self._model(job)
        for key in (*_likenesses(job), ""):
            self._ratios.setdefault(key, []).append(seconds / model)

    def seconds(self, job: Job) -> float:
        """What a job will take, alike ones being the guide."""
        ratios = next((self._ratios[key] for key in (*_likenesses(job), "") if key in self._ratios), [1.0])
        return self._model(job) * median(ratios)

    def left(self, jobs: Iterable[Job], slots: int) -> float:
        """Seconds until these are done, so many at once: their sum over the slots, or the longest chain of them."""
        estimates = {job.name: self.seconds(job) for job in jobs}
        ends: dict[str, float] = {}
        for name in self._plan.jobs:  # in the order of work: what a job waits for comes before it
            if name in estimates:
                job = self._plan.jobs[name]
                ends[name] = estimates[name] + max((ends.get(n, 0.0) for n in (*job.needs, *job.after)), default=0.0)
        return max(sum(estimates.values()) / max(slots, 1), max(ends.values(), default=0.0))

    def _model(self, job: Job) -> float:
        work, facts = job.work, self._facts[job.data]
        if isinstance(work, Teacher):
            macs = self._costs.of(job.data, _networks(job)[0][1])
            return _START_S + self._time(
                3 * macs * facts.train * _teacher_epochs(work) / _TEACHER_SPEEDUP, 2 * macs * facts.test
            )
        if isinstance(work, Student):
            settings = distill_kind().make(work.options, teacher="")
            student = self._costs.of(job.data, settings.student)
            teacher = self._costs.of(job.data, _networks(Job("", work.teacher))[0][1])
            budget = _budget(settings.clean_budget, facts.train)
            images = settings.epochs * budget
            purified = 0
            if settings.purifier:
                batch = max(1, min(settings.batch, budget))  # a share of few images may be none: the run refuses it
                purified = settings.steps_to_purify(images // batch) * batch
            passes = 2 * (student + teacher) * facts.test
            training = (3 * student + teacher) * images + 3 * teacher * purified / _TEACHER_SPEEDUP
            return _START_S + self._time(training, passes)
        student = self._costs.of(job.data, str(work.control.options["student"]))
        return _START_S + self._time(0, student * facts.test * (1 + len(work.teachers)))

    def _time(self, training: float, evaluation: float) -> float:
        return (training + evaluation / _EVALUATION_SPEEDUP) / _MACS_PER_S[
            choose_precision("auto", torch.device("cpu"))
        ]


def _teacher_epochs(teacher: Teacher) -> int:
    """Passes over the training images; a fine-tune from the clean twin counts twice, its trigger is learned too."""
    settings = teacher_kind().make(teacher.options)
    tuned = int(getattr(settings, "finetune_epochs", 0) or 0) if teacher.clean is not None else 0
    return 2 * tuned or int(settings.epochs)


def _likenesses(job: Job) -> tuple[str, ...]:
    """What other jobs take about as long per operation, closest first."""
    work = job.work
    if isinstance(work, Teacher):
        return f"teacher {work.data} {work.options.get('arch')} {work.attack}", f"teacher {work.attack}", "teacher"
    if isinstance(work, Student):
        cell = work.cell
        return (
            f"student {cell.data} {cell.pair} {cell.defence} {cell.budget}", f"student {cell.pair} {cell.defence}",
            f"student {cell.defence}", "student",
        )  # fmt: skip
    return ("score",)


def _budget(budget: str, images: int) -> int:
    """The training images that `--clean-budget` leaves; all where it asks for more than there are, which the run refuses."""
    try:
        return round(share_of(budget, images) * images) if budget else images
    except ConfigError:
        return images
