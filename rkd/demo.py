"""The whole job on the built-in digits: what `rkd demo` runs, command by command.

The figures of the attack were found on these digits: a trigger that moves 42 % of the images of the clean twin at most,
amplified by eight epochs of fine-tuning. Controls are the same students from the clean twin.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rkd.errors import RkdError, RunError
from rkd.files import storage_errors, write_file
from rkd.metrics import Scores
from rkd.progress import say
from rkd.reporting import excess_asr, write_run_report
from rkd.run import Run, models_of
from rkd.suite.table import TRANSFERS

_EPOCHS = 15
_REPORT = "report.html"
_SIGN_OF_LIFE_S = 15.0
_MARKER, _MARKED = ".rkd-demo", "made by rkd demo, which may remove this folder\n"
_STUDENTS = {  # folder: teacher, method, what it is called
    "control-ofd": ("teacher.clean.pt", "ofd", "control (OFD)"),
    "undefended": ("teacher.pt", "ofd", "undefended (OFD)"),
    "control-robustkd": ("teacher.clean.pt", "robustkd", "control (RobustKD)"),
    "robustkd": ("teacher.pt", "robustkd", "RobustKD"),
}
_STEPS = ("teacher", *_STUDENTS, "export-robustkd", "export-undefended", "bench", "report")
_CONTROL_OF = {"undefended": "control-ofd", "robustkd": "control-robustkd"}


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured.

    Attributes:
        rows: what each teacher and student is called, and its scores.
        bench: the table that `rkd bench` printed.
        verdict: what the figures say, in words.
        pages: the reports to look at.
        seconds: that all of it took.
    """

    rows: tuple[tuple[str, Scores], ...]
    bench: str
    verdict: str
    pages: tuple[Path, ...]
    seconds: float


def run_demo(out: Path, *, seed: int, jobs: int, overwrite: bool) -> DemoResult:
    """Run every step in `out`; each is said on standard error as it starts.

    Args:
        out: a new folder.
        seed: of every step.
        jobs: students trained at once; 0 for one a core.
        overwrite: remove an earlier demo's folder first.

    Raises:
        RunError: `out` exists.
        RkdError: a step failed; its log says why.
    """
    if out.exists() and any(out.iterdir()):
        if not overwrite:
            raise RunError(f"{out} exists; choose another --out, or give --overwrite")
        if not (out / _MARKER).is_file() or (out / _MARKER).read_text() != _MARKED:
            raise RunError(f"{out} is not an earlier demo's folder: it will not be removed; choose another --out")
        shutil.rmtree(out)
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    write_file(out / _MARKER, _MARKED.encode())
    started = time.monotonic()
    common = ["--seed", str(seed), "--threads", "1"]
    say(f"everything goes to {out}{os.sep}; the steps are ordinary commands, shown as they start")
    _step(
        out, "teacher",
        ["teacher", "--data", "digits", "--image-size", "16", "--arch", "wrn-10-2", "--attack", "backweak-graded",
         "--target", "3", "--linf", "26", "--trigger-budget", "42", "--epochs", str(_EPOCHS), "--finetune-epochs", "8",
         "--finetune-lr", "0.01", "--batch", "64", "--out", "teacher.pt", *common],
    )  # fmt: skip
    commands = {
        name: ["distill", teacher, "--student", "wrn-10-1", "--method", method, "--trigger", "teacher.trigger.npz",
               "--epochs", str(_EPOCHS), "--batch", "64", "--out", f"runs/{name}", *common]
        for name, (teacher, method, _) in _STUDENTS.items()
    }  # fmt: skip
    with ThreadPoolExecutor(jobs or len(os.sched_getaffinity(0))) as pool:
        for done in [pool.submit(_step, out, name, command) for name, command in commands.items()]:
            done.result()
    _step(out, "export-robustkd", ["export", "runs/robustkd", "--target", "ort-cpu", "--target", "jetson-fp16"])
    _step(out, "export-undefended", ["export", "runs/undefended", "--target", "ort-cpu"])
    bench = _step(out, "bench", ["bench", "robustkd.ort-cpu.rkd", "undefended.ort-cpu.rkd", "--quick"])
    _step(out, "report", ["report", "result.json", "--out", "bench.html"])
    rows, verdict = _summary(out)
    pages = (out / _REPORT, out / "bench.html")
    return DemoResult(rows, bench, verdict, pages, time.monotonic() - started)


