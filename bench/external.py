"""Refuse ONNX files whose tensors live in other files, and count quantised layers, without onnx.

ONNX Runtime resolves external data of a model that was loaded from bytes against the current folder, so a bundle could
make the bench read any file there. The check walks the protobuf wire format (protobuf.dev/programming-guides/encoding)
along the fields of onnx.proto that can hold a tensor, and looks at nothing else. What two protobuf readers could read
differently (tags and lengths beyond 32 bits) is refused, so that the check sees what the runtime sees. Operators that
hold graphs are refused too: inside the runtime, a loop of 2^60 rounds hears no signal.
"""

from __future__ import annotations

from collections.abc import Iterator

from rkd.errors import BundleError

# Message -> field number -> message. Only what leads to a tensor.
_FIELDS: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Graph": {1: "Node", 5: "Tensor", 15: "Sparse"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 10: "Tensor", 22: "Sparse", 23: "Sparse"},
    "Sparse": {1: "Tensor", 2: "Tensor"},
    "Tensor": {},
}
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14  # TensorProto
_SUBGRAPHS = (6, 11)  # AttributeProto's g and graphs
_NAME, _OP_TYPE = 3, 4  # NodeProto
_NODES = {("Model", 7): "Graph", ("Graph", 1): "Node"}
WEIGHTS = b".weight.dequantise"  # how the exporter names the node in front of a quantised layer
_READS_FILES = b"EPContext"  # an operator whose attribute names a compiled engine to load
_FLATBUFFER = b"ORTM"  # ONNX Runtime takes a model with this at byte 4 for one of its own format
_MAX_FIELDS = 500_000  # twenty times what large models have; walked in a second
_MAX_TAG, _MAX_LENGTH = 2**32 - 1, 2**31 - 1
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


def refuse_external_data(model: bytes, origin: str) -> None:
    """Check that all of a model's tensors are inside of it, and that it has no loops.

    Args:
        model: an ONNX file.
        origin: names it in errors.

    Raises:
        BundleError: a tensor is in another file, an operator holds a graph, or the bytes are not a protobuf message.
    """
    view = memoryview(model)
    pending = [("Model", 0, len(view))]
    fields = 0
    if model[4:8] == _FLATBUFFER:
        raise BundleError(f"{origin}: this is a model of ONNX Runtime's own format, not an ONNX file; export it again")
    while pending:
        message, start, end = pending.pop()
        try:
            for field, wire, low, high in _fields(view, start, end):
                if message == "Tensor" and (field == _EXTERNAL_DATA or (field == _DATA_LOCATION and low != 0)):
                    raise BundleError(
                        f"{origin}: a tensor of the ONNX file is stored in another file; export it again with rkd, "
                        "which keeps all data inside"
                    )
                if message == "Node" and field == _OP_TYPE and wire == _LENGTH and view[low:high] == _READS_FILES:
                    raise BundleError(
                        f"{origin}: the ONNX file wants a compiled engine from another file; export it again"
                    )
                if message == "Attribute" and field in _SUBGRAPHS and wire == _LENGTH:
                    raise BundleError(
                        f"{origin}: the ONNX file has a graph inside of an operator (a loop or a branch), which may run "
                        "for ever; networks that rkd exports have none"
                    )
                fields += 1
                if fields > _MAX_FIELDS:
                    raise ValueError(f"more than {_MAX_FIELDS:,} fields")
                inner = _FIELDS[message].get(field)
                if inner and wire == _LENGTH:
                    pending.append((inner, low, high))
        except (ValueError, IndexError) as error:
            raise BundleError(f"{origin}: not a readable ONNX file ({error}); export it again") from error


def quantised_layers(model: bytes) -> int:
    """How many layers of a file that rkd wrote have their weights in INT8.

    Args:
        model: an ONNX file that passed `refuse_external_data`.
    """
    view, pending, found = memoryview(model), [("Model", 0, len(model))], 0
    while pending:
        message, start, end = pending.pop()
        for field, wire, low, high in _fields(view, start, end):
            if message == "Node" and field == _NAME and wire == _LENGTH:
                found += bytes(view[low:high]).endswith(WEIGHTS)
            elif wire == _LENGTH and (inner := _NODES.get((message, field))):
                pending.append((inner, low, high))
    return found


def _fields(view: memoryview, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Each field of one message: number, wire type, and its content's span (for a varint: its value, 0)."""
    while at < end:
        tag, at = _varint(view, at, end)
        if tag > _MAX_TAG:
            raise ValueError("a field's number is too large")
        wire = tag & 7
        if wire == _VARINT:
            value, at = _varint(view, at, end)
            yield tag >> 3, wire, value, 0
            continue
        if wire == _LENGTH:
            length, at = _varint(view, at, end)
        elif wire in (_FIXED64, _FIXED32):
            length = 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if length > min(end - at, _MAX_LENGTH):
            raise ValueError("cut short")
        yield tag >> 3, wire, at, at + length
        at += length


def _varint(view: memoryview, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 70:
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError("cut short")
