"""From a student to one bundle a target: ONNX, precision, parity, bundle."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

from rkd import __version__
from rkd.bundle import EVALUATION, MODEL, evaluation_bytes, write_bundle
from rkd.errors import ExportError
from rkd.export.onnx_model import INPUT, frozen, to_onnx
from rkd.export.parity import HostRun, Parity, compare, host_run, predictor_of, require
from rkd.export.precision import check_range, to_fp16
from rkd.files import sha256
from rkd.metrics import Images, Labels, Scores
from rkd.network import Network
from rkd.target import Target
from rkd.triggers import Trigger

_BATCH = 64  # images at once on this machine
_MAX_TRIGGERS = 100


@dataclass(frozen=True)
class ExportReport:
    """What one export wrote.

    Attributes:
        path: the bundle.
        digest: its SHA-256.
        size_bytes: of the whole bundle.
        model_bytes: of the ONNX file in it.
        student: ACC, ASR and RA of the student in torch, on this machine.
        exported: the same of the exported file.
        parity: agreement and difference between the two.
        seconds: per stage, in their order; a stage that an earlier target already needed is absent.
    """

    path: Path
    digest: str
    size_bytes: int
    model_bytes: int
    student: Scores
    exported: Scores
    parity: Parity
    seconds: Mapping[str, float]


class Exporter:
    """Exports one student for any number of targets; what targets share is done once.

    Args:
        network: the student, on any device and in any mode; it is not changed.
        evaluation: held-out images, uint8 (N, 3, H, W), and labels, (N,), that travel with each bundle.
        triggers: what the student is tested with; they travel too.
        on_stage: told the name of each stage as it starts: student, onnx, fp16, parity, bundle.

    Raises:
        ExportError: images, labels, triggers and network do not fit together.
        ArchitectureError: the network does not run.
    """

    def __init__(
        self,
        network: Network,
        evaluation: tuple[Images, Labels],
        triggers: Sequence[Trigger] = (),
        on_stage: Callable[[str], None] = lambda _stage: None,
    ) -> None:
        _check_fit(network, evaluation, triggers)
        self._network = frozen(network)
        self._evaluation = evaluation
        self._triggers = tuple(sorted(triggers, key=lambda trigger: trigger.name))
        self._on_stage = on_stage
        self._fp32: dict[tuple[int, bool], bytes] = {}  # by opset and whether the batch axis is free
        self._student: HostRun | None = None

    def write(
        self, target: Target, *, name: str, chain: Mapping[str, str], folder: Path, overwrite: bool = False
    ) -> ExportReport:
        """Write `<name>.<target>.rkd`; equal inputs give equal bytes.

        Args:
            target: the profile of the board.
            name: the run's; letters, digits, `.`, `_` and `-`.
            chain: digests under `teacher`, `config` and `student`.
            folder: where the bundle goes.
            overwrite: replace an existing bundle.

        Raises:
            ExportError: the student cannot be written as the target asks, or the exported file decides differently.
            StorageError: the disk said no.
        """
        path = folder / bundle_name(name, target)
        if path.exists() and not overwrite:
            raise ExportError(f"{path} exists already; give --overwrite to replace it")
        seconds: dict[str, float] = {}
        student = self._score_student(seconds)
        model = self._model(target, seconds)
        with self._stage("parity", seconds):
            exported = host_run(predictor_of(model), self._evaluation, self._triggers, min(_BATCH, target.max_batch))
            parity = compare(student, exported)
            require(parity, target.precision)
        with self._stage("bundle", seconds):
            manifest = self._manifest(target, path.stem, {**chain, "onnx": sha256(model)}, (student, exported, parity))
            digest = write_bundle(path, manifest, self._members(model))
        return ExportReport(
            path, digest, path.stat().st_size, len(model), student.scores, exported.scores, parity, seconds
        )

    def _score_student(self, seconds: dict[str, float]) -> HostRun:
        if self._student is None:
            with self._stage("student", seconds):
                predict = self._network.predictor(torch.device("cpu"))
                self._student = host_run(predict, self._evaluation, self._triggers, _BATCH)
        return self._student

    def _model(self, target: Target, seconds: dict[str, float]) -> bytes:
        key = (target.opset, target.max_batch > 1)
        if key not in self._fp32:
            with self._stage("onnx", seconds):
                self._fp32[key] = to_onnx(self._network, target.opset, dynamic_batch=key[1])
        if target.precision == "fp32":
            return self._fp32[key]
        with self._stage("fp16", seconds):
            check_range(self._fp32[key], self._evaluation[0])
            return to_fp16(self._fp32[key])

    def _manifest(
        self, target: Target, name: str, chain: Mapping[str, str], host: tuple[HostRun, HostRun, Parity]
    ) -> dict[str, Any]:
        student, exported, parity = host
        return {
            "name": name,
            "target": target.to_json(),
            "input": {"name": INPUT, "shape": [3, *self._network.size], "dtype": "uint8"},
            "opset": target.opset,
            "precision": target.precision,
            "classes": list(self._network.classes),
            "chain": {link: chain[link] for link in ("teacher", "config", "student", "onnx")},
            "scores": {
                "student": student.scores.to_json(),
                "exported": exported.scores.to_json(),
                "agreement": parity.to_json(),
            },
            "tool": {
                "rkd": __version__,
                "torch": torch.__version__,
                "onnx": onnx.__version__,
                "onnxruntime": onnxruntime.__version__,
            },
        }

    def _members(self, model: bytes) -> dict[str, bytes]:
        return {
            MODEL: model,
            EVALUATION: evaluation_bytes(*self._evaluation),
            **{f"triggers/{trigger.name}.npz": trigger.to_bytes() for trigger in self._triggers},
        }

    @contextmanager
    def _stage(self, name: str, seconds: dict[str, float]) -> Iterator[None]:
        self._on_stage(name)
        started = time.monotonic()
        yield
        seconds[name] = time.monotonic() - started


def bundle_name(name: str, target: Target) -> str:
    """`<name>.<target>.rkd`.

    Raises:
        ExportError: a bundle cannot have that name.
    """
    if not re.fullmatch(r"\w[\w.-]{0,127}", name, re.ASCII):
        raise ExportError(f"run name {name!r}: a bundle's name has letters, digits, '.', '_' and '-'; rename the run")
    return f"{name}.{target.name}.rkd"


def _check_fit(network: Network, evaluation: tuple[Images, Labels], triggers: Sequence[Trigger]) -> None:
    images, labels = evaluation
    height, width = network.size
    if images.dtype != np.uint8 or images.shape[1:] != (3, height, width) or labels.shape != images.shape[:1]:
        raise ExportError(
            f"evaluation images {images.dtype} {images.shape} with labels {labels.shape}, expected uint8 "
            f"(N, 3, {height}, {width}) and (N,): the student is for {height}x{width} images"
        )
    if not len(images):
        raise ExportError("there are no evaluation images; a bundle carries at least one")
    classes = len(network.classes)
    if labels.min() < 0 or labels.max() >= classes:
        raise ExportError(f"labels go from {labels.min()} to {labels.max()}, the student has {classes} classes")
    for trigger in triggers:
        if trigger.size != network.size:
            seen = "x".join(map(str, trigger.size))
            raise ExportError(
                f"trigger {trigger.name} is for {seen} images, the student for {height}x{width}; make one of that size"
            )
        if trigger.target >= classes:
            raise ExportError(f"trigger {trigger.name} aims at class {trigger.target}, the student has {classes}")
    names = [trigger.name for trigger in triggers]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ExportError(f"two triggers are called {twice!r}; rename one")
    if len(names) > _MAX_TRIGGERS:
        raise ExportError(f"{len(names)} triggers, a bundle carries at most {_MAX_TRIGGERS}; leave some out")
