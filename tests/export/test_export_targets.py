"""Every student for every target: the bundle verifies, and its file runs, or is built by a real TensorRT builder; no GPU."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rkd.bench.runner import CPU_PROVIDER, OrtRunner
from rkd.bench.tensorrt_api import import_tensorrt
from rkd.bench.tensorrt_engine import BuildOptions, build_engine
from rkd.bundle import read_bundle
from rkd.export import Calibration, Exporter
from rkd.models import STUDENTS, build
from rkd.network import NORMALISATIONS, Network
from rkd.target import Target, builtin_targets

CHAIN = {"teacher": "1" * 64, "config": "2" * 64, "student": "3" * 64}
QUICK = ("wrn-10-1", "resnet20")


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


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(found.name, marks=[] if found.name in QUICK else [pytest.mark.slow], id=found.name)
        for found in STUDENTS
    ],
)
def test_student_is_exported_verified_and_run_or_built_for_every_target(name: str, tmp_path: Path) -> None:
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
        elif importlib.util.find_spec("tensorrt_rtx"):
            trt = import_tensorrt("tensorrt-rtx")
            engine, _ = build_engine(trt, bundle.model, BuildOptions.of(target), report.path.name)
            assert len(engine) > 1000, target.name
    assert sizes["jetson-int8"] < sizes["jetson-fp16"] < sizes["jetson-fp32"]
