"""A runtime behind the same three verbs: `with` activates it, `infer` runs one batch, leaving it releases it.

    choice = choose_runner(bundle.target)
    with open_runner(choice, bundle.model, "x.rkd") as runner:
        logits = runner.infer(images)  # uint8 (N, 3, H, W) -> float32 (N, classes)

ONNX Runtime, and TensorRT (`rkd.bench.tensorrt_runner`). Where a bundle for TensorRT meets a machine without it, or
without a CUDA device, it is run on ONNX Runtime's CPU provider instead, and says so: its scores hold for the file, its
latency says nothing about the board.

ONNX Runtime is set up as a deployed program would set it up: its default graph optimisations, its default spinning of
worker threads, one operator at a time, and as many threads as there are physical cores that this process may use.
(Idle pools of other sessions spin for a moment after their last inference; `rkd.bench.latency` waits that out.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from types import ModuleType, TracebackType
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from rkd.bench.device import physical_cores
from rkd.bench.external import refuse_external_data
from rkd.bench.tensorrt_api import import_tensorrt
from rkd.bench.tensorrt_engine import BuildOptions, OnPhase
from rkd.bench.tensorrt_layers import LayerType
from rkd.bench.tensorrt_runner import TensorRtRunner, tensorrt_missing
from rkd.errors import BundleError, ConfigError, MissingExtraError, RuntimeUnavailableError, install_hint
from rkd.progress import say
from rkd.target import Runtime, Target

INPUT, OUTPUT = "images", "logits"
CPU_PROVIDER = "CPUExecutionProvider"
_MAX_THREADS = 1024

Images = NDArray[np.uint8]  # (N, 3, H, W)
Logits = NDArray[np.float32]  # (N, classes)


@dataclass(frozen=True)
class Identity:
    """What ran a model.

    Attributes:
        runtime: `onnxruntime`, `tensorrt` or `tensorrt-rtx`.
        version: of the runtime.
        providers: those in use, first choice first; for TensorRT, the GPU and the types that its layers compute in.
        threads: that compute one operator.
        details: what else the runtime tells about itself, e.g. how many layers compute in which type; name and text.
        layers: of a built engine, where the runtime tells them.
    """

    runtime: str
    version: str
    providers: tuple[str, ...]
    threads: int
    details: tuple[tuple[str, str], ...] = ()
    layers: tuple[LayerType, ...] = ()


@dataclass(frozen=True)
class Choice:
    """Which runtime measures a bundle.

    Attributes:
        runtime: the runtime that is used.
        provider: ONNX Runtime's execution provider.
        threads: that compute one operator.
        instead: why this is not the target's runtime; empty where it is.
        build: for TensorRT, the fields of `rkd.bench.tensorrt_engine.BuildOptions`.
    """

    runtime: Runtime
    provider: str
    threads: int
    instead: str = ""
    build: Mapping[str, Any] = field(default_factory=dict)


class Stages(NamedTuple):
    """Where the time of one inference went, by the device's own clock, in milliseconds."""

    h2d_ms: float
    compute_ms: float
    d2h_ms: float


class Runner(Protocol):
    """One model in one runtime.

    A runner may also have `stages() -> Stages`, the device's times of the last `infer`, and
    `device_memory_bytes() -> int | None`, what the model holds on a device of its own. Both are called outside of what
    is timed; a runner that does not know leaves them out.
    """

    @property
    def identity(self) -> Identity:
        """What runs it; known once it is activated."""

    def __enter__(self) -> Runner: ...  # noqa: PYI034 - typing.Self came with Python 3.11

    def infer(self, images: Images) -> Logits:
        """Logits, float32 (N, classes), of uint8 images, (N, 3, H, W), contiguous.

        Raises:
            BundleError: the model does not run on such a batch.
        """

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class _Identified:
    """What a runner is, from its activation on."""

    _identity: Identity | None = None

    @property
    def identity(self) -> Identity:
        """What runs the model."""
        if self._identity is None:
            raise RuntimeError("the runner is not active")
        return self._identity


