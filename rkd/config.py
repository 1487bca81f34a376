"""rkd.toml: defaults of the commands' options (no torch).

    data = "photos"              # for every command that has --data
    [distill]
    student = "mobilenet"
    epochs = 60

Keys are the options' names; the command line wins. The file may come with somebody else's folder: what acts on other
machines, on clocks or on what is there already is taken from the command line only, and outputs stay in the folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rkd.errors import ConfigError
from rkd.toml import read_toml, unknown_key

_COMMAND_LINE_ONLY = frozenset({"host", "remote_rkd", "lock_clocks", "force", "overwrite"})


def command_defaults(path: Path, options: Mapping[str, Mapping[str, bool]]) -> dict[str, dict[str, Any]]:
    """Defaults per command.

    Args:
        path: of rkd.toml.
        options: the parameter names of every command, and whether a parameter may be repeated.

    Raises:
        ConfigError: not TOML, an unknown command or option, one that the file may not decide, or a value that is no plain
            value.
        StorageError: it cannot be read.
    """
    defaults: dict[str, dict[str, Any]] = {command: {} for command in options}
    everywhere = {name for names in options.values() for name in names}
    content = read_toml(path)
    for key, value in content.items():
        if not isinstance(value, dict):
            if key in options and key not in everywhere:
                raise ConfigError(f"{path}: {key} is a command; its options go below a line [{key}]")
            name = _option(key, value, everywhere, path)
            for command, names in options.items():
                if name in names:
                    defaults[command][name] = _value(key, value, path, repeats=names[name])
    for command, table in content.items():
        if not isinstance(table, dict):
            continue
        if command not in options:
            raise ConfigError(f"{path}: {unknown_key(command, options)} (tables are commands)")
        for key, value in table.items():
            name = _option(key, value, options[command], path, f" in [{command}]")
            defaults[command][name] = _value(key, value, path, repeats=options[command][name])
    return defaults


def _value(key: str, value: object, path: Path, *, repeats: bool) -> object:
    """One value for an option that is given once, a list for one that may be repeated."""
    if isinstance(value, list) and not repeats:
        raise ConfigError(f"{path}: {key} takes one value, not a list")
    return value if isinstance(value, list) or not repeats else [value]


def _option(key: str, value: object, known: Iterable[str], path: Path, where: str = "") -> str:
    name = key.replace("-", "_")
    if name not in known:
        raise ConfigError(f"{path}{where}: {unknown_key(key, known)}")
    plain = (str, int, float, bool)
    if not isinstance(value, plain) and not (isinstance(value, list) and all(isinstance(v, plain) for v in value)):
        raise ConfigError(f"{path}{where}: {key} must be a text, a number, true, false or a list of these")
    if name in _COMMAND_LINE_ONLY:
        raise ConfigError(f"{path}{where}: {key} is taken from the command line only; leave it out here")
    if name in ("out", "results") and (Path(str(value)).is_absolute() or ".." in Path(str(value)).parts):
        raise ConfigError(f"{path}{where}: {key} = {value!r} leads out of this folder; give such an --{key} by hand")
    return name
