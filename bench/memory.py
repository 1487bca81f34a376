"""Memory of one model: resident size of a fresh process that does nothing but load it and run it.

The child is the same interpreter with the same import path, so it works from a checkout and from a wheel. It gets the
model's verified bytes through a pipe: no temporary file, and the bundle's images do not count as the model's memory.
The figures hold Python, numpy and the runtime; `before_bytes` tells how much that was before the model came.
"""

from __future__ import annotations

import dataclasses
import json
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rkd.bench.runner import Choice
from rkd.files import sha256

INFERENCES = 50
TIMEOUT_SECONDS = 120.0
_START = "import sys; sys.path[:] = sys.argv[1:]; from rkd.bench.memory_child import main; sys.exit(main())"


@dataclass(frozen=True)
class Memory:
    """Resident memory of a process with one model; None where not reported, and then `reason` says why.

    Attributes:
        peak_bytes: the most there ever was (VmHWM).
        steady_bytes: after the last inference (VmRSS).
        growth_bytes: between the tenth and the last inference; lasting growth is a leak.
        before_bytes: before the model was loaded.
        inferences: that were run.
        reason: why figures are missing.
    """

    peak_bytes: int | None
    steady_bytes: int | None
    growth_bytes: int | None
    before_bytes: int | None
    inferences: int
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As in result.json."""
        return dataclasses.asdict(self)


def measure_memory(
    model: bytes,
    choice: Choice,
    shape: Sequence[int],
    timeout_seconds: float = TIMEOUT_SECONDS,
    inferences: int = INFERENCES,
) -> Memory:
    """Load and run a model in a child process.

    Args:
        model: the ONNX file.
        choice: what runs it.
        shape: of one batch, (N, 3, H, W).
        timeout_seconds: after which the child is killed.
        inferences: to run.

    Returns:
        The figures, or the reason why there are none; a child that crashes is such a reason.
    """
    head = {
        "choice": dataclasses.asdict(choice),
        "shape": list(shape),
        "inferences": inferences,
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
        return _missing(f"its process did not finish within {timeout_seconds:g} s")
    except OSError as error:
        return _missing(f"no process could be started ({error.strerror or error})")
    if done.returncode < 0:
        return _missing(f"its process was killed by {_signal_name(-done.returncode)}")
    return _parse(done.stdout, done.returncode)


def resident(key: str, status: Path = Path("/proc/self/status")) -> int | None:
    """`VmRSS` or `VmHWM` of this process in bytes; None where the system does not report it."""
    try:
        text = status.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(rf"^{key}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _parse(output: bytes, returncode: int) -> Memory:
    try:
        answer = json.loads(output.splitlines()[-1])
        if "error" in answer:
            return _missing(" ".join(str(answer["error"]).split())[:500])
        memory = Memory(**answer)
    except (ValueError, IndexError, TypeError, KeyError):
        return _missing(f"its process ended with status {returncode} and no answer")
    return memory


def _missing(reason: str) -> Memory:
    return Memory(None, None, None, None, 0, reason)


def _signal_name(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
    return f"{name}, perhaps for lack of memory" if name == "SIGKILL" else name
