"""One engine on one GPU: pinned buffers, one stream, events.

    with TensorRtRunner(model, options, "x.rkd") as runner:
        logits = runner.infer(images)      # host -> device -> host, then wait

The order of an inference: copy to pinned memory; [event] copy to the device [event] execute [event] copy to the host
[event]; wait. The driver is asked in a child process before any TensorRT object exists, because a process without a
working driver can end by a signal within TensorRT.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rkd.bench.cuda import Cuda, Gpu, open_cuda, probe_gpu
from rkd.bench.device import available_bytes
from rkd.bench.external import quantised_layers
from rkd.bench.tensorrt_api import ICudaEngine, IExecutionContext, Module, check_version, import_tensorrt
from rkd.bench.tensorrt_engine import (
    INPUT,
    OUTPUT,
    BuildOptions,
    OnPhase,
    build_engine,
    cache_folder,
    check_memory,
    engine_key,
    load_engine,
    load_timings,
    make_logger,
    store_engine,
    store_timings,
)
from rkd.bench.tensorrt_layers import LayerType, count_types, read_layers, verify_precision
from rkd.errors import BundleError, MissingExtraError, RuntimeUnavailableError, StorageError

Images = NDArray[np.uint8]  # (N, 3, H, W)
Logits = NDArray[np.float32]  # (N, classes)


@dataclass(frozen=True)
class Times:
    """Milliseconds of one inference on the device's clock."""

    to_device_ms: float
    compute_ms: float
    to_host_ms: float


@dataclass(frozen=True)
class Machine:
    """What the runner works with; tests put a recording device here.

    Attributes:
        load: the TensorRT module of a runtime.
        probe: asks for the GPU.
        open: opens its memory.
        cache: the folder of engines that were built here.
        available: memory that programs can still get, in bytes; None where not reported.
    """

    load: Callable[..., Module] = import_tensorrt
    probe: Callable[[], Gpu] = probe_gpu
    open: Callable[[], Cuda] = open_cuda
    cache: Callable[[], Path] = cache_folder
    available: Callable[[], int | None] = available_bytes


