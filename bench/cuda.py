"""Device memory, streams and events behind one small Protocol, and a driver check that cannot take the bench down.

Two libraries serve: pycuda, which a Jetson can compile, and cuda-python's `cuda.bindings`, which has wheels for PCs.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from rkd.errors import MissingExtraError, RuntimeUnavailableError

_PROBE_SECONDS = 30.0
_WAY_OUT = "check the driver (a container needs --runtime nvidia), or export for the target ort-cpu, which needs no GPU"
# Runs in a process of its own: a broken driver may end it by a signal.
_PROBE = """
import ctypes, json
cuda = ctypes.CDLL("libcuda.so.1")
def ask(call, *arguments):
    status = getattr(cuda, call)(*arguments)
    if status:
        raise SystemExit(f"{call} answers {status}")
ask("cuInit", 0)
count, device, driver = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
ask("cuDeviceGetCount", ctypes.byref(count))
if not count.value:
    raise SystemExit("it lists no device")
ask("cuDeviceGet", ctypes.byref(device), 0)
ask("cuDriverGetVersion", ctypes.byref(driver))
name, size = ctypes.create_string_buffer(256), ctypes.c_size_t()
ask("cuDeviceGetName", name, 256, device)
ask("cuDeviceTotalMem_v2", ctypes.byref(size), device)
numbers = []
for attribute in (75, 76, 18):  # the capability; whether it shares the memory of the CPU
    number = ctypes.c_int()
    ask("cuDeviceGetAttribute", ctypes.byref(number), attribute, device)
    numbers.append(number.value)
print(json.dumps({"name": name.value.decode(errors="replace"), "compute": "%d.%d" % tuple(numbers[:2]),
                  "driver": driver.value, "total_bytes": size.value, "integrated": bool(numbers[2])}))
"""


@dataclass(frozen=True)
class Gpu:
    """The CUDA device that is used: number 0.

    Attributes:
        name: as its driver says.
        compute: capability, e.g. `8.7`.
        driver: version as CUDA counts, e.g. 12060.
        total_bytes: of its memory.
        integrated: whether that is the memory of the CPU, as on a Jetson.
    """

    name: str
    compute: str
    driver: int
    total_bytes: int
    integrated: bool


class Cuda(Protocol):
    """One device's memory and one stream of work."""

    name: str

    def free_bytes(self) -> int:
        """Memory that the driver calls free; where the CPU shares it, without the page cache that would give way."""

    def allocate(self, size_bytes: int) -> int:
        """Device memory; its address."""

    def pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """An array in page-locked host memory."""

    def stream(self) -> int:
        """The handle of the one stream."""

    def to_device(self, address: int, source: NDArray[Any]) -> None:
        """Enqueue a copy from pinned memory."""

    def to_host(self, target: NDArray[Any], address: int) -> None:
        """Enqueue a copy to pinned memory."""

    def event(self) -> Any:
        """A timestamp that can be recorded again and again."""

    def record(self, event: Any) -> None:
        """Enqueue: take the time when all before it is done."""

    def elapsed_ms(self, first: Any, second: Any) -> float:
        """Milliseconds between two timestamps that have passed."""

    def synchronise(self) -> None:
        """Wait for all that was enqueued."""

    def close(self) -> None:
        """Release everything."""


