"""What a run's page and its last lines warn of."""

from __future__ import annotations

import pytest

from rkd.metrics import Proportion, Scores, TriggerScore
from rkd.reporting import cautions
from rkd.run import Model


def model(role: str, right: int, moved: int) -> Model:
    trigger = TriggerScore("patch", 0, Proportion(moved, 90), Proportion(90 - moved, 90))
    return Model(role, "wrn-10-1", Scores(Proportion(right, 100), (trigger,)), 1, 1, 1)


@pytest.mark.parametrize(
    ("right", "moved", "said"),
    [
        (90, 90, []),
        (12, 90, ["The student hardly beats guessing"]),
        (90, 20, ["The trigger 'patch' moves only 22.2 % of the images in the teacher itself"]),
        (12, 20, ["The student hardly beats guessing", "The trigger 'patch' moves only 22.2 %"]),
    ],
)
def test_a_student_that_guesses_and_a_trigger_that_does_not_work_are_called_so(
    right: int, moved: int, said: list[str]
) -> None:
    found = cautions([model("teacher", 95, moved), model("student", right, 0)], classes=10)
    assert len(found) == len(said)
    assert all(line.startswith(start) for line, start in zip(found, said, strict=True))


def test_without_a_trigger_there_is_nothing_to_sleep() -> None:
    clean = Model("teacher", "wrn-10-1", Scores(Proportion(95, 100), ()), 1, 1, 1)
    assert cautions([clean, clean], classes=10) == []


def test_a_teacher_that_guesses_is_named_instead_of_its_student() -> None:
    (line,) = cautions([model("teacher", 11, 90), model("student", 10, 0)], classes=10)
    assert line.startswith("The teacher itself hardly beats guessing (ACC 11.0 %, 10 classes)")
    assert "check --normalize" in line


def test_a_student_far_below_its_teacher_gets_advice() -> None:
    (line,) = cautions([model("teacher", 95, 90), model("student", 60, 0)], classes=10)
    assert line.startswith("The student is 35.0 points of ACC below its teacher: train longer")


@pytest.mark.parametrize(("moved", "said"), [(10, 1), (60, 0)])
def test_a_case_that_does_not_transfer_shows_no_defence_at_work(moved: int, said: int) -> None:
    models = [model("teacher", 95, 90), model("undefended student (OFD)", 90, moved), model("student", 90, 0)]
    found = cautions(models, classes=10)
    assert len(found) == said
    assert all("moves 11.1 % of the images in the undefended student (OFD): it hardly survives" in x for x in found)
