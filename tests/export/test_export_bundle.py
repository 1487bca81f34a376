"""From a network to a bundle."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from rkd.bundle import read_bundle
from rkd.cli.export import _print
from rkd.errors import ExportError
from rkd.export import Calibration, Exporter, bundle_name, export_bundle, exporter
from rkd.export.mixed import Quantised, choose
from rkd.export.onnx_model import to_onnx
from rkd.files import sha256
from rkd.metrics import Scores
from rkd.network import Network, Normalisation
from rkd.target import Target, load_target
from rkd.triggers import Trigger

CHAIN = {"teacher": "1" * 64, "config": "2" * 64, "student": "3" * 64}
CPU, JETSON = load_target("ort-cpu"), load_target("jetson-fp16")


class Head(nn.Module):
    """Mean colour to logits, in train mode with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.dropout = nn.Linear(3, 3), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fc(x.mean((2, 3))))


@pytest.fixture
def network() -> Network:
    module = Head()
    with torch.no_grad():
        module.fc.weight.copy_(torch.eye(3))
        module.fc.bias.zero_()
    return Network(module, "head", ("red", "green", "blue"), (8, 8), Normalisation())


def evaluation(n: int = 30) -> tuple[np.ndarray, np.ndarray]:
    """Images of one colour each, the class that colour; every tenth label is wrong."""
    labels = np.arange(n) % 3
    images = np.random.default_rng(0).integers(0, 60, (n, 3, 8, 8), dtype=np.uint8)
    images[np.arange(n), labels] += 150
    return images, np.where(np.arange(n) % 10 == 0, (labels + 1) % 3, labels)


def green(name: str = "green", size: int = 8, target: int = 1) -> Trigger:
    zero = np.zeros((3, size, size), np.float32)
    additive = zero.copy()
    additive[1] = 1
    return Trigger(name, target, zero, zero, additive)


