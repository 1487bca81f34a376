"""What a user gets wrong: one line on stderr that says what and what to do, exit code 1, and nothing is written."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from rkd.bundle import _container, evaluation_bytes, read_bundle, write_bundle
from rkd.cli import app
from rkd.errors import StorageError, install_hint
from rkd.files import sha256, to_json
from rkd.metrics import Proportion
from rkd.models import build
from rkd.run import Run, Setting
from rkd.signing import read_public
from rkd.target import load_target
from rkd.toml import read_toml
from rkd.triggers import Trigger

SIDE = 16


@dataclass(frozen=True)
class Place:
    """A working folder with a good teacher and good data in it."""

    path: Path

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def tree(self) -> dict[str, bytes | None]:
        return {str(p.relative_to(self.path)): p.read_bytes() if p.is_file() else None for p in self.path.rglob("*")}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backdoored: Path, stripes: Path) -> Place:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RKD_DEBUG", raising=False)
    shutil.copy(backdoored, "teacher.pt")
    shutil.copy(stripes, "stripes.npz")
    return Place(tmp_path)


def one_line(stderr: str) -> str:
    assert stderr.startswith("rkd: ")
    assert stderr.endswith("\n")
    assert stderr.count("\n") == 1, stderr
    assert "internal error" not in stderr
    assert stderr[:-1].isprintable()
    return stderr[5:-1]


def refusal(place: Place, *arguments: str) -> str:
    """The one line with which `rkd ARGUMENTS` ends; nothing in the folder has changed."""
    before = place.tree()
    done = CliRunner().invoke(app, [*arguments])
    assert done.exit_code == 1, done.output
    assert done.stdout == ""
    assert place.tree() == before
    return one_line(done.stderr)


FAST = ("--student", "wrn-10-1", "--epochs", "1", "--threads", "1", "--device", "cpu")


def distill(place: Place, *arguments: str, teacher: str = "teacher.pt", data: str = "stripes.npz") -> str:
    return refusal(place, "distill", teacher, "--data", data, *FAST, *arguments)


def stranger(path: Path, classes: int = 3, **extra: Any) -> Path:
    """A stranger's checkpoint of a wrn-10-1 with random weights."""
    torch.manual_seed(0)
    torch.save({"state_dict": build("wrn-10-1", classes, (SIDE, SIDE)).state_dict(), **extra}, path)
    return path


# ------------------------------------------------------------------------------------------------------- the teacher


def test_a_teacher_that_is_not_there(place: Place) -> None:
    assert distill(place, teacher="hub.pt") == "no such file or folder: hub.pt"
    assert refusal(place, "distill", "hub.pt", "--student", "wrn-10-1") == "no such file or folder: hub.pt"


def test_no_teacher_at_all(place: Place) -> None:
    assert "rkd distill teacher.pt" in refusal(place, "distill", "--data", "stripes.npz")


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"PK\x03\x04junk", bytes(1000)])
def test_a_file_that_is_no_checkpoint(place: Place, content: bytes) -> None:
    (place / "page.pt").write_bytes(content)
    assert "page.pt" in distill(place, teacher="page.pt")


def test_a_pickle_that_wants_to_run_code(place: Place) -> None:
    (place / "evil.pt").write_bytes(b"cposix\nsystem\n(S'touch canary'\ntR.")
    assert "wants to run posix.system" in distill(place, teacher="evil.pt")
    assert not (place / "canary").exists()


def test_a_torchscript_archive(place: Place) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(place / "t.pt"))
    assert "TorchScript" in distill(place, teacher="t.pt")


def test_the_wrong_architecture(place: Place) -> None:
    message = distill(place, "--arch", "wrn-16-1", "--normalize", "none")
    assert "is not a wrn-16-1: block1.layer.1" in message
    assert "--arch" in message


def test_tensors_of_no_known_network(place: Place) -> None:
    torch.save({"a.weight": torch.zeros(3, 4)}, place / "odd.pt")
    assert "--arch" in distill(place, "--normalize", "none", teacher="odd.pt")


def test_another_number_of_classes(place: Place) -> None:
    stranger(place / "ten.pt", 10)
    assert "has 10 classes, the data has 3" in distill(place, "--normalize", "none", teacher="ten.pt")


