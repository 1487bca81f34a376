"""rkd.toml: defaults of the commands' options (no torch).

    data = "photos"              # for every command that has --data
    [distill]
    student = "mobilenet"
    epochs = 60

Keys are the options' names; the command line wins.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rkd.errors import ConfigError
from rkd.toml import read_toml, unknown_key


def command_defaults(path: Path, options: Mapping[str, set[str]]) -> dict[str, dict[str, Any]]:
    """Defaults per command.

    Args:
        path: of rkd.toml.
        options: the parameter names of every command.

    Raises:
        ConfigError: not TOML, an unknown command or option, or a value that is no plain value.
        StorageError: it cannot be read.
    """
    defaults: dict[str, dict[str, Any]] = {command: {} for command in options}
    everywhere = set().union(*options.values())
    content = read_toml(path)
    for key, value in content.items():
        if not isinstance(value, dict):
            name = _option(key, value, everywhere | set(options), path)
            for command, names in options.items():
                if name in names:
                    defaults[command].setdefault(name, value)
    for command, table in content.items():
        if not isinstance(table, dict):
            continue
        if command not in options:
            raise ConfigError(f"{path}: {unknown_key(command, options)} (tables are commands)")
        for key, value in table.items():
            defaults[command][_option(key, value, options[command], path, f" in [{command}]")] = value
    return defaults


def _option(key: str, value: object, known: set[str], path: Path, where: str = "") -> str:
    name = key.replace("-", "_")
    if name not in known:
        raise ConfigError(f"{path}{where}: {unknown_key(key, known)}")
    plain = (str, int, float, bool)
    if not isinstance(value, plain) and not (isinstance(value, list) and all(isinstance(v, plain) for v in value)):
        raise ConfigError(f"{path}{where}: {key} must be a text, a number, true, false or a list of these")
    return name
