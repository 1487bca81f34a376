"""From a student to one bundle a target: ONNX, precision, ledger, bundle."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx
import onnxruntime
import torch

from rkd import __version__
from rkd.bundle import EVALUATION, LEDGER, MODEL, evaluation_bytes, write_bundle
from rkd.errors import ExportError
from rkd.export.calibration import Calibration
from rkd.export.mixed import Quantised, choose
from rkd.export.onnx_model import INPUT, frozen, to_onnx
from rkd.export.parity import HostRun, Parity, compare, host_run, predictor_of, problems
from rkd.export.precision import check_range, to_fp16
from rkd.export.tensorrt_operators import check_operators
from rkd.files import sha256
from rkd.ledger import Ledger
from rkd.metrics import Images, Labels, Scores, unjudged
from rkd.network import Network
from rkd.target import Quantisation, Target
from rkd.triggers import Trigger

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

Calibrate = Callable[[int], Calibration]
"""Draws training images: so many for the ranges of activations, and as many again to decide."""

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
        ledger: the labels of each image at each step.
        quantised: how the INT8 file was chosen; None for other precisions.
        forced: what was wrong and written all the same.
        notes: what could not be judged, and what INT8 had too few images for.
        seconds: per stage, in their order; a stage that an earlier target already needed is absent.
    """

    path: Path
    digest: str
    size_bytes: int
    model_bytes: int
    student: Scores
    exported: Scores
    parity: Parity
    ledger: Ledger
    quantised: Quantised | None
    forced: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class _Form:
    """What decides an FP32 file: the opset, and whether the batch axis is free."""

    opset: int
    dynamic: bool


