"""Every student for every target: the bundle verifies, and its file runs, or is built by a real TensorRT builder; no GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from rkd.bench.external import quantised_layers
from rkd.bench.runner import CPU_PROVIDER, OrtRunner
from rkd.bench.tensorrt_api import Module, import_tensorrt
from rkd.bench.tensorrt_engine import BuildOptions, build_engine
from rkd.bundle import read_bundle
from rkd.errors import BundleError, ExportError
from rkd.export import Calibration, Exporter
from rkd.export.calibration import observe, ranges_of
from rkd.export.onnx_model import to_onnx
from rkd.export.precision import to_fp16
from rkd.export.quantise import Graph
from rkd.export.tensorrt_operators import PARSED, check_operators
from rkd.models import STUDENTS, build
from rkd.network import NORMALISATIONS, Network, Normalisation
from rkd.target import Quantisation, Target, builtin_targets, load_target

CHAIN = {"teacher": "1" * 64, "config": "2" * 64, "student": "3" * 64}
QUICK = ("wrn-10-1",)


def student(name: str) -> Network:
    """Random weights; its BatchNorm has seen a few images."""
    torch.manual_seed(0)
    module = build(name, 10, (32, 32)).train()
    with torch.no_grad():
        module(torch.randn(8, 3, 32, 32))
    return Network(module.eval(), name, tuple("0123456789"), (32, 32), NORMALISATIONS["cifar10"])


def relaxed(target: Target) -> Target:
    """The target without a search for layers to keep: random weights have no accuracy that could be kept."""
    recipe = target.quantisation
    return (
        target if recipe is None else replace(target, acc_budget=100.0, quantisation=replace(recipe, min_agreement=0.0))
    )


def builder() -> Module:
    """The builder that stands for TensorRT's: without it these tests show nothing, and say so."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx builds the files for TensorRT: pip install '.[rtx]'")
    return import_tensorrt("tensorrt-rtx")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(found.name, marks=[] if found.name in QUICK else [pytest.mark.promise], id=found.name)
        for found in STUDENTS
    ],
)
def test_student_is_exported_verified_and_run_or_built_for_every_target(name: str, tmp_path: Path) -> None:
    trt = builder()
    network = student(name)
    pixels = np.random.default_rng(0).integers(0, 256, (48, 3, 32, 32), dtype=np.uint8)
    labels = network.predictor(torch.device("cpu"))(pixels).argmax(axis=1)
    calibration = Calibration(pixels[16:32], pixels[32:], labels[32:])
    exporter = Exporter(network, (pixels[:16], labels[:16]), calibrate=lambda _count: calibration)
    sizes = {}
    for target in map(relaxed, builtin_targets().values()):
        report = exporter.write(target, name="s", chain=CHAIN, folder=tmp_path, force=target.precision != "fp32")
        bundle = read_bundle(report.path)
        ledger = bundle.ledger()
        assert ledger is not None
        sizes[target.name] = len(bundle.model)
        if target.runtime == "onnxruntime":
            with OrtRunner(bundle.model, CPU_PROVIDER, 1, target.name) as runner:
                logits = runner.infer(np.ascontiguousarray(bundle.evaluation()[0]))
            assert logits.argmax(axis=1).tolist() == ledger.steps[-1].labels["clean"].tolist(), target.name
        else:
            engine, _ = build_engine(trt, bundle.model, BuildOptions.of(target), report.path.name)
            assert len(engine) > 1000, target.name
    assert sizes["jetson-int8"] < sizes["jetson-fp16"] < sizes["jetson-fp32"]


@pytest.fixture(scope="module")
def fp32() -> bytes:
    return to_onnx(student("wrn-10-1"), 20)


def quantised(model: bytes, recipe: Quantisation, kept: int) -> tuple[bytes, int]:
    """The file with its first layers kept in the higher precision, and how many layers it has in all."""
    graph = Graph(model, recipe)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
    ranges = ranges_of(observe(model, graph.tensors(), pixels), "minmax", recipe)
    return graph.quantised(ranges, [layer.node for layer in graph.layers[:kept]]), len(graph.layers)


