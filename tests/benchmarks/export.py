"""`make bench`: the export of `mobilenet` for `jetson-fp16`, its stages, and a bare `torch.onnx.export` beside it.

stages      seconds of each stage of `Exporter.write`; 64 evaluation images, so that the file's making shows.
ratio       seconds of making the typed file (`onnx` and `fp16`) over a bare `torch.onnx.export` of the same network.
memory      the process's peak after all of it.
bundle      its size over the sum of its members' sizes.
int8        p50 of `ort-cpu` over `ort-cpu-int8`, one thread, resnet18 at 32 pixels, in turn in one process.
"""

from __future__ import annotations

import resource
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from rkd.bench.comparison import ratio
from rkd.bench.runner import CPU_PROVIDER, OrtRunner
from rkd.bundle import read_bundle
from rkd.export import Calibration, Exporter
from rkd.models import build
from rkd.network import NORMALISATIONS, Network
from rkd.target import load_target

CHAIN = {"teacher": "0" * 64, "config": "0" * 64, "student": "0" * 64}


def bare(network: Network) -> float:
    """Seconds of `torch.onnx.export` and nothing else."""
    started = time.perf_counter()
    example = torch.zeros(2, 3, *network.size)
    axes = ({0: torch.export.Dim("N", min=1)},)
    torch.onnx.export(network.module, (example,), dynamo=True, external_data=False, opset_version=20,
                      dynamic_shapes=axes, verbose=False)  # fmt: skip
    return time.perf_counter() - started


def int8(folder: Path, rounds: int = 10) -> None:
    """How much faster resnet18 is in INT8 on this CPU."""
    torch.manual_seed(0)
    module = build("resnet18", 10, (32, 32)).train()
    with torch.no_grad():
        module(torch.randn(16, 3, 32, 32))  # BN statistics, so that the ranges are those of a network
    network = Network(module.eval(), "resnet18", tuple("0123456789"), (32, 32), NORMALISATIONS["cifar10"])
    pixels = np.random.default_rng(0).integers(0, 256, (160, 3, 32, 32), dtype=np.uint8)
    labels = network.predictor(torch.device("cpu"))(pixels).argmax(axis=1)
    calibration = Calibration(pixels[32:96], pixels[96:], labels[96:])
    exporter = Exporter(network, (pixels[:32], labels[:32]), calibrate=lambda _count: calibration)
    image, medians = pixels[:1], dict[str, list[float]]()
    with ExitStack() as stack:
        runners = {}
        for name in ("ort-cpu", "ort-cpu-int8"):
            report = exporter.write(load_target(name), name="r", chain=CHAIN, folder=folder, force=True)
            runners[name] = stack.enter_context(OrtRunner(read_bundle(report.path).model, CPU_PROVIDER, 1, name))
        for turn in range(rounds + 1):
            for name, runner in runners.items():
                times = []
                for _ in range(20):
                    started = time.perf_counter()
                    runner.infer(image)
                    times.append(time.perf_counter() - started)
                if turn:
                    medians.setdefault(name, []).append(float(np.median(times)))
    kept = f"{len(report.quantised.kept)} of {report.quantised.layers} layers kept in FP32" if report.quantised else ""
    found = ratio(medians["ort-cpu-int8"], medians["ort-cpu"])
    fp32, fast = (1e3 * float(np.median(medians[name])) for name in runners)
    print(f"resnet18, 32 pixels, batch 1, 1 thread: FP32 {fp32:.2f} ms, INT8 {fast:.2f} ms ({kept})")
    if found:
        print(f"  FP32 over INT8: {found.ratio:.2f} [{found.low:.2f}, {found.high:.2f}]")


def main() -> None:
    """All of it."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = build("mobilenet", 10, (32, 32)).eval()
    network = Network(module, "mobilenet", tuple("0123456789"), (32, 32), NORMALISATIONS["cifar10"])
    images = np.random.default_rng(0).integers(0, 256, (64, 3, 32, 32), dtype=np.uint8)
    bare(network)  # imports, caches
    with tempfile.TemporaryDirectory() as folder:
        exporter = Exporter(network, (images, np.arange(64) % 10))
        report = exporter.write(load_target("jetson-fp16"), name="m", chain=CHAIN, folder=Path(folder), force=True)
        parts = sum(len(data) for data in read_bundle(report.path).members.values()) + len(
            read_bundle(report.path).head
        )
    plain = bare(network)
    made = report.seconds["onnx"] + report.seconds["fp16"]
    stages = ", ".join(f"{name} {seconds:.2f}" for name, seconds in report.seconds.items())
    print(f"export, mobilenet to jetson-fp16: {stages} s")
    print(f"  onnx and fp16 {made:.2f} s, a bare torch.onnx.export {plain:.2f} s, ratio {made / plain:.2f}")
    print(f"  peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")
    print(f"  bundle {report.size_bytes / 1e6:.2f} MB, {report.size_bytes / parts:.4f} of its parts")
    with tempfile.TemporaryDirectory() as folder:
        int8(Path(folder))


if __name__ == "__main__":
    main()
