"""Figures of cells, put together: over seeds, against controls, over the cases that transfer (no torch).

A case is a data set, a pair of networks, an attack and a budget. It transfers where the mean excess ASR of an
undefended student is at least 30 points; only those cases can show that a defence works.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from rkd.bench.report.scores import difference
from rkd.metrics import WORKS, Proportion
from rkd.suite.file import CLEAN, Entry
from rkd.suite.results import Record, score

TRANSFERS = 30.0  # points of excess ASR
SLEEPERS = frozenset({"oscar"})  # attacks whose teacher is meant to be dormant

Case = tuple[str, str, str, str]  # data, pair, attack, budget
Basis = tuple[int, str]  # seed and teacher (SHA-256): what two students of a case must share to be compared


def basis(record: Record) -> Basis:
    """What a cell was made from."""
    return record.cell.seed, record.teacher_sha256


@dataclass(frozen=True)
class Spread:
    """A figure over seeds.

    Attributes:
        values: one a seed of which it is known.
        seeds: these; empty where that is of no interest.
    """

    values: tuple[float, ...]
    seeds: tuple[int, ...] = ()

    @property
    def mean(self) -> float:
        """Their mean; NaN where there is none."""
        return statistics.fmean(self.values) if self.values else math.nan

    @property
    def low(self) -> float:
        """The lowest."""
        return min(self.values, default=math.nan)

    @property
    def high(self) -> float:
        """The highest."""
        return max(self.values, default=math.nan)

    def few(self, seeds: Sequence[int]) -> str:
        """Of how many of these seeds it is, where some are missing; empty where none is, or all are."""
        return f"{len(self.values)} of {len(seeds)} seeds" if 0 < len(self.values) < len(seeds) else ""

    @property
    def deviation(self) -> float:
        """Standard deviation (n - 1); NaN below two values."""
        return statistics.stdev(self.values) if len(self.values) > 1 else math.nan


_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t, two-sided, 1 to 9 degrees


def between_seeds(values: Sequence[float]) -> float:
    """Half the width of Student's 95 % interval of a mean over seeds; 0 for one seed, which cannot tell."""
    if len(values) < 2:
        return 0.0
    freedom = len(values) - 1
    t = _T95[freedom - 1] if freedom <= len(_T95) else 1.96 + 2.5 / freedom
    return t * statistics.stdev(values) / math.sqrt(len(values))


@dataclass(frozen=True)
class Averaged(Proportion):
    """A share over seeds. All seeds are tested with the same images, so that n does not grow with them.

    Attributes:
        values: one a seed, in percent.
    """

    values: tuple[float, ...] = ()

    @classmethod
    def of(cls, shares: Sequence[Proportion]) -> Averaged:
        """The shares of several seeds together."""
        n = min((share.n for share in shares), default=0)
        values = tuple(share.value for share in shares)
        return cls(round(n * statistics.fmean(values) / 100) if n else 0, n, values)

    @property
    def value(self) -> float:
        """The mean over seeds, in percent."""
        return statistics.fmean(self.values) if self.values else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's interval of one seed's images and Student's over the seeds, by square-and-add."""
        if len(self.values) < 2:
            return super().interval
        low, high = super().interval
        seeds = between_seeds(self.values)
        return (
            max(0.0, self.value - math.hypot(self.value - low, seeds)),
            min(100.0, self.value + math.hypot(high - self.value, seeds)),
        )


@dataclass(frozen=True)
class Paired(Spread):
    """How far one defence is ahead of another, in points: one value a case that both have met."""

    @property
    def interval(self) -> tuple[float, float]:
        """Student's 95 % interval of the mean over cases; NaN below two, which cannot tell."""
        if len(self.values) < 2:
            return math.nan, math.nan
        half = between_seeds(self.values)
        return self.mean - half, self.mean + half

    @property
    def separated(self) -> bool:
        """Whether the interval leaves zero out."""
        low, high = self.interval
        return low > 0 or high < 0


@dataclass(frozen=True)
class Row:
    """One defence on one case, over its seeds.

    Attributes:
        case, defence: which.
        seeds: those that are finished.
        acc, asr, ra: in percent; asr and ra of a clean case are empty.
        control_asr, control_ra: of the controls under the same trigger.
        excess: ASR minus the control's, in points.
        excess_interval: 95 %, over images and seeds; NaN where there is none.
        ra_lost: mean over the seeds of the control's RA minus RA, in points; NaN where there is no control.
        lost: ACC of the undefended student of the same seed and teacher minus this one's, in points.
        seconds: of one cell.
        acc_share, asr_share, ra_share: the same with n and interval.
        student, teacher_acc, teacher_asr: the student's network; its teachers' figures.
    """

    case: Case
    defence: str
    seeds: tuple[int, ...]
    acc: Spread
    asr: Spread
    ra: Spread
    control_asr: Spread
    control_ra: Spread
    excess: Spread
    excess_interval: tuple[float, float]
    ra_lost: float
    lost: Spread
    seconds: Spread
    acc_share: Averaged
    asr_share: Averaged
    ra_share: Averaged
    student: str
    teacher_acc: Spread
    teacher_asr: Spread