@pytest.mark.parametrize("kept", [0, 3])
def test_int8_with_layers_kept_in_fp16_is_built_and_its_int8_layers_are_counted(fp32: bytes, kept: int) -> None:
    target = load_target("jetson-int8")
    assert target.quantisation is not None
    model, layers = quantised(fp32, target.quantisation, kept)
    mixed = to_fp16(model)
    assert layers > kept
    assert quantised_layers(mixed) == layers - kept
    engine, _ = build_engine(builder(), mixed, BuildOptions.of(target), "x.rkd")
    assert len(engine) > 1000


@pytest.mark.parametrize(
    "change", [{"activations": "uint8"}, {"bias": "int32"}], ids=["activations with a zero point", "quantised bias"]
)
def test_what_tensorrts_parser_rejects_is_rejected_by_the_one_that_stands_for_it(
    fp32: bytes, change: dict[str, str]
) -> None:
    target = load_target("jetson-int8")
    assert target.quantisation is not None
    model, _ = quantised(fp32, replace(target.quantisation, **change), 0)
    with pytest.raises(BundleError, match=r"cannot parse the model: node '.*quantise"):
        build_engine(builder(), model, BuildOptions.of(target), "x.rkd")


class Spectrum(nn.Module):
    """The mean of an image's spectrum to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.fft.rfft2(x).abs().mean((2, 3)))


class Determinant(Spectrum):
    """The determinant of each channel to logits."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.linalg.det(x))


@pytest.mark.parametrize(("module", "operator"), [(Spectrum, "DFT"), (Determinant, "Det")])
def test_an_operator_that_tensorrt_does_not_take_is_refused_by_the_export_as_by_the_builder(
    module: type[nn.Module], operator: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network = Network(module().eval(), "mine", tuple("abc"), (8, 8), Normalisation())
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 8, 8), dtype=np.uint8)
    exporter = Exporter(network, (pixels, np.zeros(4, np.int64)))
    path = exporter.write(load_target("ort-cpu"), name="s", chain=CHAIN, folder=tmp_path).path
    for name in ("jetson-fp32", "rtx-fp16"):
        with pytest.raises(ExportError, match=rf"^mine: node \w+ \({operator}\) is no operator .*such as ort-cpu$"):
            exporter.write(load_target(name), name="s", chain=CHAIN, folder=tmp_path)
    with pytest.raises(BundleError, match=rf"cannot parse the model: node '.*' \({operator}\)"):
        build_engine(builder(), read_bundle(path).model, BuildOptions.of(load_target("jetson-fp32")), "x.rkd")


def test_the_operators_that_the_export_allows_are_those_that_the_builders_parser_takes() -> None:
    trt: Any = builder()
    logger = trt.Logger()
    parser = trt.OnnxParser(trt.Builder(logger).create_network(0), logger)
    assert [name for name in PARSED if not parser.supports_operator(name)] == []
    for name in ("DFT", "Det", "Unique", "Col2Im", "BitShift", "Bernoulli"):
        assert (name in PARSED, parser.supports_operator(name)) == (False, False), name
    # and what it takes besides: STFT and windows came after 10.3, opset 18 has two no more, others came after 24
    more = {schema.name for schema in onnx.defs.get_all_schemas() if not schema.domain and not schema.deprecated}
    taken = {name for name in more - PARSED if parser.supports_operator(name)}
    assert taken <= {"STFT", "BlackmanWindow", "HammingWindow", "HannWindow", "CausalConvWithState", "LinearAttention"}


@pytest.mark.parametrize(
    "name",
    [
        "wrn-10-1",
        *(pytest.param(name, marks=pytest.mark.promise) for name in ("mobilenet", "mobilenet-v2", "shufflenet-v2")),
    ],
)
def test_all_operators_of_a_student_are_allowed(name: str) -> None:
    model = to_onnx(student(name), 20)
    for runtime in ("tensorrt", "tensorrt-rtx"):
        check_operators(model, runtime, name)
