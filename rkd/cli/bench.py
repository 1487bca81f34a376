"""`rkd bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from rkd.cli.app import app, guarded, origins


@app.command()
@guarded
def bench(
    context: typer.Context,
    bundles: Annotated[
        Optional[list[Path]],
        typer.Argument(
            help="Bundles (.rkd) to measure; several give one table. Default: the newest in this folder.",
            show_default=False,
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A first answer in 20 s: fewer samples, at most 256 test images.")
    ] = False,
    mlperf: Annotated[
        bool, typer.Option("--mlperf", help="As long as MLPerf's single stream: 600 s of samples a bundle.")
    ] = False,
    batch: Annotated[
        str, typer.Option(help="Images an inference; several, as in 1,4,16, give a sweep, the first is the main one.")
    ] = "1",
    threads: Annotated[int, typer.Option(help="CPU threads; 0 for all that this process may use.")] = 0,
    data: Annotated[
        Optional[Path],
        typer.Option(
            help="Evaluate on this instead of the bundle's images: a folder with one folder a class (needs Pillow), or "
            "an .npz.",
            show_default=False,
        ),
    ] = None,
    per_class: Annotated[bool, typer.Option("--per-class", help="Also ACC of each class.")] = False,
    gate: Annotated[
        Optional[list[str]],
        typer.Option(
            help="Limits, held against the bad end of each interval; exit 3 if one is broken. As in "
            "'acc>=90, asr<=2, p99<=5ms, memory<=200MB, agreement>=99.5'; may be repeated.",
            show_default=False,
        ),
    ] = None,
    require_valid: Annotated[
        bool,
        typer.Option(
            "--require-valid",
            help="Exit 3 where a result is invalid (throttled, drifted, shared, ...), or the board loses more ACC or gains "
            "more ASR than the target allows.",
        ),
    ] = False,
    lock_clocks: Annotated[
        bool,
        typer.Option(
            "--lock-clocks", help="Fix the clocks while the latency is measured (needs root); they are set back after."
        ),
    ] = False,
    host: Annotated[
        Optional[list[str]],
        typer.Option(
            help="Measure on this board (user@board, or a name of ~/.ssh/config) through ssh; may be repeated.",
            show_default=False,
        ),
    ] = None,
    remote_rkd: Annotated[str, typer.Option(help="How rkd is called on the boards of --host.")] = "rkd",
    out: Annotated[Path, typer.Option(help="Where the result goes.")] = Path("result.json"),
    json_output: Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of a table.")] = False,
) -> None:
    """Measure bundles on this machine or on boards.

    Latency, memory, power, ACC, ASR and RA; needs no torch.

    Examples:
        rkd bench
        rkd bench student.ort-cpu.rkd student-teacher.ort-cpu.rkd --batch 1,8
        rkd bench --gate 'acc>=90, asr<=2, p99<=5ms' --require-valid
        rkd bench student.jetson-fp16.rkd --host nvidia@orin --host nvidia@thor
    """
    from rkd.bench.command import Request, bench_command
    from rkd.bench.options import BenchOptions, parse_batches
    from rkd.errors import ConfigError
    from rkd.progress import say

    if host and data and origins(context)["data"] == "rkd.toml":
        say(
            f"data = {str(data)!r} in rkd.toml is on this machine: the boards of --host evaluate the bundles' own images"
        )
        data = None
    if quick and mlperf:
        raise ConfigError("--quick and --mlperf contradict each other; give one of them")
    first, *rest = parse_batches(batch)
    options = BenchOptions(
        mode="quick" if quick else "mlperf" if mlperf else "default",
        batch=first,
        sweep=tuple(rest),
        threads=threads or None,
        data=data,
        lock_clocks=lock_clocks,
    )
    bench_command(
        Request(
            bundles=tuple(bundles or ()),
            options=options,
            gates=tuple(gate or ()),
            require_valid=require_valid,
            per_class=per_class,
            hosts=tuple(host or ()),
            remote_rkd=remote_rkd,
            out=out,
            json_output=json_output,
        )
    )