@dataclass(frozen=True)
class Standing:
    """One defence over the cases of one budget that transfer.

    Attributes:
        defence, budget: which.
        cases: transferring cases that it has a figure on.
        of: transferring cases in all.
        yardstick: what the defences are compared with, and so ranked by: the one that has met the most cases, of several
            the first of the file; one that is undefended or takes nothing from the teacher only where there is no other;
            empty where none has met any.
        against: how far it is ahead of the yardstick by ACC - excess ASR, on every case that transfers and both have met,
            each the mean over the seeds of both, from the same teachers; empty for the yardstick itself.
        score: ACC - excess ASR, the mean over its own cases, as all that follows. A negative excess counts as nought
            here and in `against`: a control that obeys more is no merit.
        excess_mean, excess_worst: of excess ASR.
        lost_mean, lost_worst: points of ACC below the undefended student, over cases.
        ra_lost_mean: points of RA below the control's, over cases.
        clean_lost: points of ACC below the undefended student where the teacher is clean; the worst case.
        seconds: of one cell, the mean.
    """

    defence: str
    budget: str
    cases: int
    of: int
    yardstick: str
    against: Paired
    score: float
    excess_mean: float
    excess_worst: float
    lost_mean: float
    lost_worst: float
    ra_lost_mean: float
    clean_lost: float
    seconds: float


@dataclass(frozen=True)
class Table:
    """Everything that is reported of a suite.

    Attributes:
        rows: by case and defence, in the file's order.
        cases: in the file's order.
        transferring: those that transfer.
        untested: attacked cases of which it is not known: no undefended student of them has a control yet.
        asleep: attacked cases that do not transfer and whose attack did not take: it moves less than half of the images
            on the teacher itself.
        standings: by budget, best first.
        reference: the undefended defence that ACC is compared with; empty where there is none.
        undefended: all undefended defences, in the file's order.
    """

    rows: tuple[Row, ...]
    cases: tuple[Case, ...]
    transferring: tuple[Case, ...]
    untested: tuple[Case, ...]
    asleep: tuple[Case, ...]
    standings: tuple[Standing, ...]
    reference: str
    undefended: tuple[str, ...]

    def of(self, case: Case) -> list[Row]:
        """The rows of a case."""
        return [row for row in self.rows if row.case == case]

    @property
    def budgets(self) -> tuple[str, ...]:
        """The budgets that have a ranking, in its order."""
        return tuple(dict.fromkeys(standing.budget for standing in self.standings))

    def ranking(self, budget: str) -> list[Standing]:
        """The standings of a budget, best first."""
        return [standing for standing in self.standings if standing.budget == budget]

    def outcome(self, case: Case) -> str:
        """What plain distillation does with an attacked case, in words."""
        if case in self.untested:
            return "unknown"
        if case in self.asleep:
            return "the attack did not take"
        return "transfers" if case in self.transferring else "does not transfer"


def make_table(records: Sequence[Record], axes: Mapping[str, Sequence[Entry]]) -> Table:
    """Put finished cells together.

    Args:
        records: finished cells.
        axes: the suite's entries, for their order and for which defences are undefended.
    """
    undefended = [entry.name for entry in axes["defence"] if entry.undefended]
    reference = undefended[0] if undefended else ""
    groups: dict[tuple[Case, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.cell.case, record.cell.defence), []).append(record)
    rank = {axis: {entry.name: place for place, entry in enumerate(entries)} for axis, entries in axes.items()}

    def order(key: tuple[Case, str]) -> tuple[int, ...]:
        (data, pair, attack, budget), defence = key
        named = (("data", data), ("pair", pair), ("budget", budget), ("attack", attack), ("defence", defence))
        return tuple(rank[axis].get(name, -1 if name == CLEAN else 10**6) for axis, name in named)

    rows = tuple(_row(groups[key], groups.get((key[0], reference), [])) for key in sorted(groups, key=order))
    cases = tuple(dict.fromkeys(row.case for row in rows))
    known = {case: _transfer(rows, case, undefended) for case in cases if case[2] != CLEAN}
    transferring = tuple(case for case, excess in known.items() if excess >= TRANSFERS)
    untested = tuple(case for case, excess in known.items() if math.isnan(excess))
    asleep = tuple(
        case
        for case, excess in known.items()
        if excess < TRANSFERS and not _takes([r for r in records if r.cell.case == case])
    )
    return Table(
        rows,
        cases,
        transferring,
        untested,
        asleep,
        _standings(rows, transferring, records, axes["defence"]),
        reference,
        tuple(undefended),
    )


