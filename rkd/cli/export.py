"""`rkd export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from rkd.cli.app import app, guarded


@app.command()
@guarded
def export(
    run: Annotated[
        Optional[Path],
        typer.Argument(help="The run directory. Default: the newest finished one under runs/.", show_default=False),
    ] = None,
    target: Annotated[
        Optional[list[str]],
        typer.Option(
            help="A target's name (`rkd targets`) or TOML file; may be repeated. Default: ort-cpu.", show_default=False
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder that the bundles go to.")] = Path(),
    eval_images: Annotated[int, typer.Option(help="At most so many test images travel in the bundle.")] = 5000,
    data: Annotated[str, typer.Option(help="The data set, where it has moved since the run.", show_default=False)] = "",
    sign: Annotated[
        Optional[Path],
        typer.Option(help="Sign the bundles with this private key (`rkd keygen`).", show_default=False),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write a bundle that loses accuracy or wakes a backdoor; it is marked.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing bundles.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Write a run's student as bundles (.rkd) that boards can run and verify.

    Examples:
        rkd export --target jetson-fp16

        rkd export runs/mobilenet-robustkd-s0 --target ort-cpu --target jetson-fp16 --out ship/

        rkd export --target jetson-int8 --sign mine.key
    """
    from rkd.export.command import export_command

    export_command(
        run,
        target or ["ort-cpu"],
        out,
        eval_images=eval_images,
        data=data,
        sign=sign,
        force=force,
        overwrite=overwrite,
        json_output=json_output,
    )
