"""A network as one ONNX file, with its preprocessing inside.

    images, uint8 (N, 3, H, W)  ->  cast, scale, normalise  ->  the network, FP32, eval mode  ->  logits, float32 (N, C)

What leaves this module is checked: the opset that was asked for (the exporter silently raises low ones), no external
data, no randomness, no custom operators, no graphs inside of operators (loops, branches), a batch axis that stayed free. It holds nothing of the machine it was made on,
and equal networks give equal bytes.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import logging
import re
import warnings
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from rkd.errors import ExportError, MissingExtraError
from rkd.network import Network, Normalisation

INPUT, OUTPUT, BATCH_AXIS = "images", "logits", "N"
_EXAMPLES = 2  # images that a free batch axis is traced with; 0 and 1 would be taken for constants
_RANDOM = frozenset(
    {
        "Bernoulli", "Dropout", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"
    }
)  # fmt: skip


class _Deployed(nn.Module):
    """Camera bytes to logits."""

    def __init__(self, network: nn.Module, normalisation: Normalisation) -> None:
        super().__init__()
        self.network = network
        self.normalisation = normalisation

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(self.normalisation(images))  # (N, 3, H, W) -> (N, C)
        return logits


def frozen(network: Network) -> Network:
    """A copy on the CPU, in FP32 and eval mode; `network` stays as it is.

    Raises:
        ExportError: it cannot be copied, or a weight is not finite.
        ArchitectureError: it does not run, or does not return logits.
    """
    try:
        module = copy.deepcopy(network.module).cpu().float().eval()
        module = module.to(memory_format=torch.contiguous_format)
    except Exception as error:
        raise ExportError(
            f"{network.arch} cannot be copied ({_line(error)}); remove hooks and tensors that training left on it"
        ) from error
    for name, tensor in module.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise ExportError(f"{network.arch}: {name} holds NaN or infinity; the training diverged, distil again")
    result = dataclasses.replace(network, module=module)
    result.check_runs()
    return result


def to_onnx(network: Network, opset: int, *, dynamic_batch: bool = True) -> bytes:
    """Export a network in FP32.

    Args:
        network: on any device, in any mode; it is not changed.
        opset: ONNX operator set, 18 or newer.
        dynamic_batch: leave the batch axis free; otherwise it is 1.

    Returns:
        The ONNX file: one input `images`, uint8 (N, 3, H, W), one output `logits`, float32 (N, C).

    Raises:
        ExportError: something in the network has no ONNX counterpart, or the result is not as described.
        MissingExtraError: onnxscript is not installed.
    """
    deployed = _Deployed(frozen(network).module, network.normalisation).eval()
    example = torch.zeros(_EXAMPLES if dynamic_batch else 1, 3, *network.size, dtype=torch.uint8)
    axes = ({0: torch.export.Dim(BATCH_AXIS, min=1)},) if dynamic_batch else None
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                deployed,
                (example,),
                dynamo=True,
                external_data=False,
                opset_version=opset,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=axes,
                verbose=False,
            )
        model = cast("torch.onnx.ONNXProgram", program).model_proto
    except ImportError as error:
        raise MissingExtraError(error.name or "onnxscript", "train") from error
    except Exception as error:
        raise ExportError(_explain(error, network.arch, dynamic_batch=dynamic_batch)) from error
    strip(model)
    _check(model, network, opset, dynamic_batch=dynamic_batch)
    return serialise(model)


def strip(model: onnx.ModelProto) -> None:
    """Remove what does not compute: source locations, doc strings, inferred types, the producer's version."""
    _strip(model)
    del model.graph.value_info[:]
    model.producer_name, model.producer_version = "rkd", ""


def serialise(model: onnx.ModelProto) -> bytes:
    """The file's bytes; equal models give equal bytes.

    Raises:
        ExportError: it is larger than a protobuf may be.
    """
    try:
        return bytes(model.SerializeToString(deterministic=True))
    except Exception as error:
        raise ExportError(f"the ONNX file cannot be written ({_line(error)}); files have at most 2 GiB") from error


def check_valid(model: onnx.ModelProto, what: str) -> None:
    """Run onnx's own checker, with types and shapes.

    Raises:
        ExportError: it finds a fault.
    """
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:
        raise ExportError(f"{what} is not valid ONNX: {_line(error)}; try another opset or student") from error