def test_bundle_reads_back_with_what_went_in(network: Network, tmp_path: Path) -> None:
    stages: list[str] = []
    triggers = [green("b"), green("a")]
    report = export_bundle(
        network, CPU, name="demo", evaluation=evaluation(), triggers=triggers, chain=CHAIN, folder=tmp_path / "out",
        on_stage=stages.append,
    )  # fmt: skip
    assert report.path == tmp_path / "out" / "demo.ort-cpu.rkd"
    bundle = read_bundle(report.path)
    assert (bundle.digest, bundle.path.stat().st_size) == (report.digest, report.size_bytes)
    assert (bundle.name, bundle.target, bundle.classes) == ("demo.ort-cpu", CPU, ("red", "green", "blue"))
    for got, wanted in zip(bundle.evaluation(), evaluation(), strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert [trigger.name for trigger in bundle.triggers()] == ["a", "b"]
    manifest = bundle.manifest
    assert manifest["input"] == {"name": "images", "shape": [3, 8, 8], "dtype": "uint8"}
    assert (manifest["opset"], manifest["precision"]) == (20, "fp32")
    assert manifest["chain"] == {**CHAIN, "onnx": sha256(bundle.model)}
    assert set(manifest["tool"]) == {"rkd", "torch", "onnx", "onnxruntime"}
    scores = manifest["scores"]
    assert Scores.from_json(scores["student"]) == Scores.from_json(scores["exported"]) == report.student
    assert report.student.acc.hits == 27
    assert scores["agreement"]["percent"] == {"clean": 100.0, "trigger a": 100.0, "trigger b": 100.0}
    assert stages == ["torch", "onnx", "parity", "bundle"] == list(report.seconds)
    assert network.module.training


def test_asr_in_the_manifest_is_that_of_the_trigger(network: Network, tmp_path: Path) -> None:
    report = export_bundle(
        network, CPU, name="demo", evaluation=evaluation(), triggers=[green()], chain=CHAIN, folder=tmp_path
    )
    assert report.exported.triggers[0].asr.value == 100.0


def test_targets_share_the_export_and_the_students_scores(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exports: list[int] = []
    real = exporter.to_onnx

    def counting(net: Network, opset: int, *, dynamic_batch: bool) -> bytes:
        exports.append(opset)
        return real(net, opset, dynamic_batch=dynamic_batch)

    monkeypatch.setattr(exporter, "to_onnx", counting)
    shared = Exporter(network, evaluation(), [green()])
    reports = [shared.write(target, name="demo", chain=CHAIN, folder=tmp_path) for target in (CPU, JETSON)]
    assert exports == [20]
    assert [list(report.seconds) for report in reports] == [
        ["torch", "onnx", "parity", "bundle"],
        ["fp16", "fp16 parity", "bundle"],
    ]
    fp16 = onnx.load_model_from_string(read_bundle(reports[1].path).model)
    assert onnx.TensorProto.FLOAT16 in {tensor.data_type for tensor in fp16.graph.initializer}


def test_two_exports_are_the_same_bytes(network: Network, tmp_path: Path) -> None:
    digests = {
        export_bundle(
            network, JETSON, name="demo", evaluation=evaluation(), triggers=[green()], chain=CHAIN, folder=tmp_path / f
        ).digest
        for f in ("a", "b")
    }
    assert len(digests) == 1


@pytest.mark.parametrize("name", ["ort-cpu", "jetson-fp16", "ort-cpu-int8", "jetson-int8"])
def test_fixed_batch_target_is_scored_one_image_at_a_time(network: Network, tmp_path: Path, name: str) -> None:
    target = dataclasses.replace(load_target(name), name="one", max_batch=1)
    if target.quantisation is not None:  # blends of its training images are ties, and its only layer cannot be kept
        recipe = dataclasses.replace(target.quantisation, min_agreement=0.0)
        target = dataclasses.replace(target, quantisation=recipe)
    images, labels = evaluation(64)
    shared = Exporter(network, evaluation(), calibrate=lambda _n: Calibration(images[:32], images[32:], labels[32:]))
    report = shared.write(target, name="demo", chain=CHAIN, folder=tmp_path)
    model = onnx.load_model_from_string(read_bundle(report.path).model)
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1
    assert report.exported == report.student
    more = [] if target.precision == "fp32" else [target.precision]
    assert [step.name for step in report.ledger.steps] == ["student", "onnx-fp32", *more]


@pytest.mark.parametrize(("budget", "noted"), [(3.4, 0), (3.3, 1)])
def test_what_so_few_images_cannot_judge_is_noted(network: Network, tmp_path: Path, budget: float, noted: int) -> None:
    target = dataclasses.replace(CPU, acc_budget=budget, asr_budget=100.0)  # one of 30 images is 3.33 points
    report = export_bundle(network, target, name="demo", evaluation=evaluation(), chain=CHAIN, folder=tmp_path)
    assert len(report.notes) == noted
    assert read_bundle(report.path).notes == report.notes


@pytest.mark.parametrize(("wanted", "noted"), [(33, 1), (32, 0)])
def test_fewer_calibration_images_than_the_target_asks_for_are_noted_and_printed(
    network: Network, tmp_path: Path, capsys: pytest.CaptureFixture[str], wanted: int, noted: int
) -> None:
    images, labels = evaluation(64)
    calibration = Calibration(images[:32], images[32:], labels[32:])
    shared = Exporter(network, evaluation(), calibrate=lambda _count: calibration)
    target = load_target("ort-cpu-int8")
    assert target.quantisation is not None
    recipe = dataclasses.replace(target.quantisation, images=wanted, min_agreement=0.0)
    target = dataclasses.replace(target, quantisation=recipe, acc_budget=100.0, asr_budget=100.0)
    report = shared.write(target, name="demo", chain=CHAIN, folder=tmp_path)
    line = "INT8 was calibrated on 32 images and decided on 32, 33 each are asked for by the target"
    assert report.notes == (line,) * noted
    assert read_bundle(report.path).notes == report.notes
    _print(report, "student")
    printed = " ".join(capsys.readouterr().out.split())
    assert (line in printed) == bool(noted)
    assert " on 32 images, decided on 32; kept in higher precision, 0 of 1 layers: none" in printed


def test_existing_bundle_is_kept_unless_overwrite(network: Network, tmp_path: Path) -> None:
    path = tmp_path / "demo.ort-cpu.rkd"
    path.write_bytes(b"mine")
    shared = Exporter(network, evaluation())
    with pytest.raises(ExportError, match="exists already; give --overwrite"):
        shared.write(CPU, name="demo", chain=CHAIN, folder=tmp_path)
    assert path.read_bytes() == b"mine"
    shared.write(CPU, name="demo", chain=CHAIN, folder=tmp_path, overwrite=True)
    assert read_bundle(path).name == "demo.ort-cpu"


@pytest.mark.parametrize("target", [CPU, JETSON], ids=lambda target: target.name)
def test_file_that_decides_differently_is_not_bundled(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: Target
) -> None:
    real = exporter.to_onnx

    def corrupted(*args: object, **options: bool) -> bytes:
        model = onnx.load_model_from_string(real(*args, **options))
        weight = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("fc.weight"))
        weight.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(weight), weight.name))
        return model.SerializeToString()

    monkeypatch.setattr(exporter, "to_onnx", corrupted)
    with pytest.raises(ExportError, match=r"the fp32 file agrees with the student on 0\.00 %.*--force writes it"):
        export_bundle(network, target, name="demo", evaluation=evaluation(), chain=CHAIN, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_tie_that_falls_the_other_way_costs_nothing_and_stands_in_the_ledger(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = evaluation()
    images[:5, 1] = images[:5, 0]  # red and green the same: the student says red
    images[:5, 2] = 0

    def leaning(*args: Any, **options: Any) -> bytes:
        model = onnx.load_model_from_string(to_onnx(*args, **options))
        weight = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("fc.weight"))
        scale = np.array([[1], [1 + 1e-5], [1]], np.float32)
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * scale, weight.name))
        return model.SerializeToString()

    monkeypatch.setattr(exporter, "to_onnx", leaning)
    report = export_bundle(
        network, CPU, name="demo", evaluation=(images, np.where(np.arange(30) < 5, 0, labels)), chain=CHAIN,
        folder=tmp_path,
    )  # fmt: skip
    student, exported = (step.labels["clean"][:5].tolist() for step in report.ledger.steps)
    assert (student, exported) == ([0] * 5, [1] * 5)
    assert report.forced == ()
    assert report.parity.agreement["clean"].value == 100


