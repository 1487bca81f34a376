"""TensorRT without a GPU: the real module of TensorRT for RTX builds, a recording device shows the runner's order."""

from __future__ import annotations

import ctypes
import inspect
import json
import os
import re
import signal
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from rkd.bench import tensorrt_api as api
from rkd.bench import tensorrt_engine
from rkd.bench.cuda import Cuda, CudaPython, Gpu, probe_gpu
from rkd.bench.tensorrt_engine import (
    BuildOptions,
    build_engine,
    check_memory,
    engine_key,
    load_engine,
    load_timings,
    store_engine,
)
from rkd.bench.tensorrt_layers import LayerType, count_types, layers_to_json, read_layers, verify_precision
from rkd.bench.tensorrt_runner import Machine, TensorRtRunner, tensorrt_missing
from rkd.errors import BundleError, RuntimeUnavailableError
from rkd.files import write_file
from rkd.target import load_target

ORIN = Gpu("Orin", "8.7", 12060, 8 * 2**30, integrated=True)
FP16 = BuildOptions.of(load_target("jetson-fp16"))


# ------------------------------------------------------------------------------------------- the real module, no GPU


@pytest.fixture(scope="module")
def trt() -> api.Module:
    pytest.importorskip("tensorrt_rtx")
    return api.import_tensorrt("tensorrt-rtx")


CLASSES = [
    api.IOptimizationProfile, api.ITimingCache, api.IBuilderConfig, api.ITensor, api.INetworkDefinition, api.Builder,
    api.ParserError, api.OnnxParser, api.EngineInspector, api.IExecutionContext, api.ICudaEngine, api.Runtime_,
]  # fmt: skip


@pytest.mark.parametrize("protocol", CLASSES, ids=lambda protocol: protocol.__name__)
def test_each_call_of_a_protocol_is_a_call_of_the_real_class(trt: api.Module, protocol: type) -> None:
    real = getattr(trt, protocol.__name__.rstrip("_"))
    for name in protocol.__annotations__:
        assert hasattr(real, name), name
    for name, function in vars(protocol).items():
        if name.startswith("_") or not inspect.isfunction(function):
            continue
        said = str(getattr(real, name).__doc__)
        parameters = list(inspect.signature(function).parameters)[1:]
        assert f"{name}(" in said
        for parameter in parameters:
            assert f"{parameter}:" in said, f"{name}: {parameter} is not in {said.splitlines()[0]}"


def test_the_module_has_what_its_protocol_says(trt: api.Module) -> None:
    for name in [*api.Module.__annotations__, "Builder", "OnnxParser", "Runtime"]:
        assert hasattr(trt, name), name
    assert {"WORKSPACE"} <= set(trt.MemoryPoolType.__members__)
    assert {"TF32"} <= set(trt.BuilderFlag.__members__)


def model(node: Any, batch: str | int = "N") -> bytes:
    graph = helper.make_graph(
        [helper.make_node("Cast", ["images"], ["x"], to=TensorProto.FLOAT), node], "g",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, [batch, 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9).SerializeToString()


@pytest.mark.parametrize("batch", ["N", 1])
def test_a_file_is_built_with_progress_by_the_one_code_path(trt: api.Module, batch: str | int) -> None:
    told: list[tuple[str, int, int]] = []
    node = helper.make_node("Flatten", ["x"], ["logits"], axis=1)
    engine, _ = build_engine(trt, model(node, batch), FP16, "x.rkd", on_phase=lambda *step: told.append(step))
    assert len(engine) > 100
    assert {name for name, done, total in told if done == total} == {name for name, _, _ in told}
    assert all(0 <= done <= total for _, done, total in told)
    assert len(told) > len({name for name, _, _ in told}) > 1


class Renamed:
    """The real module under TensorRT's name, so that its branch with timings runs."""

    __name__ = "tensorrt"

    def __init__(self, real: api.Module) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


@pytest.mark.filterwarnings("ignore:.*Timing cache operations:DeprecationWarning")
def test_timings_of_one_build_go_into_the_next(trt: api.Module) -> None:
    data = model(helper.make_node("Flatten", ["x"], ["logits"], axis=1))
    first, timings = build_engine(Renamed(trt), data, FP16, "x.rkd")
    second, again = build_engine(Renamed(trt), data, FP16, "x.rkd", timing_cache=timings)
    assert timings
    assert again == timings
    assert len(first) == len(second)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no input 'images' of rank 4"),
        (b"junk", "not a readable ONNX file"),
        (model(helper.make_node("Det", ["x"], ["logits"], name="it")), r"cannot parse the model: node 'it' \(Det\)"),
        (model(helper.make_node("Foo", ["x"], ["logits"], name="it")), r"node 'it' \(Foo\): .*Plugin not found"),
    ],
    ids=["empty", "junk", "unsupported operator", "unknown operator"],
)
def test_what_tensorrt_cannot_parse_is_named_with_its_words(trt: api.Module, data: bytes, message: str) -> None:
    with pytest.raises(BundleError, match=rf"^x\.rkd: .*{message}") as caught:
        build_engine(trt, data, FP16, "x.rkd")
    assert "\n" not in str(caught.value)


