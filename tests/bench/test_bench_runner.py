from __future__ import annotations

import dataclasses
import sys

import numpy as np
import onnxruntime
import pytest

from rkd.bench.runner import CPU_PROVIDER, OrtRunner, choose_runner, open_runner
from rkd.errors import BundleError, ConfigError, MissingExtraError, RuntimeUnavailableError
from rkd.target import load_target


def test_logits_are_those_of_the_linear_model(linear, evaluation):
    images = evaluation[0][:7]
    with OrtRunner(linear.onnx().SerializeToString(), CPU_PROVIDER, 1, "m") as runner:
        logits = runner.infer(images)
    assert logits.dtype == np.float32
    np.testing.assert_array_equal(logits, images.reshape(7, -1).astype(np.int64) @ linear.weights)


def test_identity_states_runtime_version_providers_and_threads(linear):
    with OrtRunner(linear.onnx().SerializeToString(), CPU_PROVIDER, 2, "m") as runner:
        identity = runner.identity
    assert dataclasses.astuple(identity) == ("onnxruntime", onnxruntime.__version__, (CPU_PROVIDER,), 2, (), ())


def test_a_missing_provider_names_what_is_there_and_what_to_install(linear):
    with (
        pytest.raises(RuntimeUnavailableError, match=r"CUDAExecutionProvider.*CPUExecutionProvider.*onnxruntime-gpu"),
        OrtRunner(linear.onnx().SerializeToString(), "CUDAExecutionProvider", 1, "m"),
    ):
        pass


def test_a_provider_that_silently_falls_back_is_refused(linear, monkeypatch):
    class Session:
        def get_providers(self):
            return [CPU_PROVIDER]

        def disable_fallback(self):
            pass

    entries = {}
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", CPU_PROVIDER])
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda *args, **kwargs: entries.update(kwargs, so=args[1]) or Session()
    )
    with (
        pytest.raises(RuntimeUnavailableError, match="fell back from CUDAExecutionProvider to CPUExecutionProvider"),
        OrtRunner(linear.onnx().SerializeToString(), "CUDAExecutionProvider", 1, "m"),
    ):
        pass
    assert entries["providers"] == ["CUDAExecutionProvider"]
    assert entries["so"].get_session_config_entry("session.disable_cpu_ep_fallback") == "1"


@pytest.mark.skipif(
    "AzureExecutionProvider" not in onnxruntime.get_available_providers(),
    reason="this onnxruntime has no such provider",
)
def test_a_real_provider_that_runs_nothing_of_the_model_is_refused(linear):
    """Azure's provider is in every wheel and runs no operator of ours: alone, onnxruntime would fall back silently."""
    model = linear.onnx().SerializeToString()
    silent = onnxruntime.InferenceSession(model, providers=["AzureExecutionProvider"])
    assert silent.get_providers()[0] == "AzureExecutionProvider"
    with (
        pytest.raises(BundleError, match=r"cannot load the model with AzureExecutionProvider: .*fallback to CPU EP"),
        OrtRunner(model, "AzureExecutionProvider", 1, "m"),
    ):
        pass


@pytest.mark.parametrize("model", [b"", b"not onnx", b"\x08\x09", b"\x00" * 100])
def test_broken_bytes_are_one_line(model):
    with pytest.raises(BundleError) as caught, OrtRunner(model, CPU_PROVIDER, 1, "x.rkd"):
        pass
    assert str(caught.value).startswith("x.rkd: ")
    assert "\n" not in str(caught.value)


def test_every_cut_of_a_model_is_refused(linear):
    whole = linear.onnx().SerializeToString()
    for end in range(0, len(whole), 97):
        with pytest.raises(BundleError), OrtRunner(whole[:end], CPU_PROVIDER, 1, "m"):
            pass


def test_another_interface_is_refused(linear):
    with (
        pytest.raises(BundleError, match="expected uint8 'images' of rank 4 and float32 'logits'"),
        OrtRunner(linear.onnx(output="scores").SerializeToString(), CPU_PROVIDER, 1, "m"),
    ):
        pass


def test_a_batch_that_the_model_does_not_take_is_one_line(linear, evaluation):
    with (
        OrtRunner(linear.onnx(batch=1).SerializeToString(), CPU_PROVIDER, 1, "m") as runner,
        pytest.raises(BundleError, match=r"does not run on a batch of 2: [^\n]*$"),
    ):
        runner.infer(evaluation[0][:2])


def test_an_onnxruntime_target_runs_on_its_own_provider():
    choice = choose_runner(load_target("ort-cpu"), threads=3)
    assert (choice.provider, choice.threads, choice.instead) == (CPU_PROVIDER, 3, "")


def test_a_tensorrt_target_is_measured_on_the_cpu_and_says_so(linear):
    choice = choose_runner(load_target("jetson-fp16"))
    assert choice.provider == CPU_PROVIDER
    assert "tensorrt is not available here" in choice.instead
    assert "latency says nothing about the board" in choice.instead
    with open_runner(choice, linear.onnx().SerializeToString(), "m") as runner:
        assert runner.identity.runtime == "onnxruntime"


def test_without_onnxruntime_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"whl\[ort\]"):
        choose_runner(load_target("ort-cpu"))
    with pytest.raises(RuntimeUnavailableError, match=r"wants TensorRT.*whl\[ort\]"):
        choose_runner(load_target("jetson-fp16"))


@pytest.mark.parametrize("threads", [0, -1, 10_000])
def test_impossible_threads_are_refused(threads):
    with pytest.raises(ConfigError, match="threads"):
        choose_runner(load_target("ort-cpu"), threads=threads)
