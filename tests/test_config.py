"""rkd.toml, through the real command line: what it sets, what overrules it, what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rkd.cli import app
from rkd.config import command_defaults
from rkd.errors import ConfigError


class Caught(Exception):
    """Carries what a command was about to do."""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RKD_DEBUG", "1")  # `Caught` comes through as it is


def settings_of(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, dict[str, str]]:
    """The settings that `rkd ...` starts with, and where each came from."""

    def start(settings: Any, origins: dict[str, str], *_: Any) -> Any:
        raise Caught(settings, origins)

    monkeypatch.setattr("rkd.distill.session.start", start)
    monkeypatch.setattr("rkd.attacks.session.start_teacher", start)
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, Caught), (done.output, done.exception)
    settings, origins = done.exception.args
    return settings, origins


def exported(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    def command(*given: Any, **options: Any) -> None:
        raise Caught(*given, options)

    monkeypatch.setattr("rkd.export.command.export_command", command)
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, Caught), (done.output, done.exception)
    return done.exception.args


def write(text: str) -> None:
    Path("rkd.toml").write_text(text)


def refusal(arguments: tuple[str, ...] = ("doctor",)) -> str:
    done = CliRunner().invoke(app, list(arguments))
    assert isinstance(done.exception, ConfigError), (done.output, done.exception)
    assert str(done.exception).startswith("rkd.toml")
    return str(done.exception)


DISTILL = ["distill", "t.pt"]


def test_without_a_file_the_defaults_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    settings, origins = settings_of([*DISTILL, "--data", "digits"], monkeypatch)
    assert (settings.epochs, origins["epochs"]) == (40, "default")
    assert (settings.data, origins["data"]) == ("digits", "command line")


def test_the_command_line_overrules_the_table_and_the_table_overrules_the_top(monkeypatch: pytest.MonkeyPatch) -> None:
    write('data = "top"\nseed = 1\nbatch = 7\n[distill]\ndata = "table"\nseed = 2\n')
    settings, origins = settings_of([*DISTILL, "--seed", "3"], monkeypatch)
    assert (settings.batch, settings.data, settings.seed) == (7, "table", 3)
    assert (origins["batch"], origins["data"], origins["seed"]) == ("rkd.toml", "rkd.toml", "command line")


def test_a_key_at_the_top_goes_only_where_it_means_the_same() -> None:
    write(
        'data = "photos"\nbatch = 7\nthreads = 1\nseed = 3\ntarget = "jetson-fp16"\nteacher = "t.pt"\n[bench]\nbatch = "1,4"\n'
    )
    options = {
        "distill": {"teacher": Path | None, "data": str, "batch": int, "threads": int, "seed": int},
        "teacher": {"data": str, "batch": int, "target": int},
        "export": {"data": str, "target": list[str] | None, "teacher": bool},
        "bench": {"data": Path | None, "batch": str, "threads": int},
    }
    assert command_defaults(Path("rkd.toml"), options) == {
        "distill": {"data": "photos", "batch": 7, "threads": 1, "seed": 3, "teacher": "t.pt"},
        "teacher": {"data": "photos", "batch": 7},
        "export": {"data": "photos", "target": ["jetson-fp16"]},
        "bench": {"batch": "1,4"},
    }


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('epochs = "ten"', "epochs = 'ten', expected a whole number"),
        ("epochs = 1.5", "epochs = 1.5, expected a whole number"),
        ("epochs = true", "epochs = True, expected a whole number"),
        ("undefended = 1", "undefended = 1, expected true or false"),
        ('cap = "x"', "cap = 'x', expected a number"),
        ("student = true", "student = True, expected a text"),
        ("trigger = [true]", r"trigger = \[True\], expected a path in quotes"),
        ('clean-budget = "5%"\nclean_budget = "9%"', "clean-budget and clean_budget are the same option"),
    ],
)
def test_a_value_of_another_type_is_the_files_fault(line: str, said: str) -> None:
    write(f"[distill]\n{line}\n")
    assert re.search(rf"^rkd.toml in \[distill\]: {said}", refusal())


@pytest.mark.parametrize("value", ['"\\u0000"', "nan", "9223372036854775807", "0", "1.5"])
@pytest.mark.parametrize(
    "key",
    ["distill.teacher", "distill.out", "distill.trigger", "bench.bundles", "bench.out", "demo.out", "report.sources"],
)
def test_what_is_no_path_is_refused_before_anybody_opens_it(key: str, value: str) -> None:
    """Even an odd number would be an open file to those that look at paths."""
    command, option = key.split(".")
    write(f"[{command}]\n{option} = {value}\n")
    assert re.search(f"{option} = .* (expected a path in quotes|holds a zero byte; remove it)$", refusal((command,)))


def test_numbers_may_stand_for_numbers_with_a_fraction_and_for_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    write('[distill]\nhardening = 6\nclean-budget = 500\ntrigger = "a.npz"\ndata = "digits"\n')
    settings, _ = settings_of(DISTILL, monkeypatch)
    assert (settings.hardening, settings.clean_budget, settings.triggers) == (6.0, "500", ("a.npz",))


def test_the_order_of_the_file_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    # TOML puts top-level keys first, but dotted keys may come before them.
    write('distill.data = "table"\ndata = "top"\n')
    assert settings_of(DISTILL, monkeypatch)[0].data == "table"


def test_a_table_is_for_its_command_only(monkeypatch: pytest.MonkeyPatch) -> None:
    write('data = "photos"\n[teacher]\nepochs = 3\n')
    assert settings_of(DISTILL, monkeypatch)[0].epochs == 40
    settings, _ = settings_of(["teacher"], monkeypatch)
    assert (settings.epochs, settings.data) == (3, "photos")


def test_hyphens_and_underscores_name_the_same_option(monkeypatch: pytest.MonkeyPatch) -> None:
    write('data = "x"\n[distill]\naccuracy-budget = 2.5\ncheckpoint_every = 9\n')
    settings, _ = settings_of(DISTILL, monkeypatch)
    assert (settings.accuracy_budget, settings.checkpoint_every) == (2.5, 9)


def test_flags_and_numbers_of_either_kind_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    write('data = "x"\n[distill]\nundefended = true\naccuracy-budget = 2\nclean-budget = "10%"\n')
    settings, _ = settings_of(DISTILL, monkeypatch)
    assert (settings.undefended, settings.accuracy_budget, settings.clean_budget) == (True, 2.0, "10%")


def test_the_teacher_may_be_named_in_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    write('[distill]\nteacher = "hub.pt"\ndata = "x"\n')
    assert settings_of(["distill"], monkeypatch)[0].teacher == "hub.pt"


@pytest.mark.parametrize(("text", "expected"), [('"jetson-fp16"', ["jetson-fp16"]), ('["a", "b"]', ["a", "b"])])
def test_an_option_that_may_be_repeated_takes_one_value_or_a_list(
    monkeypatch: pytest.MonkeyPatch, text: str, expected: list[str]
) -> None:
    write(f"[export]\ntarget = {text}\n")
    assert list(exported(["export"], monkeypatch)[1]) == expected
    assert list(exported(["export", "--target", "c"], monkeypatch)[1]) == ["c"]


def test_triggers_are_paths_not_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    write('[distill]\ndata = "x"\ntrigger = "patch.npz"\n')
    assert settings_of(DISTILL, monkeypatch)[0].triggers == ("patch.npz",)


def test_an_option_that_takes_one_value_takes_no_list() -> None:
    write('[distill]\nstudent = ["a", "b"]\n')
    assert "one value" in refusal()


def test_an_unknown_key_is_refused_with_the_one_that_was_meant() -> None:
    write('[distill]\nstudnet = "mobilenet"\n')
    assert "in [distill]: unknown key 'studnet'; did you mean 'student'?" in refusal()


def test_an_unknown_key_at_the_top_is_refused() -> None:
    write('dta = "photos"\n')
    assert "unknown key 'dta'; did you mean 'data'?" in refusal()


def test_a_key_of_another_command_is_refused_in_a_table() -> None:
    write("[bench]\nepochs = 3\n")
    assert "in [bench]: unknown key 'epochs'" in refusal()


def test_an_unknown_table_is_refused_with_the_command_that_was_meant() -> None:
    write("[distil]\nepochs = 3\n")
    assert "unknown key 'distil'; did you mean 'distill'?" in refusal()


def test_a_command_is_a_table_not_a_value() -> None:
    write("export = 3\n")
    assert "[export]" in refusal()


@pytest.mark.parametrize("value", ["{a = 1}", "[[1]]", "2024-01-01", "12:00:00", "[{a = 1}]"])
def test_a_value_that_is_no_plain_value_is_refused(value: str) -> None:
    write(f"[distill]\nstudent = {value}\n")
    assert "student must be" in refusal()


@pytest.mark.parametrize(
    "content",
    [b"data = ", b"= 1", b"\xff\xfe", b"data = 'a\n'", b"a = 1\na = 2", b"a" * 100, b"a=" + b"[" * 100_000, b"#" * (2**20 + 1)],
    ids=["no value", "no key", "no text", "newline", "twice", "word", "nested", "huge"],
)  # fmt: skip
def test_what_is_no_toml_is_refused_before_any_command_runs(content: bytes) -> None:
    Path("rkd.toml").write_bytes(content)
    refusal()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('host = ["board"]', "host is taken from the command line only"),
        ('remote-rkd = "touch x; rkd"', "remote-rkd is taken from the command line only"),
        ("lock-clocks = true", "lock-clocks is taken from the command line only"),
        ('out = "../result.json"', "leads out of this folder"),
        ('out = "/etc/result.json"', "leads out of this folder"),
    ],
)
def test_a_folder_decides_nothing_outside_of_it(tmp_path: Path, line: str, said: str) -> None:
    options = {"bench": {"host": list[str] | None, "remote_rkd": str, "lock_clocks": bool, "out": Path}}
    for text in (line, f"[bench]\n{line}"):
        (tmp_path / "rkd.toml").write_text(text)
        with pytest.raises(ConfigError, match=said):
            command_defaults(tmp_path / "rkd.toml", options)
    (tmp_path / "rkd.toml").write_text('[bench]\nout = "results/mine.json"')
    assert command_defaults(tmp_path / "rkd.toml", options) == {"bench": {"out": "results/mine.json"}}