def test_activations_that_fp16_cannot_hold_are_found_under_a_trigger_too(network: Network, tmp_path: Path) -> None:
    images, labels = evaluation()
    images //= 10  # bright images only, such as the trigger's, are beyond 65504
    with torch.no_grad():
        network.module.fc.weight.mul_(65_000.0)
        network.module.fc.bias.fill_(1000.0)
    Exporter(network, (images, labels)).write(JETSON, name="clean", chain=CHAIN, folder=tmp_path, force=True)
    with pytest.raises(ExportError, match=r"activation \w+ reaches 66,000, FP16 holds at most 65,504"):
        Exporter(network, (images, labels), [green()]).write(
            JETSON, name="triggered", chain=CHAIN, folder=tmp_path, force=True
        )
    assert not (tmp_path / "triggered.jetson-fp16.rkd").exists()


def test_int8_that_is_unlike_the_student_on_training_images_is_bundled_only_marked(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unlike(*args: Any, **options: Any) -> Quantised:
        return dataclasses.replace(choose(*args, **options), problems=("INT8 agrees on 90.00 %",))

    monkeypatch.setattr(exporter, "choose", unlike)
    images, labels = evaluation(64)
    calibration = Calibration(images[:32], images[32:], labels[32:])
    shared = Exporter(network, evaluation(), calibrate=lambda _count: calibration)
    target = dataclasses.replace(load_target("ort-cpu-int8"), acc_budget=100.0)
    shared.write(CPU, name="demo", chain=CHAIN, folder=tmp_path)  # an earlier target's bundle is there
    with pytest.raises(ExportError, match=r"INT8 agrees on 90\.00 %; demo\.ort-cpu-int8\.rkd was not written"):
        shared.write(target, name="demo", chain=CHAIN, folder=tmp_path)
    report = shared.write(target, name="demo", chain=CHAIN, folder=tmp_path, force=True)
    assert read_bundle(report.path).forced == ("INT8 agrees on 90.00 %",)


@pytest.mark.parametrize(
    ("triggers", "message"),
    [
        ([green(size=16)], "trigger green is for 16x16 images, the student for 8x8"),
        ([green(target=3)], "aims at class 3, the student has 3"),
        ([green(), green()], "two triggers are called 'green'"),
        ([green(f"t{i}") for i in range(101)], "101 triggers"),
    ],
)
def test_triggers_that_do_not_fit_are_refused(network: Network, triggers: list[Trigger], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        Exporter(network, evaluation(), triggers)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 3, 9, 8), np.uint8), [0, 1], "the student is for 8x8 images"),
        (np.zeros((2, 3, 8, 8), np.float32), [0, 1], "expected uint8"),
        (np.zeros((2, 3, 8, 8), np.uint8), [0], "with labels"),
        (np.zeros((2, 3, 8, 8), np.uint8), [0, 3], "labels go from 0 to 3"),
        (np.zeros((0, 3, 8, 8), np.uint8), [], "no evaluation images"),
    ],
)
def test_evaluation_that_does_not_fit_is_refused(
    network: Network, images: np.ndarray, labels: list[int], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        Exporter(network, (images, np.array(labels, np.int64)))


@pytest.mark.parametrize("name", ["", "../up", "a b", ".hidden", "ü"])
def test_names_that_are_no_file_names_are_refused(name: str) -> None:
    with pytest.raises(ExportError, match="rename the run"):
        bundle_name(name, CPU)
