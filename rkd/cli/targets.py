"""`rkd targets`."""

from __future__ import annotations

from typing import Annotated

import typer

from rkd.cli.app import app, guarded


@app.command()
@guarded
def targets(json_output: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False) -> None:
    """List the boards and runtimes that a student can be exported for.

    A TOML file of your own works the same way: `rkd export --target my-board.toml`
    """
    from rich.markup import escape

    from rkd.cli import tables
    from rkd.target import builtin_targets

    found = builtin_targets()
    if json_output:
        tables.print_json({"targets": [target.to_json() for target in found.values()]})
        return
    table = tables.folding_table("target", "runtime", "precision", "board", "needs")
    for target in found.values():
        table.add_row(
            *(escape(cell) for cell in (target.name, target.runtime, target.precision, target.board, target.needs))
        )
    tables.console().print(table)
