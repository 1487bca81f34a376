"""The whole bench: several bundles in, one result out.

Order: look at the machine, activate every model, latency of all interleaved, then ACC, ASR and RA of each, then the
memory of each in a child. Whatever is wrong with a bundle or a runtime is found before the first sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import numpy as np
from numpy.typing import NDArray

import rkd
from rkd.bench.device import Device, Load, identify, load_before
from rkd.bench.latency import Latency, Series, measure, summarise
from rkd.bench.memory import Memory, measure_memory
from rkd.bench.options import BenchOptions
from rkd.bench.result import SCHEMA, SHA256
from rkd.bench.runner import Choice, Identity, Runner, choose_runner, open_runner
from rkd.bench.validity import judge
from rkd.bundle import Bundle
from rkd.errors import BundleError, ConfigError
from rkd.files import sha256
from rkd.metrics import Images, Labels, Predictions, Scores, evaluate

_EVALUATION_BATCH = 64  # fixed, so that two machines run the same batches
_QUICK_IMAGES = 256

__all__ = ["BenchOptions", "OnStage", "label_digest", "run"]

OnStage = Callable[[str, int, int], None]
"""Told that `done` of `total` steps of a stage (latency, accuracy, memory) are behind us, never while one is timed.

Draw in the call and return: a display that refreshes from a thread of its own would disturb the latency.
"""


@dataclass
class _Job:
    """One bundle and what is known about it so far."""

    bundle: Bundle
    choice: Choice
    exported: Scores
    series: Series | None = None
    identity: Identity | None = None
    latency: Latency | None = None
    memory: Memory | None = None
    scores: Scores | None = None
    predictions: Predictions | None = None
    evaluated: int = 0
    available: int = 0
    not_finite: int = 0


def run(bundles: Sequence[Bundle], options: BenchOptions, on_stage: OnStage | None = None) -> dict[str, Any]:
    """Measure bundles on this machine.

    Ctrl-C gives what was measured so far: `interrupted` is then true, and every entry is invalid and says so.

    Args:
        bundles: verified, at least one; the first is the one that ratios refer to.
        options: what to measure.
        on_stage: told about progress.

    Returns:
        What `rkd.bench.result.write` writes.

    Raises:
        ConfigError: no bundle, or a batch that a bundle does not allow.
        BundleError: a bundle's model cannot be loaded or is not what its manifest says.
        MissingExtraError, RuntimeUnavailableError: this machine lacks a runtime.
    """
    tell = on_stage or _silent
    if not bundles:
        raise ConfigError("no bundle to measure; give one, or run in a folder that holds one")
    for bundle in bundles:
        if options.batch > bundle.target.max_batch:
            raise ConfigError(
                f"batch is {options.batch}, {bundle.name} allows at most {bundle.target.max_batch}; use a smaller batch"
            )
    jobs = [_Job(b, choose_runner(b.target, options.threads), _exported_scores(b)) for b in bundles]
    started = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    device, load = identify(), load_before()
    stage = "start"
    try:
        with ExitStack() as stack:
            runners = [_activate(job, options, stack) for job in jobs]
            stage = "latency"
            if options.latency:
                _latency(jobs, options, tell)
            stage = "accuracy"
            if options.accuracy:
                _accuracy(jobs, runners, options, tell)
        stage = "memory"
        if options.memory:
            _memory(jobs, options, tell)
        interrupted = None
    except KeyboardInterrupt:
        interrupted = stage
    return {
        "schema": SCHEMA,
        "interrupted": interrupted is not None,
        "entries": [
            _entry(job, options=options, device=device, load=load, started=started, interrupted=interrupted)
            for job in jobs
        ],
    }


def _silent(name: str, done: int, total: int) -> None:
    """Nobody wants to know about progress."""


def label_digest(labels: Labels) -> str:
    """SHA-256 of predicted labels as little-endian int16: equal on two machines if all labels are."""
    return sha256(labels.astype("<i2").tobytes())


def _activate(job: _Job, options: BenchOptions, stack: ExitStack) -> Runner:
    """Load a model and see that one batch gives what the manifest says."""
    origin = str(job.bundle.path)
    runner = stack.enter_context(open_runner(job.choice, job.bundle.model, origin))
    job.identity = runner.identity
    images, _ = job.bundle.evaluation()
    job.available = len(images)
    batch = np.ascontiguousarray(np.resize(images, (options.batch, *images.shape[1:])))
    logits = runner.infer(batch)
    expected = (options.batch, len(job.bundle.classes))
    if logits.dtype != np.float32 or logits.shape != expected:
        raise BundleError(f"{origin}: the model gives {logits.dtype}{logits.shape}, expected float32{expected}")
    job.series = Series(runner.infer, batch)
    return runner


def _latency(jobs: Sequence[_Job], options: BenchOptions, on_stage: OnStage) -> None:
    series = [job.series for job in jobs if job.series]
    try:
        measure(series, options.plan, lambda done, total: on_stage("latency", done, total))
    finally:
        for job in jobs:
            if job.series:
                job.latency = summarise(job.series, options.seed)


def _accuracy(jobs: Sequence[_Job], runners: Sequence[Runner], options: BenchOptions, on_stage: OnStage) -> None:
    wanted = [min(job.available, _QUICK_IMAGES) if options.quick else job.available for job in jobs]
    done, total = 0, sum(wanted)
    on_stage("accuracy", done, total)

    def batches(job: _Job, images: Images, labels: Labels) -> Iterator[tuple[Images, Labels]]:
        nonlocal done
        size = min(job.bundle.target.max_batch, _EVALUATION_BATCH)
        for i in range(0, len(labels), size):
            yield images[i : i + size], labels[i : i + size]
            done += len(labels[i : i + size])
            on_stage("accuracy", done, total)

    for job, runner, count in zip(jobs, runners, wanted, strict=True):
        images, labels = job.bundle.evaluation()
        # The images may be sorted by class: a part of them is drawn, the same on every machine.
        part = np.sort(np.random.default_rng(0).permutation(len(labels))[:count])
        triggers = job.bundle.triggers()
        found = evaluate(_predictor(job, runner), batches(job, images[part], labels[part]), triggers)
        (job.scores, job.predictions), job.evaluated = found, count


def _predictor(job: _Job, runner: Runner) -> Callable[[Images], NDArray[Any]]:
    def predict(images: Images) -> NDArray[Any]:
        logits = runner.infer(np.ascontiguousarray(images))
        job.not_finite += int((~np.isfinite(logits).all(axis=1)).sum())
        return logits

    return predict


def _memory(jobs: Sequence[_Job], options: BenchOptions, on_stage: OnStage) -> None:
    for done, job in enumerate(jobs):
        on_stage("memory", done, len(jobs))
        shape = (options.batch, *job.bundle.manifest["input"]["shape"])
        job.memory = measure_memory(job.bundle.model, job.choice, shape)
    on_stage("memory", len(jobs), len(jobs))


def _exported_scores(bundle: Bundle) -> Scores:
    try:
        scores = Scores.from_json(bundle.manifest["scores"]["exported"])
        scores.to_json()
    except Exception as error:  # a manifest's scores are free-form JSON from outside
        raise BundleError(f"{bundle.path}: manifest.json has no readable scores of the exported file") from error
    return scores


def _differences(job: _Job) -> list[dict[str, Any]] | None:
    """Where this machine's hits differ from the exporting host's; None if not all images were evaluated."""
    if job.scores is None or job.evaluated < job.available:
        return None
    here, host = _figures(job.scores), _figures(job.exported)
    return [
        {"figure": name, "here": here.get(name), "host": host.get(name)}
        for name in [*here, *(name for name in host if name not in here)]
        if here.get(name) != host.get(name)
    ]


def _figures(scores: Scores) -> dict[str, dict[str, Any]]:
    figures = {"ACC": scores.acc.to_json()}
    for trigger in scores.triggers:
        figures[f"ASR {trigger.trigger}"] = trigger.asr.to_json()
        figures[f"RA {trigger.trigger}"] = trigger.ra.to_json()
    return figures


def _entry(
    job: _Job, *, options: BenchOptions, device: Device, load: Load, started: str, interrupted: str | None
) -> dict[str, Any]:
    bundle, predictions, identity = job.bundle, job.predictions, job.identity
    student = bundle.manifest["chain"].get("student")
    validity = judge(
        instead=job.choice.instead,
        device=device,
        load=load,
        latency=job.latency,
        min_samples=options.plan.min_samples,
        not_finite=job.not_finite,
        interrupted=interrupted,
    )
    return {
        "bundle": {
            "name": bundle.name,
            "sha256": bundle.digest,
            "model_sha256": sha256(bundle.model),
            "student_sha256": student if isinstance(student, str) and SHA256.fullmatch(student) else None,
            "target": bundle.target.name,
            "runtime": bundle.target.runtime,
            "precision": bundle.target.precision,
        },
        "started": started,
        "device": device.to_json(),
        "load": load.to_json(),
        "software": {
            "rkd": rkd.__version__,
            "python": device.python,
            "numpy": np.__version__,
            "runtime": job.choice.runtime,
            "runtime_version": identity.version if identity else None,
            "providers": list(identity.providers) if identity else [],
            "threads": job.choice.threads,
        },
        "settings": options.to_json(),
        "latency": job.latency.to_json() if job.latency else None,
        "memory": job.memory.to_json() if job.memory else None,
        "scores": job.scores.to_json() if job.scores else None,
        "evaluated": {"images": job.evaluated, "of": job.available},
        "labels": {
            "clean": label_digest(predictions.clean),
            "triggers": {name: label_digest(got) for name, got in predictions.triggered.items()},
        }
        if predictions
        else None,
        "exported_scores": job.exported.to_json(),
        "differences": _differences(job),
        "validity": validity.to_json(),
    }