def test_here_without_a_device_the_reason_names_the_way_out(trt: api.Module) -> None:
    machine = Machine(load=lambda _runtime: trt, probe=lambda: probe_gpu(code="raise SystemExit('it lists no device')"))
    options = BuildOptions.of(load_target("rtx-fp16"))
    assert tensorrt_missing(options, machine) == (
        "no CUDA device: it lists no device; check the driver (a container needs --runtime nvidia), or export for the "
        "target ort-cpu, which needs no GPU"
    )


# ------------------------------------------------------------------------------------------------------------- driver


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (f"import os; os.kill(os.getpid(), {int(signal.SIGSEGV)})", "ended by signal 11"),
        ("import ctypes; ctypes.CDLL('libno-such-driver.so.1')", "no CUDA device: OSError: libno-such-driver"),
        ("print('hello')", "answer cannot be read"),
        ("while True: pass", "did not answer within"),
    ],
    ids=["segfault", "no driver", "nonsense", "hangs"],
)
def test_a_driver_that_fails_cannot_take_the_bench_down(code: str, message: str) -> None:
    seconds = 0.2 if "while" in code else 30.0
    with pytest.raises(RuntimeUnavailableError, match=message) as caught:
        probe_gpu(seconds, code)
    assert "ort-cpu" in str(caught.value)


def test_a_driver_that_answers_tells_its_device() -> None:
    answer = {"name": "Orin", "compute": "8.7", "driver": 12060, "total_bytes": 8 * 2**30, "integrated": True}
    assert probe_gpu(code=f"print({json.dumps(answer)!r})") == ORIN


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("8.6.2", r"8\.6\.2 is here, the target wants 10\.3 or newer.*ort-cpu"),
        ("12.0", "below 12; see whether a newer rkd.*ort-cpu"),
    ],
)
def test_other_releases_are_refused_with_the_way_out(version: str, message: str) -> None:
    machine = Machine(load=lambda _runtime: SimpleNamespace(__version__=version), probe=lambda: ORIN)
    with pytest.raises(RuntimeUnavailableError, match=message):
        tensorrt_missing(FP16, machine)


def test_tensorrt_8_is_refused_whatever_the_target_says() -> None:
    machine = Machine(load=lambda _runtime: SimpleNamespace(__version__="8.6.2"), probe=lambda: ORIN)
    for least in ("", "8.5"):
        with pytest.raises(RuntimeUnavailableError, match=r"8\.6\.2 is here, the target wants 10\.3 or newer.*ort-cpu"):
            tensorrt_missing(replace(FP16, min_version=least), machine)


@pytest.mark.parametrize(("runtime", "version", "ceiling"), [("tensorrt", "12.0", "12"), ("tensorrt-rtx", "2.0", "2")])
@pytest.mark.parametrize("below", ["", "13"])
def test_a_release_that_nobody_has_seen_is_refused_whatever_the_target_says(
    runtime: Any, version: str, ceiling: str, below: str
) -> None:
    machine = Machine(load=lambda _runtime: SimpleNamespace(__version__=version), probe=lambda: ORIN)
    options = replace(FP16, runtime=runtime, min_version="", below_version=below)
    with pytest.raises(
        RuntimeUnavailableError, match=rf"and below {ceiling}; see whether a newer rkd serves it, or export .*ort-cpu"
    ):
        tensorrt_missing(options, machine)


