"""The tables of docs/results.md and the README, written from the records in results/ and from nothing else, each between <!-- NAME --> and <!-- end -->.

make results
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import sub
from pathlib import Path
from statistics import mean

from rkd.bench.report.markup import MINUS, points
from rkd.files import write_file
from rkd.metrics import Proportion
from rkd.suite.file import CLEAN, Suite, read_suite
from rkd.suite.plan import Cell, make_plan
from rkd.suite.results import Measured, Record, read_records
from rkd.suite.table import Paired, Table, ahead, basis, make_table

ROOT = Path(__file__).resolve().parents[1]
README, PAGE = ROOT / "README.md", ROOT / "docs" / "results.md"
DATA = {"cifar10": "CIFAR-10", "gtsrb": "GTSRB"}
PAIRS, BUDGETS = {"mobilenet": "to MobileNet v3-small"}, {"labels-5": "5 % of the images"}
FIRST = Cell("cifar10", "wrn", "backweak", "full", "", 0)


@dataclass(frozen=True)
class Published:
    """What is known of one suite.

    Attributes:
        name: of its file and of its folder in results/.
    """

    name: str

    @cached_property
    def records(self) -> Mapping[Cell, Record]:
        """The finished cells."""
        folder = ROOT / "results" / self.name
        return {record.cell: record for record in read_records(folder)} if folder.is_dir() else {}

    @cached_property
    def suite(self) -> Suite:
        """Its file."""
        return read_suite(ROOT / "suites" / f"{self.name}.toml")

    @cached_property
    def cells(self) -> Sequence[Cell]:
        """All cells of the suite file, in its order."""
        return make_plan(self.suite).cells

    @cached_property
    def table(self) -> Table:
        """What `rkd suite` makes of the records."""
        return make_table([*self.records.values()], self.suite.axes)

    def finished(self) -> str:
        """How far it is."""
        done, of = len(self.records), len(self.cells)
        return (
            f"All {of} cells are finished."
            if done == of
            else f"{done} of {of} cells are finished; table.md names the others."
        )

    def by_case(self) -> list[Cell]:
        """All cells, the seeds of a case one after the other."""
        cases = list(dict.fromkeys(cell.case for cell in self.cells))
        return sorted(self.cells, key=lambda cell: (cases.index(cell.case), cell.seed))

    def pairs(self) -> list[tuple[Record, Record]]:
        """The undefended student of each attacked cell that has one, and RobustKD's."""
        ofd = (self.records.get(cell) for cell in self.by_case() if cell.defence == "ofd" and cell.attack != CLEAN)
        ours = [(one, self.records.get(replace(one.cell, defence="robustkd"))) for one in ofd if one]
        return [(one, other) for one, other in ours if other]

    def transferring(self) -> list[tuple[Record, Record]]:
        """Those of them whose case transfers."""
        return [both for both in self.pairs() if both[0].cell.case in self.table.transferring]


CPU, ABLATION = Published("cpu"), Published("ablation")


def signed(value: float) -> str:
    """In points, with a plain minus; nought has no sign."""
    return points(value).replace(MINUS, "-")


def share(value: Proportion | None) -> str:
    """In percent; empty where it is not known."""
    return f"{value.value:.1f}" if value else ""


def interval(value: Proportion | None) -> str:
    """In percent, with its 95 % interval."""
    return f"{value.value:.1f} [{value.interval[0]:.1f}, {value.interval[1]:.1f}]" if value else ""


def excess(record: Record) -> str:
    """Excess ASR with its interval."""
    if record.excess is None or record.same_student:
        return "0 by definition" if record.same_student else ""
    gap, low, high = map(signed, record.excess)
    return f"{gap} [{low}, {high}]"


def figures(record: Record) -> str:
    """ACC, ASR, RA and the control's ASR."""
    assert record.control is not None
    said = f"{share(record.student.acc)}, {share(record.student.asr)}, {share(record.student.ra)} ({share(record.control.asr)})"
    return slanted(record, said)


def slanted(record: Record, said: str) -> str:
    """In italics where it was made in FP32, with a double dagger where RobustKD was hardened by an earlier default."""
    return (f"*{said}*" if in_fp32(record) else said) + before(record)


