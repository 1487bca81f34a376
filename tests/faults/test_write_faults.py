"""Whatever write, fsync or rename fails: one line, exit 1, nothing half-written, and the run goes on to the same bytes."""

from __future__ import annotations

import errno
import functools
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rkd import files
from rkd.cli import app
from rkd.detox import DetoxRecipe
from rkd.distill import session
from rkd.export import command as export_module

EXACT = ("--threads", "1", "--precision", "fp32", "--device", "cpu", "--checkpoint-every", "1")
COMMAND = ("distill", "teacher.pt", "--student", "wrn-10-1", "--epochs", "1", "--batch", "45", "--cap", "0.05", "--out",
           "run", *EXACT)  # fmt: skip
CALLS = ("write", "fsync", "replace")
SAID = {errno.ENOSPC: "No space left on", errno.EACCES: "no permission for"}
RESULTS = ("student.safetensors", "masks.npz", "metrics.jsonl")


class Disk:
    """Stands in for the `os` of `rkd.files`: counts calls, and fails one of them."""

    def __init__(self, call: str = "", number: int = -1, code: int = 0) -> None:
        self.call, self.number, self.code = call, number, code
        self.counts = dict.fromkeys(CALLS, 0)

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        return functools.partial(self._count, name, real) if name in CALLS else real

    def _count(self, name: str, real: Callable[..., Any], *args: Any) -> Any:
        self.counts[name] += 1
        if name == self.call and self.counts[name] == self.number + 1:
            if name == "write":
                real(args[0], bytes(args[1])[: len(args[1]) // 2])  # a full disk takes what fits
            raise OSError(self.code, os.strerror(self.code))
        return real(*args)


@pytest.fixture(autouse=True)
def _short_detox(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "DetoxRecipe", functools.partial(DetoxRecipe, steps=2, check_every=1))


def rkd(disk: Disk, *arguments: str) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "os", disk)
        return CliRunner().invoke(app, list(arguments))


def results(run: Path) -> tuple[bytes, ...]:
    return tuple((run / name).read_bytes() for name in RESULTS)


def failures(disk: Disk, code: dict[str, int]) -> Iterator[tuple[str, int, int]]:
    for call in CALLS:
        for number in range(disk.counts[call]):
            yield call, number, code[call]


def check(here: Path, failed: Any, where: str, code: int) -> None:
    """One line, exit 1, nothing half-written; what is named checkpoint verifies."""
    lines = [line for line in failed.stderr.splitlines() if line.startswith("rkd: ")]
    assert failed.exit_code == 1, where
    assert len(lines) == 1, where
    assert failed.stderr.splitlines()[-1] == lines[0], where
    assert "Traceback" not in failed.stderr, where
    assert "internal error" not in lines[0], where
    assert SAID.get(code, os.strerror(code)) in lines[0], where
    assert not list(here.rglob(".rkd-tmp-*")), where
    for place in (here / "run" / "checkpoints").glob("*"):
        assert (place / "digests.json").is_file(), where


@pytest.mark.parametrize(
    "codes",
    [
        {"write": errno.ENOSPC, "fsync": errno.EIO, "replace": errno.EACCES},
        pytest.param(dict.fromkeys(CALLS, errno.ENOSPC), marks=pytest.mark.slow),
        pytest.param(dict.fromkeys(CALLS, errno.EIO), marks=pytest.mark.slow),
        pytest.param(dict.fromkeys(CALLS, errno.EACCES), marks=pytest.mark.slow),
    ],
    ids=["mixed", "full", "broken", "forbidden"],
)
def test_wherever_the_disk_fails_the_run_goes_on_to_the_same_student(here: Path, codes: dict[str, int]) -> None:
    whole = Disk()
    assert rkd(whole, *COMMAND).exit_code == 0
    wanted = results(here / "run")
    assert min(whole.counts.values()) >= 8
    for call, number, code in failures(whole, codes):
        shutil.rmtree("run")
        where = f"{call} {number}"
        check(here, rkd(Disk(call, number, code), *COMMAND), where, code)
        # A failure before there is a run leaves none: the same command starts again.
        again = ("distill", "--resume", "run") if Path("run").exists() else COMMAND
        went_on = rkd(Disk(), *again)
        assert went_on.exit_code == 0, f"{where}: {went_on.stderr}"
        assert results(here / "run") == wanted, where
        assert not list(here.rglob(".rkd-tmp-*")), where
        assert Path("run/report.html").is_file(), where


@pytest.mark.slow
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
def test_wherever_the_disk_fails_with_an_undefended_student_both_are_the_same(here: Path, code: int) -> None:
    whole = Disk()
    assert rkd(whole, *COMMAND, "--undefended").exit_code == 0
    wanted = results(here / "run")
    undefended = Path("run/undefended/student.safetensors").read_bytes()
    for call, number, _ in failures(whole, dict.fromkeys(CALLS, code)):
        shutil.rmtree("run")
        where = f"{call} {number}"
        failed = rkd(Disk(call, number, code), *COMMAND, "--undefended")
        assert failed.exit_code == 1, where
        assert not list(here.rglob(".rkd-tmp-*")), where
        again = ("distill", "--resume", "run") if Path("run").exists() else (*COMMAND, "--undefended")
        assert rkd(Disk(), *again).exit_code == 0, where
        assert results(here / "run") == wanted, where
        assert Path("run/undefended/student.safetensors").read_bytes() == undefended, where


@pytest.mark.parametrize("call", CALLS)
def test_a_teacher_that_could_not_be_written_goes_on_to_the_same_bytes(here: Path, stripes: Path, call: str) -> None:
    options = ("--data", str(stripes), "--arch", "wrn-10-1", "--epochs", "1", "--batch", "45", *EXACT)
    whole = Disk()
    assert rkd(whole, "teacher", *options, "--out", "a.safetensors").exit_code == 0
    wanted = Path("a.safetensors").read_bytes()
    for number in range(0, whole.counts[call], 3):
        shutil.rmtree("runs")
        Path("b.safetensors").unlink(missing_ok=True)
        failed = rkd(Disk(call, number, errno.ENOSPC), "teacher", *options, "--out", "b.safetensors")
        assert failed.exit_code == 1, number
        assert "No space left on" in failed.stderr, number
        assert not list(here.rglob(".rkd-tmp-*")), number
        resume = ("teacher", "--resume", "runs/teacher-b", "--overwrite")
        begun = Path("runs/teacher-b").exists()
        again = resume if begun else ("teacher", *options, "--out", "b.safetensors")
        assert rkd(Disk(), *again).exit_code == 0, number
        assert Path("b.safetensors").read_bytes() == wanted, number


def test_a_folder_that_may_not_be_written_is_one_line(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class ReadOnly(Disk):
        def __getattr__(self, name: str) -> Any:
            if name == "open":
                return self._open
            return super().__getattr__(name)

        def _open(self, path: Any, flags: int, *mode: int) -> int:
            if flags & os.O_CREAT:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return os.open(path, flags, *mode)

    failed = rkd(ReadOnly(), *COMMAND)
    assert failed.exit_code == 1
    assert "no permission for" in failed.stderr.splitlines()[-1]
    assert not Path("run").exists()
    assert not list(here.rglob(".rkd-tmp-*"))


# --------------------------------------------------------------------------------------------------------------- export

EXPORT = ("export", "run", "--target", "ort-cpu", "--target", "jetson-fp16", "--eval-images", "20")


@pytest.fixture
def to_export(here: Path) -> Path:
    assert rkd(Disk(), *COMMAND).exit_code == 0
    return here


def bundles(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.rkd"))}


def test_wherever_the_disk_fails_an_export_leaves_whole_bundles_only(to_export: Path) -> None:
    whole = Disk()
    assert rkd(whole, *EXPORT).exit_code == 0
    wanted = bundles(to_export)
    assert len(wanted) == 2
    for call, number, code in failures(whole, {"write": errno.ENOSPC, "fsync": errno.EIO, "replace": errno.EACCES}):
        for path in to_export.glob("*.rkd"):
            path.unlink()
        where = f"{call} {number}"
        check(to_export, rkd(Disk(call, number, code), *EXPORT), where, code)
        assert bundles(to_export).items() <= wanted.items(), where
    assert rkd(Disk(), *EXPORT, "--overwrite").exit_code == 0
    assert bundles(to_export) == wanted


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_stopped_at_any_stage_an_export_leaves_whole_bundles_only(
    to_export: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    stages: list[str] = []
    monkeypatch.setattr(export_module, "say", stages.append)
    assert rkd(Disk(), *EXPORT).exit_code == 0
    wanted, counted = bundles(to_export), len(stages)
    assert counted > 6
    for stop_at in range(counted):
        stages.clear()

        def say(stage: str, stop_at: int = stop_at) -> None:
            stages.append(stage)
            if len(stages) == stop_at + 1:
                os.kill(os.getpid(), number)

        monkeypatch.setattr(export_module, "say", say)
        stopped = rkd(Disk(), *EXPORT, "--overwrite", "--out", "other")
        assert stopped.exit_code == code, (stop_at, stopped.output)
        assert stopped.stderr.splitlines()[-1].startswith("rkd: stopped; bundles that were finished are kept"), stop_at
        assert bundles(to_export / "other").items() <= wanted.items(), stop_at
        assert not list(to_export.rglob(".rkd-tmp-*")), stop_at