def test_weights_that_are_nan(place: Place) -> None:
    state = build("wrn-10-1", 3, (SIDE, SIDE)).state_dict()
    state["fc.weight"][0, 0] = float("nan")
    torch.save(state, place / "nan.pt")
    assert "fc.weight" in distill(place, teacher="nan.pt")


def test_a_teacher_that_does_not_say_its_scaling(place: Place) -> None:
    stranger(place / "t.pt")
    assert "--normalize" in distill(place, teacher="t.pt")


def test_a_teacher_no_better_than_chance(place: Place) -> None:
    stranger(place / "t.pt")
    assert "chance is 33.3 %" in distill(place, "--normalize", "none", teacher="t.pt")


# ---------------------------------------------------------------------------------------------------------- the data


def test_no_data_set_is_named_anywhere(place: Place) -> None:
    stranger(place / "t.pt")
    assert "--data" in refusal(place, "distill", "t.pt", *FAST)


def test_data_that_is_not_there(place: Place) -> None:
    assert "no such folder or file: ./photos" in distill(place, data="./photos")
    assert "did you mean cifar10?" in distill(place, data="cifar01")


def image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (SIDE, SIDE)).save(path)


def test_a_folder_without_images(place: Place) -> None:
    (place / "photos" / "cat").mkdir(parents=True)
    (place / "photos" / "notes.txt").write_text("none")
    assert "photos" in distill(place, data="photos")


def test_a_folder_with_one_class(place: Place) -> None:
    image(place / "photos" / "cat" / "1.png")
    assert "class" in distill(place, data="photos")


# -------------------------------------------------------------------------------------------------------- triggers


def test_a_trigger_of_another_size(place: Place) -> None:
    zeros = np.zeros((3, 8, 8), np.float32)
    Trigger("small", 0, zeros, zeros, zeros).save(place / "small.npz")
    assert "trigger small is for 8x8 images, these are 16x16" in distill(place, "--trigger", "small.npz")


def test_a_trigger_that_is_none_or_aims_too_high(place: Place) -> None:
    assert "stripes.npz" in distill(place, "--trigger", "stripes.npz")
    zeros = np.zeros((3, SIDE, SIDE), np.float32)
    Trigger("high", 3, zeros, zeros, zeros).save(place / "high.npz")
    assert "class 3, the data has 3 classes" in distill(place, "--trigger", "high.npz")
    assert "no such file" in distill(place, "--trigger", "none.npz")
    Trigger("inert", 1, zeros, zeros, zeros).save(place / "inert.npz")
    assert "inert changes none of the first" in distill(place, "--trigger", "inert.npz")


# ------------------------------------------------------------------------------------------------ names and settings


def test_an_unknown_student_with_the_one_that_was_meant(place: Place) -> None:
    assert "did you mean mobilenet" in distill(place, "--student", "mobilnet")
    assert "rkd students" in distill(place, "--student", "xyzzy")


def test_a_student_may_not_be_code(place: Place) -> None:
    (place / "mine.py").write_text("open('canary', 'w')")
    assert "--student mine.py:net" in distill(place, "--student", "mine.py:net")
    assert not (place / "canary").exists()


def test_an_unknown_method(place: Place) -> None:
    assert re.search(r"--method 'robustdk'.*robustkd", distill(place, "--method", "robustdk"))


def test_an_unknown_attack(place: Place) -> None:
    message = refusal(place, "teacher", "--data", "stripes.npz", "--attack", "badnet", "--out", "new.pt")
    assert re.search(r"--attack 'badnet'.*badnets", message)


def test_an_unknown_target_with_the_one_that_was_meant(place: Place) -> None:
    assert "did you mean jetson-fp16" in refusal(place, "export", "--target", "jetson-fp6")
    assert "no such file" in refusal(place, "export", "--target", "mine.toml")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--eval-images", "0"), "--eval-images 0: expected 1 or more"),
        (("--eval-images", "-5"), "--eval-images -5: expected 1 or more"),
        (("--out", "stripes.npz"), "--out stripes.npz is a file, expected the folder that the bundles go to"),
        (("--target", "ort-cpu", "--target", "ort-cpu"), "two targets are called 'ort-cpu'"),
    ],
)
def test_an_export_that_cannot_be_is_refused_before_a_run_is_looked_for(
    place: Place, options: tuple[str, ...], said: str
) -> None:
    assert said in refusal(place, "export", *options)


