"""In which type does each layer of an engine compute?

Read from TensorRT's inspector, because a setting that a release ignores gives an FP32 engine without a word.
The inspector's JSON has one object a layer. TensorRT 10 names a tensor's type within `Format/Datatype`, TensorRT 11 as
`DataType` beside `Format`; layers that only move data say nothing about precision.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rkd.errors import RuntimeUnavailableError, shortened
from rkd.target import Precision

UNKNOWN = "unknown"
MOST_LAYERS, MOST_NAME = 1000, 200  # of them in a result, and characters of a name
_BYTES = re.compile(r"uint8|\bu8\b", re.IGNORECASE)  # a camera's image, which no layer computes in
_TYPES = (
    ("int8", re.compile(r"(?<!u)int8|\bi8\b", re.IGNORECASE)),
    ("bf16", re.compile(r"bf16|bfloat16", re.IGNORECASE)),  # before fp16, whose names end in the same
    ("fp16", re.compile(r"half|fp16|float16", re.IGNORECASE)),
    ("fp8", re.compile(r"fp8|float8", re.IGNORECASE)),
    ("fp32", re.compile(r"float|fp32", re.IGNORECASE)),
)
_WEIGHTED = re.compile(r"conv|gemm|matmul|matrix.?multiply|fully.?connected", re.IGNORECASE)
_MOVES = re.compile(r"reformat|shuffle|constant|noop|copy|cast|quantize|signal|wait", re.IGNORECASE)


@dataclass(frozen=True)
class LayerType:
    """One layer of an engine.

    Attributes:
        name: as the inspector gives it.
        kind: its `LayerType`.
        precision: `int8`, `fp16`, `fp32`, ... of its input (of its output where that is the camera's bytes), or `unknown`.
        weighted: whether it is a convolution or matrix product.
    """

    name: str
    kind: str
    precision: str
    weighted: bool


def read_layers(information: str) -> tuple[LayerType, ...]:
    """The layers in an inspector's JSON; without detail, their types are `unknown`.

    Raises:
        RuntimeUnavailableError: it is not the inspector's JSON.
    """
    try:
        layers = json.loads(information)["Layers"]
        return tuple(_layer(layer) for layer in layers)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RuntimeUnavailableError(
            f"TensorRT's inspector gives no list of layers ({type(error).__name__}): the engine's precision cannot be "
            "verified"
        ) from error


def _layer(layer: Any) -> LayerType:
    if isinstance(layer, str):
        return LayerType(layer, "", UNKNOWN, bool(_WEIGHTED.search(layer)))
    kind = str(layer.get("LayerType", ""))
    about = f"{kind} {layer.get('ParameterType', '')} {layer.get('TacticName', '')}"
    moves = bool(_MOVES.search(kind))
    said = [_said(tensor) for tensors in ("Inputs", "Outputs") for tensor in (layer.get(tensors) or [])[:1]]
    if len(said) > 1 and _BYTES.search(said[0]):
        del said[0]
    found = _type(said[0]) if said else UNKNOWN
    return LayerType(str(layer.get("Name", "")), kind, found, bool(_WEIGHTED.search(about)) and not moves)


def _said(tensor: Mapping[str, Any]) -> str:
    """What the inspector says of a tensor's type."""
    text = " ".join(str(tensor.get(key, "")) for key in ("DataType", "Datatype", "Format/Datatype"))
    return text if text.strip() else str(tensor.get("Format", ""))


def _type(text: str) -> str:
    return next((name for name, pattern in _TYPES if pattern.search(text)), UNKNOWN)


def count_types(layers: tuple[LayerType, ...]) -> dict[str, int]:
    """How many convolutions and matrix products compute in which type; of all layers where none is told apart."""
    weighted = [layer for layer in layers if layer.weighted] or list(layers)
    return dict(sorted(Counter(layer.precision for layer in weighted).items()))


def layers_to_json(layers: tuple[LayerType, ...]) -> list[dict[str, str]]:
    """Name, kind and precision of the first layers, as in result.json."""
    return [
        {"name": _short(layer.name), "kind": _short(layer.kind), "precision": layer.precision}
        for layer in layers[:MOST_LAYERS]
    ]


def _short(text: str) -> str:
    """Names come from the model's file, and TensorRT joins those of layers that it fuses."""
    return shortened(text[: 10 * MOST_NAME], MOST_NAME)


def verify_precision(
    layers: tuple[LayerType, ...], precision: Precision, origin: str, quantised: int = 0, rest: str = ""
) -> str:
    """Refuse an engine that silently computes in another type.

    FP32 and FP16: every convolution in that type. INT8: each in INT8 or in the type of the recipe's rest, and in INT8 at
    least half as many as in the file. (TensorRT joins layers, and computes one in the other type where it has no INT8
    kernel for it.)

    Args:
        layers: of the engine.
        precision: the file's.
        origin: names the engine in errors.
        quantised: layers that the file has in INT8.
        rest: the type of the file's other layers, `fp16` or `fp32`, for precision int8.

    Returns:
        One line about the types of all layers; where the inspector tells none, that they were not verified.

    Raises:
        RuntimeUnavailableError: the engine is not in the target's precision.
    """
    counts = count_types(layers)
    shown = ", ".join(f"{count} {name}" for name, count in counts.items()) or "no layers"
    allowed = {precision, rest} if precision == "int8" else {precision}
    known = {name: count for name, count in counts.items() if name != UNKNOWN}
    if not known:
        return (
            f"layers: {shown}; NOT VERIFIED to compute in {precision}: TensorRT's inspector does not tell their types"
        )
    weighted = any(layer.weighted for layer in layers)
    wrong = sorted(set(known) - allowed) if weighted else []
    if wrong or precision not in known:
        raise RuntimeUnavailableError(
            f"{origin}: the engine does not compute in {precision}: {shown}; this TensorRT ignores the file's types: "
            "update it, or export for another precision"
        )
    if precision != "int8" or not weighted:
        return f"layers: {shown}"
    if 2 * known["int8"] < quantised:
        raise RuntimeUnavailableError(
            f"{origin}: {known['int8']} layers of the engine compute in INT8, {quantised} of the file do: {shown}; update "
            f"TensorRT, or export for precision {rest or 'fp16'}"
        )
    return f"layers: {shown}; the file has {quantised} in INT8"
