"""The tables of docs/results.md, written from the records in results/ and from nothing else, each between <!-- NAME --> and <!-- end -->.

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
PAGE = ROOT / "docs" / "results.md"
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
        return f"all {of} cells" if done == of else f"the cells that are finished so far ({done} of {of})"

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


def cases() -> str:
    """Every attacked case, undefended and with RobustKD; those that transfer first."""
    carried = CPU.transferring()
    rows = [
        [case(ofd.cell) + note, figures(ofd), excess(ofd), figures(ours), excess(ours)]
        for pairs, note in (
            (carried, ""),
            ([both for both in CPU.pairs() if both not in carried], ": does not transfer"),
        )
        for ofd, ours in pairs
    ]
    return markdown(
        [
            "case",
            "undefended (OFD): ACC, ASR, RA (control's ASR)",
            "excess ASR",
            "RobustKD: ACC, ASR, RA (control's ASR)",
            "excess ASR",
        ],
        rows,
    )


def clean() -> str:
    """ACC of students of clean teachers."""
    defences = {"ofd": "undefended (OFD)", "robustkd": "RobustKD", "ce": "no teacher (`ce`)"}
    rows = []
    for cell in CPU.by_case():
        if cell.attack == CLEAN and cell.defence == "ofd" and cell in CPU.records:
            met = [CPU.records.get(replace(cell, defence=defence)) for defence in defences]
            rows.append([case(cell), *(slanted(r, interval(r.student.acc)) if r else "" for r in met)])
    return markdown(["clean teacher", *defences.values()], rows)


def baselines() -> str:
    """RobustKD beside the baselines that met several cases; a dagger where they met another teacher."""
    defences = {
        "robustkd": "RobustKD", "finetune+ofd": "fine-tuning (`finetune+ofd`)", "nad+ofd": "NAD (`nad+ofd`)",
        "prune+ofd": "fine-pruning (`prune+ofd`)",
    }  # fmt: skip
    rows = []
    for cell in dict.fromkeys(replace(record.cell, defence="") for pair in CPU.transferring() for record in pair):
        met = [CPU.records.get(replace(cell, defence=defence)) for defence in defences]
        if any(met[1:]) and met[0]:
            rows.append([case(cell), *(beside(r, met[0]) if r else "" for r in met)])
    return markdown(["case", *defences.values()], rows)


def beside(record: Record, ours: Record) -> str:
    """One baseline's figures in the row of RobustKD's."""
    return f"{figures(record)}, **{record.score:.1f}**{'' if basis(record) == basis(ours) else ' †'}"


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
    elif used["method"].startswith("robustkd") and not used.get("purify"):
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


def summary() -> str:
    """The figures that the cases come down to."""
    pairs = CPU.transferring()
    lost = [ofd.student.acc.value - ours.student.acc.value for ofd, ours in pairs]
    extra = [ours.excess[0] for _, ours in pairs if ours.excess]
    below = [o.control.ra.value - o.student.ra.value for _, o in pairs if o.control and o.control.ra and o.student.ra]
    return (
        f"Over the {len(pairs)} rows that transfer RobustKD's ACC is {mean(lost):.1f} points below the undefended student's on "
        f"average, {max(lost):.1f} at worst; its excess ASR is {signed(mean(extra))} on average, {signed(max(extra))} at worst "
        f"({signed(mean(max(gap, 0) for gap in extra))} on average with nought in place of what is negative: in "
        f"{sum(gap < 0 for gap in extra)} rows its student obeys the trigger less than its control does); its RA is "
        f"{signed(-mean(below))} points from the control's on average, {signed(-max(below))} at worst."
    )


def apart() -> str:
    """How far each baseline that has met several cases of RobustKD's teachers is behind it."""
    names = {"finetune+ofd": "fine-tuning", "nad+ofd": "NAD", "prune+ofd": "fine-pruning"}
    cases = [carried for carried in CPU.table.transferring if carried[3] == "full"]
    said = []
    for standing in CPU.table.ranking("full"):
        n = len(standing.against.values)
        if standing.defence in names and standing.yardstick == "robustkd" and n > 1:
            plain = ahead(standing.defence, standing.yardstick, cases, [*CPU.records.values()], sub)
            verdict = "told apart" if standing.against.separated else "**not told apart**"
            said.append(
                f"{names[standing.defence]} is {behind(standing.against)} behind over {n} cases, {verdict} "
                f"({behind(plain)} with a negative excess as it is)"
            )
    return f"From the same teachers {'; '.join(said)}."


def behind(paired: Paired) -> str:
    """Mean and interval of the opposite."""
    low, high = paired.interval
    return f"{-paired.mean:.1f} [{-high:.1f}, {-low:.1f}]"


BLOCKS: Mapping[str, Callable[[], str]] = {
    "finished": CPU.finished,
    "precision": precision,
    "cases": cases,
    "summary": summary,
    "clean": clean,
    "baselines": baselines,
    "apart": apart,
    "first": first,
    "fooling": fooling,
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
    write_file(PAGE, written(PAGE.read_text()).encode())
