"""Memory of one model: resident size of a fresh process that does nothing but load it and run it.

The child is the same interpreter with the same import path, so it works from a checkout and from a wheel. It gets the
model's verified bytes through a pipe: no temporary file, and the bundle's images do not count as the model's memory.
The figures hold Python, numpy and the runtime; `before_bytes` tells how much that was before the model came.

A leak is memory that grows all along. The run is cut into twelve parts, each with the median of its resident sizes.
These medians rise in at least four places, stay within a fifth of their whole growth of the straight line from the
first to the last, and gain over the last four at least half of what that line does; and from the first to the last
quarter of the run the median grows by at least 512 KiB. So an arena that takes its size in a few steps is none, nor is
growth that dies away; where that is large, it is said to have grown (`Memory.grew`). Of random walks, about 1
in 100 is called a leak. The run is long enough for 1.2 kB an inference where one takes up to 10 ms, and ends early
where it has taken 64 MiB.
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
_LEAST_GROWTH_BYTES, _LEAST_GROWTH = 4 * 2**20, 0.05  # the latter of the steady size
_PARTS, _FEWEST_RISES, _LATE_STEPS = 12, 4, 4
_OFF_THE_LINE, _LATE = 0.2, 0.5
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

    @property
    def grew(self) -> bool:
        """Whether it grew by over 4 MiB and 5 % of the steady size, but not so that it may be called a leak."""
        grown, steady = self.growth_bytes or 0, self.steady_bytes or 0
        return not self.leak and grown > max(_LEAST_GROWTH_BYTES, _LEAST_GROWTH * steady)

    def to_json(self) -> dict[str, Any]:
        """As in result.json."""
        return dataclasses.asdict(self)


def growth(resident_bytes: Sequence[int]) -> tuple[int, bool] | None:
    """Growth over a run, and whether it is a leak; None below twelve figures.

    Args:
        resident_bytes: evenly spaced over the inferences, in their order.
    """
    if len(resident_bytes) < _PARTS:
        return None
    first, *_, last = _medians(resident_bytes, 4)
    whole = last - first
    return round(whole), whole >= LEAST_LEAK_BYTES and _goes_on(_medians(resident_bytes, _PARTS))


def _medians(sizes: Sequence[int], parts: int) -> list[float]:
    """Of equal parts; what is left over stands at the beginning and is left out."""
    n = len(sizes) // parts
    start = len(sizes) - parts * n
    return [statistics.median(sizes[start + i * n : start + (i + 1) * n]) for i in range(parts)]


def _goes_on(sizes: Sequence[float]) -> bool:
    """Whether they rise all along, as stated above."""
    whole, steps = sizes[-1] - sizes[0], len(sizes) - 1
    rises = sum(later > earlier for earlier, later in pairwise(sizes))
    straight = all(abs(size - sizes[0] - whole * i / steps) <= _OFF_THE_LINE * whole for i, size in enumerate(sizes))
    late = sizes[-1] - sizes[-1 - _LATE_STEPS] >= _LATE * whole * _LATE_STEPS / steps
    return rises >= _FEWEST_RISES and straight and late


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
