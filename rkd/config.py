"""rkd.toml: defaults of the commands' options (no torch).

    data = "photos"              # for distill, teacher and export
    [distill]
    student = "mobilenet"
    epochs = 60
    [bench]
    threads = 1

Keys are the options' names; the command line wins. A key above all tables is for every command in which it means the
same thing; the others take it from their own table. The file may come with somebody else's folder: what acts on other
machines, on clocks or on what is there already is taken from the command line only, and outputs stay in the folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

from rkd.errors import ConfigError
from rkd.toml import read_toml, unknown_key

_COMMAND_LINE_ONLY = frozenset({"host", "remote_rkd", "lock_clocks", "force", "overwrite"})

# What means something else in this command than in the others that have it: training's images, batches and threads are
# not what a board is measured with; the target of an attack is no board; and export's --teacher is a switch.
_FROM_ITS_TABLE = {
    "bench": frozenset({"data", "batch", "threads"}),
    "teacher": frozenset({"target"}),
    "export": frozenset({"teacher"}),
}

_TYPES: dict[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    Path: ((str,), "a path in quotes"),
}


def command_defaults(path: Path, options: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Defaults per command.

    Args:
        path: of rkd.toml.
        options: of every command, with their types, such as `int` or `list[Path] | None`.

    Raises:
        ConfigError: not TOML, an unknown command or option, one that the file may not decide, or a value of another type
            than its option's.
        StorageError: it cannot be read.
    """
    defaults: dict[str, dict[str, Any]] = {command: {} for command in options}
    everywhere = {name for types in options.values() for name in types}
    content = read_toml(path)
    _check_once(content, str(path))
    for key, value in content.items():
        if not isinstance(value, dict):
            if key in options and key not in everywhere:
                raise ConfigError(f"{path}: {key} is a command; its options go below a line [{key}]")
            name = _option(key, value, everywhere, str(path))
            for command, types in options.items():
                if name in types and name not in _FROM_ITS_TABLE.get(command, ()):
                    defaults[command][name] = _value(key, value, types[name], str(path))
    for command, table in content.items():
        if not isinstance(table, dict):
            continue
        if command not in options:
            raise ConfigError(f"{path}: {unknown_key(command, options)} (tables are commands)")
        where = f"{path} in [{command}]"
        _check_once(table, where)
        for key, value in table.items():
            name = _option(key, value, options[command], where)
            defaults[command][name] = _value(key, value, options[command][name], where)
    return defaults


def _check_once(table: Mapping[str, Any], where: str) -> None:
    """See that no option stands there in both of its spellings.

    Raises:
        ConfigError: one does.
    """
    for key in table:
        other = key.replace("-", "_")
        if other != key and other in table:
            raise ConfigError(f"{where}: {key} and {other} are the same option; keep one of them")


def _value(key: str, value: object, annotation: Any, where: str) -> object:
    """One value for an option that is given once, a list for one that may be repeated.

    Raises:
        ConfigError: it is of another type than the option.
    """
    kinds = [kind for kind in (get_args(annotation) or (annotation,)) if kind is not type(None)]
    repeats = get_origin(annotation) is list or any(get_origin(kind) is list for kind in kinds)
    if isinstance(value, list) and not repeats:
        raise ConfigError(f"{where}: {key} takes one value, not a list")
    (kind,) = get_args(kinds[0]) or kinds[:1]
    values = value if isinstance(value, list) else [value]
    accepted, called = _TYPES.get(kind, ((str, int, float), "a text"))
    if not all(isinstance(one, accepted) and (kind is bool or not isinstance(one, bool)) for one in values):
        raise ConfigError(f"{where}: {key} = {value!r}, expected {called}")
    if any("\0" in one for one in values if isinstance(one, str)):
        raise ConfigError(f"{where}: {key} = {value!r} holds a zero byte; remove it")
    return values if repeats else value


def _option(key: str, value: object, known: Iterable[str], where: str) -> str:
    name = "json_output" if key == "json" else key.replace("-", "_")
    if name not in known:
        names = ["json" if one == "json_output" else one.replace("_", "-") for one in known]
        raise ConfigError(f"{where}: {unknown_key(key, names)}")
    plain = (str, int, float, bool)
    if not isinstance(value, plain) and not (isinstance(value, list) and all(isinstance(v, plain) for v in value)):
        raise ConfigError(f"{where}: {key} must be a text, a number, true, false or a list of these")
    if name in _COMMAND_LINE_ONLY:
        raise ConfigError(f"{where}: {key} is taken from the command line only; leave it out here")
    if name in ("out", "results") and (Path(str(value)).is_absolute() or ".." in Path(str(value)).parts):
        raise ConfigError(f"{where}: {key} = {value!r} leads out of this folder; give such an --{key} by hand")
    return name