def before(record: Record) -> str:
    """A double dagger, or nothing."""
    return " ‡" if hardened_before(record) else ""


def hardened_before(record: Record) -> bool:
    """Whether it was hardened before the default was fewer images and a larger radius."""
    used = record.data["settings"]
    return bool(used.get("hardening")) and used.get("harden_share") is None


def in_fp32(record: Record) -> bool:
    """Whether it was trained in FP32, and not in bfloat16."""
    return bool(record.data["settings"]["precision"] == "fp32")


def precision() -> str:
    """How many cells were trained in which precision."""
    fp32, earlier = sum(map(in_fp32, CPU.records.values())), sum(map(hardened_before, CPU.records.values()))
    said = "All were trained in bfloat16."
    if fp32:
        said = f"{len(CPU.records) - fp32} were trained in bfloat16, {fp32} by an earlier run in FP32 (in italics)."
    if earlier:
        said += (
            f" {earlier} of RobustKD were hardened by the default before (‡: `--hardening 8 --harden-share 0.3`) and are to be "
            "made again."
        )
    return said


def case(cell: Cell) -> str:
    """A case in words."""
    attack = f"`{cell.attack}`" if cell.attack != CLEAN else ""
    pair, budget = PAIRS.get(cell.pair, ""), BUDGETS.get(cell.budget, "")
    seed = f"seed {cell.seed}" if any(other.seed and other.case == cell.case for other in CPU.cells) else ""
    return ", ".join(filter(None, [DATA[cell.data], attack, pair, budget, seed]))


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in row)}|" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


DEFENCES = {
    "ofd": "undefended (OFD)",
    "robustkd": "**RobustKD**",
    "finetune+ofd": "fine-tuning",
    "nad+ofd": "NAD",
    "prune+ofd": "fine-pruning",
    "anp+ofd": "ANP",
}


def cases() -> str:
    """Every attacked case that transfers, undefended, with RobustKD and with the baselines that have met it."""
    head = ["case", "student", "ACC", "ASR", "control's ASR", "excess ASR", "RA", "ACC - excess"]
    return markdown(head, (row for pair in CPU.transferring() for row in students(pair[0].cell, DEFENCES)))


def harmless() -> str:
    """Every attacked case that does not transfer, undefended and with RobustKD."""
    carried = [ofd.cell for ofd, _ in CPU.transferring()]
    found = [ofd.cell for ofd, _ in CPU.pairs() if ofd.cell not in carried]
    head = ["case", "student", "ACC", "ASR", "control's ASR", "excess ASR", "RA"]
    return markdown(head, (row[:-1] for cell in found for row in students(cell, ["ofd", "robustkd"])))


def students(cell: Cell, defences: Iterable[str]) -> list[list[str]]:
    """The rows of one case: one for each defence that has met it."""
    met = [record for name in defences if (record := CPU.records.get(replace(cell, defence=name)))]
    ours = CPU.records[replace(cell, defence="robustkd")]
    rows = []
    for record in met:
        student, control = record.student, record.control
        assert control is not None
        other = "" if basis(record) == basis(ours) else " †"
        said = [
            share(student.acc),
            share(student.asr),
            share(control.asr),
            excess(record),
            share(student.ra),
            f"{record.score:.1f}",
        ]
        said = [f"*{one}*" for one in said] if in_fp32(record) else said
        rows.append(["" if rows else case(cell), DEFENCES[record.cell.defence] + before(record) + other, *said])
    return rows


