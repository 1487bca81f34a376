"""The run directory: what survives a kill, and who may work in it."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import FACTS, MODEL

from rkd import files
from rkd import run as run_module
from rkd.errors import RunError, StorageError
from rkd.files import sha256
from rkd.run import METRICS, SUMMARY, Run, Setting, free_name, models_of


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(tmp_path / "runs" / "a", "distill", {"seed": Setting(7, "command line")})


def members(step: int) -> dict[str, bytes]:
    return {"state.safetensors": b"state %d" % step, "place.json": b"{}"}


# ------------------------------------------------------------------------------------------------------ the summary


def test_a_run_is_opened_as_it_was_left(run: Run) -> None:
    run.save(data=FACTS["data"])
    again = Run.open(run.path)
    assert again.summary == run.summary
    assert again.setting("seed") == 7
    assert not again.finished
    again.finish(**FACTS)
    assert Run.open(run.path).finished
    with pytest.raises(RunError, match="lacks the setting 'epochs'"):
        again.setting("epochs")


def test_an_existing_folder_is_taken_only_when_it_is_empty(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert Run.create(tmp_path / "empty", "distill", {}).path.is_dir()
    (tmp_path / "file").write_text("")
    for name in ("empty", "file"):
        with pytest.raises(RunError, match="exists"):
            Run.create(tmp_path / name, "distill", {})


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"3", b'"x"', b"{}", b'{"schema": 2}', b'{"schema": 1}', b'{"schema": 1, "settings": [], "state": "x"}',
     b'{"schema": 1, "settings": {}, "state": 5}', b'{"schema": 1, "kind": "distill", "settings": {}, "state": "finished"}',
     b'{"schema": 1, "kind": "distill", "settings": {"seed": 3}, "state": "running"}', b"\xff\xfe", b"[" * 100_000],
)  # fmt: skip
def test_a_damaged_summary_is_refused_by_name(run: Run, content: bytes) -> None:
    (run.path / SUMMARY).write_bytes(content)
    with pytest.raises(RunError, match=r"run\.json"):
        Run.open(run.path)


def test_a_folder_without_a_summary_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run directory"):
        Run.open(tmp_path)


def test_results_survive_the_summary(run: Run) -> None:
    with pytest.raises(RunError, match="not finished"):
        models_of(run)
    run.finish(**FACTS)
    assert models_of(Run.open(run.path)) == [MODEL, MODEL]


@pytest.mark.parametrize(
    "models", [[{}, {}], 3, [3], None, [MODEL.to_json()], [MODEL.to_json(), MODEL.to_json() | {"macs": 1e300}]]
)
def test_a_finished_run_whose_results_are_damaged_is_refused(run: Run, models: Any) -> None:
    run.finish(**FACTS | {"models": models})
    with pytest.raises(RunError, match=r"run\.json is damaged: run\.json\.models"):
        Run.open(run.path)


def test_a_step_without_end_in_the_log_is_damage(run: Run) -> None:
    (run.path / METRICS).write_bytes(b'{"stage": "distil", "step": 1e999}\n')
    with pytest.raises(RunError, match="damaged"):
        run.cut_metrics("distil", 1)


# ------------------------------------------------------------------------------------------------------ checkpoints


def test_the_newest_checkpoint_is_taken_and_the_one_before_is_kept(run: Run) -> None:
    assert next(run.checkpoints(), None) is None
    for step in (5, 10, 200, 1000):
        run.save_checkpoint(step, members(step))
    found = next(run.checkpoints(), None)
    assert found == (1000, members(1000))
    assert sorted(path.name for path in (run.path / "checkpoints").iterdir()) == ["00000200", "00001000"]


def rewrite(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda place: (place / name).write_bytes(data) and None


DIGESTS = {"state.safetensors": sha256(b"other"), "place.json": sha256(b"{}")}
OUTSIDE = {"../../../../secret": sha256(b"secret")}

DAMAGE: dict[str, Callable[[Path], Any]] = {
    "one bit": rewrite("state.safetensors", b"rtate 20"),
    "cut short": lambda place: os.truncate(place / "state.safetensors", 3),
    "emptied": lambda place: os.truncate(place / "state.safetensors", 0),
    "member gone": lambda place: (place / "place.json").unlink(),
    "member is a folder": lambda place: ((place / "place.json").unlink(), (place / "place.json").mkdir()),
    "digests gone": lambda place: (place / "digests.json").unlink(),
    "digests emptied": lambda place: os.truncate(place / "digests.json", 0),
    "digests cut short": lambda place: os.truncate(place / "digests.json", 20),
    "digests of another state": rewrite("digests.json", json.dumps(DIGESTS).encode()),
    "digests are an empty object": rewrite("digests.json", b"{}"),
    "digests are an empty list": rewrite("digests.json", b"[]"),
    "digests are a list": rewrite("digests.json", b'["state.safetensors"]'),
    "digests are a number": rewrite("digests.json", b"0"),
    "digests are nothing": rewrite("digests.json", b"null"),
    "digests are nested": rewrite("digests.json", b"[" * 100_000),
    "digests are no text": rewrite("digests.json", b"\xff\xfe\x00"),
    "digests name a file outside": rewrite("digests.json", json.dumps(OUTSIDE).encode()),
    "digests name a NUL": rewrite("digests.json", b'{"\\u0000": ""}'),
    "folder emptied": lambda place: [path.unlink() for path in place.iterdir()],
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_of_a_damaged_newest_and_a_whole_older_checkpoint_the_older_one_is_taken(run: Run, kind: str) -> None:
    (run.path.parent.parent / "secret").write_bytes(b"secret")
    run.save_checkpoint(10, members(10))
    run.save_checkpoint(20, members(20))
    DAMAGE[kind](run.path / "checkpoints" / "00000020")
    assert next(run.checkpoints(), None) == (10, members(10))
    run.save_checkpoint(20, members(20))  # going on from there writes the damaged one again
    assert next(run.checkpoints(), None) == (20, members(20))


def test_without_a_whole_checkpoint_there_is_none(run: Run) -> None:
    for step in (10, 20):
        run.save_checkpoint(step, members(step))
        os.truncate(run.path / "checkpoints" / f"{step:08}" / "state.safetensors", 1)
    assert next(run.checkpoints(), None) is None


def test_half_written_and_foreign_folders_are_no_checkpoints(run: Run) -> None:
    run.save_checkpoint(10, members(10))
    for name in (".rkd-tmp-1-00000099", "99", "last", "0000009x"):
        (run.path / "checkpoints" / name).mkdir()
    (run.path / "checkpoints" / "00000099").write_text("a file")
    assert next(run.checkpoints(), None) == (10, members(10))


@pytest.mark.parametrize("name", ["open", "write", "fsync", "replace"])
def test_a_checkpoint_that_fails_leaves_the_earlier_ones(run: Run, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    run.save_checkpoint(10, members(10))

    class Full:
        def __getattr__(self, attribute: str) -> Any:
            if attribute != name:
                return getattr(os, attribute)

            def fail(*_: Any, **__: Any) -> Any:
                raise OSError(errno.ENOSPC, "full")

            return fail

    monkeypatch.setattr(files, "os", Full())
    with pytest.raises(StorageError, match="No space left"):
        run.save_checkpoint(20, members(20))
    monkeypatch.undo()
    assert next(run.checkpoints(), None) == (10, members(10))
    assert [path.name for path in (run.path / "checkpoints").iterdir()] == ["00000010"]


def test_checkpoints_behind_a_link_are_refused_and_nothing_there_is_touched(run: Run, tmp_path: Path) -> None:
    run.save_checkpoint(10, members(10))
    (run.path / "checkpoints").rename(tmp_path / "elsewhere")
    (run.path / "checkpoints").symlink_to(tmp_path / "elsewhere")
    for touch in (
        lambda: run.save_checkpoint(20, members(20)),
        lambda: next(run.checkpoints(), None),
        run.drop_checkpoints,
        run.finish,
    ):
        with pytest.raises(RunError, match="checkpoints is a link"):
            touch()
    with pytest.raises(RunError, match="checkpoints is a link"), run.locked():
        pytest.fail("it was opened")
    assert [place.name for place in (tmp_path / "elsewhere").iterdir()] == ["00000010"]


def test_only_older_checkpoints_are_pruned_and_never_a_strangers_folder(run: Run, tmp_path: Path) -> None:
    root = run.path / "checkpoints"
    run.save_checkpoint(10, members(10))
    for name in ("00000001", "20240101", "20240102"):
        (root / name).mkdir()
        (root / name / "photo.jpg").write_bytes(b"x")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "digests.json").write_text("{}")
    (root / "00000002").symlink_to(tmp_path / "linked")
    strangers = ["00000001", "00000002", "20240101", "20240102"]
    for step in (20, 30):
        run.save_checkpoint(step, members(step))
    assert sorted(place.name for place in root.iterdir()) == sorted(["00000020", "00000030", *strangers])
    assert next(run.checkpoints(), None) == (30, members(30))
    run.drop_checkpoints()
    assert sorted(place.name for place in root.iterdir()) == strangers
    assert (root / "20240101" / "photo.jpg").is_file()
    assert (tmp_path / "linked" / "digests.json").is_file()


@pytest.mark.parametrize("kind", ["folder", "link", "file"])
def test_what_a_stranger_called_like_the_next_checkpoint_is_not_replaced(run: Run, tmp_path: Path, kind: str) -> None:
    place = run.path / "checkpoints" / "00000020"
    run.save_checkpoint(10, members(10))
    (tmp_path / "linked").mkdir()
    if kind == "folder":
        place.mkdir()
        (place / "photo.jpg").write_bytes(b"x")
    elif kind == "link":
        place.symlink_to(tmp_path / "linked")
    else:
        place.write_bytes(b"x")
    with pytest.raises(RunError, match=r"00000020 is no checkpoint of rkd's.*; move it away"):
        run.save_checkpoint(20, members(20))
    assert os.path.lexists(place)
    assert next(run.checkpoints(), None) == (10, members(10))


def test_a_checkpoint_that_a_kill_left_half_removed_is_still_known_as_one(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.save_checkpoint(10, members(10))
    place = run.path / "checkpoints" / "00000010"

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_module.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            run.save_checkpoint(10, members(10))
    assert [entry.name for entry in place.iterdir()] == ["digests.json"]
    run.save_checkpoint(10, members(10))
    assert next(run.checkpoints(), None) == (10, members(10))


def test_a_finished_run_keeps_no_checkpoints(run: Run) -> None:
    run.save_checkpoint(10, members(10))
    run.finish()
    assert not (run.path / "checkpoints").exists()
    assert next(run.checkpoints(), None) is None


# ---------------------------------------------------------------------------------------------------------- metrics


def test_a_loss_beyond_all_whole_numbers_is_a_loss(run: Run) -> None:
    run.log(stage="a", step=1, epoch=0, loss=5.4e19)
    assert Run.open(run.path).metrics()[0]["loss"] == 5.4e19


def test_what_was_logged_after_a_checkpoint_is_forgotten_in_its_stage_only(run: Run) -> None:
    run.log(stage="a", step=30, epoch=0, loss=1.0)
    for step in (10, 20, 30):
        run.log(stage="b", step=step, epoch=0, loss=0.5)
    run.cut_metrics("b", 20)
    assert [(line["stage"], line["step"]) for line in run.metrics()] == [("a", 30), ("b", 10), ("b", 20)]
    run.cut_metrics("b", 0)
    assert [line["stage"] for line in run.metrics()] == ["a"]
    run.log(stage="b", step=10, epoch=0)
    assert run.metrics()[-1] == {"stage": "b", "step": 10, "epoch": 0}


def test_a_last_line_that_a_kill_cut_short_is_left_out_and_cut_away(run: Run) -> None:
    run.log(stage="a", step=1, epoch=0)
    with (run.path / METRICS).open("a") as file:
        file.write('{"stage": "a", "st')
    assert run.metrics() == [{"stage": "a", "step": 1, "epoch": 0}]
    run.cut_metrics("a", 5)
    run.log(stage="a", step=6, epoch=0)
    assert [line["step"] for line in run.metrics()] == [1, 6]


@pytest.mark.parametrize("second", [b'{"ste', b"[]", b"3", b'{"stage": "a", "step": "1", "epoch": 0}', b"[" * 100_000])
def test_a_run_without_metrics_has_none_and_damaged_ones_are_refused(run: Run, second: bytes) -> None:
    assert run.metrics() == []
    (run.path / METRICS).write_bytes(b'{"stage": "a", "step": 1, "epoch": 0}\n' + second + b"\n")
    with pytest.raises(RunError, match=r"metrics\.jsonl is damaged: line 2"):
        run.metrics()


# ----------------------------------------------------------------------------------------------------------- newest


def finished(path: Path, kind: str, when: str) -> Run:
    run = Run.create(path, kind, {})
    run.save(**FACTS, state="finished", finished=when)
    return run


def test_the_newest_finished_distillation_is_found_among_everything_else(tmp_path: Path) -> None:
    finished(tmp_path / "z-older", "distill", "2024-01-01T00:00:00.000000+00:00")
    wanted = finished(tmp_path / "b", "distill", "2024-06-01T00:00:00.000002+00:00")
    finished(tmp_path / "y", "distill", "2024-06-01T00:00:00.000001+00:00")
    finished(tmp_path / "teacher", "teacher", "2025-01-01T00:00:00.000000+00:00")
    Run.create(tmp_path / "unfinished", "distill", {})
    for name, content in {"damaged": "{", "other schema": '{"schema": 99}', "list": "[]"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / SUMMARY).write_text(content)
    (tmp_path / "no run").mkdir()
    (tmp_path / "file").write_text("")
    assert Run.newest(tmp_path).path == wanted.path


def test_without_a_finished_run_the_unfinished_one_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no finished run"):
        Run.newest(tmp_path / "nowhere")
    finished(tmp_path / "t", "teacher", "2025-01-01")
    Run.create(tmp_path / "half", "distill", {})
    with pytest.raises(RunError, match=r"rkd distill --resume .*half"):
        Run.newest(tmp_path)


# ------------------------------------------------------------------------------------------------------------- lock


CHILD = """
import sys
from pathlib import Path
from rkd.errors import RunError
from rkd.run import Run
try:
    with Run.open(Path(sys.argv[1])).locked():
        print("in")
