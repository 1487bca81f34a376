"""Starts the sampler, and gets what it saw when it is stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rkd.bench.sensors.reading import Reading
from rkd.bench.sensors.trace import Sample, Trace

INTERVAL_S = 0.1
_STOP_S = 10.0
_START = "import sys; sys.path[:] = sys.argv[1:]; from rkd.bench.sensors.sampler import main; sys.exit(main())"


class Monitor:
    """One sampler process; `stop` is idempotent and never raises.

    Args:
        cores: logical cores that this process may use.
        interval_s: between two looks.
        root: where /proc and /sys are.
    """

    def __init__(self, cores: Sequence[int], interval_s: float = INTERVAL_S, root: Path = Path("/")) -> None:
        self._interval_s = interval_s
        self._trace: Trace | None = None
        head = {"pid": os.getpid(), "cores": list(cores), "interval_s": interval_s, "root": str(root)}
        try:
            self._child = subprocess.Popen(  # noqa: S603 - our own interpreter and code
                [sys.executable, "-c", _START, *sys.path],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the bench: what was seen until then is still wanted
            )
            if self._child.stdin:
                self._child.stdin.write(json.dumps(head).encode() + b"\n")
                self._child.stdin.flush()
            if self._child.stdout:
                self._child.stdout.readline()  # `ready`, or nothing where it ended at once
        except OSError as error:
            self._trace = Trace((), interval_s, f"no process could be started ({error.strerror or error})")

    def __enter__(self) -> Monitor:  # noqa: PYI034 - typing.Self came with Python 3.11
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> Trace:
        """End the sampling; what was seen."""
        if self._trace is None:
            self._trace = self._collect()
        return self._trace

    def _collect(self) -> Trace:
        try:
            output, _ = self._child.communicate(timeout=_STOP_S)
            answer = json.loads(output)
            silent_ns = answer["silent_ns"]
            samples = tuple(Sample(at, others, Reading.from_json(r)) for at, others, r in answer["samples"])
        except (subprocess.TimeoutExpired, OSError):
            self._child.kill()
            self._child.communicate()
            return Trace((), self._interval_s, "the process that reads the sensors did not answer")
        except (ValueError, TypeError, KeyError):
            return Trace((), self._interval_s, f"the process that reads the sensors ended ({self._child.returncode})")
        return Trace(samples, self._interval_s, silent_ns=silent_ns)
