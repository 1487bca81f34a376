"""The process that looks at the sensors while another one measures.

It keeps what it saw to itself and writes it all at the end, so that nothing has to read along while a model is timed.
One request as a JSON line on standard input; it says `ready` at its first look, samples until standard input ends, then
answers on standard output. What tegrastats said counts for five intervals: one that ends or hangs is not reported any
more, and the answer says since when.
"""

from __future__ import annotations

import json
import os
import selectors
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from rkd.bench.sensors.load import OtherLoad
from rkd.bench.sensors.reading import Reading
from rkd.bench.sensors.sysfs import Sysfs
from rkd.bench.sensors.tegrastats import parse_line

_MOST_SAMPLES = 200_000  # five and a half hours at ten a second
_NEWS_INTERVALS = 5  # so long a line of tegrastats counts
_SILENT_NS = 2_000_000_000  # without a line so long, it has stopped

Clock = Callable[[], int]  # nanoseconds; `time.perf_counter_ns`, on Linux the clock that all processes share


class Latest:
    """What tegrastats said last, for as long as that is news.

    Attributes:
        silent_ns: when it last said something before it stopped; None while it has not.

    Args:
        interval_s: between two of its lines.
        clock: nanoseconds.
    """

    def __init__(self, interval_s: float, clock: Clock = time.perf_counter_ns) -> None:
        self._news_ns, self._clock = int(_NEWS_INTERVALS * interval_s * 1e9), clock
        self._said: tuple[int, Reading] | None = None
        self.silent_ns: int | None = None

    def take(self, text: str) -> None:
        """A line; one that is none of tegrastats' says nothing."""
        if (reading := parse_line(text)) is not None:
            self._said = self._clock(), reading

    def reading(self) -> Reading:
        """The last line's figures; none where it is old."""
        if self._said is None:
            return Reading()
        at, reading = self._said
        age = self._clock() - at
        if age > _SILENT_NS and self.silent_ns is None:
            self.silent_ns = at
        return reading if age <= self._news_ns else Reading()


def main() -> int:
    """Answer one request."""
    head = json.loads(sys.stdin.buffer.readline())
    interval_s = float(head["interval_s"])
    tool = _tegrastats(interval_s)
    own = [int(head["pid"]), os.getpid(), *([tool.pid] if tool else [])]
    sensors = Sysfs(Path(head["root"]), head["cores"])
    load = OtherLoad(Path(head["root"]), head["cores"], own)
    samples: list[list[Any]] = []
    latest = Latest(interval_s)

    def look() -> None:
        if not samples:
            sys.stdout.write("ready\n")
            sys.stdout.flush()
        if len(samples) < _MOST_SAMPLES:
            reading = sensors.read().over(latest.reading())
            samples.append([time.perf_counter_ns(), load.read(), reading.to_json()])

    try:
        until_end(interval_s, look, tool.stdout if tool else None, latest.take)
    finally:
        if tool:
            tool.kill()
            tool.wait()
    sys.stdout.write(json.dumps({"samples": samples, "silent_ns": latest.silent_ns}) + "\n")
    return 0


def until_end(
    interval_s: float,
    look: Callable[[], None],
    lines: IO[bytes] | None,
    line: Callable[[str], None],
    clock: Clock = time.perf_counter_ns,
) -> None:
    """Look at every interval, pass on lines as they come, and return when standard input ends."""
    with selectors.DefaultSelector() as selector:
        selector.register(sys.stdin.buffer, selectors.EVENT_READ)
        if lines is not None:
            os.set_blocking(lines.fileno(), False)
            selector.register(lines, selectors.EVENT_READ)
        due = clock()
        while True:
            for key, _ in selector.select(max(0.0, (due - clock()) / 1e9)):
                if key.fileobj is sys.stdin.buffer:
                    look()
                    return
                data = lines.read() if lines is not None else None
                if data:
                    line(data.decode(errors="replace").rstrip().rpartition("\n")[2])
                else:
                    selector.unregister(key.fileobj)
            if clock() >= due:
                look()
                due = max(due + int(interval_s * 1e9), clock())


def _tegrastats(interval_s: float) -> subprocess.Popen[bytes] | None:
    """NVIDIA's tool where it is installed; it tells the GPU's load, which /sys hides from users on some releases."""
    path = shutil.which("tegrastats")
    if path is None:
        return None
    try:
        return subprocess.Popen(  # noqa: S603 - the board's own tool, without any input of ours
            [path, "--interval", str(int(interval_s * 1000))], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
    except OSError:
        return None


if __name__ == "__main__":
    sys.exit(main())
