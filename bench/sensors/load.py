"""What other programs take of the CPU, from /proc/stat and /proc/PID/stat (proc(5))."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

_CORE = re.compile(r"^cpu(\d+) (\d+(?: \d+){7})", re.MULTILINE)


class OtherLoad:
    """Cores that others keep busy, between one call of `read` and the next.

    Args:
        root: where /proc is.
        cores: the logical cores that count.
        own: process ids whose time is not others'.
    """

    def __init__(self, root: Path, cores: Collection[int], own: Collection[int]) -> None:
        self._root, self._cores, self._own = root, set(cores), tuple(own)
        self._before = self._ticks()

    def read(self) -> float | None:
        """Mean busy cores since the last call; None where the system does not tell."""
        before, now = self._before, self._ticks()
        self._before = now
        if before is None or now is None or not self._cores:
            return None
        passed = (now[1] - before[1]) / len(self._cores)  # ticks of wall time
        if passed <= 0:
            return None
        return max(0.0, (now[0] - before[0] - (now[2] - before[2])) / passed)

    def _ticks(self) -> tuple[int, int, int] | None:
        """Busy and all ticks of the cores, and our own."""
        text = _text(self._root / "proc/stat")
        rows = [[int(v) for v in m[2].split()] for m in _CORE.finditer(text) if int(m[1]) in self._cores]
        if not rows:
            return None
        total = sum(sum(row) for row in rows)
        idle = sum(row[3] + row[4] for row in rows)  # time stolen by a hypervisor counts as busy
        return total - idle, total, sum(self._of(pid) for pid in self._own)

    def _of(self, pid: int) -> int:
        """User and system ticks of a process and of its children that ended."""
        fields = _text(self._root / f"proc/{pid}/stat").rpartition(")")[2].split()
        return sum(int(value) for value in fields[11:15]) if len(fields) > 15 else 0


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode(errors="replace")
    except OSError:
        return ""
