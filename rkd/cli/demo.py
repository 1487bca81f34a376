"""`rkd demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rkd.cli.app import app, guarded


@app.command()
@guarded
def demo(
    out: Annotated[Path, typer.Option(help="A new folder for everything that it makes.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Of every step.")] = 0,
    jobs: Annotated[int, typer.Option(help="Students trained at once, one thread each; 0 for one a core.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Remove an earlier demo's folder first.")] = False,
) -> None:
    """Run the whole job on built-in handwritten digits, in minutes.

    A clean and a backdoored teacher, an undefended and a RobustKD student with their controls, export, bench and report:
    each step is an `rkd` command that is shown before it runs.

    Examples:
        rkd demo --out demo --jobs 2
    """
    from rkd.cli import tables
    from rkd.demo import run_demo

    result = run_demo(out, seed=seed, jobs=jobs, overwrite=overwrite)
    tables.say_next("what rkd bench says here, with --quick, which looks at 256 of the 500 test images:")
    tables.say_next(result.bench)
    tables.say_next("all 500 test images:")
    tables.print_scores(result.rows)
    tables.say_next(result.verdict)
    pages = " and ".join(map(str, result.pages))
    tables.say_next(f"{pages} have it all; it took {result.seconds / 60:.1f} minutes")
    tables.say_next(
        "next, with a teacher and images of your own: rkd distill teacher.pt --student mobilenet --data FOLDER"
    )
