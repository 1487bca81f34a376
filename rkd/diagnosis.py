"""What of this machine rkd can use, and what is missing for what (no torch unless it is there)."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

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


def diagnose() -> list[Finding]:
    """Look at the machine; nothing is changed."""
    cores = len(os.sched_getaffinity(0))
    found = [
        Finding(
            "python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}", "everything"
        ),
        Finding("cpu", "ok", f"{cores} cores for this process; {_cpu_features()}", "everything"),
        _memory(),
        _disk(),
        _sensors(),
    ]
    train = "pip install 'rkd[train]'"
    found += [
        _package("torch", "teacher, distill, export", train, _torch),
        _package("torchvision", "students by name, public data sets", train),
        _package("safetensors", "teacher, distill, export", train),
        _package("PIL", "image folders", train, distribution="pillow"),
        _package("sklearn", "the built-in digits, demo", train, distribution="scikit-learn"),
        _package("onnx", "export", train),
        _package("onnxscript", "export", train),
        _package("onnxconverter_common", "export to FP16", train, distribution="onnxconverter-common"),
        _package("onnxruntime", "bench and export parity on CPUs", "pip install 'rkd[ort]'", _onnxruntime),
        _package(
            "tensorrt",
            "bench on Jetson boards",
            "it comes with JetPack; use a venv with --system-site-packages",
        ),
        _package("cryptography", "keygen, export --sign, verify --pubkey", "pip install 'rkd[sign]'"),
        _package("pycuda", "TensorRT on a board", "pip install 'rkd[trt]', or cuda-bindings"),
        _package("cuda-bindings", "TensorRT where pycuda cannot be compiled", "pip install cuda-bindings"),
        _package("tensorrt-rtx", "target rtx-fp16", "pip install 'rkd[rtx]'"),
        _package("ray", "suite --launcher ray", "pip install 'rkd[ray]'"),
        _package("timm", "teachers named timm:NAME", "pip install timm"),
    ]
    return found


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


def _onnxruntime() -> str:
    return ", ".join(importlib.import_module("onnxruntime").get_available_providers())


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
