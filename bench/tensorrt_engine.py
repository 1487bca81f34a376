"""Build a TensorRT engine from ONNX on the machine that runs it, and keep it for the next time.

One code path for TensorRT 10.3 to 11.4 and TensorRT for RTX: the network is strongly typed, so the types are those that
the ONNX file has, and no builder flag decides precision. (Files with FP32 layers also switch TF32 off, which is on by
default.)

An engine is bound to the TensorRT release, the GPU and the driver, and deserialising one runs native code: only engines
that this user built on this machine are loaded, each only where its key fits in every part.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from rkd.bench.cuda import Gpu
from rkd.bench.external import refuse_external_data
from rkd.bench.tensorrt_api import MODULES, Builder, INetworkDefinition, IOptimizationProfile, Module, OnnxParser
from rkd.errors import BundleError, RuntimeUnavailableError, StorageError
from rkd.files import sha256, write_file
from rkd.target import Precision, Runtime, Target

INPUT, OUTPUT = "images", "logits"
_MIB = 2**20
_FORMAT = 1
_HEADER_LIMIT_BYTES = 1 << 16
_LOG_LINES = 20
_ROOM_MIB = 256  # for CUDA's own context and kernels

OnPhase = Callable[[str, int, int], None]
"""Told that `done` of `total` steps of a phase of a build are behind us."""


@dataclass(frozen=True)
class BuildOptions:
    """What decides an engine besides the model and the machine.

    Attributes:
        target: its name, for errors.
        runtime: `tensorrt` or `tensorrt-rtx`.
        precision: that the file is typed in, which the built engine is checked for.
        rest: precision of an INT8 file's other layers; empty for other files.
        opt_batch, max_batch: of the optimisation profile, whose least batch is 1.
        workspace_mib: cap of the builder's memory; 0 for none.
        min_version, below_version: of the runtime.
        compute: capabilities that the target is for; empty for any.
    """

    target: str
    runtime: Runtime
    precision: Precision
    rest: str
    opt_batch: int
    max_batch: int
    workspace_mib: int
    min_version: str
    below_version: str
    compute: Sequence[str]

    @classmethod
    def of(cls, target: Target) -> BuildOptions:
        """The options of a target."""
        rest = target.quantisation.rest if target.quantisation is not None else ""
        return cls(
            target.name, target.runtime, target.precision, rest, target.opt_batch, target.max_batch,
            target.workspace_mib, target.min_version, target.below_version, list(target.compute),
        )  # fmt: skip


class _Log:
    """TensorRT's errors and warnings; the last few explain a failure."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, text: str) -> None:
        self.lines = [*self.lines[-_LOG_LINES:], " ".join(text.split())[:300]]

    def why(self) -> str:
        return "; ".join(self.lines[-2:]) or "TensorRT gives no reason"


def make_logger(trt: Module) -> tuple[Any, _Log]:
    """A logger that keeps errors instead of printing them."""
    log = _Log()

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, text: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                log.add(text)

    return Logger(), log


def _monitor(trt: Module, on_phase: OnPhase) -> Any:
    """Reports the phases of a build, which TensorRT may run on several threads; it never stops one."""
    lock = Lock()

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:  # noqa: ARG002 - theirs
            with lock:
                self._steps[phase_name] = num_steps
                on_phase(phase_name, 0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            with lock:
                on_phase(phase_name, step + 1, self._steps.get(phase_name, step + 1))
            return True

        def phase_finish(self, phase_name: str) -> None:
            with lock:
                if (steps := self._steps.pop(phase_name, None)) is not None:
                    on_phase(phase_name, steps, steps)

    return Monitor()


def build_engine(
    trt: Module,
    model: bytes,
    options: BuildOptions,
    origin: str,
    *,
    on_phase: OnPhase = lambda _phase, _done, _total: None,
    timing_cache: bytes = b"",
) -> tuple[bytes, bytes]:
    """Build an engine; needs no GPU with TensorRT for RTX, and one with TensorRT.

    Args:
        trt: the module.
        model: an ONNX file.
        options: of the build.
        origin: names the model in errors.
        on_phase: told the phase and step of the build.
        timing_cache: kernels that were timed before; empty for none.

    Returns:
        The serialised engine, and the timing cache for the next build (empty where there is none).

    Raises:
        BundleError: TensorRT cannot parse the model.
        RuntimeUnavailableError: it cannot build it.
    """
    refuse_external_data(model, origin)
    logger, log = make_logger(trt)
    builder = trt.Builder(logger)
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model):
        raise BundleError(
            f"{origin}: {options.runtime} {trt.__version__} cannot parse the model: {_parse_errors(parser)}"
        )
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # or the inspector would not tell types
    config.progress_monitor = _monitor(trt, on_phase)
    if options.workspace_mib:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib * _MIB)
    if "fp32" in (options.precision, options.rest):
        config.clear_flag(trt.BuilderFlag.TF32)
    config.add_optimization_profile(_profile(builder, network, options, origin))
    times = trt.__name__ == MODULES["tensorrt"]  # TensorRT for RTX times nothing while it builds, and warns when asked
    if times:
        config.set_timing_cache(config.create_timing_cache(timing_cache), False)  # noqa: FBT003 - positional everywhere
    built = builder.build_serialized_network(network, config)
    if built is None:
        raise RuntimeUnavailableError(
            f"{origin}: {options.runtime} {trt.__version__} cannot build the engine: {log.why()}; "
            "free memory, lower workspace_mib in the target, or export for the target ort-cpu"
        )
    cache = config.get_timing_cache() if times else None
    return bytes(built), b"" if cache is None else bytes(cache.serialize() or b"")


