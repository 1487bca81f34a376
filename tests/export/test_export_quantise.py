"""INT8: the two forms, the images that calibrate, and what is chosen by measurement."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from rkd.data import ArraySource
from rkd.errors import DataError, ExportError
from rkd.export.calibration import Calibration, Observed, choose_calibration, observe, ranges_of
from rkd.export.mixed import Trial, _counts, best_trial, choose
from rkd.export.parity import predictor_of
from rkd.export.precision import to_fp16
from rkd.export.quantise import Graph, activation_scale
from rkd.target import Quantisation, load_target

SIDE, CLASSES = 8, 4


def recipe(target: str) -> Quantisation:
    found = load_target(target).quantisation
    assert found is not None
    return found


BOARD, CPU = recipe("jetson-int8"), recipe("ort-cpu-int8")


def small(scale: NDArray[np.float32] | None = None) -> bytes:
    """Preprocessing, Conv, Relu, Conv, Add with the first Relu, Relu, mean, Gemm; `scale` the first Conv's channels."""
    rng = np.random.default_rng(0)
    weight = rng.normal(0, 0.3, (6, 3, 3, 3)).astype(np.float32)
    if scale is not None:
        weight *= scale[:, None, None, None]
    arrays = {
        "k": np.full((1, 3, 1, 1), 1 / 64, np.float32), "b": np.full((1, 3, 1, 1), -2, np.float32),
        "network.a.weight": weight, "network.a.bias": rng.normal(0, 0.2, 6).astype(np.float32),
        "network.c.weight": rng.normal(0, 0.2, (6, 6, 3, 3)).astype(np.float32),
        "network.fc.weight": rng.normal(0, 1, (CLASSES, 6)).astype(np.float32),
        "network.fc.bias": rng.normal(0, 1, CLASSES).astype(np.float32), "axes": np.array([2, 3]),
    }  # fmt: skip
    nodes = [
        helper.make_node("Cast", ["images"], ["x0"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", ["x0", "k"], ["x1"], "mul"),
        helper.make_node("Add", ["x1", "b"], ["x"], "shift"),
        helper.make_node("Conv", ["x", "network.a.weight", "network.a.bias"], ["a"], "conv_a", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["ra"], "relu_a"),
        helper.make_node("Conv", ["ra", "network.c.weight"], ["c"], "conv_c", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["c", "ra"], ["s"], "join"),
        helper.make_node("Relu", ["s"], ["rs"], "relu_s"),
        helper.make_node("ReduceMean", ["rs", "axes"], ["m"], "mean", keepdims=0),
        helper.make_node("Gemm", ["m", "network.fc.weight", "network.fc.bias"], ["logits"], "gemm", transB=1),
    ]
    graph = helper.make_graph(
        nodes, "small",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", CLASSES])],
        [numpy_helper.from_array(values, name) for name, values in arrays.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9).SerializeToString()


def images(count: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, 3, SIDE, SIDE), dtype=np.uint8)


def quantised(form: Quantisation, keep: tuple[str, ...] = (), model: bytes | None = None) -> onnx.ModelProto:
    data = small() if model is None else model
    graph = Graph(data, form)
    spans = ranges_of(observe(data, graph.tensors(), images(64)), "minmax", form)
    return onnx.load_model_from_string(graph.quantised(spans, keep))


def node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(found for found in model.graph.node if found.name == name)


def constant(model: onnx.ModelProto, name: str) -> NDArray[np.generic]:
    return numpy_helper.to_array(next(tensor for tensor in model.graph.initializer if tensor.name == name))


def test_tensorrt_form_is_symmetric_per_channel_and_leaves_the_bias_float() -> None:
    model = quantised(BOARD)
    pairs = [found for found in model.graph.node if found.op_type == "QuantizeLinear"]
    assert {found.input[0] for found in pairs} == {"x", "ra", "m"}  # inputs of Conv and Gemm
    for found in pairs:
        assert constant(model, found.input[2]).dtype == np.int8
        assert constant(model, found.input[2]) == 0
    assert list(node(model, "conv_a").input) == ["x.dq", "conv_a.weight.dq", "network.a.bias"]
    weights, scale = constant(model, "conv_a.weight.q"), constant(model, "conv_a.weight.scale")
    assert weights.dtype == np.int8
    assert scale.shape == (6,)
    assert np.abs(weights.astype(int)).reshape(6, -1).max(axis=1).tolist() == [127] * 6
    assert list(node(model, "join").input) == ["c", "ra"]  # the shortcut stays in the higher precision


def test_cpu_form_quantises_outputs_and_bias_with_seven_bit_weights() -> None:
    model = quantised(CPU)
    pairs = {found.input[0] for found in model.graph.node if found.op_type == "QuantizeLinear"}
    assert pairs == {"x", "ra", "c", "rs", "m"}
    assert constant(model, "x.zero").dtype == np.uint8
    assert np.abs(constant(model, "conv_a.weight.q").astype(int)).max() == 63
    bias = constant(model, "conv_a.bias.q")
    assert bias.dtype == np.int32
    product = constant(model, "x.scale") * constant(model, "conv_a.weight.scale")
    np.testing.assert_allclose(
        bias * product, constant(onnx.load_model_from_string(small()), "network.a.bias"), atol=1e-4
    )
    assert list(node(model, "join").input) == ["c.dq", "ra.dq"]
    assert node(model, "gemm").output[0] == "logits"  # not rounded


@pytest.mark.parametrize("form", [BOARD, CPU], ids=["board", "cpu"])
def test_logits_are_near_and_the_preprocessing_is_untouched(form: Quantisation) -> None:
    model = quantised(form)
    assert list(node(model, "mul").input) == ["x0", "k"]
    wanted = predictor_of(small())(images(64, 1))
    got = predictor_of(model.SerializeToString(), integer=form is CPU)(images(64, 1))
    assert 0 < np.abs(got - wanted).max() < 0.1 * np.abs(wanted).max()


def test_seven_bit_weights_give_the_same_labels_with_and_without_integer_kernels() -> None:
    data = quantised(CPU).SerializeToString()
    one, other = (predictor_of(data, integer=integer)(images(128, 2)) for integer in (True, False))
    assert np.abs(one - other).max() < 0.05 * np.abs(other).max()


def test_fp16_takes_over_every_scale_as_it_is() -> None:
    model = quantised(BOARD, model=small(np.array([1e-5, 1, 1, 1e-3, 1, 50], np.float32)))
    typed = onnx.load_model_from_string(to_fp16(model.SerializeToString()))
    scales = [tensor.name for tensor in model.graph.initializer if tensor.name.endswith(".scale")]
    assert len(scales) == 6
    for name in scales:
        assert constant(typed, name).dtype == np.float16
        np.testing.assert_array_equal(constant(typed, name).astype(np.float32), constant(model, name))


def test_a_layer_that_is_kept_is_not_touched() -> None:
    model = quantised(BOARD, keep=("conv_c",))
    assert list(node(model, "conv_c").input) == ["ra", "network.c.weight"]
    assert node(model, "conv_a").input[0] == "x.dq"
    cpu = quantised(CPU, keep=("conv_c",))
    assert list(node(cpu, "join").input) == ["c", "ra.dq"]  # no integer addition of a float


def test_all_zero_weights_and_activations_have_a_scale() -> None:
    model = quantised(BOARD, model=small(np.array([0, 1, 1, 1, 1, 1], np.float32)))
    assert not constant(model, "conv_a.weight.q")[0].any()
    assert constant(model, "conv_a.weight.scale")[0] == 1
    scale, zero = activation_scale((0.0, 0.0), CPU)
    assert (float(scale), zero) == (1.0, 0)


def test_layers_go_by_their_names_in_the_student() -> None:
    assert [layer.label for layer in Graph(small(), BOARD).layers] == ["a", "c", "fc"]


def test_a_model_with_nothing_to_quantise_is_refused() -> None:
    model = onnx.load_model_from_string(small())
    del model.graph.node[3:]
    model.graph.output[0].name = "x"
    with pytest.raises(ExportError, match="nothing can be INT8"):
        Graph(model.SerializeToString(), BOARD)


# --------------------------------------------------------------------------------------------------------- calibration


def source(pixels: NDArray[np.uint8]) -> ArraySource:
    return ArraySource(pixels, np.arange(len(pixels)) % CLASSES)


def test_no_calibration_image_is_an_evaluation_image() -> None:
    pixels = images(300)
    found = choose_calibration(source(pixels), pixels[::3], 80, seed=1)
    assert (len(found.ranges), len(found.deciding), len(found.labels)) == (80, 80, 80)
    forbidden = {image.tobytes() for image in pixels[::3]}
    used = [image.tobytes() for image in (*found.ranges, *found.deciding)]
    assert not forbidden & set(used)
    assert len(set(used)) == 160


def test_the_seed_decides_which_images() -> None:
    pixels = images(300)
    one, same, other = (choose_calibration(source(pixels), pixels[:1], 50, seed).ranges for seed in (0, 0, 1))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_too_few_calibration_images_are_told_with_their_number() -> None:
    pixels = images(60)
    assert len(choose_calibration(source(pixels), pixels[:28], 256, 0).ranges) == 16
    with pytest.raises(DataError, match=r"31 of 60 are left, at least 32 are needed; distil with more, or take"):
        choose_calibration(source(pixels), pixels[:29], 256, 0, "distil with more")


def test_ranges_are_what_was_seen() -> None:
    pixels = images(40)
    seen = observe(small(), ["x", "ra"], pixels)
    shifted = pixels.astype(np.float32) / 64 - 2
    assert (seen["x"].low, seen["x"].high) == (float(shifted.min()), float(shifted.max()))
    assert seen["ra"].low == 0.0
    assert np.sort(seen["x"].sample).tolist() == np.sort(shifted.ravel()).tolist()  # 192 values an image: all are kept


def test_calibrators_leave_out_what_they_say() -> None:
    values = np.arange(-1000, 9001, dtype=np.float32)
    seen = {"t": Observed(-1000.0, 9000.0, values)}
    assert ranges_of(seen, "minmax", CPU)["t"] == (-1000.0, 9000.0)
    assert ranges_of(seen, "percentile-99.0", CPU)["t"] == pytest.approx((-950.0, 8950.0))
    assert ranges_of(seen, "percentile-99.0", BOARD)["t"] == pytest.approx((-8900.0, 8900.0), rel=1e-3)


def test_mse_cuts_heavy_tails_and_no_even_range() -> None:
    even = np.linspace(0, 1, 20_001).astype(np.float32)
    assert ranges_of({"t": Observed(0.0, 1.0, even)}, "mse", CPU)["t"][1] > 0.95
    tails = np.random.default_rng(0).standard_t(2, 30_000).astype(np.float32)
    whole = (float(tails.min()), float(tails.max()))
    cut = ranges_of({"t": Observed(*whole, tails)}, "mse", BOARD)["t"]

    def error(span: tuple[float, float]) -> float:
        scale = max(-span[0], span[1]) / 127
        return float(((np.clip(np.rint(tails / scale), -128, 127) * scale - tails) ** 2).mean())

    assert cut[1] < 0.9 * whole[1]
    assert error(cut) < error(whole)


def test_activations_that_are_not_finite_are_refused() -> None:
    model = onnx.load_model_from_string(small())
    broken = next(tensor for tensor in model.graph.initializer if tensor.name == "b")
    broken.CopyFrom(numpy_helper.from_array(np.full((1, 3, 1, 1), np.inf, np.float32), "b"))
    with pytest.raises(ExportError, match="activation x is NaN or infinite"):
        observe(model.SerializeToString(), ["x"], images(4))


# ------------------------------------------------------------------------------------------------------------- choice


def test_the_more_accurate_calibrator_wins_where_the_images_can_tell() -> None:
    trials = {"a": Trial(80.0, 99.0, 0.01), "b": Trial(90.0, 95.0, 0.02)}
    assert best_trial(trials, 1000) == "b"  # a standard error is 0.9 points
    assert best_trial({**trials, "a": Trial(89.5, 99.0, 0.01)}, 1000) == "a"
    assert best_trial({"a": Trial(90.0, 95.0, 0.02), "b": Trial(90.0, 95.0, 0.01)}, 1000) == "b"


def calibration(model: bytes) -> Calibration:
    pixels = images(64, 3)
    return Calibration(images(64, 4), pixels, predictor_of(model)(pixels).argmax(axis=1))


def harmful(*, shortcut: bool) -> bytes:
    """INT8 loses what matters: one channel is a thousand times the others, and nothing depends on it.

    It enters `conv_c`, and with the shortcut the last layer too.
    """
    scale = np.ones(6, np.float32)
    scale[0] = 3000.0
    model = onnx.load_model_from_string(small(scale))
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    changed = numpy_helper.to_array(weights["network.c.weight"]).copy()
    changed[:, 0] = 0
    weights["network.c.weight"].CopyFrom(numpy_helper.from_array(changed, "network.c.weight"))
    last = numpy_helper.to_array(weights["network.fc.weight"]).copy()
    last[:, 0] = 0
    weights["network.fc.weight"].CopyFrom(numpy_helper.from_array(last, "network.fc.weight"))
    if not shortcut:
        node(model, "join").input[1] = "c"
    return model.SerializeToString()


def test_layers_that_cost_accuracy_are_found_and_kept() -> None:
    model = harmful(shortcut=False)
    form = dataclasses.replace(BOARD, calibrators=("minmax",))
    found = choose(model, form, calibration(model), acc_budget=1.0, integer=False)
    assert found.trials["minmax"].agreement < BOARD.min_agreement
    assert found.kept == ("c",)
    assert found.chosen.agreement >= BOARD.min_agreement
    assert found.to_json()["kept"] == ["c"]


def test_a_student_that_int8_serves_keeps_nothing() -> None:
    model = small()
    relaxed = dataclasses.replace(CPU, min_agreement=80.0)
    found = choose(model, relaxed, calibration(model), acc_budget=20.0, integer=True)
    assert found.kept == ()
    assert set(found.trials) == set(CPU.calibrators)
    assert found.calibrator == best_trial(found.trials, 64)


def test_a_student_that_int8_ruins_comes_with_its_problems_in_figures() -> None:
    model = harmful(shortcut=True)
    form = dataclasses.replace(BOARD, calibrators=("minmax",))
    found = choose(model, form, calibration(model), acc_budget=1.0, integer=False)
    assert found.chosen.accuracy < found.reference - 1
    costs, agrees = found.problems
    assert re.match(r"INT8 costs \d+\.\d points .* even with [01] of 3 layers in fp16, at most 1 are allowed", costs)
    assert re.match(r"INT8 agrees .* on \d+\.\d\d % of .*, at least 98 % are required", agrees)


def test_an_agreement_below_the_recipes_is_a_problem_though_the_accuracy_holds() -> None:
    model = harmful(shortcut=True)
    form = dataclasses.replace(BOARD, calibrators=("minmax",))
    (line,) = choose(model, form, calibration(model), acc_budget=100.0, integer=False).problems
    assert "at least 98 % are required" in line
    assert choose(small(), form, calibration(small()), acc_budget=100.0, integer=False).problems == ()


def test_the_only_layer_is_never_kept_and_the_file_comes_with_its_problems() -> None:
    model = harmful(shortcut=True)
    form = dataclasses.replace(BOARD, calibrators=("minmax",), operators=("Gemm",))
    found = choose(model, form, calibration(model), acc_budget=1.0, integer=False)
    assert (found.kept, found.layers) == ((), 1)
    assert node(onnx.load_model_from_string(found.model), "gemm").input[0] == "m.dq"
    assert all("even with 0 of 1 layers in fp16" in line for line in found.problems)
    assert found.problems


@pytest.mark.parametrize(("layers", "most"), [(1, 0), (2, 1), (3, 1), (4, 2), (22, 11), (53, 26)])
def test_at_most_half_of_the_layers_are_kept(layers: int, most: int) -> None:
    counts = _counts(layers)
    assert max(counts, default=0) == most
    assert counts == sorted(set(counts))


def test_the_same_inputs_give_the_same_file() -> None:
    model = small()
    files = {choose(model, CPU, calibration(model), acc_budget=1.0, integer=True).model for _ in range(2)}
    assert len(files) == 1
