"""Jobs in processes of their own: they end when they are let go, and say why they failed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rkd.cli import app
from rkd.errors import StorageError
from rkd.run import Run
from rkd.suite.launch import Leash, LocalLauncher, Task, explain, run_task
from rkd.suite.place import Place
from rkd.suite.plan import Job
from rkd.suite.ray_launcher import gpu_share, work_remotely
from rkd.suite.results import code_version

SUITE = """
[defences.ofd]
undefended = true
distill = { method = "ofd", epochs = 400, checkpoint-every = 1 }
[defences.huge]
distill = { method = "kd", student = "wrn-10-400" }
"""


@pytest.mark.parametrize(
    ("code", "printed", "said"),
    [
        (1, "loading\nrkd: no such file: x\n", "no such file: x"),
        (1, "", "it printed nothing"),
        (-9, "step 3\n", "ran out of memory"),
        (-11, "step 3\n", "killed by SIGSEGV; the last it printed: step 3"),
        (1, "rkd: out of memory; use a smaller --batch\n", "its limit was 100 MiB: --memory"),
        (1, "ImportError: x.so: failed to map segment from shared object\n", "its limit was 100 MiB"),
        (-6, "terminate called\nwhat(): std::bad_alloc\n", "out of memory (its limit was 100 MiB: --memory): what()"),
        (
            1,
            "rkd: internal error (ImportError: failed to map segment); this is a bug\n",
            "out of memory (its limit was 100 MiB: --memory)",
        ),
    ],
)
def test_a_failure_is_explained(code: int, printed: str, said: str) -> None:
    assert said in explain(code, printed, 100)


def test_a_job_s_output_goes_to_its_log_and_earlier_attempts_stay(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "job.log"
    for argv in (("--version",), ("nonsense",)):
        outcome = run_task(Task("student:x", str(tmp_path), str(log), argv), Leash())
    text = log.read_text()
    assert text.startswith("$ rkd --version\nrkd ")
    assert "$ rkd nonsense" in text
    assert outcome.code == 2
    assert "nonsense" in outcome.said or "Error" in outcome.said or "╯" in outcome.said


def test_a_log_that_is_a_link_is_not_written(tmp_path: Path) -> None:
    (tmp_path / "log").symlink_to(tmp_path / "outside.txt")
    with pytest.raises(StorageError, match="is a symbolic link"):
        run_task(Task("student:x", str(tmp_path), str(tmp_path / "log"), ("--version",)), Leash())
    assert not (tmp_path / "outside.txt").exists()


def test_a_job_that_was_let_go_before_it_began_does_not_run_on(tmp_path: Path) -> None:
    leash = Leash()
    leash.release()
    outcome = run_task(Task("student:x", str(tmp_path), str(tmp_path / "log"), ("suite", "missing.toml")), leash)
    assert outcome.code != 0


def test_a_launcher_tells_of_a_job_that_could_not_be_started(tmp_path: Path) -> None:
    launcher = LocalLauncher(1)
    launcher.start(Task("student:x", str(tmp_path / "missing"), str(tmp_path / "log"), ("--version",)))
    (outcome,) = launcher.ended(60)
    assert outcome.code == 1
    assert "missing" in outcome.said


@contextmanager
def suite_process(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`rkd suite my.toml` as a person starts it."""
    command = [sys.executable, "-m", "rkd", "suite", "my.toml", "--jobs", "1", *arguments]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(process: subprocess.Popen[str], reached: Callable[[], bool]) -> None:
    """Until the suite is where it is wanted; it must not end before."""
    while not reached():
        try:
            process.wait(0.02)
        except subprocess.TimeoutExpired:
            continue
        raise AssertionError(process.communicate())