def test_an_unknown_key_in_the_settings_file(place: Place) -> None:
    (place / "rkd.toml").write_text("[distill]\nepoch = 3\n")
    assert "did you mean 'epochs'?" in refusal(place, "doctor")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:7"])
def test_cuda_where_there_is_none(place: Place, device: str) -> None:
    assert "use --device cpu" in distill(place, "--device", device)


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cuda:-1", "", "mps", "cpu:0:0"])
def test_a_device_that_does_not_exist(place: Place, device: str) -> None:
    assert "--device" in distill(place, "--device", device)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--epochs", "0"), ("--epochs", "-1"), ("--batch", "0"), ("--batch", "-5"), ("--lr", "0"), ("--lr", "nan"), ("--lr", "-1"),
        ("--seed", "-1"), ("--threads", "-1"), ("--checkpoint-every", "0"), ("--cap", "-0.1"), ("--cap", "nan"),
        ("--accuracy-budget", "-1"), ("--accuracy-budget", "nan"), ("--clean-budget", "0"), ("--clean-budget", "some"),
        ("--clean-budget", "200%"), ("--image-size", "-1"), ("--image-size", "100000"), ("--normalize", "mine"),
        ("--precision", "int8"),
    ],
)  # fmt: skip
def test_an_impossible_value(place: Place, arguments: tuple[str, str]) -> None:
    distill(place, *arguments)


# -------------------------------------------------------------------------------------------------------- places


def test_an_out_that_exists(place: Place) -> None:
    (place / "mine").mkdir()
    (place / "mine" / "thesis.tex").write_text("do not lose me")
    assert re.search(r"mine exists.*--out", distill(place, "--out", "mine"))
    message = refusal(place, "teacher", "--data", "stripes.npz", "--out", "teacher.pt")
    assert re.search(r"teacher\.pt exists.*--overwrite", message)
    assert re.search(r"mine exists.*--out", refusal(place, "demo", "--out", "mine"))
    assert "not an earlier demo" in refusal(place, "demo", "--out", "mine", "--overwrite")


def test_a_run_that_cannot_be_gone_on_with(place: Place) -> None:
    (place / "empty").mkdir()
    for path in ("empty", "nowhere"):
        assert "not a run directory" in refusal(place, "distill", "--resume", path)
    assert "leave" in refusal(place, "distill", "teacher.pt", "--resume", "empty")


def test_nothing_to_export(place: Place) -> None:
    assert "no finished run under runs/" in refusal(place, "export")
    Run.create(place / "runs" / "half", "distill", {"seed": Setting(0, "default")})
    assert "rkd distill --resume runs/half" in refusal(place, "export")
    assert "is not finished" in refusal(place, "export", "runs/half")


def test_nothing_to_report(place: Place) -> None:
    assert "no finished run" in refusal(place, "report")
    assert "no such file" in refusal(place, "report", "x.json")
    (place / "x.json").write_text("[")
    assert "x.json" in refusal(place, "report", "x.json")


# -------------------------------------------------------------------------------------------------------- bundles


@pytest.fixture
def bundle(place: Place) -> Path:
    images = np.random.default_rng(0).integers(0, 256, (12, 3, 8, 8), dtype=np.uint8)
    scores = {"acc": Proportion(1, 12).to_json(), "triggers": []}
    agreement = {"percent": {"clean": 100.0}, "max_difference": 0.0}
    model = b"no model"
    head: dict[str, Any] = {
        "name": "x.ort-cpu", "target": load_target("ort-cpu").to_json(), "opset": 20, "precision": "fp32",
        "input": {"name": "images", "shape": [3, 8, 8], "dtype": "uint8"}, "classes": ["a", "b"],
        "chain": {**dict.fromkeys(("teacher", "config", "student"), "ab" * 32), "onnx": sha256(model)}, "tool": {},
        "scores": {"student": scores, "exported": scores, "agreement": agreement},
    }  # fmt: skip
    members = {"model.onnx": model, "eval.npz": evaluation_bytes(images, np.arange(12) % 2)}
    write_bundle(place / "x.ort-cpu.rkd", head, members)
    return place / "x.ort-cpu.rkd"


def test_no_bundle_to_measure(place: Place) -> None:
    assert "rkd export" in refusal(place, "bench")
    assert "no such file or folder: x.rkd" in refusal(place, "bench", "x.rkd")


