"""The calls of TensorRT that rkd makes, as Protocols: NVIDIA ships no type stubs.

The same calls exist in TensorRT 10.3 to 11.4 and in TensorRT for RTX; a test compares these Protocols with the real
module by reflection. Nothing else of TensorRT may be used.
"""

# ruff: noqa: D102 - what each call does is in NVIDIA's reference

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Protocol, cast

from rkd.errors import MissingExtraError, RuntimeUnavailableError
from rkd.target import CEILINGS, FLOORS, Runtime, version

MODULES: dict[Runtime, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}


class IOptimizationProfile(Protocol):
    """The batch sizes that an engine takes."""

    def set_shape(self, input: str, min: Sequence[int], opt: Sequence[int], max: Sequence[int]) -> None: ...  # noqa: A002


class ITimingCache(Protocol):
    """Kernels that were timed before."""

    def serialize(self) -> Any: ...


class IBuilderConfig(Protocol):
    """How an engine is built."""

    profiling_verbosity: Any
    progress_monitor: Any

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int: ...
    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None: ...
    def clear_flag(self, flag: Any) -> None: ...
    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache: ...
    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool: ...  # noqa: FBT001
    def get_timing_cache(self) -> ITimingCache | None: ...


class ITensor(Protocol):
    """A network's tensor."""

    name: str
    shape: Sequence[int]


class INetworkDefinition(Protocol):
    """A parsed network."""

    def get_input(self, index: int) -> ITensor | None: ...


class Builder(Protocol):
    """Makes networks and engines."""

    def create_network(self, flags: int) -> INetworkDefinition: ...
    def create_builder_config(self) -> IBuilderConfig: ...
    def create_optimization_profile(self) -> IOptimizationProfile: ...
    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> Any: ...


class ParserError(Protocol):
    """Why a node cannot be parsed."""

    def desc(self) -> str: ...
    def node_name(self) -> str: ...
    def node_operator(self) -> str: ...


class OnnxParser(Protocol):
    """Reads ONNX."""

    num_errors: int

    def parse(self, model: bytes) -> bool: ...
    def get_error(self, index: int) -> ParserError: ...


class EngineInspector(Protocol):
    """Tells what an engine computes in which type."""

    execution_context: Any

    def get_engine_information(self, format: Any) -> str: ...  # noqa: A002


class IExecutionContext(Protocol):
    """Runs an engine."""

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool: ...
    def set_tensor_address(self, name: str, memory: int) -> bool: ...
    def infer_shapes(self) -> list[str]: ...
    def execute_async_v3(self, stream_handle: int) -> bool: ...


class ICudaEngine(Protocol):
    """A built network."""

    num_io_tensors: int
    device_memory_size_v2: int

    def get_tensor_name(self, index: int) -> str: ...
    def get_tensor_mode(self, name: str) -> Any: ...
    def get_tensor_dtype(self, name: str) -> Any: ...
    def get_tensor_shape(self, name: str) -> Sequence[int]: ...
    def create_execution_context(self) -> IExecutionContext | None: ...
    def create_engine_inspector(self) -> EngineInspector: ...


class Runtime_(Protocol):  # noqa: N801 - `Runtime` is the target's
    """Loads engines."""

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None: ...


class Module(Protocol):
    """`tensorrt` or `tensorrt_rtx`."""

    __name__: str
    __version__: str
    ILogger: Any
    IProgressMonitor: Any
    BuilderFlag: Any
    DataType: Any
    LayerInformationFormat: Any
    MemoryPoolType: Any
    NetworkDefinitionCreationFlag: Any
    ProfilingVerbosity: Any
    TensorIOMode: Any

    def Builder(self, logger: Any) -> Builder: ...  # noqa: N802
    def OnnxParser(self, network: INetworkDefinition, logger: Any) -> OnnxParser: ...  # noqa: N802
    def Runtime(self, logger: Any) -> Runtime_: ...  # noqa: N802


def import_tensorrt(runtime: Runtime) -> Module:
    """The module of a target's runtime.

    Raises:
        MissingExtraError: TensorRT for RTX is not installed.
        RuntimeUnavailableError: TensorRT is not installed, or what is installed does not start.
    """
    name = MODULES[runtime]
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name and runtime == "tensorrt-rtx":
            raise MissingExtraError(name, "rtx") from error
        if error.name == name:
            raise RuntimeUnavailableError(
                "tensorrt is not installed; on a Jetson it comes with JetPack: make the venv with --system-site-packages"
            ) from error
        raise RuntimeUnavailableError(f"{name} is installed but does not start: {error}; install it again") from error
    except Exception as error:  # libraries that cannot be loaded, with whatever their loader raises
        raise RuntimeUnavailableError(f"{name} is installed but does not start: {error}; install it again") from error
    return cast("Module", module)


def check_version(module: Module, runtime: Runtime, least: str, below: str) -> None:
    """Refuse a release that the one code path does not serve (`FLOORS`, `CEILINGS`), or that the target does not.

    Raises:
        RuntimeUnavailableError: the release is too old or too new; the message names the way out.
    """
    seen = str(module.__version__)
    ceiling = CEILINGS[runtime]
    least, below = max(least, FLOORS[runtime], key=version), min(below or ceiling, ceiling, key=version)
    if version(least) <= version(seen) < version(below):
        return
    hint = "make a target file of your own, or"
    if version(seen) < version(least):
        hint = "a newer JetPack has it (6.1 and up); without one,"
    elif version(seen) >= version(ceiling):
        hint = "see whether a newer rkd serves it, or"
    raise RuntimeUnavailableError(
        f"{runtime} {seen} is here, the target wants {least} or newer and below {below}; {hint} export for the target "
        "ort-cpu, which needs no GPU"
    )
