"""What a kill, a full disk or another hand leaves in a suite's folders is mended, or named in one line before long work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from rkd.cli import app
from rkd.errors import ConfigError
from rkd.run import Run
from rkd.suite import command, runner
from rkd.suite.command import SuiteOptions, command_of
from rkd.suite.launch import LocalLauncher, Outcome, Task

STUDENT = "student:stripes/tiny/patch/full/ofd/s0"
ATTACKED = "runs/tiny/cells/stripes/tiny/patch/full/ofd/s0"


def suite(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["suite", "tiny.toml", *arguments])


def refused(done: Result) -> str:
    """The one line of a suite that would not begin."""
    assert done.exit_code == 1, done.output
    (line,) = done.stderr.strip().splitlines()
    assert "internal error" not in line
    return line


def teacher(folder: Path, attack: str) -> Path:
    (found,) = (folder / "runs/tiny/teachers").glob(f"*-{attack}-*")
    return found


def results(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "results/tiny/cells").iterdir()}


@pytest.mark.parametrize(
    ("attack", "name"),
    [("patch", "teacher.safetensors"), ("patch", "teacher.trigger.npz"), ("clean", "teacher.safetensors")],
)
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_what_lies_beside_a_teachers_run_is_taken_from_it_again(
    attack: str, name: str, damage: str, resumed: Path, here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = teacher(resumed, attack) / name
    whole, before = path.read_bytes(), results(resumed)
    path.write_bytes(whole[:1000]) if damage == "cut" else path.unlink()
    monkeypatch.setattr(runner, "code_version", lambda: {"rkd": "0", "sources": "a" * 64})  # it trains nothing
    done = suite()
    assert done.exit_code == 0, done.output
    assert [job.partition(":")[0] for job in here.done] == ["teacher"]
    assert path.read_bytes() == whole
    assert results(resumed) == before


def test_a_teacher_of_other_data_than_its_student_is_refused_then_made_again(resumed: Path, here: Any) -> None:
    (run,) = (teacher(resumed, "patch") / "runs").iterdir()
    opened = Run.open(run)
    opened.save(data={**opened.summary["data"], "digest": "0" * 64})
    assert f"{STUDENT.partition(':')[2]} (its teacher was trained on other data)" in refused(suite())
    kept = suite("--stale", "keep")
    assert kept.exit_code == 1
    assert "its teacher was trained on other data; make both again" in kept.stderr
    assert here.done == []


def test_an_attacked_teacher_of_another_clean_twin_is_not_compared_with_this_one(resumed: Path, here: Any) -> None:
    twin = teacher(resumed, "clean")
    (run,) = (twin / "runs").iterdir()
    for path in (twin / "teacher.safetensors", run / "teacher.safetensors"):
        shutil.copy(teacher(resumed, "patch") / "teacher.safetensors", path)
    assert "it was made from another clean twin" in refused(suite("--only", "*/patch/*/ofd/*"))


def test_half_written_files_are_no_results_and_no_runs(resumed: Path, here: Any) -> None:
    before = results(resumed)
    name = next(iter(before))
    (resumed / "results/tiny/cells" / f".rkd-tmp-77-{name}").write_bytes(before[name][:50])
    (run,) = (teacher(resumed, "clean") / "runs").iterdir()
    shutil.copytree(run, run.with_name(".rkd-tmp-77-run"))
    assert suite("--table-only").exit_code == 0
    done = suite()
    assert done.exit_code == 0, done.output
    assert {name: data for name, data in results(resumed).items() if not name.startswith(".")} == before


@pytest.mark.parametrize(
    ("marker", "said"),
    [
        ("{", 'write {"schema": 1, "name": "tiny"} into it'),
        ("[]", 'write {"schema": 1, "name": "tiny"} into it'),
        ('{"schema": 2, "name": "tiny"}', "has schema 2, this rkd knows 1"),
    ],
)
def test_a_damaged_marker_is_mended_by_what_is_advised(marker: str, said: str, resumed: Path, here: Any) -> None:
    path = resumed / "runs/tiny/suite.json"
    path.write_text(marker)
    assert said in refused(suite())
    path.write_text('{"schema": 1, "name": "tiny"}')
    assert suite().exit_code == 0
    assert here.done == []


@pytest.mark.parametrize(
    "content",
    [
        "{", "5", '{"student": 1}', '{"student": "S"}', '{"student": "S", "triggers": 5}',
        '{"student": "S", "triggers": {"patch": "x"}}', '{"student": "S", "triggers": {"other": {"asr": 1}}}',
    ],
)  # fmt: skip
def test_damaged_scores_are_measured_again(content: str, resumed: Path, here: Any) -> None:
    (path,) = (resumed / "runs/tiny/scores").glob("*ofd*")
    whole, before = json.loads(path.read_text()), results(resumed)
    path.write_text(content.replace('"S"', json.dumps(whole["student"])))
    done = suite()
    assert done.exit_code == 0, done.output
    assert here.done == ["score:stripes/tiny/clean/full/ofd/s0"]
    assert json.loads(path.read_text()) == whole
    assert {name: json.loads(data)["control"] for name, data in results(resumed).items()} == {
        name: json.loads(data)["control"] for name, data in before.items()
    }


@pytest.mark.parametrize("note", ['{"seconds": "x"}', '{"seconds": NaN}', '{"code": [1]}', '{"attempts": -1}', "["])
def test_a_damaged_note_of_a_job_is_as_none(note: str, resumed: Path, here: Any) -> None:
    for path in (resumed / "runs/tiny/state").glob("*.json"):
        path.write_text(note)
    done = suite()
    assert done.exit_code == 0, done.output
    assert here.done == []
    assert suite("--dry-run").exit_code == 0


@pytest.mark.parametrize("known", [True, False])
def test_what_two_codes_made_is_of_neither(
    known: bool, resumed: Path, here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.open(resumed / ATTACKED)
    run.save(state="running")
    (path,) = (resumed / "runs/tiny/state").glob("student*patch*ofd*")
    noted = json.loads(path.read_text())
    assert noted["begun_by"] == noted["code"]
    if not known:
        path.write_text("{}")
    ours = {"rkd": "0", "sources": "a" * 64, "commit": None, "changed": None}
    monkeypatch.setattr(runner, "code_version", lambda: ours)
    done = suite()
    assert done.exit_code == 0, done.output
    assert here.done == [STUDENT]
    assert json.loads(path.read_text())["code"] == {**ours, "sources": None, "changed": True}
    assert "by other code" in (resumed / "results/tiny/table.md").read_text()


def test_a_result_that_cannot_be_read_is_named_before_anything_is_made(resumed: Path, here: Any) -> None:
    shutil.rmtree(resumed / ATTACKED)
    path = resumed / "results/tiny/cells/stripes__tiny__clean__full__ofd__s0.json"
    path.write_text(path.read_text()[:100])
    assert str(path.name) in refused(suite())
    assert here.done == []


def test_results_that_cannot_be_written_are_found_out_before_anything_is_made(resumed: Path, here: Any) -> None:
    shutil.rmtree(resumed / ATTACKED)
    shutil.rmtree(resumed / "results")
    (resumed / "results").write_text("a file")
    assert "results/tiny/cells" in refused(suite())
    assert here.done == []


def test_where_a_teachers_folder_cannot_be_made_the_job_fails_in_one_line(resumed: Path, here: Any) -> None:
    folder = teacher(resumed, "patch")
    shutil.rmtree(folder)
    folder.write_text("a file")
    done = suite()
    assert done.exit_code == 1
    assert "internal error" not in done.stderr
    assert f"{folder.name}: " in done.stderr.strip().splitlines()[-1]


class Several:
    """Two jobs that end together and one that ends when it is asked to save, a while later."""

    slots = 3

    def __init__(self) -> None:
        self.started: list[str] = []
        self.asked = 0
        self.waited = 0

    def start(self, task: Task) -> None:
        self.started.append(task.job)

    def ended(self, timeout_s: float) -> list[Outcome]:
        if not self.asked:
            return [Outcome(job, 0, 0.1) for job in self.started[:2]]
        self.waited += 1
        assert self.waited < 10, "it waits for jobs that ended long ago"
        return [Outcome(self.started[2], 0, 0.1)] if self.waited == 3 else []

    def stop(self) -> None:
        self.asked += 1

    def kill(self) -> None: ...

    def close(self) -> None: ...


def test_whatever_goes_wrong_the_running_jobs_save(resumed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = "".join(f'[defences.{name}]\ndistill = {{ method = "{name}" }}\n' for name in ("at", "kd"))
    (resumed / "tiny.toml").write_text((resumed / "tiny.toml").read_text() + more)
    launcher = Several()
    monkeypatch.setattr(command, "_launcher", lambda *_: launcher)
    monkeypatch.setattr(runner.Runner, "_settle", lambda *_args, **_named: 1 / 0)
    done = suite()
    assert "internal error (ZeroDivisionError" in done.stderr
    assert len(launcher.started) == 3
    assert (launcher.asked, launcher.waited) == (1, 3)


def test_a_machine_with_little_memory_runs_fewer_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_machines_mib", lambda: 3300)
    monkeypatch.setattr(command.os, "sched_getaffinity", lambda _pid: range(64))
    assert command.at_once() == 2
    monkeypatch.setattr(command, "_machines_mib", lambda: 100)
    assert command.at_once() == 1
    with pytest.raises(ConfigError, match=r"1 cells at once leave 100 MiB each, .* give fewer --jobs, or --memory 0"):
        command._memory(SuiteOptions(Path("my.toml")), LocalLauncher(1))
    monkeypatch.setattr(command, "_machines_mib", lambda: 10**6)
    assert command.at_once() == 64


def test_an_unfinished_teacher_goes_on_where_its_data_is_now(
    resumed: Path, here: Any, write_stripes: Callable[[Path, int], Path]
) -> None:
    folder = teacher(resumed, "patch")
    (run,) = (folder / "runs").iterdir()
    whole = (folder / "teacher.safetensors").read_bytes()
    (folder / "teacher.safetensors").unlink()
    Run.open(run).save(state="running")
    (resumed / "elsewhere").mkdir()
    (resumed / "stripes.npz").rename(resumed / "elsewhere" / "stripes.npz")
    done = suite("--data-root", "elsewhere")
    assert done.exit_code == 0, done.output
    assert (folder / "teacher.safetensors").read_bytes() == whole
    with np.load(resumed / "elsewhere" / "stripes.npz") as arrays:
        other = {**arrays, "x": 255 - arrays["x"]}
    np.savez(resumed / "elsewhere" / "stripes.npz", **other)
    Run.open(run).save(state="running")
    done = suite("--data-root", "elsewhere")
    assert done.exit_code == 1
    assert "the data has changed since the run was started" in done.stderr


def test_a_job_that_cannot_be_kept_says_so(resumed: Path, here: Any) -> None:
    (resumed / ATTACKED / "run.json").write_text("{}")
    done = suite("--stale", "keep")
    assert done.exit_code == 1
    assert "which cannot be kept; give --stale redo to make it again" in done.stderr


def test_the_command_to_go_on_with_is_the_one_that_was_given() -> None:
    assert command_of(SuiteOptions(Path("my.toml"))) == "rkd suite my.toml"
    options = SuiteOptions(Path("my.toml"), Path("a b"), Path("r"), Path("/"), ("*/x/*", "y"), 2, 4000, "ray", "keep")
    assert command_of(options) == (
        "rkd suite my.toml --out 'a b' --results r --data-root / --only '*/x/*' --only y --jobs 2 --memory 4000 "
        "--launcher ray --stale keep"
    )
