"""The process that looks at the sensors while another one measures.

It keeps what it saw to itself and writes it all at the end, so that nothing has to read along while a model is timed.
One request as a JSON line on standard input; it says `ready` at its first look, samples until standard input ends, then
answers on standard output.
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


def main() -> int:
    """Answer one request."""
    head = json.loads(sys.stdin.buffer.readline())
    interval_s = float(head["interval_s"])
    tool = _tegrastats(interval_s)
    own = [int(head["pid"]), os.getpid(), *([tool.pid] if tool else [])]
    sensors = Sysfs(Path(head["root"]), head["cores"])
    load = OtherLoad(Path(head["root"]), head["cores"], own)
    samples: list[list[Any]] = []
    latest = Reading()

    def look() -> None:
        if not samples:
            sys.stdout.write("ready\n")
            sys.stdout.flush()
        if len(samples) < _MOST_SAMPLES:
            reading = sensors.read().over(latest)
            samples.append([time.perf_counter_ns(), load.read(), reading.to_json()])

    def line(text: str) -> None:
        nonlocal latest
        latest = parse_line(text) or latest

    try:
        _until_end(interval_s, look, tool.stdout if tool else None, line)
    finally:
        if tool:
            tool.kill()
            tool.wait()
    sys.stdout.write(json.dumps({"samples": samples}) + "\n")
    return 0


def _until_end(
    interval_s: float, look: Callable[[], None], lines: IO[bytes] | None, line: Callable[[str], None]
) -> None:
    """Look at every interval, pass on lines as they come, and return when standard input ends."""
    with selectors.DefaultSelector() as selector:
        selector.register(sys.stdin.buffer, selectors.EVENT_READ)
        if lines is not None:
            os.set_blocking(lines.fileno(), False)
            selector.register(lines, selectors.EVENT_READ)
        due = time.monotonic()
        while True:
            for key, _ in selector.select(max(0.0, due - time.monotonic())):
                if key.fileobj is sys.stdin.buffer:
                    look()
                    return
                data = lines.read() if lines is not None else None
                if data:
                    line(data.decode(errors="replace").rstrip().rpartition("\n")[2])
                else:
                    selector.unregister(key.fileobj)
            if time.monotonic() >= due:
                look()
                due = max(due + interval_s, time.monotonic())


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
