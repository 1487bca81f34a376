"""`make test-board`: rkd's wheel in a real environment without torch gives the labels that the workstation gave.

Makes a small backdoored teacher and its student on the handwritten digits, exports the student in FP32 and INT8 and the
teacher, builds the wheel, installs it with onnxruntime and nothing else into a new environment, runs `rkd bench` on the
three bundles there and here, and compares the digests of all labels.

    python tests/board/check_board.py                        # a venv of this machine
    python tests/board/check_board.py --keep FOLDER          # leaves wheel, bundles and here.json, for another machine
    python tests/board/check_board.py --compare here.json there.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TEACHER = (
    "teacher", "--data", "digits", "--image-size", "16", "--arch", "wrn-10-2", "--attack", "badnets", "--target", "3",
    "--epochs", "6", "--batch", "64", "--threads", "1", "--out", "teacher.pt",
)  # fmt: skip
DISTILL = (
    "distill", "teacher.pt", "--student", "wrn-10-1", "--method", "ofd", "--epochs", "6", "--batch", "64", "--threads", "1",
    "--out", "run",
)  # fmt: skip
EXPORTS = (
    ("export", "run", "--target", "ort-cpu", "--target", "ort-cpu-int8"),
    ("export", "run", "--target", "ort-cpu", "--teacher"),
)
BUNDLES = ("run.ort-cpu.rkd", "run.ort-cpu-int8.rkd", "run-teacher.ort-cpu.rkd")


def rkd(python: Path | str, folder: Path, *arguments: str, quiet: bool = True) -> None:
    """Run `rkd ARGUMENTS` with that interpreter in `folder`."""
    subprocess.run(
        [str(python), "-m", "rkd", *arguments], check=True, cwd=folder, stdout=subprocess.DEVNULL if quiet else None
    )


def bench(python: Path | str, folder: Path, out: str) -> dict[str, Any]:
    """What `rkd bench` says of the three bundles, interleaved."""
    rkd(python, folder, "bench", *BUNDLES, "--threads", "1", "--out", out, quiet=False)
    result: dict[str, Any] = json.loads((folder / out).read_text())
    return result


def compare(here: dict[str, Any], there: dict[str, Any]) -> str:
    """Why two results are not of the same labels; empty where they are. Labels that are all alike prove nothing."""
    for one, other in zip(here["entries"], there["entries"], strict=True):
        name = one["bundle"]["name"]
        if one["bundle"]["sha256"] != other["bundle"]["sha256"]:
            return f"{name}: another bundle"
        if one["evaluated"] != other["evaluated"]:
            return f"{name}: {one['evaluated']['images']} images here, {other['evaluated']['images']} there: bench without --quick"
        if one["labels"]["clean"] in one["labels"]["triggers"].values():
            return f"{name}: its labels do not depend on the images"
        if one["labels"] != other["labels"]:
            return f"{name}: labels differ: {one['labels']} here, {other['labels']} there"
    return ""


def make(folder: Path) -> Path:
    """The bundles and the wheel; returns the wheel."""
    for arguments in (TEACHER, DISTILL, *EXPORTS):
        rkd(sys.executable, folder, *arguments)
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
    return next(folder.glob("*.whl"))


def check(folder: Path) -> str:
    """All of it; returns what is wrong."""
    wheel, board = make(folder), folder / "board"
    venv.create(board, with_pip=True)
    python = board / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", f"{wheel}[ort]"], check=True)
    missing = "import importlib.util as u; assert u.find_spec('torch') is None and u.find_spec('onnx') is None"
    subprocess.run([str(python), "-c", missing], check=True)
    for command in ("--help", "doctor", "targets", "students"):
        rkd(python, folder, command)
    return compare(bench(sys.executable, folder, "here.json"), bench(python, folder, "there.json"))


def main() -> int:
    """Do what the command line says."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--keep", type=Path, help="make wheel, bundles and here.json in this folder, and stop")
    options.add_argument("--compare", type=Path, nargs=2, metavar="RESULT")
    given = options.parse_args()
    if given.compare:
        wrong = compare(*(json.loads(path.read_text()) for path in given.compare))
    elif given.keep:
        given.keep.mkdir(parents=True, exist_ok=True)
        make(given.keep.resolve())
        bench(sys.executable, given.keep.resolve(), "here.json")
        return 0
    else:
        with tempfile.TemporaryDirectory() as temporary:
            wrong = check(Path(temporary))
    print(wrong or f"the labels of {', '.join(BUNDLES)} are the same on both, clean and triggered")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