def _strip(message: Any) -> None:
    """Clear every `metadata_props` and `doc_string` below `message`, subgraphs included."""
    for field, value in message.ListFields():
        if field.name in ("metadata_props", "doc_string"):
            message.ClearField(field.name)
        elif field.message_type is not None:
            for child in (value,) if hasattr(value, "ListFields") else value:
                _strip(child)


def _check(model: onnx.ModelProto, network: Network, opset: int, *, dynamic_batch: bool) -> None:
    arch = network.arch
    imported = {entry.domain: entry.version for entry in model.opset_import}
    if imported != {"": opset}:
        raise ExportError(f"{arch}: opset {opset} was asked for, the exporter wrote {imported}; change the target's")
    for node in model.graph.node:
        if node.domain:
            raise ExportError(f"{arch}: {node.domain}.{node.op_type} is no standard ONNX operator; replace that layer")
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            raise ExportError(
                f"{arch}: node {node.name} ({node.op_type}) holds a graph of its own, a loop or a branch, which rkd bench "
                "refuses to run; use torch.where, or take another student"
            )
        if node.op_type in _RANDOM:
            raise ExportError(
                f"{arch}: node {node.name} ({node.op_type}) is random in eval mode too; let it depend on self.training"
            )
    _refuse_external(model, arch)
    batch = BATCH_AXIS if dynamic_batch else 1
    classes = len(network.classes)
    wanted = [
        ("input", INPUT, onnx.TensorProto.UINT8, [batch, 3, *network.size], model.graph.input),
        ("output", OUTPUT, onnx.TensorProto.FLOAT, [batch, classes], model.graph.output),
    ]
    for kind, name, dtype, shape, values in wanted:
        seen = [(value.name, value.type.tensor_type.elem_type, _shape(value)) for value in values]
        if seen == [(name, dtype, shape)]:
            continue
        if dynamic_batch and len(seen) == 1 and seen[0][2][1:] == shape[1:]:
            raise ExportError(
                f"{arch}: its code fixes the number of images ({kind} {seen[0][2]}, expected {shape}); "
                "use sizes taken from the input, or set max_batch = 1 in the target"
            )
        raise ExportError(f"{arch}: {kind} {seen}, expected one {name!r} of shape {shape}; return the logits only")
    check_valid(model, f"{arch} as exported")


def _refuse_external(model: onnx.ModelProto, arch: str) -> None:
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            raise ExportError(f"{arch}: {tensor.name} was written outside of the ONNX file; upgrade torch")
        if tensor.data_type == onnx.TensorProto.FLOAT and not np.isfinite(numpy_helper.to_array(tensor)).all():
            raise ExportError(f"{arch}: {tensor.name} holds NaN or infinity; distil again")


def _shape(value: onnx.ValueInfoProto) -> list[int | str]:
    return [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints whole graphs when it fails, and logs and warns when it does not."""
    disabled = logging.root.manager.disable
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(disabled)


def _explain(error: Exception, arch: str, *, dynamic_batch: bool) -> str:
    """One line out of the exporter's pages: which operator or line of code, and what to do."""
    text = "\n".join(str(cause) for cause in _causes(error))
    if operator := re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", text):
        node = re.search(r"node %(\w+)", text)
        where = f" (node {node[1]})" if node else ""
        return (
            f"{arch}: operator {operator[1]}{where} has no ONNX counterpart; replace that layer or take another student"
        )
    if "data-dependent" in text:
        code = re.findall(r'File "[^"]*", line \d+, in \w+\n\s+(\S[^\n]*)', text)
        where = f" at `{code[-1].strip()}`" if code else ""
        return f"{arch}: its code branches on values of its tensors{where}; ONNX needs one fixed graph: use torch.where"
    hint = "; if its code fixes the number of images, set max_batch = 1 in the target" if dynamic_batch else ""
    return f"{arch} cannot be exported: {_line(list(_causes(error))[-1])}{hint}; or take another student"


def _causes(error: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__


def _line(error: BaseException) -> str:
    """The first line of an error, without colours, at most 200 characters."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__
