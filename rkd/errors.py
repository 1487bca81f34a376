"""Every error that rkd raises on purpose.

    RkdError                       exit 1
    ├── ConfigError                rkd.toml, an option's value, a combination of options
    ├── CheckpointError            a teacher file that cannot be read safely
    │   └── ArchitectureError      tensors that fit no network, or not the network that was named
    ├── DataError                  a data set that cannot be used
    ├── TriggerError               a trigger file that cannot be used
    ├── TargetError                a target profile that cannot be used
    ├── RunError                   a run directory that is missing, unfinished or damaged
    ├── ExportError                a student that cannot be written as the target asks
    ├── BundleError                a .rkd file that is not exactly what was written
    ├── SigningError               a key that cannot be used
    ├── RuntimeUnavailableError    a runtime or provider that this machine lacks
    ├── RemoteError                a board that cannot be reached or cannot measure
    ├── MissingExtraError          a command whose optional dependencies are not installed
    ├── StorageError               the disk said no: full, read-only, no permission, I/O error
    ├── PartialError               a measurement that failed half-way; it holds what was measured before
    ├── GateError                  exit 3: a measured figure is on the wrong side of its gate
    └── StoppedError               exit 130 (Ctrl-C), 143 (SIGTERM) or 129 (SIGHUP), after saving

A message says what was seen, what was expected and what to do, in one line.
"""

from __future__ import annotations

from typing import Any

from rkd import __version__


class RkdError(Exception):
    """The root: the user's input or environment is wrong."""

    exit_code = 1


class ConfigError(RkdError):
    """A setting is unknown, malformed or impossible together with another."""


class CheckpointError(RkdError):
    """A teacher file cannot be read safely."""


class ArchitectureError(CheckpointError):
    """Tensors that fit no known network, or not the one that was named."""


class DataError(RkdError):
    """A data set cannot be used."""


class TriggerError(RkdError):
    """A trigger cannot be used."""


class TargetError(RkdError):
    """A target profile cannot be used."""


class RunError(RkdError):
    """A run directory is missing, unfinished or damaged."""


class ExportError(RkdError):
    """A student cannot be written in the form that the target asks for."""


class BundleError(RkdError):
    """A bundle is not exactly what was written."""


class SigningError(RkdError):
    """A key cannot be used."""


class RuntimeUnavailableError(RkdError):
    """A runtime, provider or device that this machine lacks."""


class RemoteError(RkdError):
    """A board that cannot be reached, or lacks what it takes to measure."""


def install_hint(extra: str) -> str:
    """How to install an extra: from rkd's own wheel or checkout, never by a name that an index may give to anyone."""
    return f"pip install 'rkd-{__version__}-py3-none-any.whl[{extra}]', or '.[{extra}]' in a checkout"


class MissingExtraError(RkdError):
    """A command needs optional dependencies that are not installed."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} is not installed; install it with: {install_hint(extra)}")


class StorageError(RkdError):
    """The operating system refused to read or write."""


class PartialError(RkdError):
    """A measurement that failed half-way; `measured` is its result so far, marked as interrupted."""

    def __init__(self, message: str, measured: dict[str, Any]) -> None:
        super().__init__(message)
        self.measured = measured


class GateError(RkdError):
    """A measured figure is on the wrong side of its gate."""

    exit_code = 3


class StoppedError(RkdError):
    """Stopped by a signal, after saving.

    Args:
        message: what was saved and how to go on.
        signal_number: the signal; the exit code is 128 plus it.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def first_line(error: BaseException) -> str:
    """The first line of what an error says, cut to 200 characters; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def ran_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch raised it because memory ran out, for which it has no type of its own on a CPU."""
    return "out of memory" in str(error) or "can't allocate memory" in str(error)


def shortened(text: str, most: int) -> str:
    """`text` without what is not printable, cut to `most` characters, as one line of a result."""
    return "".join(c for c in text if c.isprintable())[:most]


def printable(text: str) -> str:
    """`text` with control characters, surrogates and direction marks replaced: it may come from a hostile file."""
    return "".join(c if c.isprintable() or c in " \n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
