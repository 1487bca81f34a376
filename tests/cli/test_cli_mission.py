"""The three lines of the README, exactly as they are written there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rkd.bundle import read_bundle
from rkd.cli import app

LINES = (
    ("distill", "teacher.pt", "--student", "mobilenet"),
    ("export", "--target", "jetson-fp16"),
    ("bench",),
)
DEFAULTS = """
data = "data.npz"
batch = 15
threads = 1
[distill]
epochs = 1
[bench]
quick = true
"""


def test_the_three_lines_work_in_a_folder_with_a_teacher_and_a_toml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backdoored: Path, stripes: Path
) -> None:
    for file in backdoored.parent.glob("teacher.*"):
        shutil.copy(file, tmp_path)
    shutil.copy(stripes, tmp_path / "data.npz")
    (tmp_path / "rkd.toml").write_text(DEFAULTS)
    monkeypatch.chdir(tmp_path)
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    for line in LINES:
        assert f"    rkd {' '.join(line)} " in readme
        done = CliRunner().invoke(app, list(line))
        assert done.exit_code == 0, done.output
    (run,) = Path("runs").iterdir()
    (bundle,) = Path().glob("*.rkd")
    read = read_bundle(bundle)
    assert read.target.name == "jetson-fp16"
    entry = json.loads(Path("result.json").read_text())["entries"][0]
    assert entry["bundle"]["sha256"] == read.digest
    assert entry["bundle"]["student_sha256"] == json.loads((run / "run.json").read_text())["student"]["sha256"]
    assert entry["scores"]["triggers"][0]["name"] == "badnets"
    assert not entry["validity"]["valid"], "a CPU stood in for the Jetson, and the result says so"
