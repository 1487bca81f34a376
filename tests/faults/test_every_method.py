"""Every method, killed and resumed, ends with the bytes and the log of a run that nobody killed."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

Start = Callable[..., BaseProcess]

EXACT = ("--threads", "1", "--precision", "fp32", "--device", "cpu", "--checkpoint-every", "1")
COMMAND = ("distill", "teacher.pt", "--student", "wrn-10-1", "--epochs", "2", "--batch", "30", "--out", "run", *EXACT)
STEPS = 6  # 90 images, 30 a step, two epochs
RESUME = ("distill", "--resume", "run")
METHODS: dict[str, tuple[str, ...]] = {
    "robustkd": (),
    "robustkd, not purified": ("--purify", "none"),
    "robustkd, paper": ("--variant", "paper"),
    "ofd": ("--method", "ofd"),
    "ofd, hardened": ("--method", "ofd", "--hardening", "8", "--perturbations", "student"),
    "kd": ("--method", "kd"),
    "ce": ("--method", "ce"),
}
SOAK_SECONDS = float(os.environ.get("RKD_SOAK_SECONDS", "60"))


def run(start: Start, folder: Path, *arguments: str, fault: tuple[str, int] | None = None) -> int:
    child = start(folder, *arguments, steps=4, fault=fault)
    child.join(280)
    assert child.exitcode in (0, -signal.SIGKILL), (folder / "stderr.txt").read_text()
    return child.exitcode


def made(folder: Path) -> tuple[str, bytes]:
    """Digest of the student, and the log, after a look at the log."""
    path = folder / "run"
    digest = hashlib.sha256((path / "student.safetensors").read_bytes()).hexdigest()
    assert json.loads((path / "run.json").read_bytes())["student"]["sha256"] == digest
    assert not list(path.rglob(".rkd-tmp-*"))
    log = (path / "metrics.jsonl").read_bytes()
    lines = [json.loads(line) for line in log.splitlines()]
    purifying = [line["step"] for line in lines if "loss" in line and not line["stage"].startswith("distil")]
    lines = [line for line in lines if line["stage"].startswith("distil")]
    assert purifying in ([], [2, 4]), "one line an epoch: no gap, no repeat"
    assert [line["step"] for line in lines if "loss" in line] == [3, 6], "one line an epoch: no gap, no repeat"
    assert [line["step"] for line in lines if line.get("ends_epoch")] == [3, 6]
    return digest, log


@pytest.fixture
def fresh(tmp_path: Path, furnish: Callable[[Path], Path]) -> Callable[[str], Path]:
    """Makes an empty working folder with a teacher."""

    def make(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        return furnish(folder)

    return make


@pytest.mark.promise
@pytest.mark.parametrize("method", METHODS)
def test_every_method_killed_in_a_checkpoint_and_while_resuming_makes_the_same_student(
    method: str, start: Start, fresh: Callable[[str], Path]
) -> None:
    command = (*COMMAND, *METHODS[method])
    whole = fresh("whole")
    assert run(start, whole, *command) == 0
    folder = fresh("killed")
    assert run(start, folder, *command, fault=("replace", 4)) == -signal.SIGKILL  # a checkpoint that was written
    assert run(start, folder, *RESUME, fault=("write", 5)) == -signal.SIGKILL  # half a checkpoint
    assert run(start, folder, *RESUME) == 0
    assert made(folder) == made(whole)


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_killed_at_random_points_for_as_long_as_there_is_time(start: Start, fresh: Callable[[str], Path]) -> None:
    """`make soak`; counts of kills are printed at the end."""
    rng, wanted, kills, resumes = random.Random(0), {}, 0, 0
    until = time.monotonic() + SOAK_SECONDS
    while time.monotonic() < until or not kills:
        method = rng.choice(list(METHODS))
        command = (*COMMAND, *METHODS[method])
        if method not in wanted:
            whole = fresh(f"whole {method}")
            assert run(start, whole, *command) == 0
            wanted[method] = made(whole)
        folder = fresh("killed")
        for arguments in (command, RESUME, RESUME):
            if arguments is RESUME and not (folder / "run").exists():
                continue
            call = rng.choice(("write", "fsync", "replace"))
            kills += run(start, folder, *arguments, fault=(call, rng.randrange(25))) != 0
            resumes += 1
        assert run(start, folder, *(RESUME if (folder / "run").exists() else command)) == 0
        assert made(folder) == wanted[method], method
        shutil.rmtree(folder)
    print(f"\n{kills} kills over {len(wanted)} methods, {resumes} runs: every student the same")  # noqa: T201
