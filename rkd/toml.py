"""Read TOML that people or strangers wrote: size-limited, one clear error (no torch)."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rkd.errors import ConfigError
from rkd.files import open_regular, storage_errors

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_LIMIT_BYTES = 2**18
_MAX_DOTS = 200  # in a line; a dotted key of n parts takes n * n time and memory in tomllib


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        ConfigError: it is not TOML, larger than a quarter of a megabyte, or has a key of hundreds of parts or a number beyond 64 bits.
        StorageError: it cannot be read.
    """
    with storage_errors(path), open_regular(path) as file:
        data = file.read(_LIMIT_BYTES + 1)
    if len(data) > _LIMIT_BYTES:
        raise ConfigError(f"{path}: larger than {_LIMIT_BYTES:,} bytes; this is not a settings file")
    if data.count(b".") > _MAX_DOTS and max(line.count(b".") for line in data.split(b"\n")) > _MAX_DOTS:
        raise ConfigError(f"{path}: a line with more than {_MAX_DOTS} dots; this is not a settings file")
    try:
        content: dict[str, Any] = tomllib.loads(data.decode())
    except Exception as error:  # TOMLDecodeError, UnicodeDecodeError, RecursionError
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    if _has_large_number(content):
        raise ConfigError(f"{path}: a whole number beyond 64 bits; TOML has none, and no setting needs one")
    return content


def _has_large_number(content: dict[str, Any]) -> bool:
    """Whether there is an integer that is not of 64 bits: Python takes it, and fails where it becomes a float."""
    pending: list[Any] = [content]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, list):
            pending += value
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            return True
    return False


def unknown_key(key: str, known: Iterable[str]) -> str:
    """`unknown key 'x'; did you mean 'y'?`, or the list of what is known."""
    names = sorted(known)
    close = difflib.get_close_matches(key, names, 1)
    return f"unknown key {key!r}; " + (
        f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(names)}"
    )