@pytest.mark.parametrize("version", ["10.3.0.26", "10.13.3.9", "10.16.1", "11.4.0"])
def test_the_releases_of_jetpack_6_1_to_7_2_are_served(version: str) -> None:
    machine = Machine(load=lambda _runtime: SimpleNamespace(__version__=version), probe=lambda: ORIN)
    assert tensorrt_missing(FP16, machine) == ""


def test_without_tensorrt_the_board_learns_where_it_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert "comes with JetPack" in tensorrt_missing(FP16)


def test_too_little_memory_is_seen_before_the_build() -> None:
    check_memory(FP16, 2**20, (512 + 256 + 4) * 2**20)
    with pytest.raises(RuntimeUnavailableError, match=r"takes about 772 MiB, 771 MiB are free.*workspace_mib = 512"):
        check_memory(FP16, 2**20, (512 + 256 + 3) * 2**20)


class CheckedRuntime:
    """cuda-python's functions, of which none is run: name, number of arguments and of results are the real ones'."""

    def __init__(self, real: Any) -> None:
        self._real = real
        self.called: set[str] = set()
        self._memory: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._real, name)
        if isinstance(real, type):  # an enum
            return real

        def call(*arguments: Any) -> tuple[Any, ...]:
            inspect.signature(real).bind(*arguments)
            self.called.add(name)
            values = re.findall(r"^\w+ : ", real.__doc__.partition("Returns\n")[2], re.MULTILINE)
            return (self._real.cudaError_t.cudaSuccess, *[self._place() for _ in values])

        return call

    def _place(self) -> int:
        """Memory that can be written to, or any other number."""
        self._memory.append(ctypes.create_string_buffer(64))
        return ctypes.addressof(self._memory[-1])


def test_cuda_python_has_every_function_and_enum_that_is_used_with_as_many_arguments(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bindings = pytest.importorskip("cuda.bindings")
    real = pytest.importorskip("cuda.bindings.runtime")
    checked = CheckedRuntime(real)
    monkeypatch.setattr(bindings, "runtime", checked)
    cuda = CudaPython()
    assert isinstance(cuda.free_bytes(), int)
    address, array = cuda.allocate(12), cuda.pinned((3, 4), np.uint8)
    array[:] = 7
    cuda.to_device(address, array)
    cuda.to_host(array, address)
    events = [cuda.event(), cuda.event()]
    cuda.record(events[0])
    assert isinstance(cuda.elapsed_ms(*events), float)
    cuda.synchronise()
    assert cuda.stream()
    cuda.close()
    written = set(re.findall(r'"(cuda[A-Z]\w+)"', inspect.getsource(CudaPython)))
    assert written - checked.called == {"cudaMemcpyHostToDevice", "cudaMemcpyDeviceToHost"}  # of the enum


# -------------------------------------------------------------------------------------------------------------- cache


def key(**changes: Any) -> dict[str, Any]:
    made = engine_key(SimpleNamespace(__version__="10.3"), b"model", FP16, ORIN)
    return {**made, **changes}


def test_an_engine_is_found_again_under_its_very_key_only(tmp_path: Path) -> None:
    store_engine(tmp_path, key(), b"engine")
    assert load_engine(tmp_path, key()) == b"engine"
    for part in key():
        assert load_engine(tmp_path, key(**{part: "another"})) is None


def test_an_engine_that_was_changed_or_that_others_could_change_is_not_loaded(tmp_path: Path) -> None:
    path = store_engine(tmp_path, key(), b"engine")
    good = path.read_bytes()
    for at in range(len(good)):
        changed = bytearray(good)
        changed[at] ^= 1
        path.write_bytes(changed)
        assert load_engine(tmp_path, key()) is None
    path.write_bytes(good)
    assert load_engine(tmp_path, key()) == b"engine"
    path.chmod(0o666)
    assert load_engine(tmp_path, key()) is None
    path.chmod(0o600)
    path.parent.chmod(0o777)
    assert load_engine(tmp_path, key()) is None
    path.parent.chmod(0o700)
    (tmp_path / "elsewhere").write_bytes(good)
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    assert load_engine(tmp_path, key()) is None


# ------------------------------------------------------------------------------------------------------------- layers


def layers(*types: str, field: str = "Format/Datatype") -> str:
    return json.dumps(
        {"Layers": [{"Name": "move", "LayerType": "Reformat", "Inputs": [{field: "Float"}]}]
         + [{"Name": f"l{i}", "LayerType": "CaskConvolution", "Inputs": [{field: kind}]} for i, kind in enumerate(types)]}
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "field", "precision"),
    [
        ("Row major linear FP16 format", "Format/Datatype", "fp16"),
        ("Half", "Format/Datatype", "fp16"),
        ("Thirty-two wide channel vectorized row major Int8 format.", "Format/Datatype", "int8"),
        ("Float", "Format/Datatype", "fp32"),
        ("Half", "DataType", "fp16"),
        ("BFloat16", "DataType", "bf16"),
        ("Row major linear BF16 format", "Format/Datatype", "bf16"),
        ("N/A due to dynamic shapes", "Format/Datatype", "unknown"),
        ("Row major linear UInt8 format", "Format/Datatype", "unknown"),
        ("UInt8", "DataType", "unknown"),
    ],
)
def test_types_are_read_from_both_forms_of_the_inspector(kind: str, field: str, precision: str) -> None:
    assert count_types(read_layers(layers(kind, field=field))) == {precision: 1}


