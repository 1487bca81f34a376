"""What `rkd bench` does: find and verify bundles, measure, save, print."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from rkd.bench import result as bench_result
from rkd.bench import table
from rkd.bench.options import BenchOptions
from rkd.bench.session import run
from rkd.bundle import read_bundle
from rkd.errors import BundleError, StoppedError
from rkd.files import check_writable
from rkd.progress import stage_lines
from rkd.signals import stop_requests


def bench_command(
    paths: Sequence[Path], *, quick: bool, batch: int, threads: int, seed: int, out: Path, json_output: bool
) -> dict[str, Any]:
    """Measure bundles and write the result.

    Args:
        paths: bundles; empty for the newest in this folder.
        quick: a first answer in seconds.
        batch: images an inference.
        threads: CPU threads; 0 for all.
        seed: of the bootstrap.
        out: where the result goes.
        json_output: print the result as JSON instead of a table.

    Raises:
        BundleError: no bundle, or one that does not verify.
        StoppedError: Ctrl-C, after the partial result was written.
    """
    bundles = [read_bundle(path) for path in paths or [newest_bundle(Path())]]
    options = BenchOptions(quick=quick, batch=batch, threads=threads or None, seed=seed)
    check_writable(out)
    with stop_requests() as stop, stage_lines() as tell:
        measured = run(bundles, options, tell)
    bench_result.write(out, measured)
    if json_output:
        print(json.dumps(measured, indent=2))  # noqa: T201
    else:
        screen = Console(highlight=False)
        screen.print(table.render(measured))
        screen.print(f"wrote {out}; next: rkd report {out}", markup=False, soft_wrap=True)
    if measured["interrupted"]:
        raise StoppedError(
            f"interrupted; what was measured is in {out}, marked invalid", stop.signal_number or signal.SIGINT
        )
    return measured


def newest_bundle(folder: Path) -> Path:
    """The `.rkd` file that was written last.

    Raises:
        BundleError: there is none.
    """
    found = [path for path in folder.glob("*.rkd") if path.is_file()]
    if not found:
        raise BundleError(
            f"no bundle (.rkd) in {folder.resolve()}: name one, or make one on the workstation with rkd export"
        )
    return max(found, key=lambda path: (path.stat().st_mtime_ns, path.name))
