"""Killed anywhere and resumed, a distillation ends with the bytes of one that was never killed."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

Start = Callable[..., BaseProcess]

EXACT = ("--threads", "1", "--precision", "fp32", "--device", "cpu", "--checkpoint-every", "2")
COMMAND = ("distill", "teacher.pt", "--student", "wrn-10-1", "--epochs", "3", "--batch", "15", "--cap", "0.05", "--out",
           "run", *EXACT)  # fmt: skip
STEPS = 18  # 90 images, 15 a step, three epochs
RESUME = ("distill", "--resume", "run")
SIGKILLED = -signal.SIGKILL
KILLS = int(os.environ.get("RKD_KILLS", "10"))  # at random times; 500 before a release


def finish(child: BaseProcess, timeout_s: float = 120) -> int:
    child.join(timeout_s)
    assert child.exitcode is not None, "the child hangs"
    return child.exitcode


def result(folder: Path) -> tuple[str, bytes, bytes]:
    """Digest of the student, the log and the masks of the run in `folder`, after a look at what must not be there."""
    run = folder / "run"
    summary = json.loads((run / "run.json").read_bytes())
    digest = hashlib.sha256((run / "student.safetensors").read_bytes()).hexdigest()
    assert summary["state"] == "finished"
    assert summary["student"]["sha256"] == digest
    assert summary["detox"]["history"], "what the mask cost is in the run's summary"
    assert (run / "report.html").is_file()
    assert not list(run.rglob(".rkd-tmp-*"))
    assert not (run / "checkpoints").exists()
    return digest, (run / "metrics.jsonl").read_bytes(), (run / "masks.npz").read_bytes()


@pytest.fixture
def fresh(tmp_path: Path, furnish: Callable[[Path], Path]) -> Callable[[], Path]:
    """Makes empty working folders with a teacher."""
    count = iter(range(10**6))

    def make() -> Path:
        folder = tmp_path / f"work-{next(count)}"
        folder.mkdir()
        return furnish(folder)

    return make


@pytest.fixture(scope="module")
def cached() -> dict[str, tuple[str, bytes, bytes]]:
    return {}


@pytest.fixture
def uninterrupted(
    cached: dict[str, tuple[str, bytes, bytes]], start: Start, fresh: Callable[[], Path]
) -> tuple[str, bytes, bytes]:
    """What a run that nobody kills makes."""
    if "result" not in cached:
        folder = fresh()
        assert finish(start(folder, *COMMAND)) == 0, (folder / "stderr.txt").read_text()
        cached["result"] = result(folder)
    return cached["result"]


def kill_when(child: BaseProcess, reached: Callable[[], bool]) -> bool:
    """SIGKILL as soon as `reached`; False where the child ended before."""
    while not reached():
        child.join(0.002)
        if child.exitcode is not None:
            assert child.exitcode == 0
            return False
    child.kill()
    return finish(child) == SIGKILLED


def logged_steps(folder: Path) -> int:
    path = folder / "run" / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def newest_checkpoint(folder: Path) -> int:
    names = [p.name for p in (folder / "run" / "checkpoints").glob("0*")]
    return max(map(int, names), default=0)


def resume_to_the_end(start: Start, folder: Path) -> None:
    """Go on; where the kill came before there was a run at all, the same command starts it."""
    command = RESUME if (folder / "run").exists() else COMMAND
    assert finish(start(folder, *command)) == 0, (folder / "stderr.txt").read_text()


# -------------------------------------------------------------------------------------------------- at chosen moments

MOMENTS: dict[str, Callable[[Path], bool]] = {
    "as soon as there is a run": lambda folder: (folder / "run" / "run.json").exists(),
    "while the mask is learned": lambda folder: (
        (folder / "run" / "run.json").exists()
        and not (folder / "run" / "masks.npz").exists()
        and "training images" in (folder / "stderr.txt").read_text()  # said by a run that knows how to go on
    ),
    "as soon as there is a mask": lambda folder: (folder / "run" / "masks.npz").exists(),
    "after the first checkpoint": lambda folder: newest_checkpoint(folder) >= 2,
    "after the first epoch": lambda folder: logged_steps(folder) >= 2,
    "late": lambda folder: newest_checkpoint(folder) >= STEPS - 4,
    "when the student is written": lambda folder: (folder / "run" / "student.safetensors").exists(),
}


QUICK = {"while the mask is learned", "after the first epoch", "when the student is written"}


@pytest.mark.parametrize(
    "moment",
    [pytest.param(m, id=name, marks=() if name in QUICK else pytest.mark.slow) for name, m in MOMENTS.items()],
)
def test_killed_at_a_moment_and_resumed_gives_the_same_bytes(
    moment: Callable[[Path], bool],
    start: Start,
    fresh: Callable[[], Path],
    uninterrupted: tuple[str, bytes, bytes],
) -> None:
    folder = fresh()
    kill_when(start(folder, *COMMAND), lambda: moment(folder))
    resume_to_the_end(start, folder)
    assert result(folder) == uninterrupted


# ------------------------------------------------------------------------------------- at a system call, to the instant


@pytest.mark.promise
@pytest.mark.parametrize(
    ("call", "number"),
    [
        ("write", 1),  # while the run directory is made: half a file is written
        ("write", 9),  # while a checkpoint is written
        ("replace", 5),
        ("replace", 14),  # while the report is written: the run is finished
        pytest.param("replace", 0, marks=pytest.mark.slow),
        pytest.param("fsync", 14, marks=pytest.mark.slow),
    ],
)
def test_killed_inside_a_write_and_resumed_gives_the_same_bytes(
    call: str, number: int, start: Start, fresh: Callable[[], Path], uninterrupted: tuple[str, bytes, bytes]
) -> None:
    folder = fresh()
    assert finish(start(folder, *COMMAND, fault=(call, number))) == SIGKILLED
    resume_to_the_end(start, folder)
    assert result(folder) == uninterrupted


@pytest.mark.promise
def test_killed_again_and_again_also_while_resuming_it_still_ends_with_the_same_bytes(
    start: Start, fresh: Callable[[], Path], uninterrupted: tuple[str, bytes, bytes]
) -> None:
    folder = fresh()
    assert finish(start(folder, *COMMAND, fault=("replace", 4))) == SIGKILLED
    assert finish(start(folder, *RESUME, fault=("replace", 0))) == SIGKILLED  # before the log is cut
    assert finish(start(folder, *RESUME, fault=("write", 4))) == SIGKILLED
    assert finish(start(folder, *RESUME, fault=("replace", 3))) == SIGKILLED
    resume_to_the_end(start, folder)
    assert result(folder) == uninterrupted


@pytest.mark.promise
def test_killed_inside_the_undefended_students_run_both_students_are_the_same(
    start: Start, fresh: Callable[[], Path]
) -> None:
    whole = fresh()
    assert finish(start(whole, *COMMAND, "--undefended")) == 0
    folder = fresh()
    # First while its run directory is made, then while one of its checkpoints is written.
    assert finish(start(folder, *COMMAND, "--undefended", fault=("replace", 1))) == SIGKILLED
    assert finish(start(folder, *RESUME, fault=("write", 9))) == SIGKILLED
    assert not (folder / "run" / "student.safetensors").exists()
    resume_to_the_end(start, folder)
    assert result(folder) == result(whole)
    name = "run/undefended/student.safetensors"
    assert (folder / name).read_bytes() == (whole / name).read_bytes()


def kill_after(child: BaseProcess, seconds: float) -> bool:
    """SIGKILL at a moment that nothing in the child chooses; False where it had ended by then."""
    child.join(seconds)
    if child.exitcode is not None:
        assert child.exitcode == 0
        return False
    child.kill()
    return finish(child) == SIGKILLED


@pytest.mark.promise
@pytest.mark.timeout(900 + 60 * KILLS)
def test_killed_at_random_times_also_while_resuming_and_in_a_checkpoint_it_ends_with_the_same_bytes(
    start: Start, fresh: Callable[[], Path], uninterrupted: tuple[str, bytes, bytes]
) -> None:
    rng, kills = random.Random(0), dict.fromkeys(("run", "resume", "checkpoint"), 0)
    started = time.monotonic()
    assert finish(start(fresh(), *COMMAND)) == 0
    seconds = time.monotonic() - started
    for attempt in itertools.count():
        if sum(kills.values()) >= KILLS and all(kills.values()):
            break
        assert attempt < 10 * KILLS, f"after {attempt} runs some kind of kill never came: {kills}"
        folder = fresh()
        kills["run"] += kill_after(start(folder, *COMMAND), rng.uniform(0, seconds))
        if (folder / "run").exists():
            kills["resume"] += kill_after(start(folder, *RESUME), rng.uniform(0, seconds))
            # At some write of the rest; half a checkpoint tells that it was one of a checkpoint's.
            ended = finish(start(folder, *RESUME, fault=("write", rng.randrange(3, 12))))
            assert ended in (0, SIGKILLED)
            kills["checkpoint"] += bool(list((folder / "run" / "checkpoints").glob(".rkd-tmp-*")))
        resume_to_the_end(start, folder)
        assert result(folder) == uninterrupted
        shutil.rmtree(folder)
    print(f"\n{kills}: every student the same")  # noqa: T201


# ----------------------------------------------------------------------------------------- while a teacher is purified

PURIFYING = ("--purify-steps", "10", "--epochs", "1")


def teachers_and_student(folder: Path) -> dict[str, bytes]:
    run = folder / "run"
    assert not list(run.rglob(".rkd-tmp-*"))
    names = {path.name for path in run.glob("*.safetensors")} | {"metrics.jsonl"}
    assert {"purified.safetensors", "student.safetensors"} <= names
    facts = json.loads((run / "run.json").read_bytes())["purified"]
    assert facts["sha256"] == hashlib.sha256((run / "purified.safetensors").read_bytes()).hexdigest()
    return {name: (run / name).read_bytes() for name in names}


@pytest.mark.parametrize(
    ("method", "faults"),
    [
        # While a checkpoint of the purifying stage is written, while a teacher is, and while the resumed one works.
        ("nad+ofd", [("replace", 6), ("write", 8)]),
        pytest.param("anp+ofd", [("replace", 4), ("replace", 3)], marks=pytest.mark.promise),
        pytest.param("prune+ofd", [("replace", 5), ("write", 6)], marks=pytest.mark.slow),
        pytest.param("finetune+kd", [("write", 10), ("replace", 2)], marks=pytest.mark.slow),
    ],
)
def test_killed_while_a_teacher_is_purified_both_networks_are_the_same(
    method: str, faults: list[tuple[str, int]], start: Start, fresh: Callable[[], Path]
) -> None:
    whole, folder = fresh(), fresh()
    command = (*COMMAND, "--cap", "0", *PURIFYING, "--method", method)
    assert finish(start(whole, *command)) == 0, (whole / "stderr.txt").read_text()
    first, *others = faults
    assert finish(start(folder, *command, fault=first)) == SIGKILLED
    assert not (folder / "run" / "student.safetensors").exists()
    for fault in others:
        assert finish(start(folder, *RESUME, fault=fault)) == SIGKILLED
    assert finish(start(folder, *RESUME)) == 0, (folder / "stderr.txt").read_text()
    assert teachers_and_student(folder) == teachers_and_student(whole)


@pytest.mark.parametrize(
    "options",
    [
        ("--method", "at", "--cap", "0", "--no-labels"),
        pytest.param(("--method", "robustkd+kd", "--input-noise", "8"), marks=pytest.mark.promise),
    ],
)
def test_killed_with_noise_or_without_labels_the_student_is_the_same(
    options: tuple[str, ...], start: Start, fresh: Callable[[], Path]
) -> None:
    whole, folder = fresh(), fresh()
    assert finish(start(whole, *COMMAND, *options)) == 0, (whole / "stderr.txt").read_text()
    assert finish(start(folder, *COMMAND, *options, fault=("replace", 7))) == SIGKILLED
    assert newest_checkpoint(folder) > 0
    assert finish(start(folder, *RESUME)) == 0, (folder / "stderr.txt").read_text()
    for name in ("student.safetensors", "metrics.jsonl"):
        assert (folder / "run" / name).read_bytes() == (whole / "run" / name).read_bytes()


# --------------------------------------------------------------------------------------------------- asked to stop


@pytest.mark.parametrize(
    ("number", "code", "moment"),
    [
        pytest.param(signal.SIGTERM, 143, "after the first checkpoint", marks=pytest.mark.slow),
        (signal.SIGINT, 130, "after the first epoch"),
        pytest.param(signal.SIGTERM, 143, "while the mask is learned", marks=pytest.mark.promise),
    ],
)
def test_asked_to_stop_it_saves_says_how_to_go_on_and_can(
    number: signal.Signals,
    code: int,
    moment: str,
    start: Start,
    fresh: Callable[[], Path],
    uninterrupted: tuple[str, bytes, bytes],
) -> None:
    folder = fresh()
    child = start(folder, *COMMAND)
    while not MOMENTS[moment](folder):
        child.join(0.002)
        assert child.exitcode is None, (folder / "stderr.txt").read_text()
    assert child.pid is not None
    os.kill(child.pid, number)
    assert finish(child) == code
    said = (folder / "stderr.txt").read_text()
    assert said.splitlines()[-1].startswith("rkd: stopped")
    assert said.splitlines()[-1].endswith("go on with: rkd distill --resume run")
    assert "Traceback" not in said
    before = newest_checkpoint(folder)
    assert before > 0 or moment == "while the mask is learned"
    resume_to_the_end(start, folder)
    assert result(folder) == uninterrupted


def test_the_program_itself_exits_143_after_sigterm(
    start: Start, fresh: Callable[[], Path], uninterrupted: tuple[str, bytes, bytes]
) -> None:
    folder = fresh()
    command = [sys.executable, "-m", "rkd", *COMMAND, "--epochs", "400"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as child:
        try:
            while not newest_checkpoint(folder):
                assert child.poll() is None
                try:
                    child.wait(0.01)
                except subprocess.TimeoutExpired:
                    continue
            child.terminate()
            _, said = child.communicate(timeout=60)
        finally:
            child.kill()
    assert child.returncode == 143, said
    assert said.splitlines()[-1].endswith("go on with: rkd distill --resume run")
