"""A real disk that is full, a clock that jumps, and two processes that want the same folder."""

from __future__ import annotations

import multiprocessing
import subprocess
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from runs import FACTS

from rkd import run as run_module
from rkd.errors import RkdError, StorageError
from rkd.files import append_line, write_directory, write_file
from rkd.run import Run, Setting


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 256 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "none", place], capture_output=True, check=False
    ).returncode:
        pytest.skip("this user may not mount")
    yield place
    subprocess.run(["umount", place], check=True)


def test_on_a_full_disk_nothing_half_written_stays_and_the_last_checkpoint_loads(small_disk: Path) -> None:
    run = Run.create(small_disk / "run", "distill", {"seed": Setting(0, "default")})
    run.save_checkpoint(1, {"state": bytes(60_000)})
    for step in range(2, 8):
        try:
            run.save_checkpoint(step, {"state": bytes(60_000 * step)})
        except StorageError as error:
            message = str(error)
            break
    else:
        pytest.fail("the disk never filled")
    assert "No space left on" in message
    found = next(run.checkpoints(), None)
    assert found is not None
    assert found[0] == step - 1
    assert not list(small_disk.rglob(".rkd-tmp-*"))
    with pytest.raises(StorageError, match="No space left on"):
        write_file(small_disk / "student", bytes(300_000))
    with pytest.raises(StorageError, match="No space left on"):
        write_directory(small_disk / "other", {"a": bytes(300_000)})
    filler = small_disk / "filler"
    filler.write_bytes(b"")
    with pytest.raises(OSError, match="No space"), filler.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    log = small_disk / "run" / "metrics.jsonl"
    written = 0
    with pytest.raises(StorageError, match="No space left on"):
        for written in range(10_000):  # noqa: B007
            append_line(log, "x" * 99)
    assert (log.read_bytes() if log.exists() else b"") == (b"x" * 99 + b"\n") * written
    assert not list(small_disk.rglob(".rkd-tmp-*"))


def test_an_empty_mount_point_is_taken_as_a_run(small_disk: Path) -> None:
    run = Run.create(small_disk, "distill", {}, members={"triggers/patch.npz": b"x"})
    assert Run.open(small_disk).summary == run.summary
    assert (small_disk / "triggers" / "patch.npz").read_bytes() == b"x"


def test_a_clock_that_was_set_back_does_not_make_an_older_run_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = datetime.now(timezone.utc)

    class Clock(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:
            return now

    monkeypatch.setattr(run_module, "datetime", Clock)
    for name, jump in (("first", 0), ("second", -3600), ("third", 86400), ("fourth", -7 * 86400)):
        now += timedelta(seconds=jump)
        Run.create(tmp_path / name, "distill", {}).finish(**FACTS)
        assert Run.newest(tmp_path).path.name == name


def _create(path: str, barrier: object, answers: object) -> None:
    barrier.wait()
    try:
        run = Run.create(Path(path), "distill", {"who": Setting(id(path), "default")})
        with run.locked():
            answers.put("made")
    except RkdError as error:
        answers.put(str(error))


@pytest.mark.parametrize("exists", [False, True])
def test_of_two_processes_that_make_the_same_run_one_makes_it_and_the_other_is_told(
    tmp_path: Path, exists: bool
) -> None:
    context = multiprocessing.get_context("fork")
    for number in range(10):
        barrier, answers = context.Barrier(2), context.Queue()
        place = tmp_path / str(number)
        if exists:
            place.mkdir()
        children = [context.Process(target=_create, args=(str(place), barrier, answers)) for _ in range(2)]
        for child in children:
            child.start()
        said = sorted(answers.get(timeout=60) for _ in children)
        for child in children:
            child.join()
        assert said.count("made") == 1
        assert next(line for line in said if line != "made").startswith(str(place))
        assert Run.open(place).summary["state"] == "running"
        assert not list(tmp_path.glob(".rkd-tmp-*"))