def goals() -> str:
    """What was asked of RobustKD's default, and what was measured."""
    (standing,) = (one for one in CPU.table.ranking("full") if one.defence == "robustkd")
    rows_of = {(row.case, row.defence): row for row in CPU.table.rows if row.case[3] == "full"}
    carried = [case for case in CPU.table.transferring if case[3] == "full"]
    own = [rows_of[case, "robustkd"] for case in carried]
    gaps = [gap for row in own for gap in row.excess.values]
    lost = [points for row in own for points in row.lost.values]
    above = [
        asr - control
        for row in own
        for asr, control in zip(row.asr.values, rows_of[row.case, "ofd"].control_asr.values, strict=True)
    ]
    clean_lost = [
        points
        for (case, defence), row in rows_of.items()
        if case[2] == CLEAN and defence == "robustkd"
        for points in row.lost.values
    ]
    clipped = mean(max(row.excess.mean, 0) for row in own)
    rows = [
        ["cases that transfer, by plain distillation", "4 or more", f"{standing.of} ({len(gaps)} rows: one a seed)"],
        ["excess ASR: mean over cases", "2 or less", f"{signed(standing.excess_mean)} ({signed(clipped)} if a negative one counts as nought)"],
        ["... worst row", "8 or less", signed(max(gaps))],
        ["... against the *undefended* control's ASR, worst row", "", signed(max(above))],
        ["ACC below the undefended student's: mean over cases", "1.0 or less", signed(standing.lost_mean)],
        ["... worst row", "2.0 or less", signed(max(lost))],
        [f"... from clean teachers, mean of {len(clean_lost)}", "1.0 or less", signed(mean(clean_lost))],
        ["... worst of them", "", signed(max(clean_lost))],
        ["RA below the control's: mean over cases", "10 or less", signed(standing.ra_lost_mean)],
    ]  # fmt: skip
    ours, plain = (CPU.records.get(replace(FIRST, budget="labels-5", defence=name)) for name in ("robustkd", "ce"))
    if ours and plain and ours.excess:
        rows.append(
            [
                f"5 % of the images{before(ours)}: ACC above that of a student without a teacher",
                "3 or more",
                signed(ours.student.acc.value - plain.student.acc.value),
            ]
        )
        rows.append(["... excess ASR", "5 or less", signed(ours.excess[0])])
    rows += [[f"ahead in ACC - excess ASR of {name}", "outside the spread", said] for name, said in apart()]
    return markdown(["RobustKD's default", "wanted", "measured"], rows)


def clean() -> str:
    """ACC of students of clean teachers."""
    defences = {"ofd": "undefended (OFD)", "robustkd": "RobustKD", "ce": "no teacher (`ce`)"}
    rows = []
    for cell in CPU.by_case():
        if cell.attack == CLEAN and cell.defence == "ofd" and cell in CPU.records:
            met = [CPU.records.get(replace(cell, defence=defence)) for defence in defences]
            rows.append([case(cell), *(slanted(r, interval(r.student.acc)) if r else "" for r in met)])
    return markdown(["clean teacher", *defences.values()], rows)


def first() -> str:
    """All methods on the first case, with controls and intervals."""
    head = ["", "ACC", "ASR", "RA", "excess ASR"]
    undefended = CPU.records[replace(FIRST, defence="ofd")]
    rows = [
        measured("clean twin, same trigger", Measured.from_json(undefended.data["teacher"]["clean_twin"])),
        measured("backdoored teacher (`backweak`)", undefended.teacher),
    ]
    for cell in CPU.cells:
        record = CPU.records.get(cell)
        if record is None or replace(cell, defence="") != FIRST:
            continue
        method = command(record)
        what = "undefended: " if cell.defence in CPU.table.undefended else "no teacher: " if record.same_student else ""
        treated = record.data.get("treated_teachers", [])
        rows += [measured(f"{one['role']}: {method}", Measured.from_json(one)) for one in treated]
        if record.control and not record.same_student:
            rows.append(measured(f"control: {method}", record.control))
        rows.append(measured(f"{what}{method}", record.student, excess(record)))
    return markdown(head, rows)


def fooling() -> str:
    """What the search finds in each teacher, and what fine-tuning leaves of the backdoor in it."""
    rows = []
    for cell in CPU.by_case():
        record = CPU.records.get(cell)
        found = record.data.get("fooling") if record and cell.defence == "robustkd" else None
        if record and found:
            tuned = [Measured.from_json(one) for one in record.data["treated_teachers"]]
            towards = f"{found['towards']} {interval(Proportion.from_json(found['together']))}"
            rows.append(
                [
                    case(cell) + (": a clean teacher" if cell.attack == CLEAN else "") + before(record),
                    interval(Proportion.from_json(found["fooled"])),
                    towards,
                    share(tuned[0].asr) if tuned else "",
                    share(record.student.asr),
                ]
            )
    return markdown(
        [
            "",
            "images that the teacher then sees wrongly, %",
            "of these seen as one class",
            "ASR of the fine-tuned teacher",
            "of its student",
        ],
        rows,
    )