except RunError as error:
    print("out:", error)
"""


def second_process(run: Run) -> str:
    command = [sys.executable, "-W", "error", "-c", CHILD, str(run.path)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()


def test_a_second_process_is_kept_out_while_the_first_is_in(run: Run) -> None:
    with run.locked():
        answer = second_process(run)
        assert answer.startswith("out:")
        assert "another process is working in this run" in answer
    assert second_process(run) == "in"


def test_the_lock_is_given_back_after_an_error_and_cleans_up_after_a_killed_process(run: Run) -> None:
    (run.path / ".rkd-tmp-1-run.json").write_bytes(b"half")
    with pytest.raises(ZeroDivisionError), run.locked():
        raise ZeroDivisionError
    assert not list(run.path.glob(".rkd-tmp-*"))
    with run.locked():
        pass


def test_a_run_that_is_gone_cannot_be_locked(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no such"), Run(tmp_path / "gone", {}).locked():
        pytest.fail("it is not there")


# ------------------------------------------------------------------------------------------------------------ names


def test_a_free_name_is_the_first_that_is_free(tmp_path: Path) -> None:
    assert free_name(tmp_path, "a") == tmp_path / "a"
    for name in ("a", "a-2", "a-4"):
        (tmp_path / name).mkdir()
    assert free_name(tmp_path, "a") == tmp_path / "a-3"