@pytest.mark.parametrize(
    ("inputs", "outputs", "precision"),
    [
        ({"Format/Datatype": "Row major linear UInt8 format"}, {"Format/Datatype": "Row major linear FP32"}, "fp32"),
        ({"DataType": "UInt8", "Format": "Linear"}, {"DataType": "Half", "Format": "Linear"}, "fp16"),
        ({"DataType": "UInt8"}, {"DataType": "Int8"}, "int8"),
        ({"DataType": "Int8"}, {"DataType": "Half"}, "int8"),
    ],
)
def test_a_layer_that_reads_the_cameras_bytes_computes_in_the_type_of_its_output(
    inputs: dict[str, str], outputs: dict[str, str], precision: Any
) -> None:
    layer = {"Name": "first", "LayerType": "CaskConvolution", "Inputs": [inputs], "Outputs": [outputs]}
    found = read_layers(json.dumps({"Layers": [layer]}))
    assert count_types(found) == {precision: 1}
    assert verify_precision(found, precision, "x").startswith("layers: 1 ")


@pytest.mark.parametrize(
    ("precision", "rest", "types", "fine"),
    [
        ("fp16", "", ("Half", "Half"), True),
        ("fp16", "", ("Float", "Float"), False),
        ("fp16", "", ("Half", "Float"), False),
        ("int8", "fp16", ("Int8", "Half"), True),
        ("int8", "fp16", ("Half", "Half"), False),
        ("int8", "fp16", ("Int8", "Float"), False),
        ("int8", "fp32", ("Int8", "Float"), True),
        ("int8", "fp32", ("Int8", "Half"), False),
        ("int8", "fp32", ("Float", "Float"), False),
        ("fp32", "", ("Float",), True),
        ("fp32", "", ("Half",), False),
    ],
)
def test_an_engine_that_silently_computes_in_another_type_is_refused(
    precision: Any, rest: str, types: tuple[str, ...], fine: bool
) -> None:
    found = read_layers(layers(*types))
    if fine:
        assert verify_precision(found, precision, "x", rest=rest).startswith("layers: ")
    else:
        with pytest.raises(RuntimeUnavailableError, match=f"does not compute in {precision}"):
            verify_precision(found, precision, "x", rest=rest)


@pytest.mark.parametrize(
    ("changes", "cleared"),
    [({}, 0), ({"precision": "int8", "rest": "fp16"}, 0), ({"precision": "int8", "rest": "fp32"}, 1),
     ({"precision": "fp32"}, 1)],
)  # fmt: skip
def test_files_with_fp32_layers_are_built_without_tf32(changes: dict[str, Any], cleared: int) -> None:
    device = Recorder()
    flat = model(helper.make_node("Flatten", ["x"], ["logits"], axis=1))
    build_engine(device.module(), flat, replace(FP16, **changes), "x.rkd")
    assert device.calls.count("clear_flag") == cleared


