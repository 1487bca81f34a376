"""`rkd suite`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from rkd.cli.app import app, guarded


@app.command()
@guarded
def suite(
    file: Annotated[Path, typer.Argument(help="The suite file (.toml); docs/suite.md has the form.", readable=False)],
    data_root: Annotated[
        Optional[Path],
        typer.Option(
            help="Where the data sets are, as NAME/, NAME.npz or NAME.tar. Default: this folder.",
            show_default=False,
            readable=False,
        ),
    ] = None,
    jobs: Annotated[
        int, typer.Option(help="Cells at once, one thread each; 0 for one a CPU, fewer where memory is short.")
    ] = 0,
    memory: Annotated[
        Optional[int],
        typer.Option(
            help="MiB that one cell may use, 0 for no limit. Default: its share of 90 % of this machine's.",
            show_default=False,
        ),
    ] = None,
    only: Annotated[
        Optional[list[str]],
        typer.Option(
            help="Work on these cells only: a pattern of DATA/PAIR/ATTACK/BUDGET/DEFENCE/sSEED, such as '*/robustkd/*'; may be repeated.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Optional[Path], typer.Option(help="Where the runs go. Default: runs/NAME.", show_default=False, readable=False)
    ] = None,
    results: Annotated[
        Path, typer.Option(help="Where the small result files and the tables go, in a folder NAME.", readable=False)
    ] = Path("results"),
    stale: Annotated[
        str, typer.Option(help="What was made with other settings: refuse to go on, keep it as it is, or redo it.")
    ] = "refuse",
    launcher: Annotated[
        str, typer.Option(help="local, or ray: cells go to the Ray cluster of RAY_ADDRESS (needs rkd[ray]).")
    ] = "local",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done and how long it takes.")] = False,
    table_only: Annotated[
        bool, typer.Option("--table-only", help="Make the tables again from the result files alone.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the table (or the plan) as JSON.")] = False,
) -> None:
    """Run attacks x defences x networks x data sets to one table.

    Run it again to go on; it skips what is done.

    Examples:
        rkd suite suites/smoke.toml
        rkd suite suites/cpu.toml --data-root DATA --dry-run
        rkd suite suites/cpu.toml --table-only
    """
    from rkd.cli import tables
    from rkd.cli.suite_tables import plan_json, print_plan, print_tables
    from rkd.errors import ConfigError
    from rkd.suite.command import SuiteOptions, rebuild, run_suite, show_plan

    if dry_run and table_only:
        raise ConfigError("give either --dry-run or --table-only")
    options = SuiteOptions(file, out, results, data_root, tuple(only or ()), jobs, memory, launcher, stale)
    if dry_run:
        planned = show_plan(options)
        if json_output:
            tables.print_json(plan_json(planned))
        else:
            print_plan(planned)
        return
    made, error = (rebuild(options), None) if table_only else run_suite(options)
    if json_output:
        tables.print_json(made.to_json())
    else:
        print_tables(made)
    if error is not None:
        raise error
