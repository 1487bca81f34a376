"""`rkd students`."""

from __future__ import annotations

from typing import Annotated

import typer

from rkd.cli.app import app, guarded


@app.command()
@guarded
def students(json_output: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False) -> None:
    """List the students by name.

    Any torchvision classification network works as well: `rkd distill teacher.pt --student efficientnet_b0`
    """
    from rkd.cli import tables
    from rkd.students import STUDENTS

    if json_output:
        tables.print_json({"students": [{"name": s.name, "summary": s.summary} for s in STUDENTS]})
        return
    table = tables.folding_table("student", "what it is")
    for student in STUDENTS:
        table.add_row(student.name, student.summary)
    tables.console().print(table)
