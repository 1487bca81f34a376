"""`rkd report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from rkd.cli.app import app, guarded


@app.command()
@guarded
def report(
    sources: Annotated[
        Optional[list[Path]],
        typer.Argument(
            help="Run directories, or result.json files of `rkd bench`. Default: ./result.json, else the newest run.",
            show_default=False,
        ),
    ] = None,
    control: Annotated[
        Optional[list[Path]],
        typer.Option(
            help="A control's run, to show excess ASR: same settings, from a clean twin of the teacher; may be repeated.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Optional[Path],
        typer.Option(help="The HTML file. Default: report.html, in the run where there is one.", show_default=False),
    ] = None,
) -> None:
    """Write a self-contained HTML page about runs or bench results.

    Examples:
        rkd report runs/mobilenet-robustkd-s0
        rkd report runs/robustkd --control runs/control-robustkd --out compare.html
        rkd report orin.json pi.json --out boards.html
    """
    from rkd.cli.tables import say_next
    from rkd.reporting import report_command

    place, about = report_command(sources or [], out, control or [])
    say_next(f"wrote {place} about {', '.join(map(str, about))}")
