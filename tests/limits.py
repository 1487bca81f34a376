"""What a hostile file may take in tests/fuzz and tests/security: memory, processor time, time by the clock."""

from __future__ import annotations

import re
import resource
import signal

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


def refuse_out_of_memory(error: BaseException) -> None:
    """Raise where `error`, or what it was raised from, says that an allocation failed."""
    cause: BaseException | None = error
    while cause is not None:
        if OUT_OF_MEMORY.search(f"{type(cause).__name__}: {cause}"):
            raise MemoryError(f"refused only because memory ran out: {error}") from error
        cause = cause.__cause__ or cause.__context__