def test_an_int8_target_whose_rest_is_fp32_has_its_engine_checked_for_that_and_kept_apart(tmp_path: Path) -> None:
    target = load_target("jetson-int8")
    assert target.quantisation is not None
    options = BuildOptions.of(replace(target, quantisation=replace(target.quantisation, rest="fp32")))
    assert (options.rest, BuildOptions.of(target).rest, FP16.rest) == ("fp32", "fp16", "")
    device = Recorder(inspector="Int8", second="Float")
    trt = device.module()
    machine = Machine(load=lambda _runtime: trt, probe=lambda: ORIN, open=lambda: device, cache=lambda: tmp_path)
    flat = model(helper.make_node("Flatten", ["x"], ["logits"], axis=1))
    with TensorRtRunner(flat, options, "x.rkd", machine=machine) as active:
        assert active.layer_types() == {"fp32": 1, "int8": 1}
    assert engine_key(trt, flat, options, ORIN) != engine_key(trt, flat, BuildOptions.of(target), ORIN)
    refused = TensorRtRunner(flat, BuildOptions.of(target), "x.rkd", machine=machine)
    with pytest.raises(RuntimeUnavailableError, match="does not compute in int8: 1 fp32, 1 int8"), refused:
        pass


@pytest.mark.parametrize(
    ("int8", "quantised", "fine"), [(20, 20, True), (10, 20, True), (9, 20, False), (1, 20, False)]
)
def test_an_int8_engine_is_compared_with_the_layers_that_the_file_has_in_int8(
    int8: int, quantised: int, fine: bool
) -> None:
    found = read_layers(layers(*["Int8"] * int8, *["Half"] * (20 - int8)))
    if fine:
        assert verify_precision(found, "int8", "x", quantised, "fp16").endswith(f"; the file has {quantised} in INT8")
    else:
        with pytest.raises(
            RuntimeUnavailableError, match=rf"x: {int8} layers of the engine compute in INT8, 20 of the"
        ):
            verify_precision(found, "int8", "x", quantised, "fp16")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_types_that_the_inspector_does_not_tell_are_said_not_to_be_verified(precision: Any) -> None:
    for found in (
        read_layers(layers("N/A")),
        read_layers('{"Layers": ["conv1", "conv2"]}'),
        read_layers('{"Layers": []}'),
    ):
        assert f"NOT VERIFIED to compute in {precision}" in verify_precision(found, precision, "x", 2)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"Layers": 3}', '{"Layers": [3]}'])
def test_what_is_no_list_of_layers_is_refused(text: str) -> None:
    with pytest.raises(RuntimeUnavailableError, match="no list of layers"):
        read_layers(text)


def test_layers_in_a_result_are_bounded_in_number_and_length_and_of_printable_text() -> None:
    found = layers_to_json((LayerType("conv\n" + "x" * 10_000, "k" * 10_000, "fp16", weighted=True),) * 5000)
    assert len(found) == 1000
    assert len(found[0]["name"]) == len(found[0]["kind"]) == 200
    assert found[0]["name"].isprintable()
    assert set(found[0]) == {"name", "kind", "precision"}


# --------------------------------------------------------------------------------------------------- recording device


class StandIn:
    """One object of TensorRT's: what its Protocol has, and nothing else; it writes down what it is asked."""

    def __init__(self, protocol: type, calls: list[str], **answers: Any) -> None:
        assert set(answers) <= names(protocol)
        vars(self).update(_protocol=protocol, _calls=calls, _answers=answers)

    def __getattr__(self, name: str) -> Any:
        if name in self._protocol.__annotations__:
            return self._answers[name]
        function = vars(self._protocol).get(name)
        if name.startswith("_") or not inspect.isfunction(function):
            raise AttributeError(f"{self._protocol.__name__} has no {name}")

        def call(*arguments: Any) -> Any:
            inspect.signature(function).bind(self, *arguments)
            self._calls.append(name)
            answer = self._answers.get(name)
            return answer(*arguments) if callable(answer) else answer

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        assert name in self._protocol.__annotations__, f"{self._protocol.__name__} has no {name}"


def names(*protocols: type) -> set[str]:
    return {name for one in protocols for name in (*vars(one), *vars(one).get("__annotations__", ()))}


