"""`rkd doctor`."""

from __future__ import annotations

from typing import Annotated

import typer

from rkd.cli.app import app, guarded


@app.command()
@guarded
def doctor(json_output: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False) -> None:
    """Say what of this machine rkd can use, and what is missing.

    Examples:
        rkd doctor
    """
    from rkd.cli import tables
    from rkd.diagnosis import diagnose

    findings = diagnose()
    if json_output:
        tables.print_json({"findings": [finding.to_json() for finding in findings]})
    else:
        tables.print_findings(findings)
