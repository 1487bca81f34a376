"""A method's name is taken apart and put together again; what does not exist is refused with what does."""

from __future__ import annotations

import pytest

from rkd.distill.methods import METHODS, OBJECTIVES, TREATMENTS, Method
from rkd.distill.settings import DistillSettings
from rkd.errors import ConfigError


def settings(**changes: object) -> DistillSettings:
    return DistillSettings(teacher="t.pt", student="wrn-10-1", data="digits", **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", METHODS)
def test_a_name_names_one_method_and_comes_back(name: str) -> None:
    method = Method.parse(name)
    assert Method.parse(str(method)) == method
    assert str(method) == ("robustkd" if name == "robustkd+ofd" else name)
    assert {method.treatment, method.objective} <= {"", "ce", *TREATMENTS, *OBJECTIVES}


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_a_treatment_alone_stands_for_itself_with_ofd(treatment: str) -> None:
    assert Method.parse(treatment) == Method.parse(f"{treatment}+ofd") == Method(treatment, "ofd")
    assert settings(method=treatment).method == settings(method=f"{treatment}+ofd").method


@pytest.mark.parametrize(
    "name", ["", "+ofd", "ce+ofd", "finetune+ce", "nad+", "ofd+kd", "robustkd+ofd+kd", "OFD", "ofd+nad"]
)
def test_what_is_no_method_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="expected ce, ofd, kd, at, or one of robustkd, finetune, prune, nad, anp"):
        Method.parse(name)


def test_a_misspelt_method_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"did you mean finetune\+ofd\?"):
        Method.parse("finetun+ofd")


def test_no_two_methods_are_called_the_same_in_a_table() -> None:
    variants = [(hardened, labels) for hardened in (False, True) for labels in (False, True)]
    methods = {Method.parse(name) for name in METHODS}
    roles = {m.role(hardened=h, labels=la) for m in methods for h, la in variants}
    assert len(roles) == len(methods) * len(variants)


# ------------------------------------------------------------------------------------------- settings that go with them


def test_robustkd_is_hardened_and_the_papers_form_and_the_baselines_are_not() -> None:
    default, paper = settings(), settings(variant="paper")
    assert default.radius > 0
    assert not default.masked
    assert paper.masked
    assert settings(cap=0.05).masked
    assert not settings(method="ofd", cap=0.0).masked
    with pytest.raises(ConfigError, match="--cap changes nothing with --method ofd"):
        settings(method="ofd", cap=0.05)
    assert (paper.radius, paper.mask_cap) == (0, 0.9)
    assert settings(variant="paper", cap=0.2, hardening=4.0).mask_cap == 0.2
    assert settings(variant="paper", hardening=4.0).radius == 4
    for name in METHODS:
        assert (settings(method=name).radius > 0) == name.startswith("robustkd")


@pytest.mark.parametrize(
    ("change", "method"),
    [
        ({"mask": "channel"}, "ofd"),
        ({"variance": False}, "finetune+ofd"),
        ({"replacement": "zero"}, "kd"),
        ({"variant": "paper"}, "at"),
        ({"taps": "last"}, "kd"),
        ({"harden_from": 0.2}, "kd"),
        ({"harden_share": 0.5}, "kd"),
        ({"perturbations": "student"}, "kd"),
        ({"taps": "1"}, "finetune+kd"),
        ({"teacher_mode": "train"}, "ce"),
    ],
)
def test_a_switch_that_the_method_would_ignore_is_refused(change: dict[str, object], method: str) -> None:
    with pytest.raises(ConfigError, match="changes nothing with --method"):
        settings(method=method, **change)
    settings(method="robustkd+kd", **({"cap": 0.05} | change))


@pytest.mark.parametrize("change", [{"mask": "channel"}, {"variance": False}, {"replacement": "zero"}])
def test_a_switch_of_the_mask_is_refused_where_there_is_none(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="it needs robustkd with a mask"):
        settings(**change)


def test_perturbations_are_the_teachers_where_there_is_hardening_and_a_teacher() -> None:
    assert settings().perturbations == "teacher"
    assert settings(method="ofd", hardening=8.0).perturbations == "teacher"
    assert settings(method="ce", hardening=8.0).perturbations == "student"
    assert settings(method="ofd").perturbations is None, "runs without hardening are what they were before there was it"
    assert settings(variant="paper").perturbations is None
    with pytest.raises(ConfigError, match="--perturbations teacher: --method ce has no teacher"):
        settings(method="ce", hardening=8.0, perturbations="teacher")
    with pytest.raises(ConfigError, match="--perturbations 'twin': expected teacher or student$"):
        settings(perturbations="twin")