class Exporter:
    """Exports one student for any number of targets; what targets share is done once.

    Args:
        network: the student, on any device and in any mode; it is not changed.
        evaluation: held-out images, uint8 (N, 3, H, W), and labels, (N,), that travel with each bundle.
        triggers: what the student is tested with; they travel too.
        on_stage: told the name of each stage as it starts: torch, onnx, parity, int8, fp16, int8 or fp16 parity,
            bundle; and what is tried within it.
        calibrate: draws training images, for targets with precision int8.

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
        calibrate: Calibrate | None = None,
    ) -> None:
        _check_fit(network, evaluation, triggers)
        self._network = frozen(network)
        self._evaluation = evaluation
        self._triggers = tuple(sorted(triggers, key=lambda trigger: trigger.name))
        self._on_stage = on_stage
        self._calibrate = calibrate
        self._fp32: dict[_Form, bytes] = {}
        self._fp32_runs: dict[_Form, HostRun] = {}
        self._int8: dict[tuple[_Form, Quantisation, float, bool], Quantised] = {}
        self._student: HostRun | None = None

    def write(
        self,
        target: Target,
        *,
        name: str,
        chain: Mapping[str, str],
        folder: Path,
        role: Literal["student", "teacher"] = "student",
        overwrite: bool = False,
        force: bool = False,
        key: Ed25519PrivateKey | None = None,
    ) -> ExportReport:
        """Write `<name>.<target>.rkd`; equal inputs give equal bytes.

        Args:
            target: the profile of the board.
            name: the run's; letters, digits, `.`, `_` and `-`.
            chain: digests under `teacher`, `config` and `student`.
            folder: where the bundle goes.
            role: what the network is in its run.
            overwrite: replace an existing bundle.
            force: write a bundle that fails the target's budgets, marked.
            key: signs the bundle.

        Raises:
            ExportError: the student cannot be written as the target asks, or the exported file decides differently.
            StorageError: the disk said no.
        """
        path = folder / bundle_name(name, target)
        if path.exists() and not overwrite:
            raise ExportError(f"{path} exists already; give --overwrite to replace it")
        seconds: dict[str, float] = {}
        form = _Form(target.opset, target.max_batch > 1)
        student = self._score_student(seconds)
        fp32 = self._score_fp32(form, seconds)
        check_operators(self._fp32[form], target.runtime, self._network.arch)
        model, quantised = self._model(target, form, seconds)
        exported = fp32
        if target.precision != "fp32":
            with self._stage(f"{target.precision} parity", seconds):
                predict = predictor_of(model, integer=target.on_cpu)
                exported = host_run(predict, self._evaluation, self._triggers, _BATCH)
        parity = compare(student, exported)
        runs = {"student": student, "onnx-fp32": fp32}
        if target.precision != "fp32":
            runs[target.precision] = exported
        truth = self._evaluation[1]
        ledger = Ledger(truth, tuple(run.step(step) for step, run in runs.items()))
        settled = Ledger(truth, tuple(run.settled(step, student) for step, run in runs.items()))
        forced = problems(compare(student, fp32), "fp32") + problems(parity, target.precision)
        forced += quantised.problems if quantised else ()
        forced += settled.judge(self._triggers, target.acc_budget, target.asr_budget)
        forced = list(dict.fromkeys(forced))
        if forced and not force:
            raise ExportError(f"{'; '.join(forced)}; {path.name} was not written (--force writes it, marked)")
        notes = unjudged(student.scores, target.acc_budget, target.asr_budget)
        if quantised and target.quantisation and min(quantised.images) < target.quantisation.images:
            notes.append(
                f"INT8 was calibrated on {quantised.images[0]} images and decided on {quantised.images[1]}, "
                f"{target.quantisation.images} each are asked for by the target"
            )
        with self._stage("bundle", seconds):
            manifest = {
                **self._manifest(target, path.stem, {**chain, "onnx": sha256(model)}, (student, exported, parity)),
                **({"role": role} if role != "student" else {}),
                "ledger": ledger.to_json(self._triggers),
                **({"quantisation": quantised.to_json()} if quantised else {}),
                **({"forced": forced} if forced else {}),
                **({"notes": notes} if notes else {}),
            }
            digest = write_bundle(path, manifest, self._members(model, ledger), key)
        return ExportReport(
            path, digest, path.stat().st_size, len(model), student.scores, exported.scores, parity, ledger, quantised,
            tuple(forced), tuple(notes), seconds,
        )  # fmt: skip

    def _score_student(self, seconds: dict[str, float]) -> HostRun:
        if self._student is None:
            with self._stage("torch", seconds):
                predict = self._network.predictor(torch.device("cpu"))
                self._student = host_run(predict, self._evaluation, self._triggers, _BATCH)
        return self._student

    def _score_fp32(self, form: _Form, seconds: dict[str, float]) -> HostRun:
        """Export in FP32, which every precision starts from, and run it."""
        if form not in self._fp32_runs:
            with self._stage("onnx", seconds):
                self._fp32[form] = to_onnx(self._network, form.opset, dynamic_batch=form.dynamic)
            with self._stage("parity", seconds):
                predict = predictor_of(self._fp32[form])
                self._fp32_runs[form] = host_run(predict, self._evaluation, self._triggers, _BATCH)
        return self._fp32_runs[form]

    def _model(self, target: Target, form: _Form, seconds: dict[str, float]) -> tuple[bytes, Quantised | None]:
        model, quantised = self._fp32[form], None
        rest = target.precision
        if target.quantisation is not None:
            quantised = self._quantise(target, form, seconds)
            model, rest = quantised.model, target.quantisation.rest
        if rest != "fp16":
            return model, quantised
        with self._stage("fp16", seconds):
            check_range(self._fp32[form], self._evaluation[0], self._triggers)
            return to_fp16(model), quantised

    def _quantise(self, target: Target, form: _Form, seconds: dict[str, float]) -> Quantised:
        recipe = target.quantisation
        if recipe is None or self._calibrate is None:
            raise ExportError(f"target {target.name} is INT8, which needs training images to calibrate with; give them")
        known = (form, recipe, target.acc_budget, target.on_cpu)
        if known not in self._int8:
            with self._stage("int8", seconds):
                self._int8[known] = choose(
                    self._fp32[form], recipe, self._calibrate(recipe.images), acc_budget=target.acc_budget,
                    integer=target.on_cpu, tell=self._on_stage,
                )  # fmt: skip
        return self._int8[known]

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

    def _members(self, model: bytes, ledger: Ledger) -> dict[str, bytes]:
        return {
            MODEL: model,
            EVALUATION: evaluation_bytes(*self._evaluation),
            LEDGER: ledger.to_bytes(),
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
