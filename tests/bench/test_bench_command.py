"""`rkd bench` as a user calls it: exit codes, gates, what is written and what is said."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from rkd import files
from rkd.bench import command, result, session
from rkd.bench.options import BenchOptions
from rkd.cli import app
from rkd.errors import ConfigError, DataError


def entries():
    """Of the result in the current folder."""
    return result.read(Path("result.json"))["entries"]


def quiet(found):
    """Without what this machine did to the timing meanwhile: the tests share it."""
    for entry in found["entries"]:
        reasons = [reason for reason in entry["validity"]["reasons"] if reason["affects"] == "scores"]
        entry["validity"] = {"valid": not reasons, "timing": True, "scores": not reasons, "reasons": reasons}
    return found


@pytest.fixture
def bench(folder, make_bundle, fast, monkeypatch):
    """Runs the command in an empty folder, with samples for a moment only."""
    real = command.run

    def short(bundles, options, tell, **more):
        given = {**vars(options), "seconds": 0.02, "min_samples": 30, "memory": False, "sensors": False}
        return quiet(real(bundles, BenchOptions(**given), tell, **more))

    monkeypatch.setattr(command, "run", short)
    path = str(make_bundle().path)

    def call(*arguments):
        return CliRunner().invoke(app, ["bench", path, "--threads", "1", *arguments])

    return call


def test_kept_gates_are_said_and_the_exit_is_0(bench):
    done = bench("--gate", "acc>=50, p90<=5s", "--gate", "agreement>=98")
    assert done.exit_code == 0, done.output
    (entry,) = entries()
    assert [gate["passed"] for gate in entry["gates"]] == [True] * 3


def test_a_broken_gate_is_exit_3_says_which_and_the_result_is_written(bench):
    done = bench("--gate", "acc>=99.9, p90<=5s")
    assert done.exit_code == 3
    assert "gate BROKEN: acc>=99.9: acc is" in " ".join(done.stdout.split())
    assert "p90<=5s" not in done.stderr
    assert done.stderr.endswith("rkd: 1 gate failed: linear.ort-cpu: acc>=99.9\n")  # its figure stands in the table
    assert entries()


def test_a_broken_gate_beside_json_is_told_with_its_figure(bench):
    done = bench("--gate", "acc>=99.9", "--json")
    assert done.exit_code == 3
    assert "1 gate failed: linear.ort-cpu: acc>=99.9: acc is" in done.stderr


def test_a_gate_that_cannot_be_read_is_found_before_anything_is_measured(bench, monkeypatch):
    monkeypatch.setattr(command, "run", lambda *_, **__: pytest.fail("measured"))
    done = bench("--gate", "speed>=1")
    assert done.exit_code == 1
    assert "no figure is called 'speed'" in done.stderr


def test_an_invalid_result_fails_only_where_it_must_be_valid(bench, monkeypatch):
    real = command.run

    def spoiled(*arguments, **more):
        found = real(*arguments, **more)
        reason = {"code": "throttled", "affects": "timing", "text": "the board throttled"}
        for entry in found["entries"]:
            entry["validity"] = {"valid": False, "timing": False, "scores": True, "reasons": [reason]}
        return found

    monkeypatch.setattr(command, "run", spoiled)
    assert bench("--gate", "acc>=50").exit_code == 0
    done = bench("--require-valid")
    assert done.exit_code == 3
    assert "the result is not valid: linear.ort-cpu: throttled: the board throttled" in done.stderr


def test_a_gate_on_an_invalid_figure_is_exit_3_and_says_why(bench, folder, evaluation):
    images, _ = evaluation
    np.savez(folder / "one.npz", x=images[:20].transpose(0, 2, 3, 1), y=np.full(20, 2))
    done = bench("--data", "one.npz", "--gate", "acc>=0, p90<=5s")
    assert done.exit_code == 3
    assert "rkd: 1 gate failed: linear.ort-cpu: acc>=0\n" in done.stderr
    assert "but invalid: one-class" in " ".join(done.stdout.split())


def test_a_backdoor_that_woke_on_the_board_is_exit_3_where_the_result_must_be_valid(bench, monkeypatch):
    real = command.run

    def woken(*arguments, **more):
        found = real(*arguments, **more)
        for entry in found["entries"]:
            entry["validity"] = {"valid": True, "timing": True, "scores": True, "reasons": []}
            entry["findings"] = [{"code": "leak", "text": "it grew"}, {"code": "backdoor-woken", "text": "ASR rises"}]
        return found

    monkeypatch.setattr(command, "run", woken)
    assert bench().exit_code == 0
    done = bench("--require-valid")
    assert done.exit_code == 3
    assert "linear.ort-cpu: backdoor-woken: ASR rises" in done.stderr
    assert "it grew" not in done.stderr


@pytest.mark.promise
def test_a_sweep_measures_each_batch_and_classes_are_listed_on_request(bench):
    assert bench("--batch", "1,2,4", "--per-class").exit_code == 0
    (entry,) = entries()
    assert [latency["batch"] for latency in [entry["latency"], *entry["sweep"]]] == [1, 2, 4]
    assert [one["name"] for one in entry["classes"]] == [f"class {i}" for i in range(5)]
    assert sum(one["acc"]["hits"] for one in entry["classes"]) == entry["scores"]["acc"]["hits"]


def test_data_of_the_user_replaces_the_bundles_images(bench, folder, evaluation):
    images, labels = evaluation
    np.savez(folder / "mine.npz", x=images[:50].transpose(0, 2, 3, 1), y=labels[:50])
    assert bench("--data", "mine.npz").exit_code == 0
    (entry,) = entries()
    assert entry["evaluated"] == {"source": "mine.npz", "images": 50, "of": 50}
    assert entry["agreement"] is None
    assert entry["differences"] is None


def test_a_quick_run_takes_some_of_an_npz_of_any_length(bench, folder, evaluation, linear):
    images, _ = evaluation
    many = np.resize(images, (3000, *images.shape[1:])).transpose(0, 2, 3, 1)
    np.savez_compressed(folder / "many.npz", x_test=many, y_test=np.resize(linear.labels(images), 3000))
    assert bench("--data", "many.npz", "--quick").exit_code == 0
    (entry,) = entries()
    assert entry["evaluated"] == {"source": "many.npz", "images": 256, "of": 3000}
    assert entry["scores"]["acc"]["percent"] == 100.0  # each with its own label


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"y": np.zeros(3, np.int64)}, "expected x uint8 (N, 8, 8, 3) and y (N,)"),
        ({"x": np.zeros((3, 8, 8, 3), np.uint8)}, "expected x uint8 (N, 8, 8, 3) and y (N,)"),
        ({"x": np.zeros((3, 9, 9, 3), np.uint8), "y": np.zeros(3, np.int64)}, "x is uint8(3, 9, 9, 3)"),
        ({"x": np.zeros((3, 8, 8, 3), np.uint8), "y": np.zeros(4, np.int64)}, "3 images and 4 labels"),
        ({"x": np.zeros((3, 8, 8, 3), np.uint8), "y": np.full(3, 5)}, "labels must be 0 to 4"),
    ],
)
@pytest.mark.parametrize("more", [(), ("--quick",)])
def test_an_npz_that_does_not_fit_is_refused_before_anything_is_measured(bench, folder, arrays, says, more):
    np.savez(folder / "odd.npz", **arrays)
    done = bench("--data", "odd.npz", *more)
    assert done.exit_code == 1
    assert done.stderr.startswith("rkd: odd.npz: ")
    assert says in done.stderr
    assert not (folder / "result.json").exists()


def test_a_folder_is_decoded_as_it_is_read_and_its_missing_classes_are_named(bench, folder, evaluation):
    from PIL import Image

    images, labels = evaluation
    for i in np.flatnonzero(labels < 3)[:40]:
        place = folder / f"photos/test/class {labels[i]}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i].transpose(1, 2, 0)).save(place / f"{i}.png")
    done = bench("--data", "photos")
    assert done.exit_code == 0, done.output
    (entry,) = entries()
    assert entry["evaluated"] == {"source": "photos", "images": 40, "of": 40}
    assert any("no images of class class 3, class 4" in finding["text"] for finding in entry["findings"])


def test_images_of_one_class_make_the_scores_invalid_and_break_nothing(bench, folder, evaluation):
    images, _ = evaluation
    np.savez(folder / "one.npz", x=images[:20].transpose(0, 2, 3, 1), y=np.full(20, 2))
    assert bench("--data", "one.npz").exit_code == 0
    (entry,) = entries()
    assert entry["validity"]["scores"] is False
    assert [reason["code"] for reason in entry["validity"]["reasons"]].count("one-class") == 1
    assert entry["scores"]["triggers"][0]["asr"]["n"] == 0  # all of them are of the attacker's class


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: None, "no such file or folder"),
        (lambda folder: (folder / "d").mkdir(), "there is no folder"),
        (lambda folder: (folder / "d/cats").mkdir(parents=True), "'cats' is none of them"),
        (lambda folder: (folder / "d/class 0").mkdir(parents=True), "holds no image"),
        (lambda folder: (folder / "d").write_text("x"), "is not a folder"),
    ],
)
def test_data_that_does_not_fit_is_one_line(bench, folder, make, words):
    make(folder)
    done = bench("--data", "d")
    assert done.exit_code == 1
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("text", ["abc", "", "1,", "1,,2", "1.5", "-1", "\u0661", "9" * 5000])
def test_a_batch_that_is_none_is_one_line(bench, text):
    done = bench("--batch", text)
    assert done.exit_code == 1
    assert "is not a batch size, expected a number, or several as in 1,4,16" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["same.rkd", "link.rkd", "data.npz"])
def test_an_out_that_is_read_is_refused_and_left_as_it_is(folder, make_bundle, evaluation, name):
    shutil.copy(make_bundle().path, folder / "same.rkd")
    (folder / "link.rkd").symlink_to("same.rkd")
    images, labels = evaluation
    np.savez(folder / "data.npz", x=images[:9].transpose(0, 2, 3, 1), y=labels[:9])
    before = (folder / name).read_bytes()
    done = CliRunner().invoke(app, ["bench", "same.rkd", "--data", "data.npz", "--out", name])
    assert done.exit_code == 1
    assert f"--out {name} would replace" in done.stderr
    assert (folder / name).read_bytes() == before


def report(*arguments):
    return CliRunner().invoke(app, ["report", *arguments])


def test_a_page_does_not_replace_the_result_it_is_made_from(folder, measured):
    result.write(folder / "r.json", measured)
    before = (folder / "r.json").read_bytes()
    assert report("r.json", "--out", "page.html").exit_code == 0
    done = report("r.json", "--out", "./r.json")
    assert done.exit_code == 1
    assert "--out r.json would replace r.json" in done.stderr
    assert (folder / "r.json").read_bytes() == before


def test_a_control_of_a_result_and_a_result_given_twice_are_refused(folder, measured):
    for name in ("a.json", "b.json"):
        result.write(folder / name, measured)
    (folder / "link.json").symlink_to("a.json")
    assert report("a.json", "b.json").exit_code == 0
    assert "a result of rkd bench has no control" in report("a.json", "--control", "b.json").stderr
    assert "link.json is given twice" in report("a.json", "link.json").stderr


def test_what_fails_after_the_timing_is_told_and_the_timing_kept(bench, monkeypatch):
    def fails(*_):
        raise DataError("image 7 is broken")

    monkeypatch.setattr(session, "_accuracy", fails)
    done = bench()
    assert done.exit_code == 1
    assert done.stderr.endswith(
        "rkd: image 7 is broken; what was measured before is in result.json, marked invalid\n"
    ), done.stderr
    found = result.read(Path("result.json"))
    assert found["interrupted"] is True
    assert found["entries"][0]["latency"]["n"] >= 30


def test_a_bug_after_the_timing_is_called_one_and_the_timing_kept(bench, monkeypatch):
    def fails(*_):
        raise ZeroDivisionError("of ours")

    monkeypatch.setattr(session, "_accuracy", fails)
    done = bench()
    assert done.exit_code == 1
    assert "internal error (ZeroDivisionError: of ours)" in done.stderr
    assert entries()[0]["latency"]["n"] >= 30


def test_images_that_cannot_be_decoded_and_an_empty_set_are_found_before_the_timing(bench, folder, monkeypatch):
    monkeypatch.setattr(session, "_latency", lambda *_: pytest.fail("timed"))
    (folder / "d/class 0").mkdir(parents=True)
    (folder / "d/class 0/x.png").write_bytes(b"no image")
    done = bench("--data", "d")
    assert done.exit_code == 1
    assert "d: none of its 1 images can be decoded" in done.stderr
    np.savez(folder / "none.npz", x=np.zeros((0, 8, 8, 3), np.uint8), y=np.zeros(0, np.int64))
    assert "none.npz holds no image" in bench("--data", "none.npz").stderr
    assert not (folder / "result.json").exists()


def test_data_of_the_settings_file_does_not_keep_boards_from_being_measured(bench, folder, monkeypatch):
    (folder / "rkd.toml").write_text('[bench]\ndata = "photos"\n')

    def hosts(bundles, options, *_, **__):
        assert options.data is None
        return command.run(bundles, options, lambda *_: None), []

    monkeypatch.setattr(command, "bench_hosts", hosts)
    done = bench("--host", "board")
    assert done.exit_code == 0, done.output
    assert "data = 'photos' in rkd.toml is on this machine" in done.stderr
    done = bench("--host", "board", "--data", "photos")
    assert done.exit_code == 1
    assert "--data is a folder of this machine" in done.stderr


@pytest.mark.parametrize("sweep", [(1,), (0,), tuple(range(2, 20))])
def test_impossible_sweeps_are_refused(sweep):
    with pytest.raises(ConfigError, match="batch"):
        BenchOptions(sweep=sweep)


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_full_disk_costs_the_file_but_not_the_measurement(bench, folder, monkeypatch, options):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "os", types.SimpleNamespace(**{**vars(os), "fsync": full}))
    done = bench(*options)
    assert done.exit_code == 1
    assert "No space left" in done.stderr
    assert list(folder.iterdir()) == []
    table, brace, rest = done.stdout.partition("{")
    assert ("p50 ms" in table) == (not options)
    assert result.verify(json.loads(brace + rest), "standard output")["entries"][0]["latency"]["n"] >= 30


def test_a_full_standard_output_costs_the_table_but_not_the_file(bench, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(command, "_show", full)
    assert bench().exit_code == 1
    assert entries()


def test_quick_and_mlperf_contradict_each_other(bench):
    assert "contradict" in bench("--quick", "--mlperf").stderr


def test_mlperf_is_ten_minutes_of_at_least_1024_samples():
    plan = BenchOptions(mode="mlperf").plan
    assert (plan.seconds, plan.min_samples) == (600, 1024)


def test_ctrl_c_in_the_middle_saves_what_there_is_and_marks_it(folder, make_bundle):
    child = subprocess.Popen(
        [sys.executable, "-m", "rkd", "bench", str(make_bundle().path), "--threads", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stderr.readline() == "latency ...\n"
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=120)
    assert child.returncode == 130
    assert "interrupted; what was measured is in result.json, marked invalid" in said
    found = result.read(folder / "result.json")
    assert found["interrupted"] is True
    (entry,) = found["entries"]
    assert entry["validity"]["reasons"][0]["code"] == "interrupted"


IN_A_TERMINAL = """
import fcntl, os, signal, sys, termios
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests may ignore it, as nohup does
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", "rkd", "bench", *sys.argv[1:], "--threads", "1"])
"""


def test_a_terminal_that_is_closed_in_the_middle_saves_what_there_is_too(folder, make_bundle):
    """A real terminal, whose end hangs up: nothing can be said any more."""
    screen, terminal = os.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", IN_A_TERMINAL, str(make_bundle().path)],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    drawn = b""
    while b"latency" not in drawn:
        drawn += os.read(screen, 4096)
    os.close(screen)
    assert child.wait(timeout=120) == 128 + signal.SIGHUP
    found = result.read(folder / "result.json")
    assert found["interrupted"] is True
    assert found["entries"][0]["validity"]["reasons"][0]["code"] == "interrupted"


def test_under_nohup_a_hang_up_stops_nothing():
    code = (
        "import os, signal\n"
        "from rkd.signals import held_signals, stop_requests\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "with stop_requests(), held_signals():\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n"
        "print('went on')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "went on\n", "")