class Recorder:
    """TensorRT and CUDA as one device that writes down what it is asked; its engine sums up each image's bytes."""

    def __init__(self, inspector: str = "Half", runs: bool = True, second: str = "") -> None:
        self.calls: list[str] = []
        self.buffers: dict[int, np.ndarray] = {}
        self.addresses: dict[str, int] = {}
        self.batch, self.runs, self.name = 0, runs, "recorder"
        self.free = 2**40
        self.types = (inspector, second) if second else (inspector,)
        self.timed: list[bytes] = []  # what each build knew of earlier ones

    def __getattr__(self, name: str) -> Any:
        """What only leaves a trace."""
        if name not in ("record", "synchronise", "close"):
            raise AttributeError(name)
        return lambda *arguments: self.calls.append(name)

    # CUDA
    def free_bytes(self) -> int:
        self.calls.append("free_bytes")
        return self.free

    def allocate(self, size_bytes: int) -> int:
        address = 1000 + len(self.buffers)
        self.buffers[address] = np.zeros(size_bytes, np.uint8)
        return address

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        return np.zeros(shape, dtype)

    def stream(self) -> int:
        return 7

    def event(self) -> int:
        return 0

    def elapsed_ms(self, _first: Any, _second: Any) -> float:
        return 0.5

    def to_device(self, address: int, source: np.ndarray) -> None:
        self.calls.append("to_device")
        self.buffers[address][: source.nbytes] = source.ravel().view(np.uint8)

    def to_host(self, target: np.ndarray, address: int) -> None:
        self.calls.append("to_host")
        target[...] = self.buffers[address][: target.nbytes].view(np.float32).reshape(target.shape)

    # TensorRT
    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def set_input_shape(self, _name: str, shape: tuple[int, ...]) -> bool:
        self.calls.append(f"shape {shape[0]}")
        self.batch = shape[0]
        return True

    def infer_shapes(self) -> list[str]:
        return []

    def execute_async_v3(self, stream: int) -> bool:
        self.calls.append(f"execute on {stream}")
        size = 3 * 4 * 4
        pixels = self.buffers[self.addresses["images"]][: self.batch * size].reshape(self.batch, size).astype(np.int64)
        logits = np.stack([pixels.sum(axis=1), -pixels.sum(axis=1)], axis=1).astype(np.float32)
        self.buffers[self.addresses["logits"]][: logits.nbytes] = logits.ravel().view(np.uint8)
        return self.runs

    def get_engine_information(self, _format: Any) -> str:
        return layers(*self.types)

    def module(self) -> Any:
        """TensorRT's module; an engine that it builds or loads is this device."""

        def stand_in(protocol: type, **answers: Any) -> StandIn:
            return StandIn(protocol, self.calls, **answers)

        engine = stand_in(
            api.ICudaEngine, num_io_tensors=2, device_memory_size_v2=2**20,
            get_tensor_name=lambda i: ("images", "logits")[i], get_tensor_mode=lambda name: ("in", "out")[name == "logits"],
            get_tensor_dtype=lambda name: ("u8", "f32")[name == "logits"],
            get_tensor_shape=lambda name: (-1, 2) if name == "logits" else (-1, 3, 4, 4),
            create_execution_context=lambda: self, create_engine_inspector=lambda: self,
        )  # fmt: skip
        cache = stand_in(api.ITimingCache, serialize=b"timings")
        config = stand_in(
            api.IBuilderConfig, get_timing_cache=lambda: cache, set_timing_cache=True,
            create_timing_cache=lambda known: self.timed.append(known) or cache,
        )  # fmt: skip
        image = stand_in(api.ITensor, name="images", shape=(-1, 3, 4, 4))
        network = stand_in(api.INetworkDefinition, get_input=lambda _index: image)
        builder = stand_in(
            api.Builder, create_network=lambda _flags: network, create_builder_config=lambda: config,
            create_optimization_profile=lambda: stand_in(api.IOptimizationProfile), build_serialized_network=b"engine",
        )  # fmt: skip
        return SimpleNamespace(
            __name__="tensorrt", __version__="10.3.0", ILogger=type("ILogger", (), {"ERROR": 1, "INTERNAL_ERROR": 2}),
            IProgressMonitor=object, ProfilingVerbosity=SimpleNamespace(DETAILED="detailed"),
            MemoryPoolType=SimpleNamespace(WORKSPACE="workspace"), BuilderFlag=SimpleNamespace(TF32="tf32"),
            NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=1),
            Builder=lambda _logger: builder, OnnxParser=lambda _network, _logger: stand_in(api.OnnxParser, parse=True),
            Runtime=lambda _logger: stand_in(api.Runtime_, deserialize_cuda_engine=lambda _data: engine),
            TensorIOMode=SimpleNamespace(INPUT="in", OUTPUT="out"), LayerInformationFormat=SimpleNamespace(JSON="json"),
            DataType=SimpleNamespace(UINT8="u8", FLOAT="f32"),
        )  # fmt: skip


