"""Whole runs of `rkd teacher` and `rkd distill`, in this process, on a data set that a tiny network learns at once."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch_file
from safetensors.torch import save_file as save_torch_file
from typer.testing import CliRunner

from rkd.cli import app
from rkd.detox import DetoxRecipe
from rkd.distill import inputs, session
from rkd.distill.methods import Method
from rkd.distill.settings import DistillSettings
from rkd.network import Network
from rkd.run import Run
from rkd.triggers import Trigger

EXACT = ("--threads", "1", "--precision", "fp32", "--device", "cpu")
SHORT = (*EXACT, "--student", "wrn-10-1", "--epochs", "3", "--batch", "15")
MASKED = (*SHORT, "--cap", "0.05")  # robustkd with its mask


def for_method(method: str) -> tuple[str, ...]:
    purifies = ("--purify-steps", "10") if Method.parse(method).purifier or method.startswith("robustkd") else ()
    return (*(MASKED if method.startswith("robustkd") else SHORT), *purifies)


def rkd(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def done(*arguments: object) -> Any:
    result = rkd(*arguments)
    assert result.exit_code == 0, result.output
    return result


def summary(run: Path | str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((Path(run) / "run.json").read_text())
    return content


@pytest.fixture(autouse=True, scope="module")
def _short_detox() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "DetoxRecipe", functools.partial(DetoxRecipe, steps=20, check_every=5))
        yield


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]


# -------------------------------------------------------------------------------------------------------------- teacher


def test_rkd_teacher_makes_a_teacher_that_knows_the_data_and_obeys_its_trigger(backdoored: Path, stripes: Path) -> None:
    run = summary(backdoored.parent / "runs" / "teacher-teacher")
    assert run["state"] == "finished"
    assert run["results"]["teacher"]["acc"]["percent"] > 90
    assert run["results"]["teacher"]["triggers"][0]["asr"]["percent"] > 80
    saved = torch.load(backdoored, weights_only=True)
    assert saved["rkd"]["classes"] == ["across", "down", "plane"]
    assert str(stripes) not in str(saved["rkd"])  # a path would make other bytes in every folder
    assert Trigger.load(backdoored.with_name("teacher.trigger.npz")).target == 0


def test_rkd_teacher_with_the_same_seed_makes_the_same_bytes(here: Path, stripes: Path) -> None:
    options = ("teacher", "--data", stripes, "--arch", "wrn-10-1", "--epochs", 1, "--batch", 30, *EXACT)
    done(*options, "--out", "a.safetensors")
    shutil.copy(stripes, "elsewhere.npz")
    done("teacher", "--data", "elsewhere.npz", *options[3:], "--out", "b.safetensors")
    assert Path("a.safetensors").read_bytes() == Path("b.safetensors").read_bytes()
    done(*options, "--out", "c.safetensors", "--seed", 1)
    a, c = load_file("a.safetensors"), load_file("c.safetensors")
    assert not np.array_equal(a["fc.weight"], c["fc.weight"])


def test_a_resumed_teacher_goes_where_the_first_command_wanted_it(here: Path, stripes: Path) -> None:
    options = ("teacher", "--data", stripes, "--arch", "wrn-10-1", "--attack", "badnets", "--epochs", 1, "--batch", 30)
    done(*options, *EXACT, "--out", "mine.pt")
    before = {name: Path(name).read_bytes() for name in ("mine.pt", "mine.trigger.npz", "teacher.pt")}
    for name in ("mine.pt", "mine.trigger.npz", "mine.clean.pt"):
        Path(name).unlink()
    done("teacher", "--resume", "runs/teacher-mine")
    assert Path("mine.trigger.npz").read_bytes() == before["mine.trigger.npz"]
    assert Path("mine.pt").exists()
    assert Path("mine.clean.pt").exists()
    assert Path("teacher.pt").read_bytes() == before["teacher.pt"]
    refused = rkd("teacher", "--resume", "runs/teacher-mine")
    assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1)
    assert "mine.pt exists" in refused.stderr


# -------------------------------------------------------------------------------------------------------------- distill


def test_a_student_that_nothing_is_called_is_refused_before_the_data_is_looked_at(here: Path) -> None:
    refused = rkd("distill", "teacher.pt", "--student", "mobilnet", "--data", "no/such/folder")
    assert refused.exit_code == 1
    assert "no network is called 'mobilnet'; did you mean mobilenet?" in refused.stderr
    assert not Path("runs").exists()


@pytest.mark.parametrize(("given", "noted"), [("cifar10", False), ("imagenet", True)])
def test_a_scaling_that_the_teachers_file_contradicts_is_taken_and_said(here: Path, given: str, noted: bool) -> None:
    result = done("distill", "teacher.pt", "--method", "ce", *SHORT, "--epochs", 1, "--normalize", given)
    assert ("--normalize imagenet is used, although the teacher's file says [0.4914," in result.output) == noted


ROLES = {
    "robustkd": "RobustKD student",
    "ofd": "undefended student (OFD)",
    "kd": "undefended student (logit KD)",
    "ce": "student without teacher (CE)",
    "at": "undefended student (AT)",
    "finetune+ofd": "student of the fine-tuned teacher (OFD)",
    "prune+ofd": "student of the fine-pruned teacher (OFD)",
    "nad+kd": "student of the teacher purified by NAD (logit KD)",
    "anp+at": "student of the teacher purified by ANP (AT)",
    "robustkd+kd": "RobustKD student (logit KD)",
    "robustkd+at": "RobustKD student (AT)",
}
PURIFIED = {
    "finetune+ofd": ("fine-tuned teacher", {"purified.safetensors"}),
    "prune+ofd": ("fine-pruned teacher", {"purified.safetensors", "pruned.safetensors"}),
    "nad+kd": ("teacher purified by NAD", {"purified.safetensors", "finetuned.safetensors"}),
    "anp+at": ("teacher purified by ANP", {"purified.safetensors"}),
    **{
        method: ("fine-tuned teacher", {"purified.safetensors"})
        for method in ("robustkd", "robustkd+kd", "robustkd+at")
    },
}


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=[pytest.mark.promise] if m == "robustkd+kd" else []) for m in ROLES]
)
def test_each_method_leaves_a_whole_run_directory(here: Path, method: str) -> None:
    result = done("distill", "teacher.pt", "--method", method, *for_method(method), "--json")
    printed = json.loads(result.stdout)
    place = Path(f"runs/wrn-10-1-{method}-s0")
    assert printed["run"] == str(place)
    treated, files = PURIFIED.get(method, ("", set[str]()))
    assert [row["role"] for row in printed["models"]] == ["teacher", *([treated] if treated else []), ROLES[method]]
    run = summary(place)
    assert run["state"] == "finished"
    assert run["models"] == printed["models"]
    data = (place / "student.safetensors").read_bytes()
    assert run["student"]["sha256"] == hashlib.sha256(data).hexdigest()
    assert run["models"][-1]["size_bytes"] == len(data)
    assert run["teacher"]["sha256"] == hashlib.sha256(Path("teacher.pt").read_bytes()).hexdigest()
    student = Network.load(place / "student.safetensors")
    assert student.classes == ("across", "down", "plane")
    assert student.provenance["teacher"] == run["teacher"]["sha256"]
    names = {p.name for p in place.iterdir()}
    wanted = {
        "run.json",
        "metrics.jsonl",
        "teacher.safetensors",
        "triggers",
        "examples",
        "student.safetensors",
        "report.html",
    }
    assert names == wanted | files | ({"masks.npz", "perturbations.npz"} if method.startswith("robustkd") else set())
    assert ("purified" in run) == bool(treated)
    if treated:
        data = (place / "purified.safetensors").read_bytes()
        assert run["purified"]["sha256"] == hashlib.sha256(data).hexdigest()
        assert run["models"][1]["size_bytes"] == len(data)
    lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line.get("ends_epoch")] == [6, 12, 18]
    text = (place / "report.html").read_text()
    page = Tags(text)
    assert "loss on the training images" in text, "the curves are there"
    assert "script" not in page.names
    assert not any(link.startswith(("http", "//")) for link in page.links)


@pytest.mark.parametrize("method", [pytest.param("robustkd", marks=pytest.mark.promise), "ce"])
def test_without_labels_the_teachers_answers_decide_and_the_labels_do_not(
    here: Path, stripes: Path, method: str
) -> None:
    arrays = dict(np.load(stripes))
    rng = np.random.default_rng(0)
    np.savez(here / "true.npz", **arrays)
    options = ("teacher.pt", "--method", method, *for_method(method), "--epochs", 1, "--no-labels")
    first = json.loads(done("distill", *options, "--data", "true.npz", "--out", "a", "--json").stdout)
    assert first["models"][-1]["role"].endswith("without labels)")
    labels = np.load("a/labels.npz")["y"]
    teacher = Network.load(Path("a/teacher.safetensors"))
    images = np.ascontiguousarray(arrays["x"].transpose(0, 3, 1, 2))
    assert np.array_equal(labels, teacher.predictor(torch.device("cpu"))(images).argmax(1))
    # A fifth of the labels wrong: the teacher still beats chance on them, and nothing else may look at them.
    wrong = np.where(rng.random(90) < 0.2, (arrays["y"] + 1) % 3, arrays["y"])
    np.savez(here / "wrong.npz", **{**arrays, "y": wrong})
    done("distill", *options, "--data", "wrong.npz", "--out", "b")
    a, b = (load_file(f"{run}/student.safetensors") for run in "ab")
    assert all(np.array_equal(a[name], b[name]) for name in a)


def test_damaged_labels_of_a_run_are_named(here: Path) -> None:
    real = session.train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "train", lambda *_args, **_kwargs: (_ for _ in ()).throw(MemoryError))
        one_line(rkd("distill", "teacher.pt", *SHORT, "--method", "kd", "--no-labels", "--out", "out"))
    assert session.train is real
    kept = Path("out/labels.npz").read_bytes()
    np.savez("out/labels.npz", y=np.zeros(90, np.int64))
    for other in (b"nonsense", Path("out/labels.npz").read_bytes()):
        Path("out/labels.npz").write_bytes(other)
        assert "labels.npz has changed since the run made it" in one_line(rkd("distill", "--resume", "out"))
    Path("out/labels.npz").write_bytes(kept)
    done("distill", "--resume", "out")


SWITCHES = {
    "paper": ("--variant", "paper", "--cap", 0.9),
    "no mask": ("--cap", 0),
    "channel": ("--mask", "channel"),
    "no variance": ("--no-variance",),
    "from zero": ("--replacement", "zero"),
    "last tap": ("--taps", "last"),
    "train mode": ("--teacher-mode", "train"),
    "noise": ("--input-noise", 8),
    "on the student": ("--perturbations", "student"),
    "most images": ("--harden-share", 0.9),
}


@pytest.mark.promise
def test_each_part_of_robustkd_can_be_switched_off_and_then_makes_another_student(here: Path) -> None:
    students, masks = {}, {}
    for name, switch in {"default": (), **SWITCHES}.items():
        out = Path(name.replace(" ", "-"))
        done("distill", "teacher.pt", *MASKED, "--epochs", 1, *switch, "--out", out)
        students[name] = hashlib.sha256((out / "student.safetensors").read_bytes()).hexdigest()
        masks[name] = [] if name == "no mask" else load_masks(out)
        assert (out / "masks.npz").exists() == (name != "no mask")
        teacher = Network.load(out / "teacher.safetensors").module.state_dict()
        assert summary(out)["models"][0]["scores"] == summary("default")["models"][0]["scores"]
        assert all(torch.isfinite(value).all() for value in teacher.values())
    assert len(set(students.values())) == len(students)
    default = masks["default"]
    assert all(mask.std((1, 2)).max() > 0 for mask in default)
    assert all(mask.std((1, 2)).max() < 1e-6 < mask.mean((1, 2)).std() for mask in masks["channel"])
    assert max(float(mask.max()) for mask in default) <= 0.05 < max(float(mask.max()) for mask in masks["paper"])
    assert (len(default), len(masks["last tap"])) == (3, 1)
    assert summary("no-variance")["detox"]["weight"] == 0
    assert [name for name in students if (Path(name.replace(" ", "-")) / "perturbations.npz").exists()] == [
        name for name in students if name not in ("on the student", "paper")
    ]
    assert set(summary("default")["fooling"]) == {"fooled", "towards", "together"}
    assert all(np.array_equal(a, b) for a, b in zip(masks["noise"], default, strict=True)), "noise is the student's"


@pytest.mark.parametrize(
    ("given", "searched"),
    [
        pytest.param(("--method", "finetune", "--purify-steps", 4, "--hardening", 8), True, marks=pytest.mark.promise),
        (("--method", "ce", "--hardening", 8), False),
        (("--no-labels",), True),
    ],
)
def test_hardening_goes_with_purified_teachers_without_a_teacher_and_without_labels(
    here: Path, given: tuple[object, ...], searched: bool
) -> None:
    result = done("distill", "teacher.pt", *SHORT, "--epochs", 1, *given, "--out", "out")
    assert ("make the teacher see" in result.stderr) == searched
    assert (here / "out" / "perturbations.npz").exists() == searched == ("fooling" in summary("out"))
    assert ("the student was hardened against them" in (here / "out" / "report.html").read_text()) == searched


def test_robustkd_purifies_the_teacher_and_hardens_against_what_fools_it_as_it_came(here: Path) -> None:
    plain, purified = Path("plain"), Path("purified")
    done("distill", "teacher.pt", *SHORT, "--purify", "none", "--out", plain)
    rows = json.loads(
        done("distill", "teacher.pt", *SHORT, "--purify", "finetune", "--out", purified, "--json").stdout
    )["models"]  # fmt: skip
    assert [row["role"] for row in rows] == ["teacher", "fine-tuned teacher", "RobustKD student"]
    assert (plain / "perturbations.npz").read_bytes() == (purified / "perturbations.npz").read_bytes()
    assert summary(purified)["settings"]["purify_steps"]["value"] == 9, "half of the student's 18"
    trained, untouched = (
        Network.load(purified / name).module.state_dict() for name in ("purified.safetensors", "teacher.safetensors")
    )
    assert any(not torch.equal(untouched[name], tensor) for name, tensor in trained.items())
    assert (plain / "student.safetensors").read_bytes() != (purified / "student.safetensors").read_bytes()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16", "auto"])
@pytest.mark.parametrize(
    "method", [("--cap", 0.05, "--perturbations", "student"), ("--method", "ofd"), ("--method", "nad+ofd")]
)
def test_distillation_on_a_gpu(here: Path, precision: str, method: tuple[object, ...]) -> None:
    done(
        "distill", "teacher.pt", "--device", "cuda", "--precision", precision, "--student", "wrn-10-1", "--epochs", 3,
        "--batch", 15, "--purify-steps", 4, *method, "--out", "out",
    )  # fmt: skip
    run = summary("out")
    assert run["state"] == "finished"
    assert run["models"][-1]["scores"]["acc"]["percent"] > 50
    done("export", "out", "--target", "ort-cpu")


def load_masks(run: Path) -> list[np.ndarray]:
    with np.load(run / "masks.npz") as arrays:
        return [arrays[name] for name in sorted(arrays.files) if name.endswith(".mask")]


def test_taps_that_the_teacher_does_not_have_are_refused_before_anything_is_written(here: Path) -> None:
    assert "the network has 3 taps" in one_line(rkd("distill", "teacher.pt", *MASKED, "--taps", "1,4", "--out", "out"))
    assert not Path("out").exists()


def test_how_many_clean_images_there_were_is_kept_and_none_is_in_the_test_set(here: Path, stripes: Path) -> None:
    arrays = dict(np.load(stripes))
    arrays["x"][[0, 5]] = arrays["x_test"][[3, 11]]  # two leaks
    np.savez("leaky.npz", **arrays)
    done("distill", "teacher.pt", *SHORT, "--epochs", 1, "--method", "ce", "--data", "leaky.npz", "--out", "out")
    data = summary("out")["data"]
    assert (data["clean_images"], data["removed_as_in_test"]) == (88, 2)
    assert any("2 training images removed" in note for note in data["notes"])


def test_a_student_learns_what_its_teacher_knows(here: Path) -> None:
    result = done("distill", "teacher.pt", "--method", "ofd", *SHORT, "--epochs", 8, "--json")
    scores = json.loads(result.stdout)["models"][-1]["scores"]
    assert scores["acc"]["percent"] > 80
    assert (scores["acc"]["n"], scores["triggers"][0]["asr"]["n"]) == (45, 30)  # 15 of 45 are of the target class


def test_every_setting_is_kept_with_where_it_came_from(here: Path, stripes: Path) -> None:
    with Path("rkd.toml").open("a") as file:
        file.write('epochs = 2\nstudent = "wrn-10-1"\n')
    done("distill", "teacher.pt", *EXACT, "--method", "ce", "--batch", 20, "--out", "out")
    settings = summary("out")["settings"]
    assert set(settings) == {field.name for field in fields(DistillSettings)}
    wanted = {
        "teacher": ("teacher.pt", "command line"),
        "method": ("ce", "command line"),
        "batch": (20, "command line"),
        "precision": ("fp32", "command line"),
        "epochs": (2, "rkd.toml"),
        "student": ("wrn-10-1", "rkd.toml"),
        "data": (str(stripes), "rkd.toml"),
        "triggers": (["teacher.trigger.npz"], "teacher"),
        "seed": (0, "default"),
        "checkpoint_every": (500, "default"),
        "lr": (0.1, "default"),
    }
    assert {name: (settings[name]["value"], settings[name]["origin"]) for name in wanted} == wanted


def test_data_may_be_named_by_the_command_line_or_by_rkd_toml_over_the_teacher(
    here: Path, write_stripes: Callable[[Path, int], Path]
) -> None:
    for name, seed in (("one.npz", 11), ("two.npz", 12)):
        write_stripes(here / name, seed)
    Path("rkd.toml").write_text('data = "one.npz"\n')
    done("distill", "teacher.pt", *SHORT, "--epochs", 1, "--method", "ce", "--out", "a")
    done("distill", "teacher.pt", *SHORT, "--epochs", 1, "--method", "ce", "--out", "b", "--data", "two.npz")
    assert summary("a")["settings"]["data"] == {"value": str(here / "one.npz"), "origin": "rkd.toml"}
    assert summary("b")["settings"]["data"] == {"value": str(here / "two.npz"), "origin": "command line"}


def test_the_trigger_beside_the_teacher_is_found_unless_another_is_given(here: Path) -> None:
    size = (16, 16)
    zeros = np.zeros((3, *size), np.float32)
    Trigger("other", 1, zeros, zeros, zeros + np.float32(0.1)).save(here / "other.npz")
    done("distill", "teacher.pt", *SHORT, "--epochs", 1, "--method", "ce", "--out", "found")
    done("distill", "teacher.pt", *SHORT, "--epochs", 1, "--method", "ce", "--out", "given", "--trigger", "other.npz")
    Path("teacher.trigger.npz").unlink()
    done("distill", "teacher.pt", *SHORT, "--epochs", 1, "--method", "ce", "--out", "none")
    shown = {
        run: [t["name"] for t in summary(run)["models"][-1]["scores"]["triggers"]] for run in ("found", "given", "none")
    }
    assert shown == {"found": ["badnets"], "given": ["other"], "none": []}
    assert summary("given")["settings"]["triggers"] == {"value": ["other.npz"], "origin": "command line"}


@pytest.mark.promise
def test_the_same_seed_gives_the_same_student_and_another_does_not(here: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        done("distill", "teacher.pt", *MASKED, "--out", name, "--seed", seed)
    a, b, c = (hashlib.sha256((here / n / "student.safetensors").read_bytes()).hexdigest() for n in "abc")
    assert a == b != c
    assert Path("a/masks.npz").read_bytes() == Path("b/masks.npz").read_bytes() != Path("c/masks.npz").read_bytes()
    assert Path("a/metrics.jsonl").read_bytes() == Path("b/metrics.jsonl").read_bytes()


@pytest.mark.promise
def test_undefended_adds_a_row_and_changes_nothing_of_the_student(here: Path) -> None:
    done("distill", "teacher.pt", *MASKED, "--out", "plain")
    result = done("distill", "teacher.pt", *MASKED, "--out", "both", "--undefended", "--json")
    rows = json.loads(result.stdout)["models"]
    wanted = ["teacher", "undefended student (OFD)", "fine-tuned teacher", "RobustKD student"]
    assert [row["role"] for row in rows] == wanted
    assert Path("both/student.safetensors").read_bytes() == Path("plain/student.safetensors").read_bytes()
    done("distill", "teacher.pt", *SHORT, "--out", "ofd", "--method", "ofd")
    undefended, alone = (load_file(p) for p in ("both/undefended/student.safetensors", "ofd/student.safetensors"))
    assert all(np.array_equal(undefended[name], alone[name]) for name in alone)


def test_a_finished_run_resumed_prints_the_same_and_writes_its_report_again(here: Path) -> None:
    first = done("distill", "teacher.pt", *SHORT, "--method", "kd", "--out", "out", "--json")
    before = Path("out/student.safetensors").read_bytes()
    Path("out/report.html").unlink()
    again = done("distill", "--resume", "out", "--json")
    assert again.stdout == first.stdout
    assert Path("out/student.safetensors").read_bytes() == before
    assert Path("out/report.html").is_file()


def test_the_table_names_each_network_with_its_figures(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")  # names wrap in narrower terminals
    result = done("distill", "teacher.pt", *SHORT, "--method", "kd", "--out", "out")
    assert "undefended student (logit KD)" in result.stdout
    assert "n = 45 clean, 30 triggered (badnets to class 0)" in result.stdout
    assert "next: rkd export out" in result.stdout


def test_a_class_share_of_the_images_is_used_where_a_budget_is_given(here: Path) -> None:
    done("distill", "teacher.pt", *SHORT, "--method", "ce", "--out", "out", "--clean-budget", "50%")
    lines = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line.get("ends_epoch")] == [3, 6, 9]  # 45 of 90 images, 15 a step


# ------------------------------------------------------------------------------------------------- going on, and refusals


def one_line(result: Any) -> str:
    assert result.exit_code == 1, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("rkd: ")]
    assert len(lines) == 1
    assert result.stderr.splitlines()[-1] == lines[0]
    assert "Traceback" not in result.stderr
    assert "internal error" not in lines[0]
    return lines[0]


@pytest.fixture(scope="module")
def interrupted_once(
    furnish: Callable[[Path], Path],
    write_stripes: Callable[[Path, int], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A folder with a run that died at its last step but one, and its data in `data.npz`."""
    folder = furnish(tmp_path_factory.mktemp("interrupted"))
    write_stripes(folder / "data.npz", 0)
    real = session.train

    def dies(trainer: Any, *args: Any, **kwargs: Any) -> None:
        steps = trainer.steps

        def until_the_last() -> Any:
            for step in steps():
                if step.number == trainer.total_steps - 1:
                    raise MemoryError
                yield step

        trainer.steps = until_the_last
        real(trainer, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(session, "train", dies)
        died = rkd("distill", "teacher.pt", *MASKED, "--data", "data.npz", "--out", "out")
    assert "out of memory" in one_line(died)
    return folder


@pytest.fixture
def interrupted(here: Path, interrupted_once: Path) -> Path:
    """A copy of it, in this folder."""
    shutil.copytree(interrupted_once, here, dirs_exist_ok=True)
    about = here / "out" / "run.json"
    about.write_text(about.read_text().replace(str(interrupted_once), str(here)))  # where its data is
    return here / "out"


@pytest.mark.promise
def test_an_interrupted_run_goes_on_to_the_same_student(interrupted: Path) -> None:
    done("distill", "teacher.pt", *MASKED, "--data", "data.npz", "--out", "whole")
    done("distill", "--resume", interrupted)
    assert (interrupted / "student.safetensors").read_bytes() == Path("whole/student.safetensors").read_bytes()
    assert (interrupted / "metrics.jsonl").read_bytes() == Path("whole/metrics.jsonl").read_bytes()
    assert not (interrupted / "checkpoints").exists()


def test_data_that_changed_since_the_start_is_refused(
    interrupted: Path, write_stripes: Callable[[Path, int], Path]
) -> None:
    write_stripes(Path("data.npz"), 1)
    assert "the data has changed since the run was started" in one_line(rkd("distill", "--resume", interrupted))
    write_stripes(Path("data.npz"), 0)
    done("distill", "--resume", interrupted)


@pytest.mark.parametrize("name", ["masks.npz", "perturbations.npz", "teacher.safetensors", "run.json"])
def test_a_damaged_file_of_the_run_is_named(interrupted: Path, name: str) -> None:
    (interrupted / name).write_bytes((interrupted / name).read_bytes()[:100])
    assert name in one_line(rkd("distill", "--resume", interrupted))


def forged(run: Path, name: str, **arrays: Any) -> None:
    """Other arrays in a file of the run, with the digest in run.json that fits them."""
    np.savez(run / name, **arrays)
    content = summary(run)
    content["made"][name] = hashlib.sha256((run / name).read_bytes()).hexdigest()
    (run / "run.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    "change", [lambda p: p[:2], lambda p: p.astype(np.float64), lambda p: p * 200, lambda p: p * np.nan]
)
def test_other_perturbations_than_the_runs_are_refused(interrupted: Path, change: Any) -> None:
    found = np.load(interrupted / "perturbations.npz")["perturbations"]
    forged(interrupted, "perturbations.npz", perturbations=change(found))
    assert "holds other perturbations" in one_line(rkd("distill", "--resume", interrupted))


def test_masks_of_other_shapes_are_refused(interrupted: Path) -> None:
    arrays = dict(np.load(interrupted / "masks.npz"))
    forged(interrupted, "masks.npz", **{key: value[:, :2] for key, value in arrays.items()})
    assert "the masks are for taps" in one_line(rkd("distill", "--resume", interrupted))


def test_another_network_in_the_teachers_place_is_refused(interrupted: Path) -> None:
    path = interrupted / "teacher.safetensors"
    with safe_open(path, "pt") as file:
        header = file.metadata()
    tensors = load_torch_file(path)
    tensors["conv1.weight"] += 1e-3
    save_torch_file(tensors, path, header)
    assert "teacher.safetensors has changed since the run was started" in one_line(
        rkd("distill", "--resume", interrupted)
    )


@pytest.mark.parametrize("name", ["masks.npz", "perturbations.npz"])
def test_a_file_that_the_run_made_and_that_changed_is_refused(interrupted: Path, name: str) -> None:
    arrays = dict(np.load(interrupted / name))
    np.savez(interrupted / name, **{key: value * np.float32(0.5) for key, value in arrays.items()})
    assert f"{name} has changed since the run made it" in one_line(rkd("distill", "--resume", interrupted))


def test_a_file_whose_digest_is_not_known_is_made_again(interrupted: Path) -> None:
    content, made = summary(interrupted), (interrupted / "masks.npz").read_bytes()
    del content["made"]["masks.npz"]
    (interrupted / "run.json").write_text(json.dumps(content))
    (interrupted / "masks.npz").write_bytes(b"a stranger's")
    done("distill", "--resume", interrupted)
    assert (interrupted / "masks.npz").read_bytes() == made
    assert summary(interrupted)["made"]["masks.npz"] == hashlib.sha256(made).hexdigest()


@pytest.mark.parametrize("change", ["other", "more", "fewer"])
def test_other_triggers_than_at_the_start_are_refused(interrupted: Path, change: str) -> None:
    (path,) = (interrupted / "triggers").glob("*.npz")
    trigger = Trigger.load(path)
    path.unlink()
    if change == "other":
        replace(trigger, target=2).save(path)
        said = f"{path.name} has changed since the run made it"
    else:
        said = "triggers holds other triggers than the run was started with"
    if change == "more":
        trigger.save(path)
        replace(trigger, name="more").save(path.with_name("more.npz"))
    assert said in one_line(rkd("distill", "--resume", interrupted))


@pytest.mark.parametrize("name", ["masks.npz", "perturbations.npz", "labels.npz", "purified.safetensors"])
def test_what_is_no_regular_file_in_a_run_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def dies(*_: object, **__: object) -> None:
        raise MemoryError

    options = {
        "labels.npz": ("--method", "kd", "--no-labels"),
        "purified.safetensors": ("--method", "finetune+kd", "--purify-steps", 2),
    }
    default = ("--cap", "0.05", "--purify-steps", 2)
    with monkeypatch.context() as patch:
        patch.setattr(session, "train", dies)
        rkd("distill", "teacher.pt", *SHORT, *options.get(name, default), "--out", "out")
    path = here / "out" / name
    assert path.is_file()
    path.unlink()
    os.mkfifo(path)
    assert f"{name}: is a pipe, a socket or a device" in one_line(rkd("distill", "--resume", "out"))
    path.unlink()
    path.mkdir()
    assert f"{name}: Is a directory" in one_line(rkd("distill", "--resume", "out"))
    path.rmdir()
    path.write_bytes(b"x")
    assert f"{name} has changed since the run made it" in one_line(rkd("distill", "--resume", "out"))


def test_a_missing_setting_of_the_run_is_named(interrupted: Path) -> None:
    content = summary(interrupted)
    del content["settings"]["cap"]
    (interrupted / "run.json").write_text(json.dumps(content))
    assert "lacks the setting 'cap'" in one_line(rkd("distill", "--resume", interrupted))


@pytest.mark.parametrize(
    ("extra", "named"), [(("teacher.pt",), "teacher"), (("--epochs", 9), "--epochs"), (("--seed", 1, "--lr", 1), "--lr, --seed")]
)  # fmt: skip
def test_resume_takes_no_other_option(interrupted: Path, extra: tuple[object, ...], named: str) -> None:
    message = one_line(rkd("distill", *extra, "--resume", interrupted))
    assert "--resume takes everything from the run directory" in message
    assert named in message


def test_what_is_wrong_at_the_start_leaves_no_run_behind(here: Path) -> None:
    one_line(rkd("distill", "teacher.pt", *MASKED, "--out", "out", "--student", "nonsense-9"))
    one_line(rkd("distill", "teacher.pt", *MASKED, "--out", "out", "--data", "nowhere.npz"))
    one_line(rkd("distill", "teacher.pt", *MASKED, "--out", "out", "--method", "magic"))
    assert not Path("out").exists()


@pytest.mark.parametrize("wrong", ["out", "normalize", "scaling", "trigger"])
def test_what_needs_no_image_is_refused_before_any_is_read(
    here: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    def read(*_: object, **__: object) -> None:
        raise AssertionError("the images were read")

    monkeypatch.setattr(inputs, "open_dataset", read)
    bare = here / "bare.pt"
    torch.save(torch.load(here / "teacher.pt", weights_only=True)["state_dict"], bare)
    taken, said = {
        "out": (("teacher.pt", "--out", here), "exists"),
        "normalize": ((bare,), "does not say how its inputs were scaled"),
        "scaling": ((bare, "--normalize", "imagnet"), "imagnet"),
        "trigger": ((bare, "--normalize", "none", "--trigger", "no.npz"), "no.npz"),
    }[wrong]
    refused = rkd("distill", *taken, *SHORT, "--data", "digits")
    assert refused.exit_code == 1, refused.output
    assert said in refused.output


def test_a_folder_that_is_not_empty_is_not_written_into(here: Path) -> None:
    Path("out").mkdir()
    Path("out/mine.txt").write_text("mine")
    message = one_line(rkd("distill", "teacher.pt", *MASKED, "--out", "out"))
    assert "out exists; choose another --out" in message
    assert "--resume" not in message, "there is no run to go on with"
    assert [p.name for p in Path("out").iterdir()] == ["mine.txt"]


def test_an_empty_folder_may_be_the_run_directory(here: Path) -> None:
    Path("out").mkdir()
    inode = Path("out").stat().st_ino
    done("distill", "teacher.pt", *SHORT, "--epochs", 1, "--method", "ce", "--out", "out")
    assert Path("out").stat().st_ino == inode, "a mount point cannot be replaced"


def test_a_second_process_is_kept_out_of_a_run(interrupted: Path) -> None:
    with Run.open(interrupted).locked():
        assert "another process is working in this run" in one_line(rkd("distill", "--resume", interrupted))
    done("distill", "--resume", interrupted)


def test_a_teacher_that_cannot_be_traced_is_measured_without_its_mask(here: Path, stripes: Path) -> None:
    """Its taps are hooks: they must not stay on the network that the table is about."""
    Path("moody.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Moody(nn.Module):\n"
        "    def __init__(self, n):\n"
        "        super().__init__()\n"
        "        self.a = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU())\n"
        "        self.b = nn.Sequential(nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU())\n"
        "        self.head = nn.Linear(32, n)\n"
        "    def forward(self, x):\n"
        "        x = self.b(self.a(x))\n"
        "        if float(x.detach().mean()) > 1e9:\n"
        "            x = -x\n"
        "        return self.head(x.mean((2, 3)))\n"
        "def make(num_classes):\n"
        "    return Moody(num_classes)\n"
    )
    done("teacher", "--data", stripes, "--arch", "moody.py:make", "--epochs", 8, "--batch", 15, *EXACT, "--out", "m.pt")
    assert "if you trust it, add --arch moody.py:make" in one_line(
        rkd("teacher", "--resume", "runs/teacher-m", "--overwrite")
    ), "a directory may not name code to run"
    done("teacher", "--resume", "runs/teacher-m", "--arch", "moody.py:make", "--overwrite")
    Path("rkd.toml").write_text('[teacher]\narch = "moody.py:make"\n')
    assert "code to run is taken from the command line only" in one_line(rkd("teacher", "--out", "other.pt"))
    Path("rkd.toml").unlink()
    options = ("m.pt", "--data", stripes, "--arch", "moody.py:make", *SHORT, "--json")
    plain = json.loads(done("distill", *options, "--method", "kd", "--out", "kd").stdout)["models"][0]
    with pytest.MonkeyPatch.context() as patch:  # a mask that ruins the teacher: all constant
        real = session.set_masks

        def constant(tapped: Any, masks: Any, *rest: Any) -> None:
            real(tapped, masks, *rest)
            tapped.set_edits([torch.zeros_like] * len(tapped.taps))

        patch.setattr(session, "set_masks", constant)
        rows = json.loads(done("distill", *options, "--cap", "0.05", "--out", "robust").stdout)["models"]
    assert plain["scores"]["acc"]["percent"] > 60
    assert rows[0]["scores"] == plain["scores"]
