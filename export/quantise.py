"""FP32 ONNX to INT8, as Q/DQ pairs around the layers that are quantised.

Two forms, chosen by the target's recipe:

    TensorRT   x -> Q -> DQ -> Conv(weights: int8 -> DQ, bias float) -> ...       symmetric, the rest may become FP16
    CPU        x -> Q -> DQ -> Conv(weights: int8 -> DQ, bias: int32 -> DQ) -> Relu -> Q -> DQ -> ...

The second one quantises a layer's output too: ONNX Runtime replaces the whole pattern by one integer kernel. Weights are
quantised channel by channel. Scales are rounded to what FP16 can hold first, and values are quantised with the rounded
scale, so that typing the rest in FP16 changes none of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from rkd.errors import ExportError
from rkd.export.onnx_model import check_valid, serialise
from rkd.target import Quantisation

Range = tuple[float, float]
_WEIGHTED = ("Conv", "Gemm")
_FUSED = ("Relu", "Clip")  # what the kernels of the CPU form compute on the way out
_INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class Layer:
    """A convolution or matrix product that can be quantised.

    Attributes:
        node: its name in the graph.
        label: the parameter's name in the student, e.g. `layer1.0.conv1`; the node's where several share the parameter.
    """

    node: str
    label: str


class Graph:
    """An FP32 model as quantisation sees it.

    Args:
        model: what `to_onnx` returned.
        recipe: the target's.

    Raises:
        ExportError: nothing in it can be quantised.
    """

    def __init__(self, model: bytes, recipe: Quantisation) -> None:
        self._model = onnx.load_model_from_string(model)
        self._recipe = recipe
        graph = self._model.graph
        self._weights = {tensor.name: tensor for tensor in graph.initializer}
        self._outputs = {value.name for value in graph.output}
        self._users: dict[str, list[onnx.NodeProto]] = {}
        self._producer: dict[str, onnx.NodeProto] = {}
        for node in graph.node:
            for name in node.input:
                self._users.setdefault(name, []).append(node)
            self._producer.update(dict.fromkeys(node.output, node))
        self.layers = self._layers()
        if not self.layers:
            raise ExportError(
                f"the student has no {' or '.join(recipe.operators)} with constant weights: nothing can be INT8; "
                "take a target with precision fp16 or fp32"
            )

    def tensors(self) -> list[str]:
        """The activations whose ranges `quantised` needs, whatever is kept."""
        return list(self._plan(frozenset()).tensors)

    def quantised(self, ranges: Mapping[str, Range], keep: Collection[str] = ()) -> bytes:
        """The model with Q/DQ pairs.

        Args:
            ranges: lowest and highest value of each of `tensors()`.
            keep: nodes that stay as they are.

        Raises:
            ExportError: the result is not valid ONNX.
        """
        plan = self._plan(frozenset(keep))
        writer = _Writer(self._recipe, self._weights, {name: ranges[name] for name in plan.tensors})
        nodes: list[onnx.NodeProto] = []
        for source in self._model.graph.node:
            node = onnx.NodeProto()
            node.CopyFrom(source)
            if node.name in plan.nodes and node.op_type in _WEIGHTED:
                nodes += writer.weights(node)
            for i, name in enumerate(source.input):
                if name in plan.tensors and (node.name in plan.nodes or name in plan.inside):
                    node.input[i] = f"{name}.dq"
            nodes.append(node)
            for name in source.output:
                if name in plan.tensors:
                    nodes += writer.pair(name)
        result = onnx.ModelProto()
        result.CopyFrom(self._model)
        del result.graph.node[:]
        del result.graph.initializer[:]
        result.graph.node.extend(nodes)
        used = {name for node in nodes for name in node.input}
        result.graph.initializer.extend(tensor for name, tensor in self._weights.items() if name in used)
        result.graph.initializer.extend(writer.constants)
        check_valid(result, "the graph in INT8")
        return serialise(result)

    def _layers(self) -> tuple[Layer, ...]:
        nodes = [node for node in self._model.graph.node if self._weighted(node)]
        shared = [node.input[1] for node in nodes]
        return tuple(
            Layer(node.name, _label(node.input[1]) if shared.count(node.input[1]) == 1 else node.name) for node in nodes
        )

    def _weighted(self, node: onnx.NodeProto) -> bool:
        if node.op_type not in _WEIGHTED or node.op_type not in self._recipe.operators:
            return False
        if node.input[0] in self._weights or not set(node.input[1:]) - {""} <= set(self._weights):
            return False
        plain = {"alpha": 1.0, "beta": 1.0}
        odd = any(a.f != plain[a.name] for a in node.attribute if a.name in plain)
        return not odd and not any(a.i for a in node.attribute if a.name == "transA")

    def _plan(self, keep: frozenset[str]) -> _Plan:
        """Which nodes are quantised, and which tensors get a pair."""
        weighted = {layer.node for layer in self.layers} - keep
        whole = self._recipe.bias == "int32"  # integer kernels from input to output
        nodes: set[str] = set()
        tensors: dict[str, None] = {}  # in the graph's order
        inside: set[str] = set()  # computed by a quantised node: whoever reads them reads 8 bits
        for node in self._model.graph.node:
            joins = whole and node.op_type in self._recipe.operators and node.op_type not in _WEIGHTED
            if node.name in weighted:
                tensors.setdefault(node.input[0])
            elif not (joins and set(node.input) <= inside):
                continue
            nodes.add(node.name)
            if whole and (out := self._rounded_output(node)):
                tensors.setdefault(out)
                inside.add(out)
        return _Plan(frozenset(nodes), tuple(tensors), frozenset(inside))

    def _rounded_output(self, node: onnx.NodeProto) -> str | None:
        """Where a quantised node's result is rounded to 8 bits; None for the logits, which stay float."""
        name = node.output[0]
        users = self._users.get(name, [])
        if len(users) == 1 and users[0].op_type in _FUSED and name not in self._outputs:
            name = users[0].output[0]
        return None if name in self._outputs else name