def test_the_recording_device_has_calls_of_the_protocols_only() -> None:
    own = {name for name in vars(Recorder) if not name.startswith("_")} - {"module"}
    assert own <= names(Cuda, api.IExecutionContext, api.EngineInspector)
    assert set(vars(Recorder().module())) <= names(api.Module)
    with pytest.raises(AttributeError):
        _ = Recorder().module().Runtime(None).deserialise


def unbuilt(
    device: Recorder, cache: Path, model: bytes, gpu: Gpu = ORIN, available: int | None = None
) -> TensorRtRunner:
    trt = device.module()
    machine = Machine(
        load=lambda _runtime: trt, probe=lambda: gpu, open=lambda: device, cache=lambda: cache, available=lambda: available
    )  # fmt: skip
    return TensorRtRunner(model, FP16, "x.rkd", machine=machine)


def runner(device: Recorder, cache: Path) -> TensorRtRunner:
    """Its engine lies in the cache already."""
    store_engine(cache, engine_key(device.module(), b"model", FP16, ORIN), b"engine")
    return unbuilt(device, cache, b"model")


def test_a_first_start_checks_memory_builds_and_keeps_timings_then_engine_a_second_one_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Recorder()

    def noted(path: Path, data: bytes, mode: int) -> None:
        device.calls.append(f"write {path.suffix}")
        write_file(path, data, mode=mode)

    monkeypatch.setattr(tensorrt_engine, "write_file", noted)
    flat = model(helper.make_node("Flatten", ["x"], ["logits"], axis=1))
    order = ["free_bytes", "build_serialized_network", "write .timings", "write .engine", "deserialize_cuda_engine"]

    def seen() -> list[str]:
        found = [call for call in device.calls if call in order]
        device.calls.clear()
        return found

    with unbuilt(device, tmp_path, flat) as active:
        assert active.infer(np.ones((1, 3, 4, 4), np.uint8)).tolist() == [[48.0, -48.0]]
    assert seen() == order
    key = engine_key(device.module(), flat, FP16, ORIN)
    assert (load_timings(tmp_path, key), load_engine(tmp_path, key)) == (b"timings", b"engine")
    with unbuilt(device, tmp_path, flat):
        pass
    assert seen() == ["deserialize_cuda_engine"]
    with unbuilt(device, tmp_path, model(helper.make_node("Flatten", ["x"], ["logits"], axis=1), batch=1)):
        pass
    assert seen() == order
    assert device.timed == [b"", b"timings"]  # another model's build starts from what the first one timed


@pytest.mark.parametrize(
    ("integrated", "free", "available", "builds"),
    [
        (True, 0, 2**40, True),  # all the rest is page cache, which gives way
        (True, 2**40, 2**20, False),
        (True, 2**40, None, True),
        (False, 2**40, 0, True),
        (False, 0, 2**40, False),
    ],
)
def test_where_the_cpu_shares_its_memory_the_build_has_what_programs_can_get(
    tmp_path: Path, integrated: bool, free: int, available: int | None, builds: bool
) -> None:
    device = Recorder()
    device.free = free
    flat = model(helper.make_node("Flatten", ["x"], ["logits"], axis=1))
    active = unbuilt(device, tmp_path, flat, replace(ORIN, integrated=integrated), available)
    with nullcontext() if builds else pytest.raises(RuntimeUnavailableError, match="MiB are free"), active:
        pass
    assert ("build_serialized_network" in device.calls) is builds


