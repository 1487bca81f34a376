"""The plan: every cell once, its control beside it, nothing trained twice."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from typer.main import get_command

from rkd.attacks.session import TeacherSettings
from rkd.cli import app
from rkd.distill.settings import DistillSettings
from rkd.errors import ConfigError
from rkd.suite.estimate import Estimator, _budget, measure_costs
from rkd.suite.file import Suite, read_suite
from rkd.suite.plan import Cell, Plan, Score, Student, Teacher, make_plan
from rkd.suite.recipes import Kind, command_line, differences, distill_kind, teacher_kind
from rkd.suite.sources import Facts

FILE = """
seeds = [5]
[teacher]
epochs = 7
[distill]
epochs = 3
student = "wrn-10-1"
[data.a]
data = "digits"
[data.b]
data = "digits"
distill = { epochs = 4 }
[pairs.one]
teacher = { arch = "wrn-10-1" }
[pairs.two]
teacher = { arch = "wrn-10-1" }
distill = { student = "wrn-16-1" }
[attacks.weak]
teacher = { attack = "badnets", epochs = 9 }
[attacks.strong]
teacher = { attack = "backweak" }
[budgets.all]
[budgets.few]
distill = { clean-budget = "10%" }
only = { defence = "main" }
[defences.main]
seeds = [0, 1]
distill = { method = "ofd" }
[defences.free]
distill = { method = "ce" }
[[override]]
data = "b"
defence = "main"
distill = { epochs = 5 }
[[override]]
attack = "strong"
pair = "two"
defence = "main"
seeds = [0, 1, 2]
[[override]]
attack = "weak"
teacher = { poison-rate = 0.2 }
[[exclude]]
data = "b"
attack = "weak"
"""


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    (tmp_path / "s.toml").write_text(FILE)
    return read_suite(tmp_path / "s.toml")


@pytest.fixture
def plan(suite: Suite) -> Plan:
    return make_plan(suite)


def student(plan: Plan, *names: object) -> Student:
    return plan.student(Cell(*names))  # type: ignore[arg-type]


def test_the_cells_are_the_product_less_what_is_left_out(plan: Plan) -> None:
    attacked = {cell for cell in plan.cells if cell.attack != "clean"}
    expected = set()
    for data in "ab":
        for pair in ("one", "two"):
            for attack in ("weak", "strong"):
                if (data, attack) == ("b", "weak"):
                    continue
                for budget in ("all", "few"):
                    seeds = (0, 1, 2) if (attack, pair) == ("strong", "two") else (0, 1)
                    expected |= {Cell(data, pair, attack, budget, "main", seed) for seed in seeds}
                expected.add(Cell(data, pair, attack, "all", "free", 5))
    assert attacked == expected


def test_each_cell_has_its_control_planned_and_the_control_has_the_same_recipe(plan: Plan) -> None:
    for cell in plan.cells:
        assert cell.control in plan.cells
        control, own = plan.student(cell.control), plan.student(cell)
        assert control.options == own.options
        assert control.cell.seed == own.cell.seed
        assert control.teacher.clean is None
        if cell.attack != "clean" and cell.defence == "main":
            assert own.teacher.clean == control.teacher


def test_a_control_can_be_asked_for_by_its_name_like_any_cell(suite: Suite) -> None:
    control = Cell("a", "one", "clean", "all", "main", 0)
    assert make_plan(suite, only=[control.name]).cells == (control,)
    assert set(make_plan(suite, only=["a/one/weak/all/main/s0"]).cells) == {
        control,
        Cell("a", "one", "weak", "all", "main", 0),
    }


def test_pairs_with_the_same_teacher_share_it(plan: Plan) -> None:
    one, two = (student(plan, "a", pair, "strong", "all", "main", 0).teacher for pair in ("one", "two"))
    assert one == two
    teachers = [job.work for job in plan.jobs.values() if isinstance(job.work, Teacher)]
    assert len({teacher.name for teacher in teachers}) == len(teachers)
    clean = [teacher for teacher in teachers if teacher.clean is None and teacher.data == "a"]
    assert sorted(teacher.seed for teacher in clean) == [0, 1, 2, 5]


def test_an_attack_s_options_do_not_touch_its_clean_twin(plan: Plan) -> None:
    teacher = student(plan, "a", "one", "weak", "all", "main", 0).teacher
    assert teacher.options["epochs"] == 9
    assert teacher.options["poison_rate"] == 0.2
    assert teacher.clean is not None
    assert teacher.clean.options["epochs"] == 7
    assert "poison_rate" not in teacher.clean.options


@pytest.mark.parametrize("option", ['arch = "wrn-16-1"', 'normalize = "imagenet"', "split-seed = 1", "image-size = 16"])
def test_an_attack_whose_clean_twin_would_be_none_is_refused(tmp_path: Path, option: str) -> None:
    given = FILE.replace('attack = "backweak" }', f'attack = "backweak", {option} }}')
    (tmp_path / "s.toml").write_text(given)
    with pytest.raises(ConfigError, match="that is no twin"):
        make_plan(read_suite(tmp_path / "s.toml"))


def test_later_options_win(plan: Plan) -> None:
    assert student(plan, "a", "one", "strong", "all", "main", 0).options["epochs"] == 3
    assert student(plan, "b", "one", "strong", "all", "free", 5).options["epochs"] == 4
    assert student(plan, "b", "one", "strong", "all", "main", 0).options["epochs"] == 5
    assert student(plan, "a", "two", "strong", "few", "main", 0).options["student"] == "wrn-16-1"
    assert student(plan, "a", "two", "strong", "few", "main", 0).options["clean_budget"] == "10%"


def test_a_teacher_free_student_is_trained_once_and_scored_under_every_attack(plan: Plan) -> None:
    of_free = [j.work for j in plan.jobs.values() if isinstance(j.work, Student) and j.work.cell.defence == "free"]
    assert {work.cell.attack for work in of_free} == {"clean"}
    score = plan.jobs["score:a/one/clean/all/free/s5"].work
    assert isinstance(score, Score)
    assert set(score.teachers) == {"weak", "strong"}


def test_a_student_of_the_teacher_s_answers_is_made_for_each_attack(tmp_path: Path) -> None:
    without = FILE.replace('distill = { method = "ce"', 'distill = { labels = false, method = "ce"')
    assert without != FILE
    (tmp_path / "s.toml").write_text(without)
    plan = make_plan(read_suite(tmp_path / "s.toml"))
    of_free = [j.work for j in plan.jobs.values() if isinstance(j.work, Student) and j.work.cell.defence == "free"]
    assert {work.cell.attack for work in of_free} == {"clean", "weak", "strong"}


def test_what_a_job_waits_for_comes_before_it(plan: Plan) -> None:
    seen: set[str] = set()
    for job in plan.jobs.values():
        assert set(job.needs) <= seen
        assert set(job.after) <= seen
        seen.add(job.name)


def test_what_is_first_in_a_list_of_seeds_comes_first(plan: Plan) -> None:
    seeds = [job.work.cell.seed for job in plan.jobs.values() if isinstance(job.work, Student)]
    assert seeds == sorted(seeds, key=[0, 5, 1, 2].index)


def test_a_part_of_a_suite_brings_its_controls_along(suite: Suite) -> None:
    part = make_plan(suite, ["a/one/strong/*/main/s1"])
    assert {cell.name for cell in part.cells} == {
        f"a/one/{attack}/{budget}/main/s1" for attack in ("clean", "strong") for budget in ("all", "few")
    }


@pytest.mark.parametrize("kind", [teacher_kind(), distill_kind()], ids=["teacher", "distill"])
def test_every_option_that_a_file_may_give_can_be_put_on_the_command_line(kind: Kind) -> None:
    """Each option's default, or another value for flags, comes back from the command's own parser as it was."""
    defaults = {f.name: f.default for f in dataclasses.fields(kind.settings) if f.name in kind.known()}
    given = {name: (not value if isinstance(value, bool) else value) for name, value in defaults.items()}
    given = {name: value for name, value in given.items() if value not in (None, dataclasses.MISSING)}
    command = get_command(app).commands[kind.command]  # type: ignore[attr-defined]
    parsed = command.make_context(kind.command, command_line(kind, given), resilient_parsing=False).params
    assert {name: parsed[name] for name in given} == given


def test_settings_that_differ_are_named_and_what_the_run_chose_itself_is_not() -> None:
    kind = distill_kind()
    made = {
        f.name: getattr(DistillSettings(data="x", teacher="t", student="s"), f.name)
        for f in dataclasses.fields(DistillSettings)
    }
    made |= {"precision": "bf16", "augmentation": "crop", "arch": "wrn-16-2", "threads": 4, "data": "/elsewhere"}
    assert differences(kind, made, {"student": "s"}, seed=0) == []
    assert differences(kind, made | {"clean_budget": "5%"}, {"student": "s"}, seed=0) == [
        "clean-budget was 5%, wanted none given"
    ]
    assert differences(kind, made, {"student": "s", "precision": "fp32"}, seed=0) == ["precision was bf16, wanted fp32"]
    assert differences(kind, made, {"student": "s"}, seed=1) == ["seed was 0, wanted 1"]
    by_hand = differences(
        kind, made | {"purify_steps": 800}, {"student": "s"}, given={"precision", "purify_steps"}, seed=0
    )
    assert by_hand == ["precision was bf16, wanted auto", "purify-steps was 800, wanted none given"]
    older = {name: value for name, value in made.items() if name != "cap"}
    assert differences(kind, older, {"student": "s", "cap": 0.5}, seed=0) != []


def test_a_record_without_a_setting_that_came_later_fits_its_default() -> None:
    older = dataclasses.asdict(TeacherSettings(data="digits"))
    del older["augmentation"]
    assert differences(teacher_kind(), older, {}, seed=0) == []


@pytest.mark.parametrize(("method", "unlike"), [("robustkd", ["harden-share was 0.3, wanted 0.1"]), ("ofd", [])])
def test_a_record_without_a_setting_that_was_another_before_does_not(method: str, unlike: list[str]) -> None:
    older = dataclasses.asdict(DistillSettings(data="digits", teacher="t", student="s", method=method))
    del older["harden_share"]
    assert differences(distill_kind(), older, {"student": "s", "method": method}, seed=0) == unlike


def test_a_record_of_what_a_setting_was_before_fits_a_recipe_that_wants_just_that() -> None:
    older = dataclasses.asdict(DistillSettings(data="digits", teacher="t", student="s", hardening=8.0))
    del older["harden_share"]
    assert differences(distill_kind(), older, {"student": "s", "hardening": 8.0, "harden_share": 0.3}, seed=0) == []


@pytest.mark.parametrize(
    ("budget", "images"), [("", 200), ("50", 50), ("10%", 20), ("300", 200), ("9" * 400, 200), ("9" * 400 + "%", 200)]
)
def test_a_clean_budget_is_estimated_as_at_most_all_images(budget: str, images: int) -> None:
    assert _budget(budget, 200) == images


def test_what_purifies_a_teacher_is_estimated_to_take_longer_than_what_does_not(tmp_path: Path) -> None:
    file = tmp_path / "suite.toml"
    file.write_text(
        FILE.replace("[defences.free]", '[defences.bought]\ndistill = { method = "nad+ofd" }\n[defences.free]')
    )
    plan = make_plan(read_suite(file))
    facts = {name: Facts(1000, 100, (32, 32), known=True) for name in ("a", "b")}
    estimator = Estimator(plan, measure_costs(plan.jobs.values(), facts), facts)
    taken = {}
    for job in plan.jobs.values():
        if isinstance(job.work, Student) and (job.work.cell.data, job.work.cell.pair) == ("a", "one"):
            taken[job.work.cell.defence] = estimator.seconds(job)
    assert taken["bought"] > 1.5 * taken["main"]


def test_a_budget_that_leaves_no_image_is_estimated_all_the_same(tmp_path: Path) -> None:
    file = tmp_path / "suite.toml"
    file.write_text(FILE.replace('clean-budget = "10%"', 'clean-budget = "0.01%"').replace('"ofd"', '"robustkd"'))
    plan = make_plan(read_suite(file))
    facts = {name: Facts(1000, 100, (32, 32), known=True) for name in ("a", "b")}
    estimator = Estimator(plan, measure_costs(plan.jobs.values(), facts), facts)
    assert min(estimator.seconds(job) for job in plan.jobs.values()) > 0


def test_what_is_left_out_of_a_plan_still_tells_how_long_its_like_takes(suite: Suite) -> None:
    whole, facts = make_plan(suite), {name: Facts(1000, 100, (32, 32), known=True) for name in ("a", "b")}
    part = make_plan(suite, ("a/one/weak/all/main/s1",))
    estimator = Estimator(part, measure_costs(whole.jobs.values(), facts), facts)
    made, wanted = (
        plan.jobs[plan.student(Cell("a", "one", "weak", "all", "main", seed)).job]
        for plan, seed in ((whole, 0), (part, 1))
    )
    assert made.name not in part.jobs
    estimator.learn(made, 777.0)
    assert estimator.seconds(wanted) == pytest.approx(777)


def test_an_attacks_option_for_all_teachers_is_refused_with_the_place_where_it_goes(tmp_path: Path) -> None:
    file = tmp_path / "suite.toml"
    file.write_text(FILE.replace("[teacher]", "[teacher]\npoison-rate = 0.2"))
    with pytest.raises(ConfigError, match=r"clean twin: .* goes to \[attacks.NAME\]\): --poison-rate changes nothing"):
        make_plan(read_suite(file))
