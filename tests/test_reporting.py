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