class TensorRtRunner:
    """TensorRT, built here and strongly typed; for one activation.

    Args:
        model: an ONNX file without external data.
        options: of the build.
        origin: names the model in errors.
        tell: told about the build, in a few lines.
        on_phase: told each step of the build.
        machine: what to work with.
    """

    def __init__(
        self,
        model: bytes,
        options: BuildOptions,
        origin: str,
        tell: Callable[[str], None] = lambda _line: None,
        on_phase: OnPhase = lambda _phase, _done, _total: None,
        machine: Machine | None = None,
    ) -> None:
        self._model, self._options, self._origin, self._tell = model, options, origin, tell
        self._on_phase, self._machine = on_phase, machine or Machine()
        self._cuda: Cuda | None = None
        self._held: list[Any] = []  # TensorRT's objects, released in reverse
        self._batch = 0
        self.layers: tuple[LayerType, ...] = ()
        self.precision = ""
        self.version = ""
        self.gpu: Gpu | None = None
        self.device_bytes = 0  # the engine, its activations, and one batch in and out

    def __enter__(self) -> TensorRtRunner:  # noqa: PYI034 - typing.Self came with Python 3.11
        """Build the engine, or take the one that was built before, and make its buffers.

        Raises:
            MissingExtraError: TensorRT, or a library for device memory, is not installed.
            RuntimeUnavailableError: no device, another release, too little memory, or an engine of another precision.
            BundleError: TensorRT cannot parse the model, or its input or output is not rkd's.
        """
        self.gpu = self._machine.probe()
        self._check_compute(self.gpu)
        trt = self._machine.load(self._options.runtime)
        check_version(trt, self._options.runtime, self._options.min_version, self._options.below_version)
        self.version = str(trt.__version__)
        self._cuda = self._machine.open()
        try:
            self._activate(trt, self._cuda, self.gpu)
        except BaseException:
            self._release()
            raise
        return self

    def infer(self, images: Images) -> Logits:
        """Logits, float32 (N, classes), of uint8 images, (N, 3, H, W), contiguous.

        Raises:
            BundleError: the engine does not run on such a batch.
        """
        cuda, n = self._open(), len(images)
        if n != self._batch:
            self._set_batch(n)
        np.copyto(self._pinned_in[:n], images)
        cuda.record(self._events[0])
        cuda.to_device(self._device_in, self._pinned_in[:n])
        cuda.record(self._events[1])
        if not self._context.execute_async_v3(cuda.stream()):
            raise BundleError(f"{self._origin}: TensorRT does not run a batch of {n}: {self._log.why()}")
        cuda.record(self._events[2])
        cuda.to_host(self._pinned_out[:n], self._device_out)
        cuda.record(self._events[3])
        cuda.synchronise()
        return np.array(self._pinned_out[:n])

    def times(self) -> Times:
        """How long the parts of the last inference took on the device."""
        cuda, events = self._open(), self._events
        first, second, third = (cuda.elapsed_ms(a, b) for a, b in pairwise(events))
        return Times(first, second, third)

    def layer_types(self) -> dict[str, int]:
        """How many convolutions and matrix products of the engine compute in which type."""
        return count_types(self.layers)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the engine and its buffers."""
        self._release()

    def _check_compute(self, gpu: Gpu) -> None:
        wanted = self._options.compute
        if wanted and gpu.compute not in wanted:
            raise RuntimeUnavailableError(
                f"{self._origin}: {gpu.name} has compute capability {gpu.compute}, the target {self._options.target} is "
                f'for {", ".join(wanted)}; export with a target file of your own that has compute = ["{gpu.compute}"]'
            )

    def _activate(self, trt: Module, cuda: Cuda, gpu: Gpu) -> None:
        engine_bytes = self._engine_bytes(trt, cuda, gpu)
        logger, self._log = make_logger(trt)
        runtime = trt.Runtime(logger)
        engine = runtime.deserialize_cuda_engine(engine_bytes)
        if engine is None:
            raise RuntimeUnavailableError(f"{self._origin}: TensorRT cannot load its own engine: {self._log.why()}")
        self._held += [logger, runtime, engine]
        shape, classes = self._interface(trt, engine)
        context = engine.create_execution_context()
        if context is None:
            raise RuntimeUnavailableError(
                f"{self._origin}: no memory for the engine ({engine.device_memory_size_v2 / 2**20:,.0f} MiB): "
                f"{self._log.why()}; stop other programs"
            )
        self._held.append(context)
        self._context: IExecutionContext = context
        most = self._options.max_batch
        self._pinned_in, self._pinned_out = (
            cuda.pinned((most, *shape), np.uint8),
            cuda.pinned((most, classes), np.float32),
        )
        self._device_in, self._device_out = (
            cuda.allocate(self._pinned_in.nbytes),
            cuda.allocate(self._pinned_out.nbytes),
        )
        self.device_bytes = len(engine_bytes) + int(engine.device_memory_size_v2)
        self.device_bytes += self._pinned_in.nbytes + self._pinned_out.nbytes
        for name, address in ((INPUT, self._device_in), (OUTPUT, self._device_out)):
            if not context.set_tensor_address(name, address):
                raise BundleError(f"{self._origin}: the engine has no tensor {name!r}; export it again")
        self._events = [cuda.event() for _ in range(4)]
        self._set_batch(self._options.opt_batch)
        self._inspect(trt, engine, context)
        self._model = b""

    def _engine_bytes(self, trt: Module, cuda: Cuda, gpu: Gpu) -> bytes:
        folder = self._machine.cache()
        key = engine_key(trt, self._model, self._options, gpu)
        if (known := load_engine(folder, key)) is not None:
            return known
        check_memory(self._options, len(self._model), self._free_bytes(cuda, gpu))
        self._tell(f"build the engine with {self._options.runtime} {trt.__version__} (once; some minutes)")
        engine, timings = build_engine(
            trt,
            self._model,
            self._options,
            self._origin,
            on_phase=self._on_phase,
            timing_cache=load_timings(folder, key),
        )
        store_timings(folder, key, timings)
        try:
            store_engine(folder, key, engine)
        except StorageError as error:
            self._tell(f"the engine was not kept for the next time: {error}")
        return engine

    def _free_bytes(self, cuda: Cuda, gpu: Gpu) -> int:
        available = self._machine.available() if gpu.integrated else None
        return cuda.free_bytes() if available is None else available

    def _interface(self, trt: Module, engine: ICudaEngine) -> tuple[tuple[int, ...], int]:
        """The shape of one image and the number of classes."""
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        seen = {
            name: (engine.get_tensor_mode(name), engine.get_tensor_dtype(name), tuple(engine.get_tensor_shape(name)))
            for name in names
        }
        modes = trt.TensorIOMode
        wanted = {INPUT: (modes.INPUT, trt.DataType.UINT8), OUTPUT: (modes.OUTPUT, trt.DataType.FLOAT)}
        if {name: value[:2] for name, value in seen.items()} != wanted:
            raise BundleError(
                f"{self._origin}: the engine's tensors are {seen}, expected uint8 {INPUT!r} and float32 {OUTPUT!r}; "
                "export it again"
            )
        return seen[INPUT][2][1:], int(seen[OUTPUT][2][1])

    def _set_batch(self, n: int) -> None:
        shape = (n, *self._pinned_in.shape[1:])
        if not 1 <= n <= len(self._pinned_in) or not self._context.set_input_shape(INPUT, shape):
            raise BundleError(
                f"{self._origin}: the engine does not take a batch of {n}; its profile goes from 1 to {len(self._pinned_in)}"
            )
        if missing := self._context.infer_shapes():
            raise BundleError(
                f"{self._origin}: TensorRT cannot tell the shapes of {', '.join(missing)} for a batch of {n}"
            )
        self._batch = n

    def _inspect(self, trt: Module, engine: ICudaEngine, context: IExecutionContext) -> None:
        inspector = engine.create_engine_inspector()
        inspector.execution_context = context  # with dynamic shapes, types are known for a shape only
        self.layers = read_layers(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
        precision, rest = self._options.precision, self._options.rest
        quantised = quantised_layers(self._model) if precision == "int8" else 0
        self.precision = verify_precision(self.layers, precision, self._origin, quantised, rest)
        self._tell(self.precision)

    def _open(self) -> Cuda:
        if self._cuda is None:
            raise RuntimeError("the runner is not active")
        return self._cuda

    def _release(self) -> None:
        self._context = None  # type: ignore[assignment]
        while self._held:
            self._held.pop()
        if self._cuda is not None:
            cuda, self._cuda = self._cuda, None
            cuda.close()


def tensorrt_missing(options: BuildOptions, machine: Machine | None = None) -> str:
    """Why TensorRT cannot run here; empty where it can.

    Raises:
        RuntimeUnavailableError: it is here, in a release that the target cannot use: an old board.
    """
    machine = machine or Machine()
    try:
        trt = machine.load(options.runtime)
    except (MissingExtraError, RuntimeUnavailableError) as error:
        return str(error)
    check_version(trt, options.runtime, options.min_version, options.below_version)
    try:
        machine.probe()
    except RuntimeUnavailableError as error:
        return str(error)
    return ""
