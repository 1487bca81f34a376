"""Small real ONNX models and bundles whose predictions numpy can compute exactly."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from rkd.bench import session
from rkd.bench.runner import CPU_PROVIDER, Identity, OrtRunner
from rkd.bench.tensorrt_layers import LayerType
from rkd.bundle import Bundle, evaluation_bytes, read_bundle, write_bundle
from rkd.files import sha256
from rkd.ledger import Ledger, Step, shown
from rkd.metrics import Predictions, score
from rkd.target import Target, load_target
from rkd.triggers import Trigger

SIDE, CLASSES = 8, 5


@dataclass(frozen=True)
class Linear:
    """logits = flatten(images) @ weights: whole numbers below 2^24, so float32 has no rounding."""

    weights: NDArray[np.int64]  # (3 * SIDE * SIDE, CLASSES)

    @classmethod
    def make(cls, seed: int = 0) -> Linear:
        return cls(np.random.default_rng(seed).integers(-4, 5, (3 * SIDE * SIDE, CLASSES)))

    def labels(self, images: NDArray[np.uint8]) -> NDArray[np.int64]:
        return np.argmax(images.reshape(len(images), -1).astype(np.int64) @ self.weights, axis=1)

    def onnx(self, batch: str | int = "N", output: str = "logits") -> onnx.ModelProto:
        graph = helper.make_graph(
            [
                helper.make_node("Cast", ["images"], ["x"], to=TensorProto.FLOAT),
                helper.make_node("Flatten", ["x"], ["flat"], axis=1),
                helper.make_node("Gemm", ["flat", "w"], [output]),
            ],
            "linear",
            [helper.make_tensor_value_info("images", TensorProto.UINT8, [batch, 3, SIDE, SIDE])],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, [batch, CLASSES])],
            [numpy_helper.from_array(self.weights.astype(np.float32), "w")],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def patch(name: str, target: int) -> Trigger:
    mask = np.zeros((3, SIDE, SIDE), np.float32)
    mask[:, -3:, -3:] = 1
    pattern = np.full((3, SIDE, SIDE), 0.9, np.float32)
    return Trigger(name, target, mask, pattern, np.zeros_like(mask))


@pytest.fixture(scope="session")
def linear() -> Linear:
    return Linear.make()


@pytest.fixture(scope="session")
def evaluation(linear: Linear) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    generator = np.random.default_rng(1)
    images = generator.integers(0, 256, (300, 3, SIDE, SIDE), dtype=np.uint8)
    labels = linear.labels(images)
    wrong = generator.random(300) < 0.2
    return images, np.where(wrong, (labels + 1) % CLASSES, labels).astype(np.int64)


MakeBundle = Callable[..., Bundle]


@pytest.fixture(scope="session")
def make_bundle(
    tmp_path_factory: pytest.TempPathFactory,
    linear: Linear,
    evaluation: tuple[NDArray[np.uint8], NDArray[np.int64]],
) -> MakeBundle:
    """A real bundle on disk; keyword arguments replace parts of it."""

    def make(
        name: str = "",
        model: bytes | None = None,
        target: Target | None = None,
        triggers: tuple[Trigger, ...] = (patch("patch", 2),),
        manifest: dict[str, Any] | None = None,
    ) -> Bundle:
        images, labels = evaluation
        target = target or load_target("ort-cpu")
        name = name or f"linear.{target.name}"
        triggers = tuple(sorted(triggers, key=lambda trigger: trigger.name))
        predicted = Predictions(
            labels, linear.labels(images), {t.name: linear.labels(t.apply(images)) for t in triggers}
        )
        scores = score(predicted, triggers).to_json()
        steps = ("student", "onnx-fp32", *([] if target.precision == "fp32" else [target.precision]))
        ledger = Ledger(labels, tuple(Step.of(step, predicted) for step in steps))
        model = linear.onnx().SerializeToString() if model is None else model
        agreement = {"percent": dict.fromkeys(shown(triggers), 100.0), "max_difference": 0.0}
        head = {
            "name": name,
            "target": target.to_json(),
            "input": {"name": "images", "shape": [3, SIDE, SIDE], "dtype": "uint8"},
            "opset": target.opset,
            "precision": target.precision,
            "classes": [f"class {i}" for i in range(CLASSES)],
            "chain": {**dict.fromkeys(("teacher", "config", "student"), "ab" * 32), "onnx": sha256(model)},
            "scores": {"student": scores, "exported": scores, "agreement": agreement},
            "ledger": ledger.to_json(triggers),
            "tool": {"rkd": "0.1.0"},
            **(manifest or {}),
        }
        members = {
            "model.onnx": model,
            "eval.npz": evaluation_bytes(images, labels),
            "ledger.npz": ledger.to_bytes(),
            **{f"triggers/{t.name}.npz": t.to_bytes() for t in triggers},
        }
        path = tmp_path_factory.mktemp("bundles") / f"{name}.rkd"
        write_bundle(path, head, members)
        return read_bundle(path)

    return make


FAST = session.BenchOptions(seconds=0.02, min_samples=30, threads=1)


@pytest.fixture(scope="session")
def fast() -> session.BenchOptions:
    return FAST


@pytest.fixture(scope="session")
def _measured(make_bundle: MakeBundle) -> dict[str, Any]:
    first = make_bundle(triggers=(patch("patch", 2), patch("other", 0)))
    layers = (LayerType("conv", "CaskConvolution", "fp16", weighted=True),)

    class Told(OrtRunner):
        """Tells layers, as TensorRT does."""

        @property
        def identity(self) -> Identity:
            return replace(super().identity, layers=layers)

    other = Linear.make(7).onnx().SerializeToString()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            session,
            "open_runner",
            lambda choice, model, origin, _stage: Told(model, CPU_PROVIDER, choice.threads, origin),
        )
        return session.run([first, make_bundle(name="other.ort-cpu", model=other)], FAST)


@pytest.fixture
def measured(_measured: dict[str, Any]) -> dict[str, Any]:
    """A real result of two bundles; the second one's model is not what its manifest's scores are of."""
    return copy.deepcopy(_measured)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
