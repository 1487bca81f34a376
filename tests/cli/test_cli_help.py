"""`--help` and `--version`: there for every command, fast, and on boards as well."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from rkd.cli import app
from rkd.errors import install_hint

COMMANDS = [
    "bench",
    "demo",
    "distill",
    "doctor",
    "export",
    "inspect",
    "keygen",
    "report",
    "students",
    "suite",
    "targets",
    "teacher",
    "verify",
]
SLOW = {"torch", "torchvision", "onnx", "onnxruntime", "onnxscript", "PIL", "sklearn", "scipy", "safetensors", "numpy"}

BLOCK = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {blocked}:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)

sys.meta_path.insert(0, Blocker())
"""
BOARD = BLOCK.format(blocked={"torch", "torchvision", "onnx", "onnxscript", "PIL", "sklearn", "safetensors", "scipy"})


def child(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def text_of(*arguments: str) -> str:
    done = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, [*arguments])
    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    return done.stdout


def test_the_commands_are_these() -> None:
    assert set(COMMANDS) == set(
        re.findall(r"^\W*([a-z]+)  +\S", text_of("--help").partition("Commands")[2], re.MULTILINE)
    )


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(command: str, flag: str) -> None:
    text = text_of(command, flag)
    assert f"Usage: rkd {command}" in text
    assert re.search(rf"rkd ({command}|distill|export) ?[a-z/.-]*", text.partition("Usage")[2].partition("\n")[2])


def test_the_first_help_shows_the_three_lines_of_the_job_as_they_are_typed() -> None:
    lines = [" ".join(line.partition("#")[0].split()) for line in text_of("--help").splitlines()]
    for line in ("rkd distill teacher.pt --student mobilenet", "rkd export --target jetson-fp16", "rkd bench"):
        assert line in lines


def test_no_commands_summary_is_cut_short() -> None:
    done = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["--help"])
    assert "..." not in done.stdout.partition("Commands")[2]


def test_the_parts_for_ablations_have_a_section_of_their_own() -> None:
    usual, _, parts = text_of("distill", "--help").partition("Parts of RobustKD, for ablations:\n")
    assert re.search("^  --epochs", usual, re.MULTILINE)
    assert re.search("^  --cap", parts, re.MULTILINE)
    assert "--cap " not in usual


def test_without_a_command_the_help_is_shown() -> None:
    done = CliRunner().invoke(app, [])
    assert "Usage: rkd" in done.output
    assert done.exit_code in (0, 2)  # as the installed typer has it


def test_the_version_is_the_distributions() -> None:
    assert text_of("--version") == f"rkd {importlib.metadata.version('rkd')}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([command, "--help"] for command in COMMANDS)])
def test_help_imports_nothing_slow(arguments: list[str]) -> None:
    code = """
import sys
from rkd.cli import app
try:
    app(sys.argv[1:])
except SystemExit as end:
    assert not end.code, end.code
print(*sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)
"""
    done = child(code, *arguments)
    assert done.returncode == 0, done.stderr
    assert set(done.stderr.split()) & SLOW == set()


def test_what_a_board_needs_imports_without_what_only_a_workstation_has() -> None:
    code = (
        BOARD
        + """
import importlib, pkgutil
names = ['rkd', 'rkd.bundle', 'rkd.target', 'rkd.triggers', 'rkd.metrics', 'rkd.npz', 'rkd.files', 'rkd.config',
         'rkd.run', 'rkd.errors', 'rkd.diagnosis', 'rkd.inspection', 'rkd.reporting']
for package in ('rkd.bench', 'rkd.cli'):
    names += [m.name for m in pkgutil.walk_packages(importlib.import_module(package).__path__, package + '.')]
for name in names:
    importlib.import_module(name)
print(*names)
"""
    )
    done = child(code)
    assert done.returncode == 0, done.stderr
    assert {"rkd.bench.session", "rkd.bench.command", "rkd.cli.bench", "rkd.cli.distill"} <= set(done.stdout.split())


@pytest.mark.parametrize("command", ["bench", "doctor", "inspect", "report", "students", "targets"])
def test_a_boards_commands_start_without_what_only_a_workstation_has(command: str) -> None:
    code = BOARD + "from rkd.cli import app\napp(sys.argv[1:])\n"
    arguments = {"bench": ["nowhere.rkd"], "inspect": ["nowhere.rkd"], "report": ["nowhere.json"]}.get(command, [])
    done = child(code, command, *arguments)
    if arguments:
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        assert "nowhere" in done.stderr
    else:
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "arguments", [["distill", "t.pt", "--data", "x"], ["teacher"], ["export"], ["inspect", "t.pt"]]
)
def test_a_workstations_command_on_a_board_names_the_extra(arguments: list[str]) -> None:
    code = (
        BOARD
        + """
import os, tempfile
os.chdir(tempfile.mkdtemp())
open('t.pt', 'wb').close()
from rkd.cli import app
app(sys.argv[1:])
"""
    )
    done = child(code, *arguments)
    assert done.returncode == 1
    assert re.fullmatch(
        rf"rkd: \w+ is not installed; install it with: {re.escape(install_hint('train'))}\n", done.stderr
    )
