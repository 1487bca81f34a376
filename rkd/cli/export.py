"""`rkd export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from rkd.cli.app import app, code_from_command_line, guarded

if TYPE_CHECKING:
    from rkd.export import ExportReport


@app.command()
@guarded
def export(
    context: typer.Context,
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
    teacher: Annotated[
        bool,
        typer.Option(
            "--teacher", help="Export the run's teacher instead, to compare it with its student on the board."
        ),
    ] = False,
    arch: Annotated[
        str,
        typer.Option(
            help="With --teacher: your code for it (path/file.py:factory), where it has some.", show_default=False
        ),
    ] = "",
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
    """Write a run's student as bundles (.rkd) for boards.

    Examples:
        rkd export --target jetson-fp16
        rkd export runs/mobilenet-robustkd-s0 --target ort-cpu --target jetson-fp16 --out ship/
        rkd export --target jetson-int8 --sign mine.key
        rkd export --teacher --target ort-cpu
    """
    from rkd.cli import tables
    from rkd.export.command import export_command
    from rkd.signals import stop_requests

    code_from_command_line(context, "arch")
    with stop_requests() as stop:
        stop.hint = "the same command makes the bundles (with --overwrite where some were finished: they are kept)"
        exported, reports = export_command(
            run,
            target or ["ort-cpu"],
            out,
            eval_images=eval_images,
            data=data,
            teacher=teacher,
            arch=arch,
            sign=sign,
            force=force,
            overwrite=overwrite,
        )
    if json_output:
        bundles = [_as_json(report) for report in reports]
        tables.print_json({"run": str(exported.path), "bundles": bundles})
        return
    for report in reports:
        _print(report, "teacher" if teacher else "student")
    tables.say_next(f"next: copy it to the board and run rkd bench there, or here: rkd bench {reports[0].path}")


def _as_json(report: ExportReport) -> dict[str, Any]:
    from rkd.ledger import pairs

    ledger = report.ledger
    return {
        "path": str(report.path), "sha256": report.digest, "size_bytes": report.size_bytes,
        "model_bytes": report.model_bytes, "student": report.student.to_json(), "exported": report.exported.to_json(),
        "agreement": report.parity.to_json(),
        "flips": {f"{a.name} -> {b.name}": len(ledger.flips(a, b)) for a, b in pairs(ledger)},
        "quantisation": report.quantised.to_json() if report.quantised else None, "forced": list(report.forced),
        "notes": list(report.notes),
        "seconds": dict(report.seconds),
    }  # fmt: skip


def _print(report: ExportReport, role: str) -> None:
    from rkd.bundle import NO_TRIGGER
    from rkd.cli import tables
    from rkd.ledger import pairs

    ledger = report.ledger
    tables.print_scores([(f"{role} in torch", report.student), (report.path.name, report.exported)])
    for before, after in pairs(ledger):
        flips = ledger.flips(before, after)
        first = f"{role} in torch" if before.name == "student" else before.name
        tables.say_next(f"{first} -> {after.name}: {len(flips)} of {ledger.decisions} decisions flip")
    if report.quantised:
        kept = ", ".join(report.quantised.kept) or "none"
        ranges, deciding = report.quantised.images
        tables.say_next(
            f"INT8: calibrator {report.quantised.calibrator} on {ranges} images, decided on {deciding}; kept in higher "
            f"precision, {len(report.quantised.kept)} of {report.quantised.layers} layers: {kept}"
        )
    if not report.student.triggers:
        tables.say_next(f"{report.path.name}: {NO_TRIGGER}")
    for line in report.notes:
        tables.say_next(f"{report.path.name}: {line}")
    for line in report.forced:
        tables.say_next(f"FORCED: {line}")
    stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in report.seconds.items())
    size = f"{report.size_bytes / 1e6:.2f} MB"
    tables.say_next(f"wrote {report.path}: {size}, sha256 {report.digest[:16]}..., seconds: {stages}")