@pytest.mark.promise
def test_killed_stopped_and_out_of_memory_a_suite_goes_on_and_loses_nothing(folder: Path, base: str) -> None:
    """One suite: kill -9 in the first student, SIGTERM in its second attempt, then to the end beside a cell that is too large."""
    (folder / "my.toml").write_text(base + SUITE)
    student = folder / "runs/my/cells/stripes/tiny/clean/full/ofd/s0"

    def checkpoint() -> int:
        return max((int(p.name) for p in (student / "checkpoints").glob("[0-9]*") if p.name.isdigit()), default=0)

    with suite_process(folder) as process:
        wait_for(process, lambda: checkpoint() > 0)
        process.kill()
        process.wait()
    killed_at = checkpoint()
    assert Run.open(student).summary["state"] == "running"

    with suite_process(folder) as process:  # the orphan saves and leaves first
        wait_for(process, lambda: checkpoint() > killed_at + 2)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=120)
    assert process.returncode == 143, said
    assert "Traceback" not in said
    assert "FAILED" not in said
    assert said.strip().splitlines()[-1].endswith("go on with the same command: rkd suite my.toml --jobs 1")
    assert "0 of 2 students are done" in said.strip().splitlines()[-1]
    stopped_at = checkpoint()
    assert stopped_at > killed_at

    # Shorten what is left, in the run and in the file alike, to what a test has time for.
    summary = json.loads((student / "run.json").read_text())
    summary["settings"]["epochs"]["value"] = -(
        -(stopped_at + 1) // 6
    )  # 90 images in batches of 15: enough for one more
    (student / "run.json").write_text(json.dumps(summary))
    edited = (
        (folder / "my.toml").read_text().replace("epochs = 400", f"epochs = {summary['settings']['epochs']['value']}")
    )
    (folder / "my.toml").write_text(edited)
    with suite_process(folder, "--memory", "4000") as process:
        _, said = process.communicate(timeout=280)
    assert process.returncode == 1, said
    last = said.strip().splitlines()[-1]
    assert "1 of the suite's jobs failed: student stripes/tiny/clean/full/huge/s0: out of memory" in last
    assert "4,000 MiB" in last
    assert Run.open(student).finished
    logged = [line["step"] for line in Run.open(student).metrics() if line["stage"].startswith("distil")]
    assert logged == sorted(logged)
    assert (folder / "results/my/cells/stripes__tiny__clean__full__ofd__s0.json").is_file()
    assert "ofd" in (folder / "results/my/table.md").read_text()
    logs = (folder / "runs/my/logs").iterdir()
    assert sum(path.read_text().count("$ rkd teacher") for path in logs) == 1


@pytest.mark.promise
def test_where_the_disk_is_full_the_cells_that_run_save_first(
    folder: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One cell ends and nothing can be noted of it any more; the one beside it is asked to save, and does."""
    short = SUITE.split("[defences.huge]", maxsplit=1)[0] + '[defences.ce]\ndistill = { method = "ce", epochs = 1 }\n'
    (folder / "my.toml").write_text(base + short)
    student = folder / "runs/my/cells/stripes/tiny/clean/full/ofd/s0"
    note = Place.note

    def full(place: Place, job: Job, **facts: Any) -> None:
        if "/ce/" in job.name:
            while not list((student / "checkpoints").glob("0*")):
                threading.Event().wait(0.02)
            raise StorageError("no space left on the device")
        note(place, job, **facts)

    monkeypatch.setattr(Place, "note", full)
    failed = CliRunner().invoke(app, ["suite", "my.toml", "--jobs", "2"])
    assert failed.exit_code == 1
    assert failed.stderr.strip().splitlines()[-1] == "rkd: no space left on the device"
    log = folder / "runs/my/logs/student__stripes__tiny__clean__full__ofd__s0.log"
    assert "stopped and saved at step" in log.read_text()


def test_a_worker_with_other_sources_does_nothing(tmp_path: Path) -> None:
    code = code_version()
    task = Task("student:x", str(tmp_path), str(tmp_path / "log"), ("--version",))
    (tmp_path / "suite.json").write_text("{}")
    other = work_remotely(task, str(tmp_path / "suite.json"), {**code, "sources": "0" * 64})
    assert other.code == 1
    assert (
        f"has rkd {code['rkd']} (sources {code['sources'][:12]}), expected rkd {code['rkd']} (sources 0000"
        in other.said
    )
    assert not (tmp_path / "log").exists()
    assert work_remotely(task, str(tmp_path / "suite.json"), code).code == 0
    assert "does not see" in work_remotely(task, str(tmp_path / "nothing"), code).said


@pytest.mark.parametrize(
    ("jobs", "gpus", "share"), [(1, 1, 1.0), (2, 4, 1.0), (4, 1, 0.25), (4, 2, 0.5), (3, 2, 0.5), (8, 3, 1 / 3)]
)
def test_jobs_share_the_gpus_of_a_cluster(jobs: int, gpus: int, share: float) -> None:
    assert gpu_share(jobs, gpus) == pytest.approx(share)
    assert gpus * int(1 / gpu_share(jobs, gpus)) >= jobs, "all of them run at once"
