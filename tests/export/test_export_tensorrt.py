"""Every student for every TensorRT target is parsed and built by a real builder; no GPU is needed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rkd.bench.tensorrt_api import import_tensorrt
from rkd.bench.tensorrt_engine import BuildOptions, build_engine
from rkd.bundle import read_bundle
from rkd.export import Calibration, Exporter
from rkd.models import STUDENTS, build
from rkd.network import NORMALISATIONS, Network
from rkd.target import builtin_targets

pytest.importorskip("tensorrt_rtx")

CHAIN = {"teacher": "1" * 64, "config": "2" * 64, "student": "3" * 64}
BOARDS = [target for target in builtin_targets().values() if target.runtime != "onnxruntime"]


def student(name: str) -> Network:
    """Random weights; its BatchNorm has seen a few images."""
    torch.manual_seed(0)
    module = build(name, 10, (32, 32)).train()
    with torch.no_grad():
        module(torch.randn(8, 3, 32, 32))
    return Network(module.eval(), name, tuple("0123456789"), (32, 32), NORMALISATIONS["cifar10"])


@pytest.mark.parametrize("name", [found.name for found in STUDENTS])
def test_student_is_parsed_and_built_for_every_tensorrt_target(name: str, tmp_path: Path) -> None:
    network = student(name)
    pixels = np.random.default_rng(0).integers(0, 256, (48, 3, 32, 32), dtype=np.uint8)
    labels = network.predictor(torch.device("cpu"))(pixels).argmax(axis=1)
    calibration = Calibration(pixels[16:32], pixels[32:], labels[32:])
    exporter = Exporter(network, (pixels[:16], labels[:16]), calibrate=lambda _count: calibration)
    trt = import_tensorrt("tensorrt-rtx")
    sizes = {}
    for target in BOARDS:
        # Random weights have no accuracy that could be kept: what counts here is the form of the file.
        report = exporter.write(target, name="s", chain=CHAIN, folder=tmp_path, force=True)
        model = read_bundle(report.path).model
        engine, _ = build_engine(trt, model, BuildOptions.of(target), report.path.name)
        sizes[target.name] = len(model)
        assert len(engine) > 1000
    assert sizes["jetson-int8"] < sizes["jetson-fp16"] < sizes["jetson-fp32"]
