"""The bench part of `make bench`: rkd's bench against bare loops, each figure a ratio measured in one run.

latency     p50 of rkd's loop over that of a bare ONNX Runtime loop and of Polygraphy's runner on the same model, in turn;
            rkd's p50 beside the `model_run` events of ONNX Runtime's own profiler, of the very same inferences; the mean
            beside the one that `polygraphy run --onnxrt` prints. The sensors are read meanwhile, as in every real run.
harness     what rkd's loop costs an inference of a model that does nothing, without and with the sensors being read.
accuracy    images/s of the accuracy pass over a bare loop with the same batches.
planted     two ONNX nodes more, as rkd sees them and as ONNX Runtime's profiler does; a leak and a noisy neighbour, by the
            name that rkd gives them.
help        seconds of `rkd bench --help` in a fresh process.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper, numpy_helper

from rkd.bench import session
from rkd.bench.comparison import ratio
from rkd.bench.device import visible_cores
from rkd.bench.latency import Plan, Series, measure, sample, summarise
from rkd.bench.memory import growth
from rkd.bench.memory_child import run as run_for_memory
from rkd.bench.options import BenchOptions
from rkd.bench.runner import CPU_PROVIDER, OrtRunner
from rkd.bench.sensors.monitor import Monitor
from rkd.bench.sensors.trace import conditions
from rkd.bench.validity import busy_limit
from rkd.bundle import Bundle, read_bundle
from rkd.export import export_bundle
from rkd.metrics import evaluate
from rkd.models import build
from rkd.network import NORMALISATIONS, Network
from rkd.target import load_target

THREADS = 1
Infer = Callable[[np.ndarray], object]


def make_bundle(folder: Path) -> Bundle:
    """A wrn-16-1 with random weights and 1,000 random images."""
    torch.manual_seed(0)
    classes = tuple("0123456789")
    network = Network(build("wrn-16-1", 10, (32, 32)), "wrn-16-1", classes, (32, 32), NORMALISATIONS["cifar10"])
    rng = np.random.default_rng(0)
    evaluation = rng.integers(0, 256, (1000, 3, 32, 32), dtype=np.uint8), rng.integers(0, 10, 1000)
    chain = dict.fromkeys(("teacher", "config", "student"), "0" * 64)
    report = export_bundle(
        network, load_target("ort-cpu"), name="bench", evaluation=evaluation, chain=chain, folder=folder
    )
    return read_bundle(report.path)


def bare_session(model: bytes, profile: str = "") -> onnxruntime.InferenceSession:
    """ONNX Runtime as its documentation starts it, with as many threads as rkd."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = THREADS, 4
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, profile
    return onnxruntime.InferenceSession(model, options, providers=[CPU_PROVIDER])


def bare_times(infer: Infer, images: np.ndarray, seconds: float) -> list[int]:
    """The shortest loop there is."""
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter_ns()
        infer(images)
        times.append(time.perf_counter_ns() - start)
    return times


def latency(bundle: Bundle, folder: Path, rounds: int = 16, seconds: float = 0.4) -> None:
    """Print p50 over a bare loop's, ONNX Runtime's own, and Polygraphy's."""
    images = np.ascontiguousarray(bundle.evaluation()[0][:1])
    plain, profiled = bare_session(bundle.model), bare_session(bundle.model, str(folder / "ort"))
    runs: dict[str, Infer] = {"a bare loop": lambda x: plain.run(["logits"], {"images": x})}
    polygraphy = polygraphy_runner(bundle.model)
    if polygraphy:
        runs["polygraphy's OnnxrtRunner"] = polygraphy
    medians: dict[str, list[float]] = {name: [] for name in ("rkd", *runs)}
    traced = Series(lambda x: profiled.run(["logits"], {"images": x}), images)
    with Monitor(visible_cores()), OrtRunner(bundle.model, CPU_PROVIDER, THREADS, "m") as runner:
        series = Series(runner.infer, images)
        order = list(medians)
        for turn in range(rounds + 1):
            for name in order[turn % len(order) :] + order[: turn % len(order)]:
                if name == "rkd":
                    before = series.n
                    sample(series, 1, seconds, 60)
                    found = series.times[before : series.n]
                else:
                    found = np.array(bare_times(runs[name], images, seconds))
                if turn:
                    medians[name].append(float(np.median(found)))
        sample(traced, 1000, 2.0, 60)
    print(f"latency, wrn-16-1, batch 1, {THREADS} thread, {rounds} rounds of {seconds:g} s in turn")
    (events,) = profile_ms(profiled, "model_run")
    seen = np.median(traced.times[: traced.n]) / 1e6
    print(
        f"  the same {len(events):,} inferences: rkd's p50 {seen:.4f} ms, `model_run` events {np.median(events):.4f} ms"
    )
    for name in runs:
        pair = ratio(medians[name], medians["rkd"])
        if pair:
            print(f"  rkd's p50 over {name}'s: {pair.ratio:.4f} [{pair.low:.4f}, {pair.high:.4f}]")


def profile_ms(profiled: onnxruntime.InferenceSession, *names: str) -> list[list[float]]:
    """The milliseconds of each event that ONNX Runtime's profiler saw by these names; ends the profiling."""
    events = json.loads(Path(profiled.end_profiling()).read_text())
    return [[event["dur"] / 1e3 for event in events if event.get("name") == name] for name in names]


def polygraphy_command(bundle: Bundle, folder: Path) -> None:
    """Print the mean that `polygraphy run --onnxrt` states and rkd's, both on one core: it takes no number of threads."""
    tool = shutil.which("polygraphy", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if tool is None:
        print("  (polygraphy's command is not installed)")
        return
    model = folder / "model.onnx"
    model.write_bytes(bundle.model)
    shape = ",".join(map(str, (1, *bundle.manifest["input"]["shape"])))
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        done = subprocess.run(
            [tool, "run", str(model), "--onnxrt", "--input-shapes", f"images:[{shape}]", "--iterations", "1000", "--sequential-runners", "--warm-up", "200"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        with OrtRunner(bundle.model, CPU_PROVIDER, THREADS, "m") as runner:
            series = Series(runner.infer, np.ascontiguousarray(bundle.evaluation()[0][:1]))
            measure([series], Plan(1.5, 400, 60, 5))
    finally:
        os.sched_setaffinity(0, cores)
    stated = re.search(r"Average inference time: ([\d.]+) ms", done.stdout)
    ours = summarise(series)
    said = f"{float(stated[1]):.4f} ms" if stated else f"nothing (status {done.returncode})"
    print(f"  on one core, mean: polygraphy run --onnxrt says {said}, rkd {ours.mean_ms if ours else 0:.4f} ms")


def polygraphy_runner(model: bytes) -> Infer | None:
    """Polygraphy's runner on the same session settings; None where it is not installed."""
    try:
        from polygraphy.backend.onnxrt import OnnxrtRunner
    except ImportError:
        print("  (polygraphy is not installed)")
        return None
    runner = OnnxrtRunner(bare_session(model))
    runner.activate()
    return lambda x: runner.infer({"images": x}, check_inputs=False)


def harness() -> None:
    """Print what rkd's loop costs an inference, without and with the sensors being read."""
    for words, watching in (("sensors off", nullcontext()), ("sensors read", Monitor(visible_cores()))):
        series = Series(lambda _: None, np.zeros((1, 3, 2, 2), np.uint8), times=np.empty(1_000_000, np.int64))
        with watching:
            start = time.perf_counter_ns()
            sample(series, 1_000_000, 0, 60)
            passed = time.perf_counter_ns() - start
        times = series.times[: series.n] / 1e3
        print(
            f"harness, {words}: {passed / series.n / 1e3:.3f} us an inference, of which {np.median(times):.3f} us "
            f"(p99.9 {np.percentile(times, 99.9):.3f}) are in the figure"
        )


def accuracy(bundle: Bundle, rounds: int = 8) -> None:
    """Print images/s of the accuracy pass over a bare loop's."""
    images, labels = bundle.evaluation()
    plain = bare_session(bundle.model)
    rates: dict[str, list[float]] = {"rkd": [], "bare": []}
    with OrtRunner(bundle.model, CPU_PROVIDER, THREADS, "m") as runner:
        for _ in range(rounds + 1):
            start = time.perf_counter()
            hits = sum(
                int((plain.run(["logits"], {"images": images[i : i + 64]})[0].argmax(1) == labels[i : i + 64]).sum())
                for i in range(0, len(labels), 64)
            )
            rates["bare"].append(len(labels) / (time.perf_counter() - start))
            start = time.perf_counter()
            batches = ((images[i : i + 64], labels[i : i + 64]) for i in range(0, len(labels), 64))
            scores, _ = evaluate(lambda x: runner.infer(np.ascontiguousarray(x)), batches)
            rates["rkd"].append(len(labels) / (time.perf_counter() - start))
            assert scores.acc.hits == hits
    pair = ratio(rates["bare"][1:], rates["rkd"][1:])
    if pair:
        print(f"accuracy pass: {pair.ratio:.3f} of a bare loop's images/s [{pair.low:.3f}, {pair.high:.3f}]")


def with_slow_nodes(model: bytes, width: int = 100_000) -> bytes:
    """The same predictions after two matrix products more."""
    found = onnx.load_from_string(model)
    logits = found.graph.output[0]
    found.graph.node[[n.output[0] for n in found.graph.node].index(logits.name)].output[0] = "before"
    classes = logits.type.tensor_type.shape.dim[-1].dim_value
    up, down = np.eye(classes, width, dtype=np.float32), np.eye(width, classes, dtype=np.float32)
    for name, weights, source, result in (("up", up, "before", "wide"), ("down", down, "wide", logits.name)):
        found.graph.initializer.append(numpy_helper.from_array(weights, f"planted_{name}_weights"))
        found.graph.node.append(
            helper.make_node("MatMul", [source, f"planted_{name}_weights"], [result], f"planted_{name}")
        )
    return bytes(found.SerializeToString())


def planted(bundle: Bundle, folder: Path) -> None:
    """Print what rkd says of slow nodes, a leak and a noisy neighbour that are really there."""
    images = np.ascontiguousarray(bundle.evaluation()[0][:1])
    slow = with_slow_nodes(bundle.model)
    # The profiler sees the very inferences that rkd times; it costs time itself, so it is on in both models.
    plain, profiled = bare_session(bundle.model, str(folder / "plain")), bare_session(slow, str(folder / "planted"))
    with OrtRunner(bundle.model, CPU_PROVIDER, THREADS, "m") as runner:
        both = [Series(lambda x, one=one: one.run(["logits"], {"images": x}), images) for one in (plain, profiled)]
        with Monitor(visible_cores()):
            measure(both, Plan(4.0, 400, 60, 5))
        (whole,) = profile_ms(plain, "model_run")
        slower, *nodes = profile_ms(profiled, "model_run", "planted_up_kernel_time", "planted_down_kernel_time")
        more = np.median(slower[-both[1].n :]) - np.median(whole[-both[0].n :])
        before, after = (summarise(one) for one in both)
        if before and after:
            print(
                f"planted nodes: seen as +{after.p50.ms - before.p50.ms:.4f} ms at p50; onnxruntime's profiler: `model_run` "
                f"+{more:.4f} ms, the nodes alone {sum(np.median(times) for times in nodes):.4f} ms (they push other weights out of the cache)"
            )
        kept = []

        class Leaking:
            identity = runner.identity

            def infer(self, x: np.ndarray) -> np.ndarray:
                kept.append(mmap.mmap(-1, 50_000))  # not from memory that this process has freed before
                kept[-1].write(b"x" * 50_000)
                return runner.infer(x)

        done, _, sizes = run_for_memory(Leaking(), images, 400, 0, 30)  # type: ignore[arg-type]
        print(f"planted leak of 50 kB an inference: growth and leak {growth(sizes)} over {done} inferences")
    with (
        Monitor(visible_cores()) as watching,
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) as neighbour,
    ):
        start = time.perf_counter_ns()
        time.sleep(3)
        end = time.perf_counter_ns()
        neighbour.kill()
        seen = conditions(watching.stop(), [(start, end)], start, busy_limit(len(visible_cores())))
    print(f"planted neighbour of 1 core: {seen.others}")


def whole_run(bundle: Bundle) -> None:
    """Print how long a quick answer takes."""
    start = time.perf_counter()
    session.run([bundle], BenchOptions(mode="quick", threads=THREADS))
    print(f"quick: a table after {time.perf_counter() - start:.1f} s")


def help_time() -> None:
    """Print the median time of `rkd bench --help`."""
    seconds = []
    for _ in range(7):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "rkd", "bench", "--help"], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - started)
    print(f"help: `rkd bench --help` {float(np.median(seconds)):.3f} s (median of 7)")


def main() -> None:
    """All of it."""
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, onnxruntime {onnxruntime.__version__}")
    with tempfile.TemporaryDirectory() as temporary:
        bundle = make_bundle(Path(temporary))
        latency(bundle, Path(temporary))
        polygraphy_command(bundle, Path(temporary))
        harness()
        accuracy(bundle)
        planted(bundle, Path(temporary))
        whole_run(bundle)
    help_time()


if __name__ == "__main__":
    main()
