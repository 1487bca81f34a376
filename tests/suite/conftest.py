"""Tiny suites on striped images, and a launcher that does the jobs in this very process."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rkd.cli import app
from rkd.suite import child, command
from rkd.suite.launch import Outcome, Task, explain

BASE = """
[teacher]
arch = "wrn-10-1"
epochs = 2
batch = 15
precision = "fp32"
device = "cpu"
[distill]
student = "wrn-10-1"
epochs = 2
batch = 15
precision = "fp32"
device = "cpu"
[data.stripes]
data = "stripes.npz"
[pairs.tiny]
"""
TINY = (
    BASE
    + """
[attacks.patch]
teacher = { attack = "badnets", poison-rate = 0.3 }
[defences.ofd]
undefended = true
distill = { method = "ofd" }
[defences.ce]
distill = { method = "ce" }
"""
)


class Here:
    """Does each job to its end in this process, as a child would, and remembers which."""

    slots = 1

    def __init__(self) -> None:
        self.done: list[str] = []
        self._ended: list[Outcome] = []

    def start(self, task: Task) -> None:
        self.done.append(task.job)
        code, before = 0, Path.cwd()
        Path(task.log).parent.mkdir(parents=True, exist_ok=True)
        with Path(task.log).open("w") as log:
            os.chdir(task.folder)
            try:
                with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                    child.run(asdict(task))
            except SystemExit as left:
                code = int(left.code or 0)
            finally:
                os.chdir(before)
        said = explain(code, Path(task.log).read_text(), task.memory_mib) if code else ""
        self._ended.append(Outcome(task.job, code, 0.5, said, "here"))

    def ended(self, timeout_s: float) -> list[Outcome]:
        found, self._ended = self._ended, []
        return found

    def stop(self) -> None: ...

    def kill(self) -> None: ...

    def close(self) -> None: ...


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Here:
    """Suites of this test do their jobs in this process."""
    launcher = Here()
    monkeypatch.setattr(command, "_launcher", lambda *_: launcher)
    return launcher


@pytest.fixture(scope="session")
def base() -> str:
    """A suite file without attacks and defences."""
    return BASE


@pytest.fixture(scope="session")
def tiny() -> str:
    """A suite file of two controls, one attacked student, and one that needs no teacher."""
    return TINY


@pytest.fixture
def folder(tmp_path: Path, write_stripes: Callable[[Path, int], Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with stripes.npz."""
    monkeypatch.chdir(tmp_path)
    write_stripes(tmp_path / "stripes.npz", 0)
    return tmp_path


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, write_stripes: Callable[[Path, int], Path]) -> Path:
    """A folder in which tiny.toml was run to its end (do not change it: copy it)."""
    folder = tmp_path_factory.mktemp("suite")
    write_stripes(folder / "stripes.npz", 0)
    (folder / "tiny.toml").write_text(TINY)
    launcher = Here()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(command, "_launcher", lambda *_: launcher)
        done = CliRunner().invoke(app, ["suite", "tiny.toml"])
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture
def resumed(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished suite's folder, to work in."""
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    monkeypatch.chdir(copy)
    return copy
