"""FP32 ONNX to FP16-typed ONNX.

The types are written into the file, because TensorRT 11 knows strongly typed networks only, and because a precision
flag that a TensorRT version ignores gives an FP32 engine without a word.

    images uint8 -> preprocessing FP32 -> Cast -> everything else FP16 -> Cast -> logits float32

Where the converter keeps an operator in FP32 (its own block list: Resize, TopK, ...) it says so with casts.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from onnxconverter_common import float16

from rkd.errors import ExportError
from rkd.export.onnx_model import INPUT, check_valid, serialise, strip
from rkd.export.parity import session_of
from rkd.metrics import Images
from rkd.triggers import Trigger

_FP16_MAX = float(np.finfo(np.float16).max)  # 65504
_RANGE_IMAGES = 32  # images that the range of the activations is measured on
_RANGE_BATCH = 4  # at once: every activation of them is kept


def to_fp16(model: bytes) -> bytes:
    """Type a graph in FP16.

    Args:
        model: what `to_onnx` returned.

    Raises:
        ExportError: a weight is beyond the range of FP16, or the converted graph is not valid.
    """
    graph_model = onnx.load_model_from_string(model)
    graph = graph_model.graph
    preprocessing = _preprocessing(graph)
    _merge_statistics(graph)
    _check_weights(graph, preprocessing)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # the converter clips out-of-range values with a warning
            converted = float16.convert_float_to_float16(
                graph_model,
                min_positive_val=0.0,  # tiny weights round as IEEE says, instead of up
                max_finite_val=_FP16_MAX,
                keep_io_types=True,
                node_block_list=[node.name for node in preprocessing],
            )
    except Exception as error:
        raise ExportError(f"the graph cannot be typed in FP16 ({error}); take a target with precision fp32") from error
    strip(converted)
    check_valid(converted, "the graph in FP16")
    return serialise(converted)


def check_range(model: bytes, images: Images, triggers: Sequence[Trigger] = ()) -> tuple[str, float]:
    """Measure the largest activation, on a spread of the images, clean and triggered, and refuse what FP16 cannot hold.

    A CPU computes FP16 graphs in FP32 between the casts: parity on the host would not show an overflow on the board.

    Args:
        model: the FP32 file.
        images: uint8 (N, 3, H, W).
        triggers: under each of which the same images are tried.

    Returns:
        The tensor with the largest magnitude, and that magnitude.

    Raises:
        ExportError: it is beyond 65504.
    """
    inferred = onnx.shape_inference.infer_shapes(onnx.load_model_from_string(model))
    kept = [value for value in inferred.graph.value_info if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT]
    names = {name for node in inferred.graph.node for name in node.output}
    inferred.graph.output.extend(value for value in kept if value.name in names)
    session = session_of(serialise(inferred), optimise=False)
    floats = [output.name for output in session.get_outputs() if output.type == "tensor(float)"]
    fixed = session.get_inputs()[0].shape[0] == 1
    clean = images[np.unique(np.linspace(0, len(images) - 1, min(len(images), _RANGE_IMAGES)).astype(np.intp))]
    batch = 1 if fixed else _RANGE_BATCH
    peaks = dict.fromkeys(floats, 0.0)
    for shown in (clean, *(trigger.apply(clean) for trigger in triggers)):
        for i in range(0, len(shown), batch):
            for name, value in zip(floats, session.run(floats, {INPUT: shown[i : i + batch]}), strict=True):
                peaks[name] = max(peaks[name], float(np.abs(value).max(initial=0.0)))
    worst = max(peaks, key=lambda name: peaks[name])
    if not peaks[worst] <= _FP16_MAX:
        raise ExportError(
            f"activation {worst} reaches {peaks[worst]:,.0f}, FP16 holds at most {_FP16_MAX:,.0f}; "
            "take a target with precision fp32, or distil with weight decay or another student"
        )
    return worst, peaks[worst]


def _preprocessing(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes from the input up to the normalised image: Cast, Mul, Add."""
    constants = {tensor.name for tensor in graph.initializer}
    found: list[onnx.NodeProto] = []
    tensor = INPUT
    for wanted in ("Cast", "Mul", "Add"):
        users = [node for node in graph.node if tensor in node.input]
        if len(users) != 1 or users[0].op_type != wanted:
            break
        if not set(users[0].input) <= {tensor, *constants}:
            break
        found.append(users[0])
        tensor = users[0].output[0]
    if not found:
        raise ExportError(f"{INPUT!r} is not cast first: this graph was not exported by rkd; export the run again")
    return found


def _merge_statistics(graph: onnx.GraphProto) -> None:
    """Give BatchNormalization mean 0, variance 1 and epsilon 0, all else merged into scale and shift.

    A variance below 6e-8 or above 65504 would be lost in FP16, and epsilon with it; the merged values are harmless.
    """
    weights = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type != "BatchNormalization" or not set(node.input[1:]) <= set(weights):
            continue
        scale, shift, mean, variance = (
            numpy_helper.to_array(weights[name]).astype(np.float64) for name in node.input[1:]
        )
        epsilon = next((attribute for attribute in node.attribute if attribute.name == "epsilon"), None)
        factor = scale / np.sqrt(variance + (1e-5 if epsilon is None else epsilon.f))
        merged = [factor, shift - mean * factor, np.zeros_like(mean), np.ones_like(variance)]
        if epsilon is None:
            epsilon = node.attribute.add(name="epsilon", type=onnx.AttributeProto.FLOAT)
        epsilon.f = 0.0
        for i, values in enumerate(merged, start=1):
            node.input[i] = f"{node.input[i]}.{node.name}"
            graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), node.input[i]))
    used = {name for node in graph.node for name in node.input}
    unused = [tensor for tensor in graph.initializer if tensor.name not in used]
    for tensor in unused:
        graph.initializer.remove(tensor)


def _check_weights(graph: onnx.GraphProto, preprocessing: list[onnx.NodeProto]) -> None:
    exempt = {name for node in preprocessing for name in node.input}
    for tensor in graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT or tensor.name in exempt:
            continue
        values: NDArray[np.float32] = numpy_helper.to_array(tensor)
        peak = float(np.abs(values).max(initial=0.0))
        if not peak <= _FP16_MAX:
            raise ExportError(
                f"{tensor.name} reaches {peak:,.0f}, FP16 holds at most {_FP16_MAX:,.0f}; "
                "take a target with precision fp32, or distil with weight decay"
            )
