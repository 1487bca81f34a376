from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from rkd.bench import memory, memory_child
from rkd.bench.device import resident
from rkd.bench.memory import measure_memory
from rkd.bench.runner import CPU_PROVIDER, Choice

CPU = Choice("onnxruntime", CPU_PROVIDER, 1)
SHAPE = (1, 3, 8, 8)


def big(linear, megabytes):
    """The linear model with weights that it needs and that cannot be folded away."""
    model = linear.onnx()
    wide = megabytes * 2**20 // 4 // 5
    model.graph.initializer.append(numpy_helper.from_array(np.ones((5, wide), np.float32), "u"))
    model.graph.initializer.append(numpy_helper.from_array(np.ones((wide, 5), np.float32), "v"))
    model.graph.node[-1].output[0] = "a"
    model.graph.node.append(onnx.helper.make_node("MatMul", ["a", "u"], ["b"]))
    model.graph.node.append(onnx.helper.make_node("MatMul", ["b", "v"], ["logits"]))
    return model.SerializeToString()


def test_a_child_reports_memory_above_zero(linear):
    found = measure_memory(linear.onnx().SerializeToString(), CPU, SHAPE)
    assert found.reason is None
    assert found.inferences >= 600
    assert found.leak is False
    assert found.loaded_bytes >= found.before_bytes
    assert found.peak_bytes >= found.steady_bytes > found.before_bytes > 2**20
    assert abs(found.growth_bytes) < found.steady_bytes


def test_a_larger_model_takes_more(linear):
    small = measure_memory(linear.onnx().SerializeToString(), CPU, SHAPE)
    large = measure_memory(big(linear, 32), CPU, SHAPE, cap_seconds=1.0)
    assert large.steady_bytes - small.steady_bytes > 48 * 2**20  # two matrices of 32 MiB
    assert large.peak_bytes >= large.steady_bytes


def test_a_model_that_does_not_load_is_a_reason(linear):
    found = measure_memory(b"not onnx", CPU, SHAPE)
    assert found.peak_bytes is None
    assert "BundleError" in found.reason
    assert "\n" not in found.reason


@pytest.mark.parametrize(
    ("start", "reason"),
    [
        ("import os; os.abort()", "killed by SIGABRT"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL, perhaps for lack of memory"),
        ("import sys; sys.exit(3)", "ended with status 3 and no answer"),
        ("print('[]')", "no answer"),
        ("print('{}')", "no answer"),
        ("raise ValueError", "no answer"),
    ],
)
def test_a_child_that_crashes_is_a_reason_and_no_traceback(monkeypatch, start, reason):
    monkeypatch.setattr(memory, "_START", start)
    found = measure_memory(b"", CPU, SHAPE)
    assert found.peak_bytes is None
    assert reason in found.reason


def test_a_child_that_hangs_is_killed(monkeypatch):
    monkeypatch.setattr(memory, "_START", "import signal; signal.pause()")
    assert "did not finish within 0.3 s" in measure_memory(b"", CPU, SHAPE, timeout_seconds=0.3).reason


@pytest.mark.parametrize(
    ("before", "after", "fell"), [(900, 400, 500), (400, 900, None), (400, 400, None), (None, 4, None), (4, None, None)]
)
def test_memory_that_the_system_did_not_lose_is_not_reported_as_nothing(before, after, fell):
    assert memory_child.fall(before, after) == fell


def test_resident_size_is_none_without_proc(tmp_path):
    assert resident("VmRSS", tmp_path / "status") is None
    (tmp_path / "status").write_text("Name:\tpython\nVmRSS:\t    1234 kB\n")
    assert resident("VmRSS", tmp_path / "status") == 1234 * 1024
    assert resident("VmHWM", tmp_path / "status") is None