def test_an_inference_copies_in_executes_copies_out_and_waits_on_one_stream(tmp_path: Path) -> None:
    device, images = Recorder(), np.random.default_rng(0).integers(0, 256, (1, 3, 4, 4), dtype=np.uint8)
    with runner(device, tmp_path) as active:
        device.calls.clear()
        logits = active.infer(images)
        assert device.calls == [
            "record", "to_device", "record", "execute on 7", "record", "to_host", "record", "synchronise"
        ]  # fmt: skip
        assert logits.tolist() == [[float(images.sum()), -float(images.sum())]]
        assert active.times().compute_ms == 0.5
        assert active.layer_types() == {"fp16": 1}
    assert device.calls[-1] == "close"


def test_the_shape_is_set_when_the_batch_changes_and_results_are_copies(tmp_path: Path) -> None:
    device, images = Recorder(), np.random.default_rng(1).integers(0, 256, (5, 3, 4, 4), dtype=np.uint8)
    with runner(device, tmp_path) as active:
        first = active.infer(images[:1])
        kept = first.copy()
        device.calls.clear()
        for part in (images, images, images[:2]):
            assert active.infer(part)[:, 0].tolist() == part.reshape(len(part), -1).sum(axis=1).tolist()
        assert [call for call in device.calls if call.startswith("shape")] == ["shape 5", "shape 2"]
        assert np.array_equal(first, kept)
        with pytest.raises(BundleError, match="batch of 17; its profile goes from 1 to 16"):
            active.infer(np.zeros((17, 3, 4, 4), np.uint8))


def test_a_silent_fp32_engine_is_refused_and_everything_is_released(tmp_path: Path) -> None:
    device = Recorder(inspector="Float")
    with pytest.raises(RuntimeUnavailableError, match="does not compute in fp16"), runner(device, tmp_path):
        pass
    assert device.calls[-1] == "close"


def test_an_execution_that_fails_is_one_line(tmp_path: Path) -> None:
    with (
        runner(Recorder(runs=False), tmp_path) as active,
        pytest.raises(BundleError, match="does not run a batch of 1"),
    ):
        active.infer(np.zeros((1, 3, 4, 4), np.uint8))


def test_another_gpu_than_the_targets_is_refused_with_what_to_write(tmp_path: Path) -> None:
    machine = Machine(probe=lambda: Gpu("RTX 4090", "8.9", 12060, 2**34, integrated=False), cache=lambda: tmp_path)
    with (
        pytest.raises(RuntimeUnavailableError, match=r'RTX 4090 has compute capability 8\.9.*compute = \["8\.9"\]'),
        TensorRtRunner(b"model", FP16, "x.rkd", machine=machine),
    ):
        pass


@pytest.mark.gpu
def test_a_board_builds_keeps_and_runs_a_bundle_as_its_ledger_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a board with TensorRT: RKD_GPU_BUNDLE names a bundle for it."""
    from rkd.bench.runner import choose_runner
    from rkd.bundle import read_bundle

    place = os.environ.get("RKD_GPU_BUNDLE", "")
    if not place:
        pytest.skip("needs a bundle for this board: set RKD_GPU_BUNDLE to the .rkd")
    monkeypatch.setenv("RKD_CACHE", str(tmp_path))
    bundle = read_bundle(Path(place))
    options = BuildOptions.of(bundle.target)
    assert choose_runner(bundle.target).instead == ""
    images, _ = bundle.evaluation()
    shown = {"clean": images, **{f"trigger {t.name}": t.apply(images) for t in bundle.triggers()}}
    found = {}
    for batch in dict.fromkeys((1, options.max_batch)):  # the second time from the cache
        with TensorRtRunner(bundle.model, options, place) as active:
            for key, pixels in shown.items():
                parts = [np.ascontiguousarray(pixels[i : i + batch]) for i in range(0, len(pixels), batch)]
                found[batch, key] = np.concatenate([active.infer(part) for part in parts]).argmax(axis=1)
            times = active.times()
            assert min(times.to_device_ms, times.compute_ms, times.to_host_ms) > 0
            assert active.layers
    ledger = bundle.ledger()
    assert ledger is not None
    wanted = ledger.steps[-1].labels
    differ = {where: int((labels != wanted[where[1]]).sum()) for where, labels in found.items()}
    most = 0.002 if options.precision == "fp32" else 0.02  # of the images: near-ties fall either way
    assert all(count <= max(1, most * len(images)) for count in differ.values()), differ
