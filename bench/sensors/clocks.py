"""Fixed clocks for as long as a measurement lasts, where the user asked for them; nothing else in rkd changes a board.

A Jetson has NVIDIA's jetson_clocks, which stores and restores all of its settings; elsewhere every core that may be
used gets the governor `performance`, and what it had before comes back at the end, also after an error or a signal.
What does not come back is said; it takes no measurement away.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from rkd.errors import RuntimeUnavailableError
from rkd.progress import say
from rkd.signals import held_signals

_GOVERNOR = "sys/devices/system/cpu/cpu{}/cpufreq/scaling_governor"
_TOOL_TIMEOUT_S = 60
_HOW = "run rkd bench as root (sudo), or leave --lock-clocks out"


@contextmanager
def locked_clocks(cores: Sequence[int], root: Path = Path("/")) -> Iterator[str]:
    """Fix the clocks; gives what was done, in words.

    Raises:
        RuntimeUnavailableError: this machine does not let its clocks be fixed, or not by this user.
    """
    tool = shutil.which("jetson_clocks")
    with _jetson_clocks(tool) if tool else _performance(cores, root) as done:
        yield done


@contextmanager
def _jetson_clocks(tool: str) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="rkd-clocks-") as folder:
        kept = str(Path(folder) / "jetson_clocks.conf")
        _run([tool, "--store", kept])
        try:
            _run([tool])
            yield "jetson_clocks"
        finally:
            with held_signals():
                _say_errors([lambda: _run([tool, "--restore", kept])])


@contextmanager
def _performance(cores: Sequence[int], root: Path) -> Iterator[str]:
    files = [file for core in cores if (file := root / _GOVERNOR.format(core)).exists()]
    if not files:
        raise RuntimeUnavailableError("--lock-clocks: this machine shows no clock governor to set; leave it out")
    before: list[tuple[Path, str]] = []
    try:
        for file in files:
            before.append((file, _governor(file)))
            _set_governor(file, "performance")
        yield "governor performance"
    finally:
        with held_signals():
            _say_errors([partial(_set_back, file, governor) for file, governor in before])


def _say_errors(steps: Sequence[Callable[[], None]]) -> None:
    """Take all steps, whichever fails."""
    for step in steps:
        try:
            step()
        except RuntimeUnavailableError as error:
            say(f"the clocks are not as they were: {error}")


def _governor(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise RuntimeUnavailableError(f"--lock-clocks: {file} cannot be read; leave it out") from error


def _set_governor(file: Path, governor: str) -> None:
    try:
        with file.open("w", encoding="ascii") as knob:  # a switch of the kernel, not a file of ours
            knob.write(governor)
    except OSError as error:
        raise RuntimeUnavailableError(
            f"--lock-clocks: {file} does not take {governor!r} ({error.strerror}); {_HOW}"
        ) from error


def _set_back(file: Path, governor: str) -> None:
    if _governor(file) != governor:
        _set_governor(file, governor)


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(  # noqa: S603 - the board's own tool
            command,
            capture_output=True,
            timeout=_TOOL_TIMEOUT_S,
            check=False,
            text=True,
            start_new_session=True,  # Ctrl-C is for the bench: a tool that it ends would leave half of the clocks fixed
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeUnavailableError(f"--lock-clocks: {command[0]} does not run ({error}); leave it out") from error
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())[:300]
        raise RuntimeUnavailableError(f"--lock-clocks: {' '.join(command)} failed: {said}; {_HOW}")
