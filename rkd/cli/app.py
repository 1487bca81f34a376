"""The program itself: version, defaults from rkd.toml, and the one place where an error becomes a line."""

from __future__ import annotations

import functools
import inspect
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar, get_type_hints

import typer
from typer.core import TyperCommand

from rkd import __version__
from rkd.errors import ConfigError, MissingExtraError, RkdError, printable, ran_out_of_memory

P = ParamSpec("P")
R = TypeVar("R")

_EXTRAS = {
    "torch": "train", "torchvision": "train", "safetensors": "train", "PIL": "train", "sklearn": "train",
    "onnx": "train", "onnxscript": "train", "onnxconverter_common": "train", "onnxruntime": "ort",
    "cryptography": "sign",
}  # fmt: skip

_MAX_MESSAGE = 4000  # a hostile file may have names of megabytes


def as_typed(text: str | None) -> str:
    """A help text in which paragraphs with indented lines, such as examples, are not wrapped."""
    paragraphs = inspect.cleandoc(text or "").split("\n\n")
    return "\n\n".join(f"\b\n{one}" if re.search("^ ", one, re.MULTILINE) else one for one in paragraphs)


app = typer.Typer(
    name="rkd",
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: rich's takes twice as long to come
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=as_typed("""Distil a teacher you cannot trust into a student you can ship.

    The three lines of the job:

        rkd distill teacher.pt --student mobilenet
        rkd export --target jetson-fp16
        rkd bench

    See it all happen on built-in data: `rkd demo`.
    """),
)


class Sectioned(TyperCommand):
    """A command whose options with a `rich_help_panel` have a section of their own in the plain help."""

    def format_options(self, ctx: Any, formatter: Any) -> None:  # noqa: D102
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if (row := param.get_help_record(ctx)) is not None:
                usual = "Arguments" if param.param_type_name == "argument" else "Options"
                sections.setdefault(getattr(param, "rich_help_panel", None) or usual, []).append(row)
        for title, rows in sections.items():
            with formatter.section(title):
                formatter.write_dl(rows)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"rkd {__version__}")  # noqa: T201
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[  # noqa: ARG001
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Read defaults from rkd.toml in the working folder."""
    path = Path("rkd.toml")
    if not path.is_file():
        return
    try:
        from rkd.config import command_defaults

        context.default_map = command_defaults(path, command_options())
    except RkdError as error:
        fail(error)


def command_options() -> dict[str, dict[str, Any]]:
    """The options of every command and their types, such as `int` or `list[Path] | None`."""
    return {
        found.name or found.callback.__name__: {
            name: kind for name, kind in get_type_hints(found.callback).items() if name not in ("context", "return")
        }
        for found in app.registered_commands
        if found.callback is not None
    }


def fail(error: RkdError) -> None:
    """Print an error as one line and leave with its exit code."""
    if os.environ.get("RKD_DEBUG") == "1":
        raise error
    say_error(str(error))
    raise typer.Exit(error.exit_code)


def say_error(message: str) -> None:
    """One line on standard error; what a hostile file put into it cannot steer the terminal."""
    line = " ".join(printable(message[:_MAX_MESSAGE]).split())
    print(f"rkd: {line}{' ...' if len(message) > _MAX_MESSAGE else ''}", file=sys.stderr)  # noqa: T201


def guarded(command: Callable[P, R]) -> Callable[P, R]:
    """Turn whatever a command raises into one line and an exit code; `RKD_DEBUG=1` shows the traceback instead."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except RkdError as error:
            fail(error)
        except ModuleNotFoundError as error:
            extra = _EXTRAS.get((error.name or "").partition(".")[0])
            if extra is None:
                raise
            fail(MissingExtraError(str(error.name), extra))
        except KeyboardInterrupt as stopped:
            say_error(str(stopped) or "interrupted")
            raise typer.Exit(128 + getattr(stopped, "signal_number", 2)) from None
        except MemoryError:
            fail(RkdError("out of memory; use a smaller --batch or a smaller data set"))
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except typer.Exit:
            raise
        except RuntimeError as error:
            if not ran_out_of_memory(error):
                internal(error)
            fail(RkdError("out of memory; use a smaller --batch, a smaller data set or another --device"))
        except Exception as error:  # noqa: BLE001  (the last border: whatever it is, the user gets one line)
            internal(error)
        raise AssertionError  # `fail` always raises

    run.__doc__ = as_typed(command.__doc__)
    return run


def internal(error: Exception) -> None:
    """Report a bug of rkd.

    Raises:
        Exception: `error` itself, where RKD_DEBUG is 1.
    """
    if os.environ.get("RKD_DEBUG") == "1":
        raise error
    fail(RkdError(f"internal error ({type(error).__name__}: {error}); this is a bug in rkd, RKD_DEBUG=1 shows where"))


def only_resume(context: typer.Context, *also: str) -> set[str]:
    """Refuse options beside --resume that the run directory decides; `also` may be given.

    Returns:
        What was given on the command line: a run's own settings go before rkd.toml's.

    Raises:
        ConfigError: one was given on the command line.
    """
    given = {name for name, origin in origins(context).items() if origin == "command line"}
    if refused := sorted(given - {"resume", "json_output", *also}):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in refused)
        raise ConfigError(f"--resume takes everything from the run directory: leave {names} out")
    return given


def code_from_command_line(context: typer.Context, *names: str) -> None:
    """Refuse code to run (`path/file.py:factory`) that rkd.toml or the environment names.

    Raises:
        ConfigError: one of the options `names` names code, and does not come from the command line.
    """
    where = origins(context)
    for name in names:
        value = str(context.params.get(name) or "")
        if ".py" in value and where[name] != "command line":
            raise ConfigError(
                f"{name} = {value!r}: code to run is taken from the command line only; give it with --{name}"
            )


def origins(context: typer.Context) -> dict[str, str]:
    """Where the value of each option came from: command line, rkd.toml, environment or default."""
    names = {"COMMANDLINE": "command line", "DEFAULT_MAP": "rkd.toml", "ENVIRONMENT": "environment"}
    found = {}
    for name in context.params:
        source = context.get_parameter_source(name)
        found[name] = names.get(source.name if source is not None else "", "default")
    return found