def _profile(builder: Builder, network: INetworkDefinition, options: BuildOptions, origin: str) -> IOptimizationProfile:
    image = network.get_input(0)
    if image is None or image.name != INPUT or len(image.shape) != 4:
        raise BundleError(f"{origin}: the model has no input {INPUT!r} of rank 4; export it again")
    batch, *rest = image.shape
    least, best, most = (1, options.opt_batch, options.max_batch) if batch == -1 else (batch,) * 3
    profile = builder.create_optimization_profile()
    profile.set_shape(INPUT, (least, *rest), (best, *rest), (most, *rest))
    return profile


def _parse_errors(parser: OnnxParser) -> str:
    lines = []
    for i in range(min(parser.num_errors, 3)):
        error = parser.get_error(i)
        node, operator = error.node_name(), error.node_operator()
        where = f"node {node!r} ({operator}): " if node or operator else ""
        lines.append(where + " ".join(str(error.desc()).split())[:300])
    return "; ".join(dict.fromkeys(lines)) or "no reason given"


def check_memory(options: BuildOptions, model_bytes: int, free_bytes: int) -> None:
    """See that a build has room, before it fails halfway: workspace, four copies of the weights, CUDA's own part.

    Raises:
        RuntimeUnavailableError: less is free.
    """
    needed = (options.workspace_mib + _ROOM_MIB) * _MIB + 4 * model_bytes
    if free_bytes < needed:
        raise RuntimeUnavailableError(
            f"building the engine takes about {needed / _MIB:,.0f} MiB, {free_bytes / _MIB:,.0f} MiB are free; stop other "
            f"programs, or lower workspace_mib = {options.workspace_mib} in a copy of the target {options.target}"
        )


# ------------------------------------------------------------------------------------------------------- engine cache


def cache_folder() -> Path:
    """`$RKD_CACHE`, or `rkd` in the user's cache."""
    if place := os.environ.get("RKD_CACHE"):
        return Path(place)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rkd"


def engine_key(trt: Module, model: bytes, options: BuildOptions, gpu: Gpu) -> dict[str, Any]:
    """Everything that an engine depends on; two engines may stand for each other only where all of it is equal."""
    return {
        "format": _FORMAT,
        "model": sha256(model),
        "runtime": options.runtime,
        "version": str(trt.__version__),
        "gpu": asdict(gpu),
        "options": asdict(options),
    }


def store_engine(folder: Path, key: Mapping[str, Any], engine: bytes) -> Path:
    """Keep an engine for the next time.

    Raises:
        StorageError: the disk said no.
    """
    path = _place(folder, key)
    _own_folder(path.parent)
    head = json.dumps({**key, "engine": sha256(engine)}, sort_keys=True).encode()
    write_file(path, head + b"\n" + engine, mode=0o600)
    return path


def load_engine(folder: Path, key: Mapping[str, Any]) -> bytes | None:
    """An engine that was kept under this very key; None where there is none that can be trusted.

    Refused are: another key, a digest that does not fit, files and folders of other users, and those that others can
    write to.
    """
    path = _place(folder, key)
    try:
        if not all(_owned(place) for place in (path.parent, path)):
            return None
        head, _, engine = path.read_bytes().partition(b"\n")
        stored = json.loads(head) if len(head) < _HEADER_LIMIT_BYTES else None
    except (OSError, ValueError, RecursionError):
        return None
    wanted = json.loads(json.dumps({**key, "engine": sha256(engine)}))
    return engine if stored == wanted and engine else None


def load_timings(folder: Path, key: Mapping[str, Any]) -> bytes:
    """What earlier builds with this TensorRT on this GPU timed; empty where there is nothing."""
    path = _timings(folder, key)
    try:
        return path.read_bytes() if _owned(path.parent) and _owned(path) else b""
    except OSError:
        return b""


def store_timings(folder: Path, key: Mapping[str, Any], timings: bytes) -> None:
    """Keep timings; a disk that refuses costs time later, not this build."""
    if not timings:
        return
    path = _timings(folder, key)
    try:
        _own_folder(path.parent)
        write_file(path, timings, mode=0o600)
    except StorageError:
        return


def _place(folder: Path, key: Mapping[str, Any]) -> Path:
    return folder / "engines" / f"{_digest(key)}.engine"


def _timings(folder: Path, key: Mapping[str, Any]) -> Path:
    part = {name: key[name] for name in ("format", "runtime", "version", "gpu")}
    return folder / "engines" / f"{_digest(part)}.timings"


def _digest(key: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def _own_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise StorageError(f"{folder}: {error.strerror or error}; set RKD_CACHE to a folder of yours") from error


def _owned(path: Path) -> bool:
    """Whether it is this user's and nobody else can write to it; a link is nobody's."""
    status = path.lstat()
    return not stat.S_ISLNK(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022
