"""The whole bench: several bundles in, one result out.

Order: look at the machine, activate every model, latency of all interleaved while another process reads the sensors,
then ACC, ASR and RA of each, then the memory of each in a child. Whatever is wrong with a bundle or a runtime is found
before the first sample.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from datetime import datetime, timezone
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

import rkd
from rkd.bench.comparison import compare
from rkd.bench.device import Device, Load, identify, load_before, visible_cores
from rkd.bench.evaluation import EvaluationSet, evaluation_set, host_labels, judge_step
from rkd.bench.examples import Examples
from rkd.bench.latency import Latency, Plan, Series, measure, summarise
from rkd.bench.memory import CAP_SECONDS, INFERENCES, SECONDS, TIMEOUT_SECONDS, Memory, measure_memory
from rkd.bench.options import BenchOptions
from rkd.bench.result import MOST_FORCED, SCHEMA
from rkd.bench.runner import CPU_PROVIDER, Choice, Identity, Runner, choose_runner, open_runner, stages_of
from rkd.bench.sensors.clocks import locked_clocks
from rkd.bench.sensors.monitor import Monitor
from rkd.bench.sensors.trace import Conditions, Trace, conditions, power
from rkd.bench.tensorrt_layers import layers_to_json
from rkd.bench.validity import busy_limit, findings, judge
from rkd.bundle import Bundle
from rkd.checks import digest
from rkd.errors import BundleError, ConfigError, DataError, PartialError, shortened
from rkd.files import sha256
from rkd.metrics import Flip, Images, Labels, Predictions, Proportion, Scores, class_accuracies, evaluate, flips

_QUICK_MEMORY = (60, 0.5, 0.5)  # inferences, seconds, seconds at most
_QUICK_SECONDS, _QUICK_BATCH = 20.0, 16
_QUICK_LATENCY_SECONDS, _LATENCY_SHARE = 8.0, 0.7  # at most, and of the time until the accuracy must be done
_CHILD_SECONDS = 3.0  # for one bundle's memory: Python and a runtime start in it
_LEAST_MEMORY_SECONDS, _MOST_MEMORY_SECONDS = 5.0, 15.0  # kept for all of them
_SHORTEST_CHILD_SECONDS = 1.0  # less is not worth a start
_AFTER_SECONDS = 0.3  # sensors are read for so long after the last sample
_MOST_FLIPS = 1000

__all__ = ["BenchOptions", "OnStage", "label_digest", "run"]

OnStage = Callable[[str, int, int], None]
"""Told that `done` of `total` steps of a stage (a phase of an engine's build, latency, accuracy, memory) are behind us, never while one is timed.

Draw in the call and return: a display that refreshes from a thread of its own would disturb the latency.
"""


@dataclass
class _Job:
    """One bundle and what is known about it so far."""

    bundle: Bundle
    choice: Choice
    exported: Scores
    images: EvaluationSet
    host_labels: dict[str, Labels] | None
    series: list[Series] = field(default_factory=list)  # one a batch size
    identity: Identity | None = None
    latencies: list[Latency] = field(default_factory=list)
    memory: Memory | None = None
    scores: Scores | None = None
    predictions: Predictions | None = None
    examples: list[dict[str, Any]] = field(default_factory=list)
    not_finite: int = 0


@dataclass(frozen=True)
class _Budget:
    """The 20 s that --quick has for all bundles once they are loaded; other modes take what they need."""

    quick: bool
    clock: Callable[[], float]  # seconds
    start: float
    children: int = 0  # that will measure memory

    @property
    def accuracy_end(self) -> float:
        """When the memory's turn comes, in seconds from the start."""
        kept = max(_LEAST_MEMORY_SECONDS, min(_MOST_MEMORY_SECONDS, self.children * _CHILD_SECONDS))
        return _QUICK_SECONDS - kept

    @property
    def latency_end(self) -> float:
        """When the accuracy's turn comes."""
        return min(_QUICK_LATENCY_SECONDS, _LATENCY_SHARE * self.accuracy_end)

    def left(self, end: float = _QUICK_SECONDS) -> float:
        """Seconds until so many have passed since the start."""
        return self.start + end - self.clock() if self.quick else math.inf

    def child(self, waiting: int) -> float:
        """Seconds for the next child of those that wait for their turn."""
        left = self.left()
        return min(left, max(left / waiting, _CHILD_SECONDS), TIMEOUT_SECONDS)


@dataclass
class _Machine:
    """What is known about the machine."""

    device: Device
    load: Load
    started: str
    ready_ns: int
    plan: Plan
    trace: Trace | None = None
    locked: str | None = None


def run(
    bundles: Sequence[Bundle],
    options: BenchOptions,
    on_stage: OnStage | None = None,
    *,
    per_class: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Measure bundles on this machine.

    Ctrl-C gives what was measured so far: `interrupted` is then true, and every entry is invalid and says so.

    Args:
        bundles: verified, at least one; the first is the one that ratios refer to.
        options: what to measure.
        on_stage: told about progress.
        per_class: state ACC of each class.
        clock: seconds, by which --quick ends.

    Returns:
        What `rkd.bench.result.write` writes.

    Raises:
        ConfigError: no bundle, or a batch that a bundle does not allow.
        BundleError: a bundle's model cannot be loaded or is not what its manifest says.
        DataError: the user's data does not fit a bundle.
        MissingExtraError, RuntimeUnavailableError: this machine lacks a runtime, or does not let its clocks be fixed.
        PartialError: from whatever failed once something had been measured; it holds that, marked as after Ctrl-C.
    """
    tell = on_stage or _silent
    jobs = _jobs(bundles, options)
    stage, interrupted, failure = "start", None, None
    started = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    device = identify()
    with ExitStack() as outer:
        watch = options.sensors and options.latency
        monitor = outer.enter_context(Monitor(visible_cores())) if watch else None
        machine = _Machine(device, load_before(), started, time.perf_counter_ns(), options.plan)
        try:
            with ExitStack() as stack:
                runners = [_activate(job, options, stack, tell) for job in jobs]
                if options.accuracy:
                    _try_accuracy(jobs, runners, options)
                budget = _Budget(options.quick, clock, clock(), len(jobs) if options.memory else 0)
                stage = "latency"
                if options.latency:
                    _latency(jobs, options, tell, machine, budget)
                    _finish(monitor, machine)
                stage = "accuracy"
                if options.accuracy:
                    _accuracy(jobs, runners, tell, budget)
            stage = "memory"
            if options.memory:
                _memory(jobs, options, tell, budget)
        except KeyboardInterrupt:
            interrupted = stage
        except Exception as error:
            if not any(job.latencies or job.scores for job in jobs):
                raise
            interrupted, failure = stage, error
        if monitor:
            machine.trace = monitor.stop()
    seen = _conditions(jobs, machine)
    measured = {
        "schema": SCHEMA,
        "interrupted": interrupted is not None,
        "comparisons": _comparisons(jobs),
        "entries": [_entry(job, options, machine, seen, interrupted, per_class=per_class) for job in jobs],
    }
    if failure:
        raise PartialError(str(failure), measured) from failure
    return measured


def _silent(name: str, done: int, total: int) -> None:
    """Nobody wants to know about progress."""


def label_digest(labels: Labels) -> str:
    """SHA-256 of predicted labels as little-endian int16: equal on two machines if all labels are."""
    return sha256(labels.astype("<i2").tobytes())


def _jobs(bundles: Sequence[Bundle], options: BenchOptions) -> list[_Job]:
    if not bundles:
        raise ConfigError("no bundle to measure; give one, or run in a folder that holds one")
    for bundle in bundles:
        if max(options.batches) > bundle.target.max_batch:
            raise ConfigError(
                f"batch is {max(options.batches)}, {bundle.name} allows at most {bundle.target.max_batch}; use a "
                "smaller batch"
            )
    return [
        _Job(
            bundle,
            choose_runner(bundle.target, options.threads),
            Scores.from_json(bundle.manifest["scores"]["exported"]),
            evaluation_set(bundle, options.data, quick=options.quick),
            host_labels(bundle) if options.data is None else None,
        )
        for bundle in bundles
    ]


def _activate(job: _Job, options: BenchOptions, stack: ExitStack, on_stage: OnStage) -> Runner:
    """Load a model and see that one batch of each size gives what the manifest says."""
    origin = str(job.bundle.path)
    runner = stack.enter_context(open_runner(job.choice, job.bundle.model, origin, on_stage))
    job.identity = runner.identity
    images, _ = job.bundle.evaluation()
    for size in options.batches:
        batch = np.ascontiguousarray(np.resize(images, (size, *images.shape[1:])))
        _try(job, runner, batch)
        job.series.append(Series(runner.infer, batch, stages=stages_of(runner)))
    return runner


def _try_accuracy(jobs: Sequence[_Job], runners: Sequence[Runner], options: BenchOptions) -> None:
    """The first batch of what ACC is measured on: minutes of timing are not to be lost to images that are none."""
    for job, runner in zip(jobs, runners, strict=True):
        batches = job.images.batches(_accuracy_batch(job, quick=options.quick))
        first = next(batches, None)
        if first is None:
            raise DataError(f"{job.images.source}: none of its {job.images.available:,} images can be decoded")
        _try(job, runner, np.ascontiguousarray(first[0]))


def _accuracy_batch(job: _Job, *, quick: bool) -> int:
    """At most so many images at once."""
    return min(_QUICK_BATCH, job.bundle.target.max_batch) if quick else job.bundle.target.max_batch


def _try(job: _Job, runner: Runner, images: Images) -> None:
    logits, expected = runner.infer(images), (len(images), len(job.bundle.classes))
    if logits.dtype != np.float32 or logits.shape != expected:
        raise BundleError(
            f"{job.bundle.path}: the model gives {logits.dtype}{logits.shape}, expected float32{expected}"
        )


def _latency(
    jobs: Sequence[_Job], options: BenchOptions, on_stage: OnStage, machine: _Machine, budget: _Budget
) -> None:
    series = [one for job in jobs for one in job.series]
    machine.plan = machine.plan.within(budget.left(budget.latency_end) / len(series))
    try:
        with locked_clocks(visible_cores()) if options.lock_clocks else nullcontext() as locked:
            machine.locked = locked
            measure(
                series,
                machine.plan,
                lambda done, total: on_stage("latency", done, total),
                enough=lambda: budget.left(budget.latency_end) <= 0,
            )
    finally:
        for job in jobs:
            job.latencies = [found for one in job.series if (found := summarise(one))]


def _finish(monitor: Monitor | None, machine: _Machine) -> None:
    """Look at the machine for a moment after the last sample."""
    if monitor:
        time.sleep(_AFTER_SECONDS)
        machine.trace = monitor.stop()


def _accuracy(jobs: Sequence[_Job], runners: Sequence[Runner], on_stage: OnStage, budget: _Budget) -> None:
    """On all images, or on as many as the budget allows, one batch at least."""
    before, total = 0, sum(len(job.images.rows) for job in jobs)
    on_stage("accuracy", 0, total)

    def batches(job: _Job, examples: Examples, seconds: float) -> Iterator[tuple[Images, Labels]]:
        at, end = 0, budget.clock() + seconds
        for images, labels in job.images.batches(_accuracy_batch(job, quick=budget.quick)):
            examples.add(at, images, labels)
            yield images, labels
            at += len(labels)
            on_stage("accuracy", before + at, total)
            if budget.clock() >= end:
                return

    for i, (job, runner) in enumerate(zip(jobs, runners, strict=True)):
        triggers = job.bundle.triggers()
        examples = Examples(triggers)
        part = batches(job, examples, budget.left(budget.accuracy_end) / (len(jobs) - i))
        job.scores, job.predictions = evaluate(_predictor(job, runner), part, triggers)
        before += len(job.images.rows)
        on_stage("accuracy", before, total)
        job.images = job.images.first(len(job.predictions.labels))
        job.examples = examples.to_json(job.predictions, job.bundle.classes)


def _predictor(job: _Job, runner: Runner) -> Callable[[Images], NDArray[Any]]:
    def predict(images: Images) -> NDArray[Any]:
        logits = runner.infer(np.ascontiguousarray(images))
        job.not_finite += int((~np.isfinite(logits).all(axis=1)).sum())
        return logits

    return predict


def _memory(jobs: Sequence[_Job], options: BenchOptions, on_stage: OnStage, budget: _Budget) -> None:
    length = _QUICK_MEMORY if options.quick else (INFERENCES, SECONDS, CAP_SECONDS)
    for done, job in enumerate(jobs):
        on_stage("memory", done, len(jobs))
        shape = (options.batch, *job.bundle.manifest["input"]["shape"])
        timeout = budget.child(len(jobs) - done)
        if timeout < _SHORTEST_CHILD_SECONDS:
            job.memory = Memory(reason="no time was left for it; measure without --quick")
            continue
        job.memory = measure_memory(job.bundle.model, job.choice, shape, timeout, *length)
    on_stage("memory", len(jobs), len(jobs))


def _conditions(jobs: Sequence[_Job], machine: _Machine) -> Conditions | None:
    if machine.trace is None:
        return None
    slices = [span for job in jobs for one in job.series for span in one.slices]
    return conditions(machine.trace, slices, machine.ready_ns, busy_limit(machine.device.cores))


def _comparisons(jobs: Sequence[_Job]) -> list[dict[str, Any]]:
    """Every pair of bundles, at every batch size."""
    found = []
    for (i, first), (j, second) in combinations(enumerate(jobs), 2):
        for one, other in zip(first.series, second.series, strict=False):
            if pair := compare(one, other):
                found.append({"first": i, "second": j, "batch": len(one.images), **pair.to_json()})
    return found


def _differences(job: _Job) -> list[dict[str, Any]] | None:
    """Where this machine's hits differ from the exporting host's; None if not all images were evaluated."""
    if job.scores is None or job.images.source != "bundle" or len(job.images.rows) < job.images.available:
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


def _agreement(job: _Job) -> tuple[Proportion, list[Flip]] | None:
    if job.predictions is None or job.host_labels is None:
        return None
    return flips(job.predictions, job.host_labels, job.images.rows)


def _entry(
    job: _Job,
    options: BenchOptions,
    machine: _Machine,
    seen: Conditions | None,
    interrupted: str | None,
    *,
    per_class: bool,
) -> dict[str, Any]:
    predictions, identity, images = job.predictions, job.identity, job.images
    agreement, evaluated = _agreement(job), predictions is not None
    validity = judge(
        instead=job.choice.instead,
        device=machine.device,
        on_gpu=job.choice.provider != CPU_PROVIDER,
        load=machine.load,
        conditions=seen,
        latencies={latency.batch: latency for latency in job.latencies},
        min_samples=machine.plan.min_samples,
        seconds=machine.plan.seconds,
        not_finite=job.not_finite,
        classes_present=images.classes_present if evaluated else None,
        interrupted=interrupted,
    )
    return {
        "bundle": _bundle(job.bundle),
        "host": None,
        "started": machine.started,
        "device": machine.device.to_json(),
        "load": machine.load.to_json(),
        "software": {
            "rkd": rkd.__version__,
            "python": machine.device.python,
            "numpy": np.__version__,
            "runtime": job.choice.runtime,
            "runtime_version": identity.version if identity else None,
            "providers": list(identity.providers) if identity else [],
            "threads": job.choice.threads,
            "details": dict(identity.details) if identity else {},
        },
        "layers": layers_to_json(identity.layers) if identity and identity.layers else None,
        "settings": {**options.to_json(), "clocks_locked_by": machine.locked},
        "latency": job.latencies[0].to_json() if job.latencies else None,
        "sweep": [latency.to_json() for latency in job.latencies[1:]],
        "memory": job.memory.to_json() if job.memory else None,
        "power": _power(job, machine),
        "conditions": seen.to_json() if seen else None,
        "scores": job.scores.to_json() if job.scores else None,
        "classes": _classes(predictions, job.bundle.classes) if per_class and predictions else None,
        "evaluated": {
            "source": images.source,
            "images": len(images.rows) if evaluated else 0,
            "of": images.available,
        },
        "labels": {
            "clean": label_digest(predictions.clean),
            "triggers": {name: label_digest(got) for name, got in predictions.triggered.items()},
        }
        if predictions
        else None,
        "agreement": {
            "share": agreement[0].to_json(),
            "flips": [dict(flip.__dict__) for flip in agreement[1][:_MOST_FLIPS]],
        }
        if agreement
        else None,
        "examples": job.examples,
        "exported_scores": job.exported.to_json(),
        "differences": _differences(job),
        "gates": [],
        "findings": [
            *(judge_step(job.bundle, predictions, images.rows) if predictions and job.host_labels else ()),
            *findings(
                job.memory,
                scores=job.scores,
                classes=len(job.bundle.classes),
                images=(len(images.rows), images.available) if evaluated else None,
                notes=images.notes if evaluated else (),
                flips=len(agreement[1]) if agreement else 0,
            ),
        ],
        "validity": validity.to_json(),
    }


def _bundle(bundle: Bundle) -> dict[str, Any]:
    student = bundle.manifest["chain"].get("student")
    return {
        "name": bundle.name,
        "role": bundle.role,
        "sha256": bundle.digest,
        "model_sha256": sha256(bundle.model),
        "student_sha256": student if digest(student) is None else None,
        "target": bundle.target.name,
        "runtime": bundle.target.runtime,
        "precision": bundle.target.precision,
        "forced": [shortened(line, 500) for line in bundle.forced[:MOST_FORCED]],
    }


def _power(job: _Job, machine: _Machine) -> dict[str, Any] | None:
    """Of the first batch size's slices."""
    if machine.trace is None or not job.latencies:
        return None
    mean_s = job.latencies[0].mean_ms / 1e3
    found = power(machine.trace, job.series[0].slices, machine.ready_ns, mean_s)
    return found.to_json() if found else None


def _classes(predictions: Predictions, names: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {"name": shortened(name, 80), "acc": share.to_json()}
        for name, share in zip(names, class_accuracies(predictions, len(names)), strict=True)
    ]
