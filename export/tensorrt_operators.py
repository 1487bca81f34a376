"""Which ONNX operators TensorRT's parser takes, so that the export says what a board would say much later."""

from __future__ import annotations

import onnx

from rkd.errors import ExportError
from rkd.target import Runtime

PARSED = frozenset({
    "Abs", "Acos", "Acosh", "Add", "And", "ArgMax", "ArgMin", "Asin", "Asinh", "Atan", "Atanh", "Attention",
    "AveragePool", "BatchNormalization", "Cast", "CastLike", "Ceil", "Celu", "Clip", "Concat", "Constant",
    "ConstantOfShape", "Conv", "ConvTranspose", "Cos", "Cosh", "CumSum", "DepthToSpace", "DequantizeLinear", "Div",
    "Dropout", "Einsum", "Elu", "Equal", "Erf", "Exp", "Expand", "EyeLike", "Flatten", "Floor", "GRU", "Gather",
    "GatherElements", "GatherND", "Gelu", "Gemm", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "Greater",
    "GreaterOrEqual", "GridSample", "GroupNormalization", "HardSigmoid", "HardSwish", "Hardmax", "Identity", "If",
    "InstanceNormalization", "IsInf", "IsNaN", "LRN", "LSTM", "LayerNormalization", "LeakyRelu", "Less",
    "LessOrEqual", "Log", "LogSoftmax", "Loop", "LpNormalization", "LpPool", "MatMul", "Max", "MaxPool", "Mean",
    "MeanVarianceNormalization", "Min", "Mish", "Mod", "Mul", "Neg", "NonMaxSuppression", "NonZero", "Not",
    "OneHot", "Or", "PRelu", "Pad", "Pow", "QuantizeLinear", "RMSNormalization", "RNN", "RandomNormal",
    "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Range", "Reciprocal", "ReduceL1", "ReduceL2",
    "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum",
    "ReduceSumSquare", "Relu", "Reshape", "Resize", "ReverseSequence", "RoiAlign", "RotaryEmbedding", "Round",
    "Scan", "ScatterElements", "ScatterND", "Selu", "Shape", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh", "Size",
    "Slice", "Softmax", "Softplus", "Softsign", "SpaceToDepth", "Split", "Sqrt", "Squeeze", "Sub", "Sum", "Swish",
    "Tan", "Tanh", "TensorScatter", "ThresholdedRelu", "Tile", "TopK", "Transpose", "Trilu", "Unsqueeze", "Where",
    "Xor",
})  # fmt: skip
"""Of opset 18 to 24, in onnx-tensorrt's docs/operators.md for TensorRT 10.15, which NVIDIA keeps. Left out are STFT and the
windows (BlackmanWindow, HammingWindow, HannWindow), which 10.3 did not take yet. An operator of a newer opset than a release
reads cannot be in its files (`rkd.target.OPSETS`)."""
_NOT_FOR_RTX = frozenset({"DeformConv"})  # TensorRT takes it since 10.1, TensorRT for RTX does not


def check_operators(model: bytes, runtime: Runtime, arch: str) -> None:
    """Refuse a file that the parser of a target's TensorRT refuses, whatever its shapes and types; others pass.

    Args:
        model: what `to_onnx` returned.
        runtime: the target's.
        arch: names the network in errors.

    Raises:
        ExportError: an operator is not one that the parser takes.
    """
    if runtime == "onnxruntime":
        return
    taken = PARSED | _NOT_FOR_RTX if runtime == "tensorrt" else PARSED
    for node in onnx.load_model_from_string(model).graph.node:
        if node.op_type not in taken:
            raise ExportError(
                f"{arch}: node {node.name} ({node.op_type}) is no operator that {runtime}'s ONNX parser takes; replace the "
                "layer that makes it, or export for a target of ONNX Runtime, such as ort-cpu"
            )
