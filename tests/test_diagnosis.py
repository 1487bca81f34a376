"""What `rkd doctor` says of runtimes, the GPU and targets, on machines that are made up."""

from __future__ import annotations

import sys
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import pytest

from rkd.bench.cuda import Gpu
from rkd.bench.tensorrt_runner import Machine
from rkd.diagnosis import Finding, diagnose
from rkd.errors import MissingExtraError, RuntimeUnavailableError
from rkd.target import builtin_targets

ORIN = Gpu("Orin", "8.7", 12060, 8 * 2**30, integrated=True)


def machine(version: str = "", gpu: Gpu | None = None, asked: list[int] | None = None) -> Machine:
    """TensorRT of a version, and a GPU, where there are any."""

    def load(runtime: str) -> Any:
        if runtime == "tensorrt-rtx":
            raise MissingExtraError("tensorrt_rtx", "rtx")
        if not version:
            raise RuntimeUnavailableError("tensorrt is not installed; on a Jetson it comes with JetPack")
        return SimpleNamespace(__version__=version)

    def probe() -> Gpu:
        if asked is not None:
            asked.append(1)
        if gpu is None:
            raise RuntimeUnavailableError("no CUDA device: it lists no device")
        return gpu

    return Machine(load=load, probe=probe)


def look(made: Machine) -> dict[str, Finding]:
    return {finding.what: finding for finding in diagnose(made)}


@pytest.fixture
def gpu_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module `onnxruntime`, from the distribution onnxruntime-gpu."""
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    module = SimpleNamespace(__version__="1.23.0", get_available_providers=lambda: providers)
    monkeypatch.setitem(sys.modules, "onnxruntime", module)
    known = metadata.version

    def version(name: str) -> str:
        if name == "onnxruntime":
            raise metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(metadata, "version", version)


def test_onnxruntime_is_what_can_be_imported_under_whatever_name_it_was_installed(gpu_onnxruntime: None) -> None:
    found = look(machine())
    assert (found["onnxruntime"].state, found["onnxruntime"].detail) == (
        "ok", "1.23.0; CUDAExecutionProvider, CPUExecutionProvider"
    )  # fmt: skip
    assert found["target ort-cuda-fp16"].detail == found["target ort-cpu"].detail == "can run here"


def test_without_onnxruntime_its_targets_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    found = look(machine())
    assert found["onnxruntime"].state == "missing"
    assert found["target ort-cpu"].state == "note"
    assert "onnxruntime" in found["target ort-cpu"].detail


def test_a_board_names_its_gpu_driver_and_tensorrt_and_what_can_run() -> None:
    pytest.importorskip("cuda")
    found = look(machine("10.3.0", ORIN))
    assert found["gpu"].detail == (
        "Orin, compute capability 8.7, driver for CUDA 12.6, 8.0 GiB, shared with the CPU"
    )  # fmt: skip
    assert (found["tensorrt"].state, found["tensorrt"].detail) == ("ok", "10.3.0")
    assert {name for name, one in found.items() if one.detail == "can run here"} >= {
        "target jetson-fp16", "target jetson-fp32", "target jetson-int8", "target ort-cpu"
    }  # fmt: skip
    assert "whl[rtx]" in found["target rtx-fp16"].detail


@pytest.mark.parametrize(
    ("version", "gpu", "words"),
    [
        ("", ORIN, "tensorrt is not installed"),
        ("8.6.2", ORIN, "tensorrt 8.6.2 is here, the target wants 10.3 or newer and below 12"),
        ("12.0", ORIN, "tensorrt 12.0 is here"),
        ("10.3.0", None, "no usable GPU, see gpu"),
        ("10.3.0", Gpu("RTX 4090", "8.9", 12060, 2**34, integrated=False), "8.9, it is for 8.7, 11.0"),
    ],
)
def test_a_target_that_cannot_run_here_says_what_it_lacks(version: str, gpu: Gpu | None, words: str) -> None:
    found = look(machine(version, gpu))
    assert found["target jetson-fp16"].state == "note"
    assert words in found["target jetson-fp16"].detail
    assert (found["tensorrt"].state == "ok") is (version == "10.3.0")
    assert (found["gpu"].state == "ok") is (gpu is not None)


def test_there_is_a_line_for_each_target_and_a_driver_that_hangs_is_asked_once() -> None:
    asked: list[int] = []
    found = look(machine("10.3.0", None, asked))
    assert {name for name in found if name.startswith("target ")} == {f"target {name}" for name in builtin_targets()}
    assert asked == [1]