def excess_of(table: Table, case: Case, defence: str) -> float:
    """Mean excess ASR of a defence on a case; NaN where it is not known."""
    return next((row.excess.mean for row in table.rows if row.case == case and row.defence == defence), math.nan)


def _takes(records: Sequence[Record]) -> bool:
    """Whether an attack works on its teachers, on average, or is one that is meant to sleep there."""
    asr = [record.teacher.asr.value for record in records if record.teacher.asr]
    kinds = {str(record.data["teacher"]["settings"].get("attack")) for record in records}
    return not asr or statistics.fmean(asr) >= WORKS or bool(kinds & SLEEPERS)


def comparable(table: Table, budget: str) -> str:
    """What the defences of a budget are ranked by, in words."""
    yardstick = table.ranking(budget)[0].yardstick
    if not yardstick and any(case[3] == budget for case in table.untested):
        return (
            "It is not known yet which cases transfer, so the defences are not ranked: that takes an undefended student "
            "(undefended = true in the suite file) of the case and its control."
        )
    if not yardstick:
        return "No case transfers, so the defences are not ranked."
    return (
        f"Each is compared with the yardstick, {yardstick}, the defence that has met the most cases, and ranked by how far it "
        "is ahead of it in ACC - excess ASR (a negative excess counts as 0): the mean difference over the cases (n) that both "
        "have met, each over the seeds of both and from the same teachers, with Student's 95 % interval over the cases. A dash: there "
        "is no such case. Cases of one seed share the clean twin, the controls and the test images, so the interval says how "
        "the attacks differ, and less of what another seed would give. Two others are not compared "
        "with each other: they may have met different cases. The other figures are over each defence's own cases."
    )


def _transfer(rows: Iterable[Row], case: Case, undefended: Sequence[str]) -> float:
    """The largest mean excess ASR of an undefended student; NaN where none is known."""
    found = [r.excess.mean for r in rows if r.case == case and r.defence in undefended and r.excess.values]
    return max(found, default=math.nan)


def _row(records: Sequence[Record], reference: Sequence[Record]) -> Row:
    records = sorted(records, key=lambda record: record.cell.seed)
    undefended = {basis(record): record.student.acc.value for record in reference}
    asr = [r.student.asr for r in records if r.student.asr]
    ra = [r.student.ra for r in records if r.student.ra]

    def over_seeds(figure: Callable[[Record], float | None]) -> Spread:
        known = {r.cell.seed: value for r in records if (value := figure(r)) is not None}
        return Spread(tuple(known.values()), tuple(known))

    controlled = [r for r in records if r.excess is not None]
    return Row(
        records[0].cell.case,
        records[0].cell.defence,
        tuple(record.cell.seed for record in records),
        over_seeds(lambda r: r.student.acc.value),
        over_seeds(lambda r: r.student.asr.value if r.student.asr else None),
        over_seeds(lambda r: r.student.ra.value if r.student.ra else None),
        over_seeds(lambda r: r.control.asr.value if r.control and r.control.asr else None),
        over_seeds(lambda r: r.control.ra.value if r.control and r.control.ra else None),
        over_seeds(lambda r: r.excess[0] if r.excess else None),
        _excess_interval(controlled),
        _mean([r.control.ra.value - r.student.ra.value for r in records if r.control and r.control.ra and r.student.ra]),
        over_seeds(lambda r: undefended[basis(r)] - r.student.acc.value if basis(r) in undefended else None),
        over_seeds(lambda r: None if r.same_student else r.seconds),
        Averaged.of([r.student.acc for r in records]),
        Averaged.of(asr),
        Averaged.of(ra),
        str(records[0].data["student"].get("arch", "")),
        over_seeds(lambda r: r.teacher.acc.value),
        over_seeds(lambda r: r.teacher.asr.value if r.teacher.asr else None),
    )  # fmt: skip


def _excess_interval(records: Sequence[Record]) -> tuple[float, float]:
    """Newcombe's interval of one seed's images and Student's over the seeds' differences, by square-and-add."""
    if not records:
        return math.nan, math.nan
    if all(record.same_student for record in records):
        return 0.0, 0.0
    mine = Averaged.of([r.student.asr for r in records if r.student.asr])
    controls = Averaged.of([r.control.asr for r in records if r.control and r.control.asr])
    gap, low, high = difference(Proportion(mine.hits, mine.n), Proportion(controls.hits, controls.n))
    each = [record.excess[0] for record in records if record.excess]
    mean, seeds = statistics.fmean(each), between_seeds(each)
    return max(mean - math.hypot(gap - low, seeds), -100.0), min(mean + math.hypot(high - gap, seeds), 100.0)