def command(record: Record) -> str:
    """The options that a cell was made with."""
    used = record.data["settings"]
    options = f"--method {used['method']}"
    if used["variant"] == "paper":
        options += " --variant paper"
    elif used["method"].startswith("robustkd") and used.get("purify") in (None, "none"):
        options += " --purify none"
    if hardened_before(record):
        options += f" --hardening {used['hardening']:g} --harden-share 0.3"
    return f"`{options}`{', FP32' if in_fp32(record) else ''}"


def measured(what: str, network: Measured, gap: str = "") -> list[str]:
    """A row of one network."""
    return [what, interval(network.acc), interval(network.asr), interval(network.ra), gap]


def ablation() -> str:
    """RobustKD with one part changed at a time."""
    rows = []
    for cell in ABLATION.cells:
        record, control = ABLATION.records.get(cell), ABLATION.records.get(cell.control)
        if cell.attack != CLEAN and record and control:
            rows.append(
                [
                    f"`{cell.defence}`",
                    figures(record),
                    excess(record),
                    interval(control.student.acc),
                    f"{record.score:.1f}",
                ]
            )
    return markdown(
        ["", "ACC, ASR, RA (control's ASR)", "excess ASR", "ACC, clean teacher", "ACC - excess ASR"],
        rows,
    )


def apart() -> list[tuple[str, str]]:
    """How far RobustKD is ahead of each baseline that has met several cases of its teachers, by name."""
    cases = [carried for carried in CPU.table.transferring if carried[3] == "full"]
    found = []
    for standing in CPU.table.ranking("full"):
        n, name = len(standing.against.values), DEFENCES.get(standing.defence, "")
        if standing.defence in ("ofd", standing.yardstick) or not name or standing.yardstick != "robustkd" or n < 2:
            continue
        plain = ahead(standing.defence, standing.yardstick, cases, [*CPU.records.values()], sub)
        verdict = "" if standing.against.separated else "**not told apart**, "
        found.append(
            (
                f"{name}, {n} cases",
                f"{behind(standing.against)} ({verdict}{behind(plain)} with a negative excess as it is)",
            )
        )
    return found


def behind(paired: Paired) -> str:
    """Mean and interval of the opposite."""
    low, high = paired.interval
    return f"{-paired.mean:.1f} [{-high:.1f}, {-low:.1f}]"


def short() -> str:
    """What RobustKD comes to, for the README."""
    cases = [case for case in CPU.table.transferring if case[3] == "full"]
    rows = []
    for defence, name in (("ofd", "undefended"), ("robustkd", "RobustKD")):
        own = [row for row in CPU.table.rows if row.case in cases and row.defence == defence]
        figures = ((row.acc.mean, row.asr.mean, row.control_asr.mean, row.ra.mean) for row in own)
        rows.append([name, *(f"{mean(values):.1f}" for values in zip(*figures, strict=True))])
    return markdown([f"mean of {len(cases)} cases", "ACC", "ASR", "control's ASR", "RA"], rows)


BLOCKS: Mapping[str, Callable[[], str]] = {
    "finished": CPU.finished,
    "precision": precision,
    "goals": goals,
    "cases": cases,
    "harmless": harmless,
    "clean": clean,
    "first": first,
    "fooling": fooling,
    "short": short,
    "ablation": ablation,
}  # fmt: skip


_BLOCK = re.compile(r"<!-- (\w+) -->(\n?)(.*?)(\n?)<!-- end -->", re.DOTALL)


def blocks(page: str) -> list[tuple[str, str]]:
    """Name and text of each block of a page."""
    return [(found[1], found[3]) for found in _BLOCK.finditer(page)]


def written(page: str) -> str:
    """The page with its blocks as the records have them."""
    return _BLOCK.sub(lambda found: f"<!-- {found[1]} -->{found[2]}{BLOCKS[found[1]]()}{found[4]}<!-- end -->", page)


if __name__ == "__main__":
    for page in (README, PAGE):
        write_file(page, written(page.read_text()).encode())
