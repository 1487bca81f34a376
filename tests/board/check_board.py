"""`make test-board`: rkd's wheel in a real environment without torch gives the labels that the workstation gave.

Builds the wheel, makes a bundle from a small student with random weights, installs the wheel with onnxruntime and
nothing else into a new environment, runs `rkd bench` there and here, and compares the digests of all labels.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import numpy as np
import torch

from rkd.export import export_bundle
from rkd.models import build
from rkd.network import NORMALISATIONS, Network
from rkd.target import load_target
from rkd.triggers import Trigger

ROOT = Path(__file__).resolve().parents[2]


def make_bundle(folder: Path) -> Path:
    """A bundle of a wrn-10-1 with random weights, 200 random images and a patch trigger."""
    torch.manual_seed(0)
    network = Network(
        build("wrn-10-1", 10, (32, 32)), "wrn-10-1", tuple("0123456789"), (32, 32), NORMALISATIONS["cifar10"]
    )
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (200, 3, 32, 32), dtype=np.uint8)
    mask = np.zeros((3, 32, 32), np.float32)
    mask[:, -4:-1, -4:-1] = 1
    trigger = Trigger("patch", 3, mask, np.ones_like(mask), np.zeros_like(mask))
    report = export_bundle(
        network, load_target("ort-cpu"), name="board", evaluation=(images, rng.integers(0, 10, 200)), triggers=[trigger],
        chain={"teacher": "0" * 64, "config": "0" * 64, "student": "0" * 64}, folder=folder,
    )  # fmt: skip
    return report.path


def bench(python: Path | str, bundle: Path, out: Path) -> dict[str, object]:
    """The first entry of `rkd bench --quick` with that interpreter."""
    command = [str(python), "-m", "rkd", "bench", str(bundle), "--quick", "--threads", "1", "--out", str(out)]
    subprocess.run(command, check=True, cwd=out.parent)
    entry: dict[str, object] = json.loads(out.read_text())["entries"][0]
    return entry


def main() -> None:
    """All of it."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        subprocess.run(
            [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        wheel = next(folder.glob("*.whl"))
        board = folder / "board"
        venv.create(board, with_pip=True)
        python = board / "bin" / "python"
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", f"{wheel}[ort]"], check=True)
        missing = "import importlib.util as u; assert u.find_spec('torch') is None and u.find_spec('onnx') is None"
        subprocess.run([str(python), "-c", missing], check=True)
        for command in ("--help", "doctor", "targets", "students"):
            subprocess.run([str(python), "-m", "rkd", command], check=True, stdout=subprocess.DEVNULL, cwd=folder)
        bundle = make_bundle(folder)
        here, there = bench(sys.executable, bundle, folder / "here.json"), bench(python, bundle, folder / "there.json")
        if here["labels"] != there["labels"]:
            sys.exit(f"labels differ: {here['labels']} here, {there['labels']} on the board")
        print(f"the board's labels are the workstation's: {there['labels']}")


if __name__ == "__main__":
    main()
