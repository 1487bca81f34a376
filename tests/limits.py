"""What a hostile file may take in tests/fuzz and tests/security: memory, processor time, time by the clock."""

from __future__ import annotations

import os
import re
import resource
import signal
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass

MEMORY_BYTES, CPU_SECONDS, WALL_SECONDS = 2 * 2**30, 5, 30
OUT_OF_MEMORY = re.compile("MemoryError|bad_alloc|can't allocate memory|Unable to allocate|BFCArena", re.IGNORECASE)


def limit_this_process() -> None:
    """2 GiB of data; beyond it, allocating fails."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def set_timers(cpu_seconds: float, wall_seconds: float) -> None:
    """After either, the process ends, also inside C: both signals do so by default. 0 turns a timer off."""
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    signal.setitimer(signal.ITIMER_REAL, wall_seconds)


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        output: what its work returned, or the traceback that ended it.
        status: exit code, or the signal that ended it, negative; 70 after a traceback.
        peak_bytes: most memory that it held, with what it has in common with its parent.
        cpu_seconds: processor time that it took.
    """

    output: bytes
    status: int
    peak_bytes: int
    cpu_seconds: float


def forked(work: Callable[[], bytes]) -> Ended:
    """Do `work` in a forked child within the limits; it may also end by `os._exit`, and set timers of its own."""
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if child == 0:
            code = 70
            try:
                limit_this_process()
                set_timers(CPU_SECONDS, WALL_SECONDS)
                os.write(output.fileno(), work())
                code = 0
            except BaseException:
                os.write(output.fileno(), traceback.format_exc().encode(errors="replace"))
            finally:
                os._exit(code)
        _, status, usage = os.wait4(child, 0)
        output.seek(0)
        return Ended(
            output.read(),
            os.waitstatus_to_exitcode(status),
            usage.ru_maxrss * 1024,
            usage.ru_utime + usage.ru_stime,
        )


def refuse_out_of_memory(error: BaseException) -> None:
    """Raise where `error`, or what it was raised from, says that an allocation failed."""
    cause: BaseException | None = error
    while cause is not None:
        if OUT_OF_MEMORY.search(f"{type(cause).__name__}: {cause}"):
            raise MemoryError(f"refused only because memory ran out: {error}") from error
        cause = cause.__cause__ or cause.__context__
