"""`make bench`: the export of `mobilenet` for `jetson-fp16`, its stages, and a bare `torch.onnx.export` beside it.

stages      seconds of each stage of `Exporter.write`; 64 evaluation images, so that the file's making shows.
ratio       seconds of making the typed file (`onnx` and `fp16`) over a bare `torch.onnx.export` of the same network.
memory      the process's peak after all of it.
bundle      its size over the sum of its members' sizes.
"""

from __future__ import annotations

import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from rkd.bundle import read_bundle
from rkd.export import Exporter
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


if __name__ == "__main__":
    main()