def _standings(
    rows: Sequence[Row], transferring: Sequence[Case], records: Sequence[Record], entries: Sequence[Entry]
) -> tuple[Standing, ...]:
    found: list[Standing] = []
    places = {entry.name: place for place, entry in enumerate(entries)}
    last = {entry.name for entry in entries if entry.undefended} | {r.cell.defence for r in records if r.same_student}
    for budget in dict.fromkeys(row.case[3] for row in rows):
        cases = [case for case in transferring if case[3] == budget]
        there = dict.fromkeys(row.defence for row in rows if row.case[3] == budget)
        defences = sorted(there, key=lambda defence: places.get(defence, len(places)))
        scores = {defence: _scores(defence, cases, records) for defence in defences}
        met = [defence for defence in scores if scores[defence]]
        yardstick = max(met, key=lambda defence: (defence not in last, len(scores[defence])), default="")
        against = {defence: _paired(scores[defence], scores.get(yardstick, {})) for defence in scores}
        # The yardstick's own differences are noughts, which put it in its place.
        for defence in sorted(scores, key=lambda defence: -_least_first(against[defence].mean)):
            mine = [row for row in rows if row.defence == defence and row.case[3] == budget]
            found.append(
                _standing(
                    defence, budget, [r for r in mine if r.case in cases and r.excess.values],
                    [r for r in mine if r.case[2] == CLEAN], len(cases),
                    yardstick, Paired(()) if defence == yardstick else against[defence],
                    _mean([_score([*each.values()]) for each in scores[defence].values()]),
                )
            )  # fmt: skip
    return tuple(found)


_Figures = Mapping[Case, Mapping[Basis, tuple[float, float]]]  # ACC and excess ASR, by case, seed and teacher


def _scores(defence: str, cases: Sequence[Case], records: Sequence[Record]) -> _Figures:
    """The figures of a defence that its score is made from."""
    found: dict[Case, dict[Basis, tuple[float, float]]] = {}
    for record in records:
        cell = record.cell
        if cell.defence == defence and cell.case in cases and record.excess is not None:
            found.setdefault(cell.case, {})[basis(record)] = record.student.acc.value, record.excess[0]
    return found


def ahead(
    defence: str,
    other: str,
    cases: Sequence[Case],
    records: Sequence[Record],
    by: Callable[[float, float], float] = score,
) -> Paired:
    """How far a defence is ahead of another on each of these cases that both have met, as `Standing.against`.

    Args:
        defence: its name.
        other: the other's.
        cases: to look at.
        records: finished cells.
        by: a case's score of its ACC and excess ASR.
    """
    return _paired(_scores(defence, cases, records), _scores(other, cases, records), by)


def _score(figures: Sequence[tuple[float, float]], by: Callable[[float, float], float] = score) -> float:
    """The score of one case, of its means over the seeds, so that their noise about an excess of nought cancels out."""
    acc, excess = (statistics.fmean(values) for values in zip(*figures, strict=True))
    return by(acc, excess)


def _paired(mine: _Figures, other: _Figures, by: Callable[[float, float], float] = score) -> Paired:
    """How far one is ahead of the other on each case of both, over the seeds and teachers of both."""
    both = {case: [same for same in mine[case] if same in other[case]] for case in mine if case in other}
    return Paired(
        tuple(
            _score([mine[case][same] for same in common], by) - _score([other[case][same] for same in common], by)
            for case, common in both.items()
            if common
        )
    )


def _least_first(value: float) -> float:
    return -math.inf if math.isnan(value) else value


def _standing(
    defence: str,
    budget: str,
    rows: Sequence[Row],
    clean: Sequence[Row],
    of: int,
    yardstick: str,
    against: Paired,
    score: float,
) -> Standing:
    lost = [row.lost.mean for row in rows if row.lost.values]
    ra_lost = [row.ra_lost for row in rows if math.isfinite(row.ra_lost)]
    seconds = [value for row in (*rows, *clean) for value in row.seconds.values]
    excess = [row.excess.mean for row in rows]
    return Standing(
        defence, budget, len(rows), of, yardstick, against, score,
        _mean(excess), max(excess, default=math.nan),
        _mean(lost), max(lost, default=math.nan),
        _mean(ra_lost),
        max((row.lost.mean for row in clean if row.lost.values), default=math.nan),
        _mean(seconds),
    )  # fmt: skip


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan
