"""What of this machine rkd can use, and what is missing for what (no torch unless it is there)."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path

from rkd.bench.cuda import Gpu
from rkd.bench.runner import import_onnxruntime
from rkd.bench.tensorrt_api import check_version
from rkd.bench.tensorrt_engine import BuildOptions
from rkd.bench.tensorrt_runner import Machine, tensorrt_missing
from rkd.errors import MissingExtraError, RkdError, RuntimeUnavailableError, install_hint
from rkd.target import Target, builtin_targets, load_target, version

_GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Attributes:
        what: its name.
        state: `ok`, `missing` or `note`.
        detail: what was seen.
        needed_for: which commands need it.
        remedy: what to do where it is missing.
    """

    what: str
    state: str
    detail: str
    needed_for: str
    remedy: str = ""

    def to_json(self) -> dict[str, str]:
        """All fields."""
        return asdict(self)


def diagnose(machine: Machine | None = None) -> list[Finding]:
    """Look at the machine; nothing is changed.

    Args:
        machine: how TensorRT and the GPU are asked; tests put their own here.
    """
    machine = machine or Machine()
    machine = replace(machine, probe=_once(machine.probe))
    cores = len(os.sched_getaffinity(0))
    gpu = _gpu(machine)
    found = [
        Finding(
            "python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}", "everything"
        ),
        Finding("cpu", "ok", f"{cores} cores for this process; {_cpu_features()}", "everything"),
        _memory(),
        _disk(),
        _sensors(),
        gpu,
    ]
    train = install_hint("train")
    found += [
        _package("torch", "teacher, distill, export", train, _torch),
        _package("torchvision", "students by name, public data sets", train),
        _package("safetensors", "teacher, distill, export", train),
        _package("PIL", "image folders", train, distribution="pillow"),
        _package("sklearn", "the built-in digits, demo", train, distribution="scikit-learn"),
        _package("onnx", "export", train),
        _package("onnxscript", "export", train),
        _package("onnxconverter_common", "export to FP16", train, distribution="onnxconverter-common"),
        _onnxruntime(),
        _tensorrt(machine),
        _package("cryptography", "keygen, export --sign, verify --pubkey", install_hint("sign")),
        _package("pycuda", "TensorRT on a board", f"{install_hint('trt')}; or pip install cuda-bindings"),
        _package("cuda-bindings", "TensorRT where pycuda cannot be compiled", "pip install cuda-bindings"),
        _package("tensorrt-rtx", "target rtx-fp16", install_hint("rtx")),
        _package("ray", "suite --launcher ray", install_hint("ray")),
        _package("timm", "teachers named timm:NAME", "pip install timm"),
    ]
    return found + [_target(target, machine, gpu) for target in builtin_targets().values()]


def _package(
    module: str, needed_for: str, remedy: str, detail: Callable[[], str] | None = None, distribution: str = ""
) -> Finding:
    name = distribution or module
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(name, "missing", "not installed", needed_for, remedy)
    try:
        more = f"; {detail()}" if detail is not None else ""
    except Exception as error:  # noqa: BLE001  (a broken installation may raise anything when imported)
        return Finding(
            name, "missing", f"{version}, but it does not work: {error}", needed_for, f"reinstall it: {remedy}"
        )
    return Finding(name, "ok", f"{version}{more}", needed_for)


def _torch() -> str:
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        return "no CUDA device: trains on the CPU"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def _onnxruntime() -> Finding:
    """By importing it: onnxruntime-gpu and others bring the same module under other names."""
    what = ("onnxruntime", "bench and export parity on CPUs")
    try:
        ort = import_onnxruntime()
        providers = ", ".join(ort.get_available_providers())
    except MissingExtraError:
        return Finding(what[0], "missing", "not installed", what[1], install_hint("ort"))
    except Exception as error:  # noqa: BLE001  (as in _package)
        return Finding(what[0], "missing", str(error), what[1], f"reinstall it: {install_hint('ort')}")
    return Finding(what[0], "ok", f"{ort.__version__}; {providers}", what[1])


def _tensorrt(machine: Machine) -> Finding:
    what = ("tensorrt", "bench on Jetson boards")
    served = load_target("jetson-fp16")
    try:
        trt = machine.load(served.runtime)
        check_version(trt, served.runtime, served.min_version, served.below_version)
    except RkdError as error:
        return Finding(what[0], "missing", str(error), what[1])
    return Finding(what[0], "ok", str(trt.__version__), what[1])


def _gpu(machine: Machine) -> Finding:
    try:
        gpu = machine.probe()
    except RuntimeUnavailableError as error:
        return Finding("gpu", "note", str(error), "TensorRT")
    shared = ", shared with the CPU" if gpu.integrated else ""
    driver = f"{gpu.driver // 1000}.{gpu.driver % 1000 // 10}"
    return Finding(
        "gpu",
        "ok",
        f"{gpu.name}, compute capability {gpu.compute}, driver for CUDA {driver}, {gpu.total_bytes / _GIB:.1f} GiB{shared}",
        "TensorRT",
    )


def _once(ask: Callable[[], Gpu]) -> Callable[[], Gpu]:
    """Ask once only: a driver that hangs costs its time once."""
    seen: list[Gpu | RuntimeUnavailableError] = []

    def answer() -> Gpu:
        if not seen:
            try:
                seen.append(ask())
            except RuntimeUnavailableError as error:
                seen.append(error)
        if isinstance(seen[0], RuntimeUnavailableError):
            raise seen[0]
        return seen[0]

    return answer


def _target(target: Target, machine: Machine, gpu: Finding) -> Finding:
    try:
        lacks = _lacks_provider(target) if target.runtime == "onnxruntime" else _lacks_tensorrt(target, machine)
    except Exception as error:  # noqa: BLE001  (as in _package)
        lacks = str(error)
    if lacks == gpu.detail:
        lacks = "no usable GPU, see gpu"
    if lacks:
        return Finding(f"target {target.name}", "note", f"cannot run here: {lacks}", "bench", target.needs)
    return Finding(f"target {target.name}", "ok", "can run here", "bench")


def _lacks_provider(target: Target) -> str:
    ort = import_onnxruntime()
    if version(ort.__version__) < version(target.min_version):
        return f"onnxruntime {ort.__version__} is here, {target.min_version} or newer is needed"
    providers = ort.get_available_providers()
    return "" if target.provider in providers else f"this onnxruntime has {', '.join(providers)}, not {target.provider}"


def _lacks_tensorrt(target: Target, machine: Machine) -> str:
    if missing := tensorrt_missing(BuildOptions.of(target), machine):
        return missing
    gpu = machine.probe()
    if target.compute and gpu.compute not in target.compute:
        return f"{gpu.name} has compute capability {gpu.compute}, it is for {', '.join(target.compute)}"
    if not any(importlib.util.find_spec(name) for name in ("pycuda", "cuda")):
        return "neither pycuda nor cuda-bindings is installed"
    return ""


def _cpu_features() -> str:
    try:
        flags = set(Path("/proc/cpuinfo").read_text(errors="replace").split())
    except OSError:
        return "features not reported"
    names = [
        name
        for name in ("amx_bf16", "avx512_bf16", "avx512_vnni", "avx512f", "avx2", "asimd", "asimddp")
        if name in flags
    ]
    return ", ".join(names) or "no vector extensions reported"


def _sensors(root: Path = Path("/")) -> Finding:
    """What of power, clocks, heat and throttling this machine reports."""
    from rkd.bench.device import visible_cores
    from rkd.bench.sensors.sysfs import Sysfs, power_mode

    watch = Sysfs(root, visible_cores())
    watch.read()  # energy counters need two looks
    seen = watch.read()
    kinds = {"power": seen.watts, "clocks": seen.hertz, "heat": seen.celsius, "throttling": seen.throttle}
    mode = power_mode(root)
    said = [f"{kind} ({', '.join(list(names)[:4])})" for kind, names in kinds.items() if names]
    said += [f"power mode {mode}"] if mode else []
    said += ["tegrastats"] if shutil.which("tegrastats") else []
    missing = [kind for kind, names in kinds.items() if not names]
    detail = "; ".join(filter(None, (", ".join(said), f"not reported: {', '.join(missing)}" if missing else "")))
    return Finding("sensors", "note" if missing else "ok", detail, "power and validity in bench")


def _memory() -> Finding:
    try:
        lines = Path("/proc/meminfo").read_text(errors="replace").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError, IndexError):
        return Finding("memory", "note", "not reported", "everything")
    low = free < 2 * _GIB
    return Finding(
        "memory",
        "note" if low else "ok",
        f"{free / _GIB:.1f} GiB available",
        "teacher, distill",
        "a smaller --batch helps" if low else "",
    )


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free
    low = free < 2 * _GIB
    return Finding(
        "disk",
        "note" if low else "ok",
        f"{free / _GIB:.1f} GiB free in this folder",
        "runs, bundles",
        "free some space" if low else "",
    )
