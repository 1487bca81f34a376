"""`rkd inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rkd.cli.app import app, guarded


@app.command()
@guarded
def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            help="A checkpoint, a run directory, a bundle, a trigger, a result, a target profile or rkd.toml."
        ),
    ],
    json_output: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Say what a file or a run is, without running anything in it.

    Examples:
        rkd inspect hub.pth.tar                      # which network, how many classes
        rkd inspect runs/mobilenet-robustkd-s0       # results, and where each setting came from
        rkd inspect student.ort-cpu.rkd              # verified digests, scores, target
    """
    from rkd.cli import tables
    from rkd.inspection import inspect_path

    found = inspect_path(path)
    if json_output:
        tables.print_json({"path": str(path), **found})
    else:
        tables.print_tree(str(path), found)