class OrtRunner(_Identified):
    """ONNX Runtime with exactly one provider and no silent fallback; for one activation.

    Args:
        model: an ONNX file without external data.
        provider: an execution provider's name.
        threads: that compute one operator.
        origin: names the model in errors.
    """

    def __init__(self, model: bytes, provider: str, threads: int, origin: str) -> None:
        self._model, self._provider, self._threads, self._origin = model, provider, threads, origin
        self._session: Any = None
        self._outputs = [OUTPUT]

    def __enter__(self) -> OrtRunner:  # noqa: PYI034 - as above
        """Load the model.

        Raises:
            MissingExtraError: onnxruntime is not installed.
            RuntimeUnavailableError: it lacks the provider, or would not use it.
            BundleError: it cannot load the model, or the model's input or output is not rkd's.
        """
        ort = import_onnxruntime()
        available = ort.get_available_providers()
        if self._provider not in available:
            raise RuntimeUnavailableError(
                f"{self._origin}: {self._provider} is not in this onnxruntime {ort.__version__}, which has "
                f"{', '.join(available)}; install the onnxruntime build that has it (onnxruntime-gpu for CUDA), "
                "or export for the target ort-cpu"
            )
        refuse_external_data(self._model, self._origin)
        self._session = self._load(ort)
        self._model = b""  # the session has its own copy
        used = self._session.get_providers()
        if used[0] != self._provider:
            self._session = None
            raise RuntimeUnavailableError(
                f"{self._origin}: onnxruntime {ort.__version__} fell back from {self._provider} to {', '.join(used)}; "
                "check the provider's driver and libraries, or export for the target ort-cpu"
            )
        self._check_interface()
        self._identity = Identity("onnxruntime", str(ort.__version__), tuple(used), self._threads)
        return self

    def infer(self, images: Images) -> Logits:
        """Logits, float32 (N, classes), of uint8 images, (N, 3, H, W), contiguous.

        Raises:
            BundleError: the model does not run on such a batch.
        """
        try:
            logits: Logits = self._session.run(self._outputs, {INPUT: images})[0]
        except Exception as error:  # shapes and operators that only fail when they run
            raise BundleError(
                f"{self._origin}: the model does not run on a batch of {len(images)}: {_one_line(error)}; "
                "export it again"
            ) from error
        return logits

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the model."""
        self._session = None

    def _load(self, ort: ModuleType) -> Any:
        options = ort.SessionOptions()
        options.log_severity_level = 4  # failures come as exceptions; its log would cut through the progress display
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.add_session_config_entry("session.load_model_format", "ONNX")  # by default it guesses from the bytes
        if self._provider != CPU_PROVIDER:
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        try:
            session = ort.InferenceSession(self._model, options, providers=[self._provider], enable_fallback=0)
            session.disable_fallback()
        except Exception as error:  # every kind of error comes out of the parser and the providers
            raise BundleError(
                f"{self._origin}: onnxruntime {ort.__version__} cannot load the model with {self._provider}: "
                f"{_one_line(error)}"
            ) from error
        return session

    def _check_interface(self) -> None:
        try:
            inputs = [(i.name, i.type, len(i.shape)) for i in self._session.get_inputs()]
            outputs = [(o.name, o.type) for o in self._session.get_outputs()]
        except Exception as error:  # a name may be no UTF-8
            raise BundleError(f"{self._origin}: the model's inputs cannot be read: {_one_line(error)}") from error
        if inputs != [(INPUT, "tensor(uint8)", 4)] or outputs != [(OUTPUT, "tensor(float)")]:
            self._session = None
            raise BundleError(
                f"{self._origin}: the model takes {inputs} and gives {outputs}, expected uint8 {INPUT!r} of rank 4 and "
                f"float32 {OUTPUT!r}; export it again"
            )


class _TensorRt(_Identified):
    """A `TensorRtRunner` as a `Runner`."""

    def __init__(self, model: bytes, choice: Choice, origin: str, on_stage: OnPhase) -> None:
        self._inner = TensorRtRunner(
            model,
            BuildOptions(**choice.build),
            origin,
            tell=say,
            on_phase=lambda phase, done, total: on_stage(f"engine: {phase}", done, total),
        )
        self._choice = choice

    def __enter__(self) -> _TensorRt:  # noqa: PYI034 - as above
        inner = self._inner.__enter__()
        gpu = inner.gpu
        device = f"{gpu.name} (compute {gpu.compute})" if gpu else ""
        layers = ", ".join(f"{count} in {kind}" for kind, count in inner.layer_types().items())
        details = (("Layers", layers),) if layers else ()
        providers = (device, inner.precision)
        self._identity = Identity(
            self._choice.runtime, inner.version, providers, self._choice.threads, details, inner.layers
        )
        return self

    def infer(self, images: Images) -> Logits:
        return self._inner.infer(images)

    def stages(self) -> Stages:
        found = self._inner.times()
        return Stages(found.to_device_ms, found.compute_ms, found.to_host_ms)

    def device_memory_bytes(self) -> int:
        return self._inner.device_bytes

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._inner.__exit__(kind, error, trace)


def choose_runner(target: Target, threads: int | None = None) -> Choice:
    """Which runtime measures a bundle on this machine.

    Args:
        target: the bundle's.
        threads: that compute one operator; None for the physical cores that this process may use.

    Raises:
        ConfigError: an impossible number of threads.
        MissingExtraError: onnxruntime is needed and not installed.
        RuntimeUnavailableError: no runtime on this machine can run the bundle.
    """
    if threads is not None and not 1 <= threads <= _MAX_THREADS:
        raise ConfigError(f"threads is {threads}, expected 1 to {_MAX_THREADS}")
    count = threads or physical_cores()
    if target.runtime == "onnxruntime":
        import_onnxruntime()
        return Choice("onnxruntime", target.provider, count)
    build = BuildOptions.of(target)
    why = tensorrt_missing(build)
    if not why:
        return Choice(target.runtime, "", count, build=asdict(build))
    try:
        import_onnxruntime()
    except MissingExtraError as error:
        raise RuntimeUnavailableError(
            f"target {target.name} wants TensorRT, which is not available here ({why}), and there is no ONNX Runtime "
            f"to check the file with instead; install it with: {install_hint('ort')}"
        ) from error
    return Choice(
        "onnxruntime",
        CPU_PROVIDER,
        count,
        f"target runtime {target.runtime} is not available here ({why}): measured with ONNX Runtime on the CPU; latency says "
        "nothing about the board; ACC/ASR/RA hold for the file",
    )


def open_runner(
    choice: Choice, model: bytes, origin: str, on_stage: OnPhase = lambda _stage, _done, _total: None
) -> Runner:
    """The runner of a choice, not yet active; `origin` names the model in errors, `on_stage` is told about a build."""
    if choice.runtime != "onnxruntime":
        return _TensorRt(model, choice, origin, on_stage)
    return OrtRunner(model, choice.provider, choice.threads, origin)


def stages_of(runner: Runner) -> Callable[[], Stages] | None:
    """How to ask for the device's times of the last inference; None where the runtime does not tell."""
    found: Callable[[], Stages] | None = getattr(runner, "stages", None)
    return found


def device_memory_of(runner: Runner) -> int | None:
    """Bytes that the model holds on a device of its own; None where there is none, or it is not told."""
    ask: Callable[[], int | None] | None = getattr(runner, "device_memory_bytes", None)
    return ask() if ask else None


def import_runtime(choice: Choice) -> None:
    """Import a choice's runtime, so that its own memory can be told from a model's.

    Raises:
        MissingExtraError: it is not installed.
        RuntimeUnavailableError: it is installed and does not start.
    """
    if choice.runtime == "onnxruntime":
        import_onnxruntime()
    else:
        import_tensorrt(choice.runtime)


def import_onnxruntime() -> ModuleType:
    """ONNX Runtime, by whichever distribution.

    Raises:
        MissingExtraError: it is not installed.
        RuntimeUnavailableError: it is installed and does not start.
    """
    try:
        import onnxruntime
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "onnxruntime":
            raise MissingExtraError("onnxruntime", "ort") from error
        raise RuntimeUnavailableError(
            f"onnxruntime is installed but does not start: {_one_line(error)}; install it again: {install_hint('ort')}"
        ) from error
    module: ModuleType = onnxruntime
    return module


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]