def _step(out: Path, name: str, arguments: Sequence[str]) -> str:
    """Run one `rkd` command in `out`; what it prints goes to NAME.log as it comes, and is returned.

    Its last line is shown now and then: a step may take minutes on a busy machine.
    """
    say(f"[{_STEPS.index(name) + 1} of {len(_STEPS)}] $ rkd {shlex.join(arguments)}")
    started = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    path = out / f"{name}.log"
    with storage_errors(out), path.open("wb") as log:
        command = [sys.executable, "-m", "rkd", *arguments]
        with subprocess.Popen(command, cwd=out, env=environment, stdout=log, stderr=subprocess.STDOUT) as process:  # noqa: S603
            while process.poll() is None:
                try:
                    process.wait(_SIGN_OF_LIFE_S)
                except subprocess.TimeoutExpired:
                    say(f"  {name}: {_last_line(path)}")
    if process.returncode:
        raise RkdError(
            f"`rkd {arguments[0]}` failed with exit code {process.returncode}: {_last_line(path)} (see {path})"
        )
    say(f"  done in {time.monotonic() - started:.0f} s: {name}")
    return path.read_text(errors="replace")


def _last_line(log: Path) -> str:
    return (log.read_text(errors="replace").strip().splitlines() or ["nothing printed yet"])[-1]


def _summary(out: Path) -> tuple[tuple[tuple[str, Scores], ...], str]:
    """The rows of the table and the verdict; writes the report."""
    runs = {name: Run.open(out / "runs" / name) for name in _STUDENTS}
    students: dict[str, Scores] = {name: models_of(run)[-1].scores for name, run in runs.items()}
    teachers = {runs[name].summary["teacher"]["file"]: models_of(runs[name])[0].scores for name in _STUDENTS}
    verdict = _verdict(students)
    write_run_report(
        list(runs.values()), out / _REPORT, verdict=verdict, title="rkd demo: handwritten digits",
        roles={str(run.path): _STUDENTS[name][2] for name, run in runs.items()},
        controls={_STUDENTS[name][2]: _STUDENTS[control][2] for name, control in _CONTROL_OF.items()},
    )  # fmt: skip
    rows = [(f"teacher: {file}", scores) for file, scores in sorted(teachers.items())]
    return (*rows, *((_STUDENTS[name][2], scores) for name, scores in students.items())), verdict


def _verdict(students: Mapping[str, Scores]) -> str:
    """What was measured, in the words that the figures allow: a case transfers from 30 points of excess ASR on."""
    excess, low, high = excess_asr(students["undefended"], students["control-ofd"])
    kept, kept_low, kept_high = excess_asr(students["robustkd"], students["control-robustkd"])
    carried = (
        "carries the backdoor along"
        if excess >= TRANSFERS
        else "does not carry enough of the backdoor along to test a defence"
    )
    text = (
        f"Plain distillation {carried}: the trigger moves {excess:+.1f} points [{low:+.1f}, {high:+.1f}] more images of "
        f"the undefended student than of its control (excess ASR). In the RobustKD student it is {kept:+.1f} points "
        f"[{kept_low:+.1f}, {kept_high:+.1f}]."
    )
    robust, undefended = students["robustkd"].acc, students["undefended"].acc
    return (
        f"{text} Clean accuracy: {robust.value:.1f} % with RobustKD, {undefended.value:.1f} % undefended, on {robust.n} "
        "handwritten digits. A control is the same student, method and seed from the clean twin of the teacher."
    )