def test_a_bundle_cut_short_or_changed(place: Place, bundle: Path) -> None:
    data = bundle.read_bytes()
    for damaged in (data[: len(data) // 2], data[:-1], data + b"\0", data.replace(b"no model", b"my model"), b""):
        bundle.write_bytes(damaged)
        for command in ("bench", "inspect"):
            assert "x.ort-cpu.rkd" in refusal(place, command, "x.ort-cpu.rkd")
        assert re.search("again|tampered", refusal(place, "bench"))


def test_a_bundle_whose_model_is_none(place: Place, bundle: Path) -> None:
    assert "x.ort-cpu.rkd" in refusal(place, "bench", "x.ort-cpu.rkd", "--quick", "--threads", "1")


@pytest.mark.parametrize("arguments", [("--batch", "0"), ("--threads", "-1"), ("--batch", "100000")])
def test_an_impossible_value_of_bench(place: Place, bundle: Path, arguments: tuple[str, str]) -> None:
    assert arguments[0].strip("-") in refusal(place, "bench", *arguments)


def test_a_missing_extra(place: Place, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    message = refusal(place, "bench")
    assert message == f"onnxruntime is not installed; install it with: {install_hint('ort')}"


# ---------------------------------------------------------------------------------------------------------- inspect


def test_inspect_of_what_rkd_does_not_know(place: Place) -> None:
    (place / "folder").mkdir()
    assert "not a run" in refusal(place, "inspect", "folder")
    for name, content in {
        "a.json": b"[]",
        "b.json": b"{",
        "c.toml": b"=",
        "d.npz": b"x",
        "e": b"\0",
        "f.rkd": b"x",
    }.items():
        (place / name).write_bytes(content)
        assert name in refusal(place, "inspect", name)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("rkd.toml", "seed = 3\n[distill]\nepochs = 7\n", "epochs"),
        ("mine.toml", "about = 'x'\n[attacks.none]\n", "suite; its cells: rkd suite mine.toml --dry-run"),
    ],
)
def test_inspect_tells_tomls_apart(place: Place, name: str, text: str, said: str) -> None:
    Path(name).write_text(text)
    done = CliRunner().invoke(app, ["inspect", name])
    assert done.exit_code == 0
    assert said in done.output


def test_a_bundle_as_teacher_is_called_one(place: Place, bundle: Path) -> None:
    assert "is a bundle for boards" in refusal(place, "distill", bundle.name, "--data", "digits", "--normalize", "none")


@pytest.mark.parametrize(
    "change",
    [
        {"command": 5}, {"models": 5}, {"models": [5]}, {"models": [{}]}, {"student": "x"}, {"student": 5}, {"data": []}, {"settings": {"a": 5}},
        {"kind": {}},
    ],
)  # fmt: skip
def test_inspect_of_a_run_with_a_damaged_summary_ends_with_a_line_or_an_answer(
    place: Place, change: dict[str, Any]
) -> None:
    run = Run.create(place / "r", "distill", {"seed": Setting(0, "default")})
    run.save(**change)
    done = CliRunner().invoke(app, ["inspect", "r"])
    if done.exit_code:
        assert "run.json" in one_line(done.stderr)


@pytest.mark.parametrize("scores", [{}, {"student": {}, "exported": {}}, {"student": 5, "exported": []}])
def test_inspect_of_a_bundle_with_other_scores(place: Place, bundle: Path, scores: Any) -> None:
    read = read_bundle(bundle)
    bundle.write_bytes(_container({"manifest.json": to_json({**read.manifest, "scores": scores}), **read.members}))
    assert "scores" in refusal(place, "inspect", bundle.name)


# ------------------------------------------------------------------------------------------------------ the messages


def test_control_characters_do_not_reach_the_terminal(place: Place) -> None:
    message = refusal(place, "inspect", "\x1b[31mred\x07.pt")
    assert "red" in message
    torch.save({"\x1b]0;title\x07": torch.tensor([float("nan")])}, place / "t.pt")
    assert "title" in refusal(place, "inspect", "t.pt")


def test_debug_shows_where(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RKD_DEBUG", "1")
    done = CliRunner().invoke(app, ["inspect", "nowhere"])
    assert type(done.exception).__name__ == "StorageError"


@pytest.mark.parametrize(
    "arguments",
    [("distill", "--epoch", "3"), ("bench", "--threads", "many"), ("export", "a", "b"), ("nothing",), ("--nothing",), ("inspect",)],
)  # fmt: skip
def test_a_usage_error_is_exit_code_2(place: Place, arguments: tuple[str, ...]) -> None:
    before = place.tree()
    done = CliRunner().invoke(app, [*arguments])
    assert done.exit_code == 2
    assert "Usage" in done.stderr
    assert place.tree() == before


# ------------------------------------------------------------------------------------------------- as a real process


def process(place: Place, *arguments: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error::UserWarning", "-m", "rkd", *arguments]
    return subprocess.run(command, cwd=place.path, capture_output=True, text=True, check=False, timeout=120, **kwargs)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("inspect", "nowhere.pt"), 1),
        (("bench",), 1),
        (("distill", "teacher.pt", "--data", "nowhere.npz", "--threads", "1"), 1),
        (("distill", "--nothing"), 2),
        (("students",), 0),
    ],
)
def test_a_real_process_ends_the_same_way(place: Place, arguments: tuple[str, ...], code: int) -> None:
    before = place.tree()
    done = process(place, *arguments)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert (done.stderr == "") == (code == 0)
    if code == 1:
        one_line(done.stderr)
    assert place.tree() == before


