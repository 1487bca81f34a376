"""What the tests of hostile files share: a child with limits, and a real ONNX model that numpy can compute."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from limits import forked, refuse_out_of_memory
from onnx import TensorProto, helper, numpy_helper

from rkd.errors import RkdError

SIDE, CLASSES = 4, 3


@dataclass(frozen=True)
class Outcome:
    """What a child that read a hostile file came to.

    Attributes:
        refused: the message, where it was refused; empty where it was read.
        status: exit code 0, or the signal that ended it, negative; 70 after anything but `RkdError`, which `refused` tells.
    """

    refused: str
    status: int


def in_limits(work: Callable[[], object]) -> Outcome:
    """Do `work` in a forked child that may take 2 GiB of data and 5 s of processor time, and raise `RkdError` only."""

    def refused() -> bytes:
        try:
            work()
        except RkdError as error:
            refuse_out_of_memory(error)
            return str(error).encode(errors="replace")
        return b""

    ended = forked(refused)
    return Outcome(ended.output.decode(), ended.status)


@pytest.fixture
def refusal_in_limits() -> Callable[[Callable[[], object]], str]:
    """Does work in a limited child; the message with which it was refused."""

    def refusal(work: Callable[[], object]) -> str:
        outcome = in_limits(work)
        assert outcome.status == 0, outcome
        assert outcome.refused, "it was not refused"
        return outcome.refused

    return refusal


@pytest.fixture
def pack() -> Callable[..., bytes]:
    """Makes a zip archive."""

    def pack(members: Sequence[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", method) as archive:
            for name, data in members:
                archive.writestr(name, data)
        return buffer.getvalue()

    return pack


@dataclass(frozen=True)
class Linear:
    """logits = flatten(images) @ weights, in whole numbers: float32 has no rounding."""

    weights: np.ndarray  # (3 * SIDE * SIDE, CLASSES)
    images_shape = (3, SIDE, SIDE)

    def onnx(self) -> onnx.ModelProto:
        graph = helper.make_graph(
            [
                helper.make_node("Cast", ["images"], ["x"], to=TensorProto.FLOAT),
                helper.make_node("Flatten", ["x"], ["flat"], axis=1),
                helper.make_node("Gemm", ["flat", "w"], ["logits"]),
            ],
            "linear",
            [helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", 3, SIDE, SIDE])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", CLASSES])],
            [numpy_helper.from_array(self.weights.astype(np.float32), "w")],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


@pytest.fixture(scope="session")
def linear() -> Linear:
    return Linear(np.random.default_rng(0).integers(-4, 5, (3 * SIDE * SIDE, CLASSES)))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