@dataclass(frozen=True)
class _Plan:
    nodes: frozenset[str]
    tensors: tuple[str, ...]
    inside: frozenset[str]


class _Writer:
    """Makes the nodes and constants of one quantised graph."""

    def __init__(
        self, recipe: Quantisation, weights: Mapping[str, onnx.TensorProto], ranges: Mapping[str, Range]
    ) -> None:
        self._recipe, self._weights = recipe, weights
        self.constants: list[onnx.TensorProto] = []
        self._scales = {name: activation_scale(span, recipe) for name, span in ranges.items()}

    def pair(self, name: str) -> list[onnx.NodeProto]:
        """Q and DQ behind an activation."""
        scale, zero = self._scales[name]
        kind = np.int8 if self._recipe.activations == "int8" else np.uint8
        constants = [self._add(f"{name}.scale", scale), self._add(f"{name}.zero", np.asarray(zero, kind))]
        return [
            helper.make_node("QuantizeLinear", [name, *constants], [f"{name}.q"], name=f"{name}.quantise"),
            helper.make_node("DequantizeLinear", [f"{name}.q", *constants], [f"{name}.dq"], name=f"{name}.dequantise"),
        ]

    def weights(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """The DQ of a layer's weights and, in the CPU form, of its bias; `node` is changed to read them."""
        values = numpy_helper.to_array(self._weights[node.input[1]]).astype(np.float64)
        axis = 0 if node.op_type == "Conv" or any(a.name == "transB" and a.i for a in node.attribute) else 1
        rows = np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)  # (channels, weights of each)
        limit = 2 ** (self._recipe.weight_bits - 1) - 1
        scale = _holdable(np.abs(rows).max(axis=1) / limit)
        x_scale = float(self._scales[node.input[0]][0])
        bias = numpy_helper.to_array(self._weights[node.input[2]]) if len(node.input) > 2 and node.input[2] else None
        if bias is not None and self._recipe.bias == "int32":
            scale = np.maximum(scale, _holdable(np.abs(bias) / (x_scale * _INT32_MAX)))
        shape = [-1 if i == axis else 1 for i in range(values.ndim)]
        rounded = np.clip(np.rint(values / scale.reshape(shape)), -limit, limit).astype(np.int8)
        nodes = [self._dequantise(f"{node.name}.weight", rounded, scale, axis)]
        node.input[1] = nodes[0].output[0]
        if bias is not None and self._recipe.bias == "int32":
            product = (np.float32(x_scale) * scale.astype(np.float32)).astype(np.float32)
            whole = np.clip(np.rint(bias / product.astype(np.float64)), -_INT32_MAX, _INT32_MAX).astype(np.int32)
            nodes.append(self._dequantise(f"{node.name}.bias", whole, product, 0))
            node.input[2] = nodes[-1].output[0]
        return nodes

    def _dequantise(
        self, name: str, values: NDArray[np.int8] | NDArray[np.int32], scale: NDArray[np.floating], axis: int
    ) -> onnx.NodeProto:
        inputs = [
            self._add(f"{name}.q", values),
            self._add(f"{name}.scale", scale.astype(np.float32)),
            self._add(f"{name}.zero", np.zeros(scale.shape, values.dtype)),
        ]
        return helper.make_node("DequantizeLinear", inputs, [f"{name}.dq"], name=f"{name}.dequantise", axis=axis)

    def _add(self, name: str, values: NDArray[np.generic]) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(values), name))
        return name


def activation_scale(span: Range, recipe: Quantisation) -> tuple[NDArray[np.float32], int]:
    """Scale and zero point of an activation whose values lie within `span`; zero is always exact."""
    low, high = min(span[0], 0.0), max(span[1], 0.0)
    if recipe.activations == "int8":
        scale = _holdable(np.asarray(max(-low, high) / 127))
        return scale.astype(np.float32), 0
    scale = _holdable(np.asarray((high - low) / 255))
    return scale.astype(np.float32), int(np.clip(np.rint(-low / float(scale)), 0, 255))


def _holdable(scale: NDArray[np.float64]) -> NDArray[np.float64]:
    """The next FP16 number that is not smaller; 1 for what is nothing but zeros."""
    scale = np.where(scale > 0, scale, 1.0)
    down = np.minimum(scale, np.finfo(np.float16).max).astype(np.float16)
    up = np.where(down.astype(np.float64) < scale, np.nextafter(down, np.float16(np.inf)), down)
    held: NDArray[np.float64] = np.minimum(up.astype(np.float64), float(np.finfo(np.float16).max))
    return held


def _label(weight: str) -> str:
    return weight.removeprefix("network.").removesuffix(".weight")


def labels_of(layers: Iterable[Layer], nodes: Collection[str]) -> tuple[str, ...]:
    """The labels of some nodes, in the graph's order."""
    return tuple(layer.label for layer in layers if layer.node in nodes)