@pytest.mark.parametrize(
    "arguments",
    [
        ("bench", "pipe.rkd"),
        ("inspect", "pipe.npz"),
        ("distill", "pipe.pt", "--data", "stripes.npz"),
        *(
            pytest.param(arguments, marks=pytest.mark.promise)
            for arguments in (
                ("bench", "x.ort-cpu.rkd", "--data", "pipe.npz"),
                ("report", "pipe.json"),
                ("verify", "pipe.rkd"),
                ("inspect", "pipe.toml"),
                ("distill", "pipe.safetensors", "--data", "stripes.npz"),
                ("teacher", "--data", "pipe.npz", "--out", "other.pt"),
                ("export", "--target", "pipe.toml"),
                ("suite", "pipe.toml"),
            )
        ),
    ],
)
def test_a_pipe_is_refused_and_not_waited_for(place: Place, bundle: Path, arguments: tuple[str, ...]) -> None:
    name = next(argument for argument in arguments if argument.startswith("pipe"))
    os.mkfifo(place / name)
    done = process(place, *arguments)
    assert done.returncode == 1
    assert re.search(f"{name}(: is a pipe| is not a folder)", one_line(done.stderr))


def test_a_pipe_in_place_of_a_key_is_refused(place: Place) -> None:
    os.mkfifo(place / "pipe.pem")
    with pytest.raises(StorageError, match="is a pipe"):
        read_public(place / "pipe.pem")


@pytest.mark.parametrize("entry", ["python -m rkd", "the installed rkd"])
def test_ctrl_c_while_python_still_imports_is_silent(entry: str) -> None:
    scripts = read_toml(Path(__file__).parents[2] / "pyproject.toml")["project"]["scripts"]
    module, _, function = scripts["rkd"].partition(":")
    run = (
        "runpy.run_module('rkd', run_name='__main__')"
        if entry == "python -m rkd"
        else f"getattr(importlib.import_module({module!r}), {function!r})()"
    )
    code = f"""
import importlib, os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
class Stop:
    def find_spec(self, name, path, target=None):
        if name == "typer":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Stop())
sys.argv = ["rkd", "targets"]
{run}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_reader_that_goes_away_is_no_traceback(place: Place) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "rkd", "students"]
    done = subprocess.run(
        command, cwd=place.path, stdout=write, stderr=subprocess.PIPE, text=True, check=False, timeout=60
    )
    os.close(write)
    assert "Traceback" not in done.stderr
    assert done.returncode in (0, 1, 120, 128 + signal.SIGPIPE)


def test_the_json_answers_are_json(place: Place) -> None:
    for arguments in (["students"], ["targets"], ["doctor"], ["inspect", "teacher.pt"], ["inspect", "stripes.toml"]):
        if arguments[-1] == "stripes.toml":
            (place / "stripes.toml").write_text(
                "".join(f"{k} = {json.dumps(v)}\n" for k, v in load_target("ort-cpu").to_json().items())
            )
        done = CliRunner().invoke(app, [*arguments, "--json"])
        assert done.exit_code == 0, done.output
        assert isinstance(json.loads(done.stdout), dict)
