"""`rkd export` of a run: its student, and its teacher to compare with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from rkd.bench.runner import CPU_PROVIDER, OrtRunner
from rkd.bundle import read_bundle
from rkd.cli import app
from rkd.files import sha256
from rkd.network import Network

EXACT = ("--batch", "15", "--threads", "1", "--precision", "fp32", "--device", "cpu")
DISTILL = ("--method", "ofd", "--student", "wrn-10-1", "--epochs", "1", "--out", "run", *EXACT)


def rkd(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_student_and_teacher_are_two_bundles_with_the_same_images(here: Path) -> None:
    assert rkd("distill", "teacher.pt", *DISTILL).exit_code == 0
    for more in ((), ("--teacher",)):
        done = rkd("export", "run", *more)
        assert done.exit_code == 0, done.output
        assert ("teacher in torch" in done.output) == bool(more)
        assert "no trigger travels in it" not in done.output
    student, teacher = (read_bundle(here / f"{name}.ort-cpu.rkd") for name in ("run", "run-teacher"))
    images = student.evaluation()[0]
    assert np.array_equal(images, teacher.evaluation()[0])
    assert student.manifest["chain"]["teacher"] == teacher.manifest["chain"]["teacher"]
    for bundle, name in ((student, "student"), (teacher, "teacher")):
        assert bundle.role == name
        assert f"it holds its run's {name}" in rkd("verify", bundle.path).output
        assert f"{name} before export" in rkd("inspect", bundle.path).output
        file = here / "run" / f"{name}.safetensors"
        assert bundle.manifest["chain"]["student"] == sha256(file.read_bytes())
        with OrtRunner(bundle.model, CPU_PROVIDER, 1, name) as runner:
            logits = runner.infer(np.ascontiguousarray(images[:20]))
        torchs = Network.load(file).predictor(torch.device("cpu"))(images[:20])
        np.testing.assert_allclose(logits, torchs, rtol=1e-3, atol=1e-3)


@pytest.mark.promise
def test_two_processes_export_the_same_bytes(here: Path) -> None:
    assert rkd("distill", "teacher.pt", *DISTILL).exit_code == 0
    names = ("run.ort-cpu-int8.rkd", "run.jetson-int8.rkd")
    targets = ("--target", "ort-cpu-int8", "--target", "jetson-int8", "--force")
    for folder in ("a", "b"):
        command = [sys.executable, "-m", "rkd", "export", "run", *targets, "--out", folder]
        subprocess.run(command, check=True, capture_output=True, timeout=600)
    for name in names:
        assert (here / "a" / name).read_bytes() == (here / "b" / name).read_bytes(), name


def test_too_few_images_to_calibrate_with_are_known_before_any_bundle_is_written(here: Path) -> None:
    assert rkd("distill", "teacher.pt", *DISTILL, "--clean-budget", "30").exit_code == 0
    refused = rkd("export", "run", "--target", "ort-cpu", "--target", "ort-cpu-int8")
    assert refused.exit_code == 1
    assert (
        "30 of 30 are left, at least 32 are needed; the run has --clean-budget 30, distil with more" in refused.stderr
    )
    assert not list(here.glob("*.rkd"))


def test_a_teacher_that_was_changed_after_the_run_took_it_in_is_refused(here: Path) -> None:
    (here / "teacher.trigger.npz").unlink()
    assert rkd("distill", "teacher.pt", *DISTILL).exit_code == 0
    path, run = here / "run" / "teacher.safetensors", here / "run" / "run.json"
    summary = json.loads(run.read_text())
    assert summary["teacher"]["converted_sha256"] == sha256(path.read_bytes())
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refused = rkd("export", "run", "--teacher")
    assert refused.exit_code == 1
    assert "is not the teacher that this run took in" in refused.stderr
    del summary["teacher"]["converted_sha256"]  # a run of an older rkd
    run.write_text(json.dumps(summary))
    done = rkd("export", "run", "--teacher")
    assert done.exit_code == 0, done.output
    assert "no trigger travels in it: whether a backdoor wakes was not checked" in " ".join(done.output.split())


def test_a_teacher_that_is_made_by_code_is_exported_only_with_that_code(here: Path, stripes: Path) -> None:
    Path("net.py").write_text(
        "from rkd.models.wrn import WideResNet\ndef make(num_classes):\n    return WideResNet(10, 1, num_classes)\n"
    )
    code = ("--arch", "net.py:make")
    assert rkd("teacher", "--data", stripes, *code, "--epochs", 8, *EXACT, "--out", "mine.pt").exit_code == 0
    done = rkd("distill", "mine.pt", *code, *DISTILL)
    assert done.exit_code == 0, done.output
    refused = rkd("export", "run", "--teacher")
    assert refused.exit_code == 1
    assert refused.stderr == "rkd: run is made by code (net.py:make); if you trust it, add --arch net.py:make\n"
    assert rkd("export", "run", "--teacher", *code).exit_code == 0
    Path("rkd.toml").write_text('[export]\narch = "net.py:make"\n')
    refused = rkd("export", "run", "--teacher", "--overwrite")
    assert (refused.exit_code, "taken from the command line only" in refused.stderr) == (1, True)
