"""A whole suite on striped images: resumes, skips, survives what fails, and its table comes from results/ alone."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from rkd.cli import app
from rkd.metrics import Proportion, evaluate
from rkd.run import Run, models_of
from rkd.suite.file import read_suite
from rkd.suite.place import Place
from rkd.suite.plan import make_plan
from rkd.suite.results import collect
from rkd.triggers import Trigger

OUTPUTS = ("table.md", "table.csv", "table.json", "report.html")
CELLS = {
    f"stripes__tiny__{attack}__full__{defence}__s0.json" for attack in ("clean", "patch") for defence in ("ofd", "ce")
}


def suite(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["suite", *arguments])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def record(folder: Path, attack: str, defence: str) -> dict[str, Any]:
    path = folder / "results" / "tiny" / "cells" / f"stripes__tiny__{attack}__full__{defence}__s0.json"
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_every_cell_has_a_run_a_result_and_its_place_in_the_table(finished: Path) -> None:
    results = finished / "results" / "tiny"
    assert {path.name for path in (results / "cells").iterdir()} == CELLS
    for output in OUTPUTS:
        assert "patch" in (results / output).read_text()
    for cell in ("clean/full/ofd", "patch/full/ofd", "clean/full/ce"):
        run = Run.open(finished / "runs" / "tiny" / "cells" / "stripes" / "tiny" / cell / "s0")
        assert run.finished
        assert (run.path / "report.html").is_file()
        assert run.setting("seed") == 0
        assert run.setting("threads") == 1


def test_a_result_has_figures_digests_and_code_and_no_path_of_this_machine(finished: Path) -> None:
    for name, data in contents(finished / "results" / "tiny").items():
        assert str(finished).encode() not in data, name
        assert str(Path.home()).encode() + b"/" not in data, name
    found = record(finished, "patch", "ofd")
    run = Run.open(finished / "runs/tiny/cells/stripes/tiny/patch/full/ofd/s0")
    scores = models_of(run)[-1].scores
    assert found["student"]["acc"] == scores.acc.to_json()
    assert found["student"]["asr"] == scores.triggers[0].asr.to_json()
    assert found["student"]["asr"]["n"] == 30  # of 45 test images in three classes, those of two
    assert found["student"]["sha256"] == run.summary["student"]["sha256"]
    assert found["teacher"]["sha256"] == run.summary["teacher"]["sha256"]
    assert found["seconds"]["job"] == 0.5
    assert found["code"]["rkd"] == found["versions"]["rkd"]


def test_the_control_s_score_is_what_its_network_does_under_the_attack_s_trigger(finished: Path) -> None:
    from rkd.data import open_dataset
    from rkd.network import Network

    control = finished / "runs/tiny/cells/stripes/tiny/clean/full/ofd/s0"
    import torch

    predict = Network.load(control / "student.safetensors").predictor(torch.device("cpu"))
    (trigger,) = (finished / "runs/tiny/teachers").glob("*patch*/*.trigger.npz")
    scores, _ = evaluate(predict, open_dataset(str(finished / "stripes.npz")).test.batches(64), [Trigger.load(trigger)])
    found = record(finished, "patch", "ofd")
    assert found["control"]["asr"] == scores.triggers[0].asr.to_json()
    assert found["control"]["acc"] == scores.acc.to_json()
    points = found["student"]["asr"]["percent"] - found["control"]["asr"]["percent"]
    assert found["excess_asr"]["points"] == pytest.approx(points, abs=1e-3)


def test_the_teacher_free_student_was_trained_once_and_is_its_own_control(finished: Path) -> None:
    found = record(finished, "patch", "ce")
    assert found["same_student"] is True
    assert (
        found["student"]["sha256"] == found["control"]["sha256"] == record(finished, "clean", "ce")["student"]["sha256"]
    )
    assert found["excess_asr"] == {"points": 0.0, "low": 0.0, "high": 0.0}
    assert not (finished / "runs/tiny/cells/stripes/tiny/patch/full/ce").exists()


def test_what_a_control_did_under_an_earlier_trigger_is_not_this_one_s(resumed: Path, here: Any) -> None:
    plan = make_plan(read_suite(resumed / "tiny.toml"))
    place = Place(resumed / "runs/tiny", plan)
    cell = next(cell for cell in plan.cells if (cell.attack, cell.defence) == ("patch", "ofd"))
    found = collect(place, plan, cell)
    assert found is not None
    assert found["control"] is not None
    (score,) = (resumed / "runs/tiny/scores").glob("*ofd*")
    edit(score, found["trigger"]["sha256"], "0" * 64)
    without = collect(place, plan, cell)
    assert without is not None
    assert (without["control"], without["excess_asr"]) == (None, None)
    assert suite("tiny.toml").exit_code == 0
    assert here.done == ["score:stripes/tiny/clean/full/ofd/s0"]


def test_run_again_it_does_nothing_and_changes_nothing(resumed: Path, here: Any) -> None:
    before = contents(resumed / "results")
    assert suite("tiny.toml").exit_code == 0
    assert here.done == []
    assert contents(resumed / "results") == before


def test_the_tables_come_from_the_results_alone(resumed: Path) -> None:
    before = contents(resumed / "results")
    shutil.rmtree(resumed / "runs")
    (resumed / "stripes.npz").unlink()
    for output in OUTPUTS:
        (resumed / "results" / "tiny" / output).unlink()
    done = suite("tiny.toml", "--table-only")
    assert done.exit_code == 0, done.output
    assert contents(resumed / "results") == before
    assert not (resumed / "runs").exists()


def test_the_dry_run_tells_what_is_done_and_writes_nothing(resumed: Path) -> None:
    shutil.rmtree(resumed / "runs/tiny/cells/stripes/tiny/clean/full/ce")
    for attack in ("clean", "patch"):
        (resumed / f"results/tiny/cells/stripes__tiny__{attack}__full__ce__s0.json").unlink()
    before = contents(resumed)
    done = suite("tiny.toml", "--dry-run", "--json")
    assert done.exit_code == 0, done.output
    planned = json.loads(done.stdout)
    assert contents(resumed) == before
    states = {line["job"]: line["state"] for line in planned["jobs"]}
    assert [job for job, state in states.items() if state == "fresh"] == [
        "student stripes/tiny/clean/full/ce/s0", "score stripes/tiny/clean/full/ce/s0",
    ]  # fmt: skip
    assert 0 < planned["seconds"] < 60


def test_what_a_kill_left_unfinished_is_gone_on_with(resumed: Path, here: Any) -> None:
    """As kill -9 leaves it: a run that says `running`, and results that were not written yet."""
    run = Run.open(resumed / "runs/tiny/cells/stripes/tiny/patch/full/ofd/s0")
    digest = run.summary["student"]["sha256"]
    run.save(state="running")
    (run.path / "student.safetensors").unlink()
    (resumed / "results/tiny/cells/stripes__tiny__patch__full__ofd__s0.json").unlink()
    done = suite("tiny.toml")
    assert done.exit_code == 0, done.output
    assert here.done == ["student:stripes/tiny/patch/full/ofd/s0"]
    log = resumed / "runs/tiny/logs/student__stripes__tiny__patch__full__ofd__s0.log"
    assert record(resumed, "patch", "ofd")["student"]["sha256"] == digest
    assert "stale" not in log.read_text()


def test_what_an_older_rkd_began_is_made_again_or_refused(resumed: Path, here: Any) -> None:
    run = Run.open(resumed / "runs/tiny/cells/stripes/tiny/patch/full/ofd/s0")
    settings = {name: value for name, value in run.summary["settings"].items() if name != "purify"}
    run.save(settings=settings, state="running")
    refused = suite("tiny.toml")
    assert refused.exit_code == 1
    assert "it was begun by another rkd, without purify" in " ".join(refused.output.split())
    assert suite("tiny.toml", "--stale", "redo").exit_code == 0
    assert here.done == ["student:stripes/tiny/patch/full/ofd/s0"]


def test_results_that_were_lost_are_written_again_from_the_runs(resumed: Path, here: Any) -> None:
    before = contents(resumed / "results")
    shutil.rmtree(resumed / "results")
    assert suite("tiny.toml").exit_code == 0
    assert here.done == []
    assert contents(resumed / "results") == before


def test_a_result_says_what_became_of_the_teacher_on_the_way(resumed: Path, here: Any) -> None:
    run = Run.open(resumed / "runs/tiny/cells/stripes/tiny/patch/full/ofd/s0")
    teacher, student = run.summary["models"]
    half = Proportion(1, 2).to_json()
    fooling = {"fooled": half, "towards": "a class", "together": half}
    run.save(models=[teacher, {**teacher, "role": "fine-tuned teacher"}, student], fooling=fooling)
    done = suite("tiny.toml")
    assert done.exit_code == 0, done.output
    found = record(resumed, "patch", "ofd")
    (treated,) = found["treated_teachers"]
    assert treated["role"] == "fine-tuned teacher"
    assert treated["asr"] == teacher["scores"]["triggers"][0]["asr"]
    assert found["fooling"] == fooling
    assert record(resumed, "clean", "ofd")["treated_teachers"] == []


def test_on_another_machine_the_cells_that_have_results_are_not_made_again(resumed: Path, here: Any) -> None:
    before = contents(resumed / "results")
    shutil.rmtree(resumed / "runs")
    done = suite("tiny.toml")
    assert done.exit_code == 0, done.output
    assert "4 cells were made elsewhere: results/tiny has their results" in done.output
    assert here.done == []
    assert contents(resumed / "results") == before

    (resumed / "results/tiny/cells/stripes__tiny__patch__full__ofd__s0.json").unlink()
    done = suite("tiny.toml")
    assert done.exit_code == 0, done.output
    made = [job for job in here.done if not job.startswith("teacher")]
    assert made == [f"{kind}:stripes/tiny/{attack}/full/ofd/s0"
                    for kind, attack in (("student", "clean"), ("student", "patch"), ("score", "clean"))]  # fmt: skip
    assert record(resumed, "patch", "ofd")["excess_asr"] is not None
    assert set(contents(resumed / "results")) == set(before)


@pytest.mark.promise
def test_a_result_of_other_settings_does_not_stand_for_a_cell(resumed: Path, here: Any) -> None:
    shutil.rmtree(resumed / "runs")
    edit(
        resumed / "tiny.toml",
        '[distill]\nstudent = "wrn-10-1"\nepochs = 2',
        '[distill]\nstudent = "wrn-10-1"\nepochs = 3',
    )
    assert suite("tiny.toml").exit_code == 0
    assert len([job for job in here.done if job.startswith("student")]) == 3
    assert record(resumed, "patch", "ofd")["settings"]["epochs"] == 3


def test_a_new_attack_asks_for_its_own_cells_only(resumed: Path, here: Any) -> None:
    with (resumed / "tiny.toml").open("a") as file:
        file.write('[attacks.second]\nteacher = { attack = "badnets", poison-rate = 0.2 }\n')
    done = suite("tiny.toml")
    assert done.exit_code == 0, done.output
    kinds = [job.partition(":")[0] for job in here.done]
    assert sorted(kinds) == ["score", "score", "student", "teacher"]
    assert record(resumed, "second", "ce")["student"]["asr"]["n"] == 30
    assert record(resumed, "patch", "ofd")["control"] is not None


def test_other_settings_are_refused_then_redone_and_nothing_is_lost(resumed: Path, here: Any) -> None:
    edit(resumed / "tiny.toml", 'distill = { method = "ofd" }', 'distill = { method = "ofd", epochs = 1 }')
    before = contents(resumed)
    refused = suite("tiny.toml")
    assert refused.exit_code == 1
    assert "epochs was 2, wanted 1" in refused.stderr
    assert "--stale redo" in refused.stderr
    assert here.done == []
    assert contents(resumed) == before

    kept = suite("tiny.toml", "--stale", "keep")
    assert kept.exit_code == 0, kept.output
    assert here.done == []
    assert "was made with other settings: epochs was 2, wanted 1" in kept.stdout
    assert "was made with other settings" in (resumed / "results/tiny/table.md").read_text()

    redone = suite("tiny.toml", "--stale", "redo")
    assert redone.exit_code == 0, redone.output
    assert sorted(here.done) == [
        "score:stripes/tiny/clean/full/ofd/s0", "student:stripes/tiny/clean/full/ofd/s0",
        "student:stripes/tiny/patch/full/ofd/s0",
    ]  # fmt: skip
    assert record(resumed, "patch", "ofd")["settings"]["epochs"] == 1
    old = [Run.open(path) for path in (resumed / "runs/tiny/replaced").iterdir() if path.is_dir()]
    assert [run.setting("epochs") for run in old] == [2, 2]
    assert "was made with other settings" not in (resumed / "results/tiny/table.md").read_text()


@pytest.mark.parametrize("damage", ["another student", "another teacher", "no JSON"])
def test_a_finished_cell_that_is_not_what_it_says_is_not_believed(damage: str, resumed: Path, here: Any) -> None:
    run = resumed / "runs/tiny/cells/stripes/tiny/patch/full/ofd/s0"
    if damage == "another student":
        shutil.copy(resumed / "runs/tiny/cells/stripes/tiny/clean/full/ce/s0/student.safetensors", run)
    elif damage == "another teacher":
        opened = Run.open(run)
        opened.save(teacher={**opened.summary["teacher"], "sha256": "0" * 64})
    else:
        (run / "run.json").write_bytes((run / "run.json").read_bytes()[:100])
    done = suite("tiny.toml")
    assert done.exit_code == 1
    assert "stripes/tiny/patch/full/ofd/s0" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert here.done == []


def test_a_cell_that_fails_is_named_and_the_rest_is_done(folder: Path, here: Any, tiny: str) -> None:
    """One student and one teacher get a learning rate with which no training survives."""
    (folder / "tiny.toml").write_text(
        tiny
        + '[attacks.broken]\nteacher = { attack = "badnets", lr = 1e30 }\n'
        + '[defences.wild]\ndistill = { method = "kd", lr = 1e30 }\nonly = { attack = "patch" }\n'
    )
    done = suite("tiny.toml")
    assert done.exit_code == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "3 of the suite's jobs failed" in last
    assert "the loss became" in last
    assert "1 that need them were not begun" not in last or "broken" in done.stderr
    assert "Traceback" not in done.output
    results = folder / "results" / "tiny"
    assert {path.name for path in (results / "cells").iterdir()} == CELLS
    assert record(folder, "patch", "ofd")["control"] is not None
    assert "wild/s0 failed" in (results / "table.md").read_text()

    edit(folder / "tiny.toml", 'method = "kd", lr = 1e30', 'method = "kd"')
    before = len(here.done)
    again = suite("tiny.toml", "--stale", "redo")
    assert again.exit_code == 1
    tried = here.done[before:]
    assert "student:stripes/tiny/patch/full/wild/s0" in tried
    assert "student:stripes/tiny/patch/full/ofd/s0" not in tried
    assert record(folder, "patch", "wild")["control"] is not None


def test_the_folder_of_another_suite_is_refused(resumed: Path, here: Any, tiny: str) -> None:
    (resumed / "other.toml").write_text(tiny)
    done = suite("other.toml", "--out", "runs/tiny")
    assert done.exit_code == 1
    assert "belongs to the suite 'tiny'" in done.stderr
    (resumed / "full").mkdir()
    (resumed / "full" / "thesis.txt").touch()
    done = suite("other.toml", "--out", "full")
    assert done.exit_code == 1
    assert "is not a suite's folder" in done.stderr
    assert [path.name for path in (resumed / "full").iterdir()] == ["thesis.txt"]


def test_two_suites_do_not_work_in_one_folder(resumed: Path, here: Any) -> None:
    import fcntl

    descriptor = os.open(resumed / "runs" / "tiny", os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        done = suite("tiny.toml")
    finally:
        os.close(descriptor)
    assert done.exit_code == 1
    assert "another rkd suite is at work here" in done.stderr


def test_data_that_changed_fails_the_score_and_says_so(resumed: Path, here: Any) -> None:
    shutil.rmtree(resumed / "runs/tiny/scores")
    arrays = dict(np.load(resumed / "stripes.npz"))
    arrays["x_test"] = 255 - arrays["x_test"]
    np.savez(resumed / "stripes.npz", **arrays)
    done = suite("tiny.toml")
    assert done.exit_code == 1
    assert "the data has changed" in done.stderr


def test_a_data_set_in_a_tar_is_unpacked_once(tmp_path: Path) -> None:
    import tarfile

    from rkd.suite.sources import ready_sources

    (tmp_path / "photos" / "train").mkdir(parents=True)
    (tmp_path / "photos" / "train" / "a.txt").write_text("a")
    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        archive.add(tmp_path / "photos", "photos")
    first = ready_sources({"photos": tmp_path / "photos.tar"}, tmp_path / "data")
    assert Path(first["photos"]).name == "photos"
    assert (Path(first["photos"]) / "train" / "a.txt").read_text() == "a"
    (Path(first["photos"]) / "train" / "b.txt").touch()
    assert ready_sources({"photos": tmp_path / "photos.tar"}, tmp_path / "data") == first
    assert (Path(first["photos"]) / "train" / "b.txt").exists()


@pytest.mark.parametrize("name", ["../outside.txt", "/tmp/absolute.txt"])
def test_a_tar_cannot_write_outside_of_its_folder(name: str, tmp_path: Path) -> None:
    import io
    import tarfile

    from rkd.errors import DataError
    from rkd.suite.sources import ready_sources

    with tarfile.open(tmp_path / "bad.tar", "w") as archive:
        entry = tarfile.TarInfo(name)
        entry.size = 1
        archive.addfile(entry, io.BytesIO(b"x"))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        archive.addfile(link)
    with pytest.raises(DataError):
        ready_sources({"bad": tmp_path / "bad.tar"}, tmp_path / "deep" / "data")
    assert not (tmp_path / "deep" / "outside.txt").exists()
    assert not (tmp_path / "deep" / "data" / "bad").exists()


def test_a_student_of_another_teacher_recipe_is_refused_before_that_teacher_is_made(resumed: Path, here: Any) -> None:
    edit(resumed / "tiny.toml", '[teacher]\narch = "wrn-10-1"\nepochs = 2', '[teacher]\narch = "wrn-10-1"\nepochs = 3')
    refused = suite("tiny.toml")
    assert refused.exit_code == 1
    assert "its teacher was stripes-wrn-10-1-clean-s0-" in refused.stderr
    assert here.done == []


def test_a_kept_student_of_another_teacher_is_not_recorded_as_this_one_s(resumed: Path, here: Any) -> None:
    run = Run.open(resumed / "runs/tiny/cells/stripes/tiny/patch/full/ofd/s0")
    run.save(teacher={**run.summary["teacher"], "sha256": "0" * 64})
    kept = suite("tiny.toml", "--stale", "keep")
    assert kept.exit_code == 1
    assert "was distilled from another teacher than the suite's" in kept.output
    assert here.done == []


def test_a_teacher_whose_trigger_was_not_written_is_not_done(resumed: Path, here: Any) -> None:
    (trigger,) = (resumed / "runs/tiny/teachers").glob("*patch*/teacher.trigger.npz")
    before = trigger.read_bytes()
    trigger.unlink()
    done = suite("tiny.toml")
    assert done.exit_code == 0, done.output
    assert [job.partition(":")[0] for job in here.done] == ["teacher"], "it goes on; what it made is the same"
    assert trigger.read_bytes() == before


def test_what_is_redone_and_fails_leaves_no_old_result(
    resumed: Path, here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(resumed / "tiny.toml", 'distill = { method = "ofd" }', 'distill = { method = "ofd", epochs = 1, lr = 1e30 }')
    failed = suite("tiny.toml", "--stale", "redo")
    assert failed.exit_code == 1
    edit(resumed / "tiny.toml", 'distill = { method = "ofd", epochs = 1, lr = 1e30 }', 'distill = { method = "ofd" }')
    assert not list((resumed / "results/tiny/cells").glob("*patch*ofd*"))
    here.done.clear()
    again = suite("tiny.toml", "--stale", "redo")
    assert again.exit_code == 0, again.output
    assert "student:stripes/tiny/patch/full/ofd/s0" in here.done
    assert record(resumed, "patch", "ofd")["settings"]["epochs"] == 2


def test_a_run_that_was_removed_here_is_made_again(resumed: Path, here: Any) -> None:
    shutil.rmtree(resumed / "runs/tiny/cells/stripes/tiny/patch/full/ofd/s0")
    done = suite("tiny.toml")
    assert done.exit_code == 0, done.output
    assert here.done == ["student:stripes/tiny/patch/full/ofd/s0"]


def test_the_table_names_cells_whose_control_or_teacher_is_by_other_code(resumed: Path) -> None:
    path = resumed / "results/tiny/cells/stripes__tiny__patch__full__ofd__s0.json"
    good = json.loads(path.read_text())
    assert good["code"]["sources"] == good["control"]["code"]["sources"] == good["teacher"]["code"]["sources"]

    def noted(**changes: Any) -> str:
        path.write_text(json.dumps({**good, **changes}))
        assert suite("tiny.toml", "--table-only").exit_code == 0
        return (resumed / "results/tiny/table.md").read_text()

    other = {**good["code"], "sources": "f" * 64}
    assert "by other code" not in noted()
    assert "1 cells whose control was made by other code" in noted(control={**good["control"], "code": other})
    assert "is not the one in the table: stripes/tiny/patch" in noted(control={**good["control"], "sha256": "e" * 64})
    assert "1 cells whose teacher was made by other code" in noted(teacher={**good["teacher"], "code": other})
    kd = {**good["cell"], "defence": "ce"}
    assert "with 2 teachers" not in noted(cell=good["cell"])
    twin = path.with_name("stripes__tiny__patch__full__ce__s0.json")
    twin.write_text(json.dumps({**good, "cell": kd, "teacher": {**good["teacher"], "sha256": "a" * 64}}))
    assert "stripes/tiny/patch of seed 0 was made with 2 teachers" in noted()


def test_the_table_says_that_students_were_trained_with_two_precisions_or_versions(resumed: Path) -> None:
    edit(
        resumed / "results/tiny/cells/stripes__tiny__patch__full__ofd__s0.json",
        '"precision": "fp32"',
        '"precision": "bf16"',
    )
    done = suite("tiny.toml", "--table-only")
    assert "the students were not trained with one precision: bf16, fp32" in done.output
    assert "version of torch" not in done.output
