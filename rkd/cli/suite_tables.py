"""What `rkd suite` prints: the plan before, the ranking after."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.markup import escape

from rkd.cli.tables import console, folding_table, say_next

if TYPE_CHECKING:
    from rkd.suite.command import Planned
    from rkd.suite.output import Tables


def print_plan(planned: Planned) -> None:
    """Every job with its state and estimated time, and the time of all."""
    from rkd.suite.display import duration

    table = folding_table("job", "state", "about", "options")
    for line in planned.lines:
        options = ", ".join(f"{name.replace('_', '-')}={value}" for name, value in line.options.items())
        table.add_row(escape(line.job), line.state, duration(line.seconds), escape(options))
    console().print(table)
    for note in planned.notes:
        say_next(note)
    todo = [line for line in planned.lines if line.state != "done"]
    say_next(
        f"{len(planned.lines)} jobs, {len(todo)} to do, {planned.slots} at once: about {duration(planned.seconds)}. The "
        "estimate is from multiply-accumulates until some jobs are done, and from what those took then."
    )


def plan_json(planned: Planned) -> dict[str, Any]:
    """The plan for programs."""
    return {
        "suite": planned.suite,
        "slots": planned.slots,
        "seconds": round(planned.seconds),
        "notes": list(planned.notes),
        "jobs": [{**vars(line), "options": dict(line.options)} for line in planned.lines],
    }


def print_tables(made: Tables) -> None:
    """The ranking of the defences, and where the rest is."""
    from rkd.suite.display import shown
    from rkd.suite.output import MARKDOWN, PAGE, STANDING_HEADS, standing_cells
    from rkd.suite.table import comparable

    table = folding_table(*STANDING_HEADS)
    for standing in made.table.standings:
        budget = f" ({standing.budget})" if len(made.table.budgets) > 1 else ""
        name, *cells = standing_cells(standing)
        table.add_row(escape(name + budget), *cells)
    console().print(table)
    for said in dict.fromkeys([*(comparable(made.table, budget) for budget in made.table.budgets), *made.notes]):
        say_next(said)
    attacked = [case for case in made.table.cases if case[2] != "clean"]
    say_next(
        f"{len(made.table.transferring)} of {len(attacked)} attacked cases transfer; "
        f"{shown(made.folder / MARKDOWN)} and {shown(made.folder / PAGE)} have every case"
    )
