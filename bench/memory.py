"""Memory of one model: resident size of a fresh process that does nothing but load it and run it.

The child is the same interpreter with the same import path, so it works from a checkout and from a wheel. It gets the
model's verified bytes through a pipe: no temporary file, and the bundle's images do not count as the model's memory.
The figures hold Python, numpy and the runtime; `before_bytes` tells how much that was before the model came.

A leak is memory that grows all along: the medians of the resident size in the four quarters of the run rise from each
to the next by at least a tenth of the whole growth, and that is at least 512 KiB. An arena that takes its size in one
step is none. The run is long enough for 1.2 kB an inference where one takes up to 10 ms, and ends early where it has
taken 64 MiB.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from rkd.bench.runner import Choice
from rkd.files import sha256

INFERENCES, SECONDS, CAP_SECONDS = 600, 1.0, 6.0
FEWEST = 40
SETTLED = 10  # inferences after which the runtime's arena has its size
TIMEOUT_SECONDS = 120.0
LEAST_LEAK_BYTES = 512 * 1024
_LEAST_STEP = 0.1
_APART = 0.75  # of the run lies between the middles of its first and its last quarter
_START = "import sys; sys.path[:] = sys.argv[1:]; from rkd.bench.memory_child import main; sys.exit(main())"


@dataclass(frozen=True)
class Memory:
    """Resident memory of a process with one model; None where not reported, and then `reason` says why.

    Attributes:
        peak_bytes: the most there ever was (VmHWM).
        steady_bytes: after the last inference (VmRSS).
        growth_bytes: from the first to the last quarter of the inferences.
        leak: whether it grows all along.
        before_bytes: before the model was loaded.
        loaded_bytes: after it was loaded, before its first inference.
        arena_bytes: what the first inferences added to that: the runtime's arena for activations, and its scratch.
        device_bytes: what the model holds on a device of its own; None where there is none.
        system_bytes: by how much the whole system's available memory fell; tells what a GPU that shares it holds. None
            where it did not fall: other programs gave more back than the model took.
        inferences: that were run.
        reason: why figures are missing.
    """

    peak_bytes: int | None = None
    steady_bytes: int | None = None
    growth_bytes: int | None = None
    leak: bool | None = None
    before_bytes: int | None = None
    loaded_bytes: int | None = None
    arena_bytes: int | None = None
    device_bytes: int | None = None
    system_bytes: int | None = None
    inferences: int = 0
    reason: str | None = None

    @property
    def growth_an_inference_bytes(self) -> float:
        """Growth of one inference, in bytes; 0 where it is not known."""
        return (self.growth_bytes or 0) / (_APART * max(self.inferences - SETTLED, 1))

    def to_json(self) -> dict[str, Any]:
        """As in result.json."""
        return dataclasses.asdict(self)


def growth(resident_bytes: Sequence[int]) -> tuple[int, bool] | None:
    """Growth over a run, and whether it is a leak; None below eight figures.

    Args:
        resident_bytes: evenly spaced over the inferences, in their order.
    """
    n = len(resident_bytes) // 4
    if n < 2:
        return None
    start = len(resident_bytes) - 4 * n
    quarters = [statistics.median(resident_bytes[start + i * n : start + (i + 1) * n]) for i in range(4)]
    whole = quarters[3] - quarters[0]
    rises = all(later - earlier >= _LEAST_STEP * whole for earlier, later in pairwise(quarters))
    return round(whole), whole >= LEAST_LEAK_BYTES and rises


def measure_memory(
    model: bytes,
    choice: Choice,
    shape: Sequence[int],
    timeout_seconds: float = TIMEOUT_SECONDS,
    inferences: int = INFERENCES,
    seconds: float = SECONDS,
    cap_seconds: float = CAP_SECONDS,
) -> Memory:
    """Load and run a model in a child process.

    Args:
        model: the ONNX file.
        choice: what runs it.
        shape: of one batch, (N, 3, H, W).
        timeout_seconds: after which the child is killed.
        inferences: to run at least, where the cap allows.
        seconds: to run at least, unless it grows too much.
        cap_seconds: to run at most, but `FEWEST` inferences at least.

    Returns:
        The figures, or the reason why there are none; a child that crashes is such a reason.
    """
    head = {
        "choice": dataclasses.asdict(choice),
        "shape": list(shape),
        "inferences": inferences,
        "seconds": seconds,
        "cap_seconds": cap_seconds,
        "sha256": sha256(model),
    }
    command = [sys.executable, "-c", _START, *sys.path]
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter and code
            command,
            input=json.dumps(head).encode() + b"\n" + model,
            capture_output=True,
            timeout=timeout_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return _missing(f"its process did not finish within {timeout_seconds:.2g} s; measure without --quick")
    except OSError as error:
        return _missing(f"no process could be started ({error.strerror or error})")
    if done.returncode < 0:
        return _missing(f"its process was killed by {_signal_name(-done.returncode)}")
    return _parse(done.stdout, done.returncode)


def _parse(output: bytes, returncode: int) -> Memory:
    try:
        answer = json.loads(output.splitlines()[-1])
        if "error" in answer:
            return _missing(" ".join(str(answer["error"]).split())[:500])
        memory = Memory(**answer) if answer else None
    except (ValueError, IndexError, TypeError, KeyError):
        memory = None
    return memory or _missing(f"its process ended with status {returncode} and no answer")


def _missing(reason: str) -> Memory:
    return Memory(reason=reason)


def _signal_name(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
    return f"{name}, perhaps for lack of memory" if name == "SIGKILL" else name
