"""Whatever write, fsync or rename fails: one line, exit 1, nothing half-written, and the run goes on to the same bytes."""

from __future__ import annotations

import errno
import functools
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from disk import CALLS, MIXED, Disk, check_refusal, rkd
from safetensors.torch import load

from rkd.bench import command as bench_module
from rkd.bench import result as bench_result
from rkd.bench import session as bench_session
from rkd.bench.options import BenchOptions
from rkd.bundle import read_bundle
from rkd.detox import DetoxRecipe
from rkd.distill import session
from rkd.distill.loop import Step, Trainer
from rkd.export import command as export_module
from rkd.run import Run

EXACT = ("--threads", "1", "--precision", "fp32", "--device", "cpu", "--checkpoint-every", "1")
COMMAND = ("distill", "teacher.pt", "--student", "wrn-10-1", "--epochs", "1", "--batch", "45", "--cap", "0.05", "--purify", "none", "--out",
           "run", *EXACT)  # fmt: skip
RESULTS = ("student.safetensors", "masks.npz", "perturbations.npz", "metrics.jsonl")


@pytest.fixture(autouse=True)
def _short_detox(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "DetoxRecipe", functools.partial(DetoxRecipe, steps=2, check_every=1))


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the training steps that are done."""
    done: list[int] = []
    real = Trainer.steps

    def counted(trainer: Trainer) -> Iterator[Step]:
        for step in real(trainer):
            done.append(step.number)
            yield step

    monkeypatch.setattr(Trainer, "steps", counted)
    return done


def results(run: Path) -> tuple[bytes, ...]:
    return tuple((run / name).read_bytes() for name in RESULTS)


def last_checkpoint(run: Path, disk: Disk) -> int:
    """The step of the newest checkpoint, after a look: every one there is whole, and its state loads."""
    for place in (run / "checkpoints").glob("*"):
        assert (place / "digests.json").is_file(), disk
    found = next(Run.open(run).checkpoints(), None)
    if found is None:
        return 0
    step, members = found
    assert load(members["state.safetensors"]), disk
    return step


def goes_on(run: Path, network: str, disk: Disk, steps: list[int], *begin: str) -> None:
    """What was begun on `disk` goes on from its last checkpoint; where there is no run yet, the command begins again.

    `steps` are those of the failed command, of two: a checkpoint of the last of them, or of the one before it, is there,
    unless `network`, to which they lead, is in the run already.
    """
    last, made, arguments = 0, False, begin
    if run.exists():
        last, made = last_checkpoint(run, disk), (run / network).is_file()
        arguments = (begin[0], "--resume", str(run), *(("--overwrite",) if begin[0] == "teacher" else ()))
        assert made or last in (len(steps) - 1, len(steps)), disk
    else:
        assert steps == [], disk
    steps.clear()
    went_on = rkd(Disk(), *arguments)
    assert went_on.exit_code == 0, f"{disk}: {went_on.stderr}"
    assert steps == ([] if made else list(range(last + 1, 3))), disk


@pytest.mark.parametrize(
    "codes",
    [
        pytest.param(MIXED, marks=pytest.mark.promise),
        *(
            pytest.param(dict.fromkeys(CALLS, code), marks=pytest.mark.slow)
            for code in (errno.ENOSPC, errno.EIO, errno.EACCES)
        ),
    ],
    ids=["mixed", "full", "broken", "forbidden"],
)
def test_wherever_the_disk_fails_the_run_goes_on_from_its_last_checkpoint_to_the_same_student(
    here: Path, codes: dict[str, int], steps: list[int]
) -> None:
    whole = Disk()
    assert rkd(whole, *COMMAND).exit_code == 0
    wanted = results(here / "run")
    assert min(whole.counts.values()) >= 8
    for disk in whole.failing(codes):
        shutil.rmtree("run")
        steps.clear()
        check_refusal(disk, rkd(disk, *COMMAND), here)
        goes_on(here / "run", "student.safetensors", disk, steps, *COMMAND)
        assert results(here / "run") == wanted, disk
        assert not list(here.rglob(".rkd-tmp-*")), disk
        assert Path("run/report.html").is_file(), disk


@pytest.mark.slow
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
def test_wherever_the_disk_fails_with_an_undefended_student_both_are_the_same(here: Path, code: int) -> None:
    whole = Disk()
    assert rkd(whole, *COMMAND, "--undefended").exit_code == 0
    wanted = results(here / "run")
    undefended = Path("run/undefended/student.safetensors").read_bytes()
    for disk in whole.failing(dict.fromkeys(CALLS, code)):
        shutil.rmtree("run")
        failed = rkd(disk, *COMMAND, "--undefended")
        assert failed.exit_code == 1, disk
        assert not list(here.rglob(".rkd-tmp-*")), disk
        again = ("distill", "--resume", "run") if Path("run").exists() else (*COMMAND, "--undefended")
        assert rkd(Disk(), *again).exit_code == 0, disk
        assert results(here / "run") == wanted, disk
        assert Path("run/undefended/student.safetensors").read_bytes() == undefended, disk


@pytest.mark.slow
def test_wherever_the_disk_fails_a_purified_teacher_and_its_student_are_the_same(here: Path) -> None:
    command = ("distill", "teacher.pt", "--student", "wrn-10-1", "--epochs", "1", "--batch", "45", "--purify-steps", "2",
               "--out", "run", *EXACT)  # fmt: skip
    names = ("purified.safetensors", "student.safetensors", "perturbations.npz", "metrics.jsonl")
    whole = Disk()
    assert rkd(whole, *command).exit_code == 0
    wanted = [(here / "run" / name).read_bytes() for name in names]
    for disk in whole.failing(MIXED):
        shutil.rmtree("run")
        check_refusal(disk, rkd(disk, *command), here)
        assert not list(here.rglob(".rkd-tmp-*")), disk
        again = ("distill", "--resume", "run") if Path("run").exists() else command
        assert rkd(Disk(), *again).exit_code == 0, disk
        assert [(here / "run" / name).read_bytes() for name in names] == wanted, disk


@pytest.mark.promise
def test_wherever_the_disk_fails_a_teacher_goes_on_from_its_last_checkpoint_to_the_same_bytes(
    here: Path, stripes: Path, steps: list[int]
) -> None:
    command = (
        "teacher",
        "--data",
        str(stripes),
        "--arch",
        "wrn-10-1",
        "--epochs",
        "1",
        "--batch",
        "45",
        *EXACT,
        "--out",
    )
    whole = Disk()
    assert rkd(whole, *command, "a.safetensors").exit_code == 0
    wanted = Path("a.safetensors").read_bytes()
    for disk in whole.failing(MIXED):
        shutil.rmtree("runs")
        Path("b.safetensors").unlink(missing_ok=True)
        steps.clear()
        check_refusal(disk, rkd(disk, *command, "b.safetensors"), here)
        assert not Path("b.safetensors").exists() or Path("b.safetensors").read_bytes() == wanted, disk
        goes_on(here / "runs" / "teacher-b", "teacher.safetensors", disk, steps, *command, "b.safetensors")
        assert Path("b.safetensors").read_bytes() == wanted, disk


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


@pytest.mark.promise
def test_wherever_the_disk_fails_an_export_leaves_whole_bundles_only(to_export: Path) -> None:
    whole = Disk()
    assert rkd(whole, *EXPORT).exit_code == 0
    wanted = bundles(to_export)
    assert len(wanted) == 2
    for disk in whole.failing(MIXED):
        for path in to_export.glob("*.rkd"):
            path.unlink()
        check_refusal(disk, rkd(disk, *EXPORT), to_export)
        assert bundles(to_export).items() <= wanted.items(), disk
    assert rkd(Disk(), *EXPORT, "--overwrite").exit_code == 0
    assert bundles(to_export) == wanted


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
@pytest.mark.promise
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
        assert stopped.stderr.splitlines()[-1].startswith("rkd: stopped; the same command makes the bundles"), stop_at
        assert bundles(to_export / "other").items() <= wanted.items(), stop_at
        assert not list(to_export.rglob(".rkd-tmp-*")), stop_at


# ------------------------------------------------------------------------------------------------- bench, report, keygen
@pytest.mark.promise
def test_wherever_the_disk_fails_a_bench_s_result_is_whole_or_not_there_and_is_printed(
    to_export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert rkd(Disk(), *EXPORT[:4]).exit_code == 0
    measured = bench_module.run

    def short(bundles: Any, options: Any, tell: Any, **more: Any) -> Any:
        brief = {"seconds": 0.02, "min_samples": 10, "memory": False, "sensors": False}
        return measured(bundles, BenchOptions(**{**vars(options), **brief}), tell, **more)

    monkeypatch.setattr(bench_module, "run", short)
    whole = Disk()
    assert rkd(whole, "bench", "--threads", "1").exit_code == 0
    assert whole.counts == {"write": 1, "fsync": 2, "replace": 1}
    for disk in whole.failing(MIXED):
        Path("result.json").unlink(missing_ok=True)
        failed = rkd(disk, "bench", "--threads", "1")
        check_refusal(disk, failed, to_export)
        assert '"entries": [' in failed.stdout, disk
        assert not Path("result.json").exists() or bench_result.read(Path("result.json")), disk


@pytest.mark.parametrize(
    "command",
    [
        ("report", "run", "--out", "page.html"),
        pytest.param(("report", "result.json", "--out", "page.html"), marks=pytest.mark.promise),
    ],
)
def test_wherever_the_disk_fails_a_page_is_the_one_before_or_the_new_one(
    to_export: Path, command: tuple[str, ...]
) -> None:
    if "result.json" in command:
        assert rkd(Disk(), *EXPORT[:4]).exit_code == 0
        brief = BenchOptions(seconds=0.02, min_samples=10, threads=1, memory=False, sensors=False)
        bench_result.write(Path("result.json"), bench_session.run([read_bundle(Path("run.ort-cpu.rkd"))], brief))
    whole, page = Disk(), Path("page.html")
    assert rkd(whole, *command).exit_code == 0
    new = page.read_bytes()
    assert whole.counts == {"write": 1, "fsync": 2, "replace": 1}
    for disk in whole.failing(MIXED):
        page.write_bytes(b"before")
        check_refusal(disk, rkd(disk, *command), to_export)
        assert page.read_bytes() == (new if disk.call == "fsync" and disk.number == 1 else b"before"), disk


def test_wherever_the_disk_fails_there_are_two_keys_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    whole = Disk()
    assert rkd(whole, "keygen", "first").exit_code == 0
    assert whole.counts == {"write": 2, "fsync": 4, "replace": 2}
    for number, disk in enumerate(whole.failing(MIXED)):
        check_refusal(disk, rkd(disk, "keygen", f"k{number}"), tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {"first.key", "first.pub"}, disk
        assert rkd(Disk(), "keygen", f"k{number}").exit_code == 0, disk
        for ending in ("key", "pub"):
            Path(f"k{number}.{ending}").unlink()
