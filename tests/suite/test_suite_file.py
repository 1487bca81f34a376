"""What a suite file says wrong is refused before anything is written, in one line that names the place."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from rkd.cli import app
from rkd.errors import ConfigError
from rkd.suite.file import read_suite
from rkd.suite.plan import make_plan

GOOD = """
[data.digits]
[pairs.wrn]
teacher = { arch = "wrn-10-2" }
distill = { student = "wrn-10-1" }
[attacks.backweak]
teacher = { attack = "backweak" }
[defences.ofd]
undefended = true
distill = { method = "ofd" }
"""

WRONG = {
    "not TOML": ("seeds = [", "is not valid TOML"),
    "unknown table": (GOOD + "[defence.kd]\n", "unknown key 'defence'; did you mean 'defences'?"),
    "unknown teacher option": (GOOD + "[teacher]\nepoch = 3\n", "did you mean 'epochs'? (options of rkd teacher)"),
    "unknown distill option": (GOOD + "[distill]\nhardning = 3\n", "did you mean 'hardening'? (options of rkd distill)"),
    "option outside of its table": (GOOD + '[defences.kd]\nmethod = "kd"\n', "put it into distill = { ... }"),
    "unknown attack": (GOOD.replace('attack = "backweak"', 'attack = "bakweak"'), "did you mean 'backweak'?"),
    "unknown method": (GOOD.replace('"ofd"', '"ofdd"'), "did you mean"),
    "no attack named": (GOOD.replace('attack = "backweak"', "target = 3"), "names no attack"),
    "clean that is not": (GOOD + '[attacks.clean]\nteacher = { attack = "badnets" }\n', "is the clean twin"),
    "seed as an option": (GOOD + "[teacher]\nseed = 3\n", "leave seed out: seeds are given by `seeds`"),
    "seed twice": ("seeds = [0, 1, 0]\n" + GOOD, "two cells would have one name"),
    "no seeds": ("seeds = []\n" + GOOD, "expected a list of whole numbers"),
    "one name twice": (GOOD + "[defences.ofd]\n", "is not valid TOML"),
    "names that differ in case": (GOOD + "[defences.OFD]\n", "two cells would have one name"),
    "a name that leaves its folder": (GOOD + '[defences."../x"]\n', "folders go by it"),
    "a name that splits in two": (GOOD + "[defences.a__b]\n", "folders go by it"),
    "a text for a number": (GOOD + '[distill]\nepochs = "six"\n', "epochs = 'six': expected a whole number"),
    "true for a number": (GOOD + "[distill]\nepochs = true\n", "expected a whole number"),
    "a number for true": (GOOD + "[defences.kd]\nundefended = 1\n", "must be true or false"),
    "an impossible value": (GOOD + "[distill]\nepochs = 0\n", "--epochs 0: expected 1 or more"),
    "a defence with teacher options": (GOOD + "[defences.kd]\nteacher = { epochs = 3 }\n", "does not know the defence"),
    "an attack with distill options": (GOOD + '[attacks.b]\nteacher = { attack = "badnets" }\ndistill = { epochs = 3 }\n', "a defence does not know the attack"),
    "an override without effect": (GOOD + '[[override]]\ndata = "digits"\n', "changes nothing"),
    "an override of everything": (GOOD + "[[override]]\nseeds = [1]\n", "matches everything"),
    "an override that lets a defence see the attack": (GOOD + '[[override]]\nattack = "backweak"\ndistill = { epochs = 3 }\n', "does not know the attack"),
    "an exclude of nobody": (GOOD + '[[exclude]]\ndefence = "odf"\n', "there is no defence 'odf'; did you mean 'ofd'?"),
    "an exclude of all": (GOOD + '[[exclude]]\ndefence = "*"\n', "leave no cell at all"),
    "only of a wrong axis": (GOOD + '[defences.kd]\nonly = { attacks = "backweak" }\n', "did you mean 'attack'?"),
    "no student": (GOOD.replace('distill = { student = "wrn-10-1" }', ""), "no student"),
    "no defence": (GOOD.partition("[defences")[0], "no [defences.NAME]"),
    "two splits": (GOOD + "[teacher]\nsplit-seed = 1\n[distill]\nsplit-seed = 2\n", "different split-seeds"),
    "too many seeds": (f"seeds = {list(range(101))}\n" + GOOD, "101 seeds, expected at most 100"),
    "too many cells": (
        f"seeds = {list(range(100))}\n" + GOOD + "".join(f"[defences.d{i}]\n" for i in range(60)), "cells, expected at most 10,000"
    ),
    "too many combinations": (
        GOOD + "".join(f"[budgets.b{i}]\n[defences.d{i}]\n" for i in range(320)), "combinations, expected at most 100,000"
    ),
    "names that no file can have": (
        GOOD.replace("backweak]", "b" * 60 + "]") + f"[defences.{'d' * 60}]\n[budgets.{'e' * 60}]\n", "expected at most 200"
    ),
    "a budget that is none": (GOOD + '[budgets.b]\ndistill = { clean-budget = "nan%" }\n', "--clean-budget 'nan%'"),
    "a scaling that is none": (GOOD + '[teacher]\nnormalize = "junk"\n', "--normalize 'junk'"),
    "a device that is none": (GOOD + '[distill]\ndevice = "abc"\n', "--device 'abc'"),
    "a class that is none": (GOOD + "[teacher]\ntarget = 4000000000000\n", "--target 4000000000000"),
    "an epoch too many": (GOOD + "[distill]\nepochs = 1000000000000\n", "expected at most 4,294,967,295"),
    "an attack for everybody": (GOOD + '[teacher]\nattack = "badnets"\n', "clean twins have none"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_file_is_refused_with_its_place(what: str, tmp_path: Path) -> None:
    text, said = WRONG[what]
    path = tmp_path / "my.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        make_plan(read_suite(path))
    assert said in str(caught.value)
    assert "my" in str(caught.value)
    assert "\n" not in str(caught.value).replace("\n  ", "")


def test_the_good_file_is_good(tmp_path: Path) -> None:
    (tmp_path / "good.toml").write_text(GOOD)
    suite = read_suite(tmp_path / "good.toml")
    assert suite.name == "good"
    assert [job.partition(":")[0] for job in make_plan(suite).jobs] == [
        "teacher", "teacher", "student", "student", "score",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GOOD.replace("wrn-10-1", "wrm-10-1"), "no network is called 'wrm_10_1'"),
        (GOOD.replace("data.digits", "data.digts"), "did you mean digits?"),
        (GOOD.replace("data.digits", "data.nowhere"), "--data-root"),
        (GOOD + '[data.nothing]\ndata = ""\n', "names nothing"),
        (GOOD + f'[data.long]\ndata = "{"x" * 300}"\n', "File name too long"),
    ],
)
def test_networks_and_data_that_do_not_exist_are_named_before_anything_is_written(
    text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.toml").write_text(text)
    done = CliRunner().invoke(app, ["suite", "my.toml"])
    assert done.exit_code == 1
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["my.toml"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--launcher", "slurm"], "expected local or ray"),
        (["--stale", "ignore"], "expected one of refuse, keep, redo"),
        (["--jobs", "-1"], "expected 0 for one a CPU"),
        (["--memory", "100"], "expected 0 for no limit, or from 800 MiB"),
        (["--memory", str(10**14)], "expected 0 for no limit"),
        (["--results", "x" * 300], "File name too long"),
        (["--data-root", "nowhere"], "no such folder"),
        (["--only", "nothing/*"], "no cell of suite my is called so"),
        (["--dry-run", "--table-only"], "either --dry-run or --table-only"),
        (["--table-only"], "holds no results"),
    ],
)
def test_wrong_options_are_refused(
    options: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.toml").write_text(GOOD)
    done = CliRunner().invoke(app, ["suite", "my.toml", *options])
    assert done.exit_code == 1
    assert said in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["my.toml"]


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["suite", "no.toml"])
    assert done.exit_code == 1
    assert done.stderr == "rkd: no such file or folder: no.toml\n"
