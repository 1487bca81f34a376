"""`rkd bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from rkd.cli.app import app, guarded


@app.command()
@guarded
def bench(
    bundles: Annotated[
        Optional[list[Path]],
        typer.Argument(
            help="Bundles (.rkd) to measure; several give one table. Default: the newest in this folder.",
            show_default=False,
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A first answer in seconds: fewer samples, at most 256 test images.")
    ] = False,
    batch: Annotated[int, typer.Option(help="Images an inference.")] = 1,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 for all that this process may use.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    out: Annotated[Path, typer.Option(help="Where the result goes.")] = Path("result.json"),
    json_output: Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of a table.")] = False,
) -> None:
    """Measure bundles on this machine: latency, memory, ACC, ASR and RA. Needs no torch.

    Examples:
        rkd bench

        rkd bench a.ort-cpu.rkd b.ort-cpu.rkd

        rkd bench --quick --threads 1
    """
    from rkd.bench.command import bench_command

    bench_command(bundles or [], quick=quick, batch=batch, threads=threads, seed=seed, out=out, json_output=json_output)
