"""Options of `rkd teacher` and `rkd distill` as a suite file gives them: checked, compared, put on a command line.

Nothing here knows an attack or a method by name: the settings classes say what exists.
"""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Collection, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from rkd.errors import ConfigError, RkdError
from rkd.files import sha256, to_json
from rkd.toml import unknown_key

Options = Mapping[str, Any]

_TEACHER_DECIDED = {
    "data": "the data set is an entry of [data]",
    "clean": "the clean twin is trained by the suite",
    "seed": "seeds are given by `seeds`",
}
_DISTILL_DECIDED = {
    "data": "the data set is an entry of [data]",
    "teacher": "the teacher is the cell's",
    "triggers": "the trigger is the teacher's",
    "trigger": "the trigger is the teacher's",
    "seed": "seeds are given by `seeds`",
    "undefended": "undefended students are cells of their own",
}
# What does not decide the result, or is compared by its digest instead.
NOT_COMPARED = frozenset({"data", "teacher", "triggers", "clean", "device", "threads", "checkpoint_every"})
_LEFT_TO_THE_RUN = ("auto", None)
_FROM_THE_FILE = frozenset({"arch", "normalize"})  # of the teacher's file, where they are empty


@dataclass(frozen=True)
class Kind:
    """One of the two commands that a recipe is for.

    Attributes:
        command: `teacher` or `distill`.
        settings: the dataclass that its options fill.
        decided: options that the suite itself gives, and why.
        needed: values for the fields without a default, to check a recipe with.
    """

    command: str
    settings: type[Any]
    decided: Mapping[str, str]
    needed: Mapping[str, Any]

    def known(self) -> list[str]:
        """The options that a suite file may give."""
        return [f.name for f in fields(self.settings) if f.name not in self.decided]

    def default(self, name: str) -> Any:
        """The default of an option."""
        return next(_default(f) for f in fields(self.settings) if f.name == name)

    def make(self, options: Options, where: str = "", **decided: Any) -> Any:
        """The settings that the options stand for.

        Raises:
            ConfigError: one has an impossible value; `where` says whose.
        """
        try:
            return self.settings(**{**self.needed, **options, **decided})
        except RkdError as error:
            raise ConfigError(f"{where}{': ' if where else ''}{error}{_nearest(str(error))}") from error


def teacher_kind() -> Kind:
    """`rkd teacher`."""
    from rkd.attacks.session import TeacherSettings

    return Kind("teacher", TeacherSettings, _TEACHER_DECIDED, {"data": "digits"})


def distill_kind() -> Kind:
    """`rkd distill`."""
    from rkd.distill.settings import DistillSettings

    return Kind("distill", DistillSettings, _DISTILL_DECIDED, {"data": "digits", "teacher": "t", "student": "wrn-16-1"})


def checked_options(kind: Kind, options: Options, where: str) -> dict[str, Any]:
    """The options of one table of a suite file, by the names of the settings' fields, of the fields' types.

    Raises:
        ConfigError: an unknown option, one that the suite decides, or a value of another type.
    """
    hints, known = get_type_hints(kind.settings), kind.known()
    found: dict[str, Any] = {}
    for key, value in options.items():
        name = key.replace("-", "_")
        if name in kind.decided:
            raise ConfigError(f"{where}: leave {key} out: {kind.decided[name]}")
        if name not in known:
            spelled = [option.replace("_", "-") for option in known]
            raise ConfigError(f"{where}: {unknown_key(key.replace('_', '-'), spelled)} (options of rkd {kind.command})")
        if name in found:
            raise ConfigError(f"{where}: {key} is given twice")
        found[name] = _typed(value, hints[name], f"{where}: {key}")
    return found


def differences(
    kind: Kind, recorded: Mapping[str, Any], options: Options, *, given: Collection[str] = (), **decided: Any
) -> list[str]:
    """How the settings that something was made with differ from what is wanted, in words; nothing where they do not.

    A setting that the wanted recipe leaves to the run (`auto`) fits whatever the run chose by itself; one that the
    record does not have yet, because an older rkd made it, must be wanted as it was then: at its default, or as the field's
    metadata has it.

    Args:
        kind: of the recipe.
        recorded: value by name.
        options: the wanted recipe, as the suite file has it.
        given: the settings that were given when it was made, where that is known: the run did not choose these.
        **decided: the rest of it.
    """
    wanted, found = kind.make(options, **decided), []
    for f in fields(kind.settings):
        value = getattr(wanted, f.name)
        found_out = f.name in _FROM_THE_FILE and value == ""
        if f.name in NOT_COMPARED or ((value in _LEFT_TO_THE_RUN or found_out) and f.name not in given):
            continue
        seen = recorded.get(f.name, _before(f, recorded))
        if (tuple(seen) if isinstance(seen, list) else seen) != value:
            found.append(
                f"{f.name.replace('_', '-')} was {seen}, wanted {value if value not in ('', None) else 'none given'}"
            )
    return found


def command_line(kind: Kind, options: Options) -> list[str]:
    """The options as they are typed, e.g. `--epochs=6`.

    Raises:
        ConfigError: the command has no such option.
    """
    from typer.main import get_command

    from rkd.cli import app

    commands: Mapping[str, Any] = getattr(get_command(app), "commands", {})
    parameters = {str(p.name): p for p in commands[kind.command].params}
    words: list[str] = []
    for name, value in options.items():
        if name not in parameters:
            raise ConfigError(f"rkd {kind.command} has no option for its setting {name}")
        parameter = parameters[name]
        if value is True or value is False:
            flags = parameter.opts if value else parameter.secondary_opts
            words += [max(flags, key=len)] if flags else []
        else:
            option = max(parameter.opts, key=len)
            words += [f"{option}={item}" for item in (value if isinstance(value, tuple) else (value,))]
    return words


def digest(value: object) -> str:
    """SHA-256 of something that JSON can hold, whatever order its keys are in."""
    return sha256(to_json(_sorted(value)))


def _sorted(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _sorted(value[key]) for key in sorted(value)}
    return [_sorted(item) for item in value] if isinstance(value, list | tuple) else value


def _before(field: Field[Any], recorded: Mapping[str, Any]) -> Any:
    """What a setting was before there was one: its default, or what its metadata has for where another setting is on."""
    before = field.metadata.get("before")
    return before["value"] if before and recorded.get(before["with"]) else _default(field)


def _default(field: Field[Any]) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return None if field.default is MISSING else field.default


def _typed(value: Any, hint: Any, where: str) -> Any:
    allowed = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for kind in allowed:
        if kind is float and type(value) in (int, float):
            return float(value)
        if kind in (bool, int, str) and type(value) is kind:
            return value
        if get_origin(kind) is tuple and isinstance(value, list):
            return tuple(value)
        if get_origin(kind) is Literal and value in get_args(kind):
            return value
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    expected = [names[k] for k in allowed if k in names] or [str(hint)]
    raise ConfigError(f"{where} = {value!r}: expected {' or '.join(expected)}")


def _nearest(message: str) -> str:
    """`; did you mean 'x'?`, where a message names what was seen and all that is known."""
    match = re.search(r"'([^']+)': expected (?:one of )?(.+)$", message)
    known = re.findall(r"[\w:+.-]+", match[2]) if match else []
    close = difflib.get_close_matches(match[1], known, 1) if match else []
    return f"; did you mean {close[0]!r}?" if close else ""