def probe_gpu(timeout_seconds: float = _PROBE_SECONDS, code: str = _PROBE) -> Gpu:
    """Ask the driver for its first device, in a child process.

    Raises:
        RuntimeUnavailableError: there is no driver or no device, or asking ends the child.
    """
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter and code
            [sys.executable, "-I", "-c", code], capture_output=True, timeout=timeout_seconds, check=False
        )
    except subprocess.TimeoutExpired:
        raise RuntimeUnavailableError(
            f"the CUDA driver did not answer within {timeout_seconds:g} s; {_WAY_OUT}"
        ) from None
    except OSError as error:
        raise RuntimeUnavailableError(f"no process could be started to ask the CUDA driver: {error}") from error
    if done.returncode < 0:
        raise RuntimeUnavailableError(f"asking the CUDA driver ended by signal {-done.returncode}; {_WAY_OUT}")
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no answer"]
        raise RuntimeUnavailableError(f"no CUDA device: {lines[-1][:200]}; {_WAY_OUT}")
    try:
        answer = json.loads(done.stdout)
        return Gpu(
            str(answer["name"]),
            str(answer["compute"]),
            int(answer["driver"]),
            int(answer["total_bytes"]),
            bool(answer["integrated"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise RuntimeUnavailableError(f"the CUDA driver's answer cannot be read; {_WAY_OUT}") from error


def open_cuda() -> Cuda:
    """The first of pycuda and cuda-python that is installed.

    Raises:
        MissingExtraError: neither is.
        RuntimeUnavailableError: it does not start.
    """
    try:
        return PyCuda()
    except MissingExtraError as missing:
        try:
            return CudaPython()
        except MissingExtraError:
            raise missing from None


class PyCuda:
    """Memory by pycuda, in the primary context, which TensorRT uses too."""

    name = "pycuda"

    def __init__(self) -> None:
        try:
            from pycuda import driver
        except ImportError as error:
            raise MissingExtraError("pycuda", "trt") from error
        self._driver: Any = driver
        try:
            driver.init()
            self._context = driver.Device(0).retain_primary_context()
            self._context.push()
            self._stream = driver.Stream()
        except Exception as error:
            raise RuntimeUnavailableError(f"pycuda does not start: {error}; {_WAY_OUT}") from error
        self._held: list[Any] = []

    def free_bytes(self) -> int:
        """See `Cuda`."""
        return int(self._driver.mem_get_info()[0])

    def allocate(self, size_bytes: int) -> int:
        """See `Cuda`."""
        self._held.append(self._driver.mem_alloc(size_bytes))
        return int(self._held[-1])

    def pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """See `Cuda`."""
        array: NDArray[Any] = self._driver.pagelocked_empty(shape, dtype)
        return array

    def stream(self) -> int:
        """See `Cuda`."""
        return int(self._stream.handle)

    def to_device(self, address: int, source: NDArray[Any]) -> None:
        """See `Cuda`."""
        self._driver.memcpy_htod_async(address, source, self._stream)

    def to_host(self, target: NDArray[Any], address: int) -> None:
        """See `Cuda`."""
        self._driver.memcpy_dtoh_async(target, address, self._stream)

    def event(self) -> Any:
        """See `Cuda`."""
        return self._driver.Event()

    def record(self, event: Any) -> None:
        """See `Cuda`."""
        event.record(self._stream)

    def elapsed_ms(self, first: Any, second: Any) -> float:
        """See `Cuda`."""
        return float(second.time_since(first))

    def synchronise(self) -> None:
        """See `Cuda`."""
        self._stream.synchronize()

    def close(self) -> None:
        """See `Cuda`."""
        for allocation in self._held:
            allocation.free()
        self._held = []
        self._context.pop()
        self._context.detach()


class CudaPython:
    """Memory by cuda-python's `cuda.bindings.runtime`."""

    name = "cuda-python"

    def __init__(self) -> None:
        try:
            from cuda.bindings import runtime
        except ImportError as error:
            raise MissingExtraError("cuda-bindings", "rtx") from error
        self._runtime: Any = runtime
        self._held: list[int] = []
        self._pinned: list[int] = []
        self._events: list[Any] = []
        self._ask("cudaSetDevice", 0)
        self._stream = self._ask("cudaStreamCreate")

    def free_bytes(self) -> int:
        """See `Cuda`."""
        return int(self._ask("cudaMemGetInfo")[0])

    def allocate(self, size_bytes: int) -> int:
        """See `Cuda`."""
        self._held.append(int(self._ask("cudaMalloc", size_bytes)))
        return self._held[-1]

    def pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """See `Cuda`."""
        size_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self._pinned.append(int(self._ask("cudaMallocHost", size_bytes)))
        buffer = (ctypes.c_uint8 * size_bytes).from_address(self._pinned[-1])
        return np.ctypeslib.as_array(buffer).view(dtype).reshape(shape)

    def stream(self) -> int:
        """See `Cuda`."""
        return int(self._stream)

    def to_device(self, address: int, source: NDArray[Any]) -> None:
        """See `Cuda`."""
        self._copy(address, source.ctypes.data, source.nbytes, "cudaMemcpyHostToDevice")

    def to_host(self, target: NDArray[Any], address: int) -> None:
        """See `Cuda`."""
        self._copy(target.ctypes.data, address, target.nbytes, "cudaMemcpyDeviceToHost")

    def event(self) -> Any:
        """See `Cuda`."""
        self._events.append(self._ask("cudaEventCreate"))
        return self._events[-1]

    def record(self, event: Any) -> None:
        """See `Cuda`."""
        self._ask("cudaEventRecord", event, self._stream)

    def elapsed_ms(self, first: Any, second: Any) -> float:
        """See `Cuda`."""
        return float(self._ask("cudaEventElapsedTime", first, second))

    def synchronise(self) -> None:
        """See `Cuda`."""
        self._ask("cudaStreamSynchronize", self._stream)

    def close(self) -> None:
        """See `Cuda`."""
        for address in self._held:
            self._ask("cudaFree", address)
        for address in self._pinned:
            self._ask("cudaFreeHost", address)
        for event in self._events:
            self._ask("cudaEventDestroy", event)
        self._held, self._pinned, self._events = [], [], []
        self._ask("cudaStreamDestroy", self._stream)

    def _copy(self, target: int, source: int, size_bytes: int, kind: str) -> None:
        kinds = self._runtime.cudaMemcpyKind
        self._ask("cudaMemcpyAsync", target, source, size_bytes, getattr(kinds, kind), self._stream)

    def _ask(self, call: str, *arguments: Any) -> Any:
        status, *values = getattr(self._runtime, call)(*arguments)
        if int(status) != 0:
            raise RuntimeUnavailableError(f"CUDA: {call} answers {status}; {_WAY_OUT}")
        return values[0] if len(values) == 1 else tuple(values)