def test_robustkd_without_hardening_and_without_a_mask_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"is not RobustKD: .* or --method finetune\+ofd"):
        settings(hardening=0.0)
    with pytest.raises(ConfigError, match="is not RobustKD: .* or --method kd"):
        settings(method="robustkd+kd", hardening=0.0, purify="none")
    assert settings(hardening=0.0, cap=0.2).masked


def test_what_purifies_the_teacher_is_the_methods_or_with_robustkd_the_options() -> None:
    assert [settings(method=name).purifier for name in ("ofd", "ce", "finetune", "nad+kd")] == [
        None,
        None,
        "finetune",
        "nad",
    ]
    assert settings(purify="none").purifier is None
    assert settings(variant="paper").purifier is None
    assert settings(variant="paper", purify="prune").purifier == "prune"
    for method in ("ofd", "finetune+ofd", "ce"):
        with pytest.raises(ConfigError, match=f"--purify changes nothing with --method .*{method[:3]}"):
            settings(method=method, purify="nad")
    with pytest.raises(ConfigError, match="--purify 'wash': expected none or finetune or prune or nad or anp"):
        settings(purify="wash")


def test_a_baseline_purifies_for_400_steps_and_robustkd_for_half_of_the_students_and_three_epochs_at_most() -> None:
    ours, baseline = settings(purify="finetune", epochs=6), settings(method="finetune+ofd", epochs=6)
    assert [ours.steps_to_purify(steps) for steps in (1, 100, 10_000)] == [1, 50, 400]
    assert settings(purify="finetune", epochs=40).steps_to_purify(440) == 33, "three epochs of eleven steps"
    assert [baseline.steps_to_purify(steps) for steps in (1, 100, 10_000)] == [400, 400, 400]
    assert settings(purify="finetune", purify_steps=7).steps_to_purify(100) == 7


@pytest.mark.parametrize("change", [{"purify_steps": 7}, {"purify_lr": 0.1}])
def test_how_to_purify_is_refused_where_nothing_is_purified(change: dict[str, object]) -> None:
    for without in ({"method": "ofd"}, {"method": "ce"}, {"purify": "none"}, {"variant": "paper"}):
        with pytest.raises(ConfigError, match="--purify-(steps|lr) changes nothing with --method .* a purifier"):
            settings(**without, **change)
    assert settings(method="nad+ofd", **change).purifier == "nad"
    assert settings(purify_steps=7, purify_lr=0.1, undefended=True).undefended_twin("t", ()).purifier is None


@pytest.mark.parametrize(
    ("change", "option"),
    [
        ({"mask": "row"}, "--mask"),
        ({"replacement": "median"}, "--replacement"),
        ({"teacher_mode": "test"}, "--teacher-mode"),
        ({"variant": "papers"}, "--variant"),
        ({"taps": "0"}, "--taps"),
        ({"taps": "1,,2"}, "--taps"),
        ({"taps": "first"}, "--taps"),
        ({"harden_from": 1.0}, "--harden-from"),
        ({"harden_from": -0.1}, "--harden-from"),
        ({"harden_share": 0.0}, "--harden-share"),
        ({"harden_share": 1.1}, "--harden-share"),
        ({"harden_share": float("nan")}, "--harden-share"),
        ({"input_noise": -1.0}, "--input-noise"),
        ({"input_noise": float("nan")}, "--input-noise"),
        ({"purify_steps": 0}, "--purify-steps"),
        ({"purify_lr": float("inf")}, "--purify-lr"),
        ({"cap": -0.1}, "--cap"),
    ],
)
def test_an_impossible_value_is_refused_by_the_options_name(change: dict[str, object], option: str) -> None:
    with pytest.raises(ConfigError, match=option):
        settings(**change)


@pytest.mark.parametrize(("text", "taps"), [("all", None), ("last", (-1,)), ("1", (0,)), ("1, 3", (0, 2))])
def test_taps_are_counted_from_one_at_the_input(text: str, taps: tuple[int, ...] | None) -> None:
    assert settings(taps=text).chosen_taps == taps


def test_the_undefended_twin_has_no_defence_left() -> None:
    defended = settings(
        undefended=True, cap=0.05, mask="channel", variance=False, replacement="zero", taps="last", teacher_mode="train",
        input_noise=4.0, epochs=7, labels=False, purify="nad",
    )  # fmt: skip
    twin = defended.undefended_twin("other.pt", ("trigger.npz",))
    plain = DistillSettings(
        teacher="other.pt", student="wrn-10-1", data="digits", method="ofd", triggers=("trigger.npz",), epochs=7,
        labels=False,
    )  # fmt: skip
    assert twin == plain
