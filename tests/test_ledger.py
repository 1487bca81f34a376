"""The ledger: labels of every image at every step."""

from __future__ import annotations

import numpy as np
import pytest

from rkd.errors import BundleError
from rkd.ledger import Flip, Ledger, Step, pairs, shown
from rkd.metrics import Predictions, Proportion, allowed
from rkd.triggers import Trigger

TRUTH = np.array([0, 0, 1, 1, 2, 2, 2, 2])


def trigger(name: str = "patch", target: int = 0) -> Trigger:
    zero = np.zeros((3, 2, 2), np.float32)
    return Trigger(name, target, zero, zero, zero)


def step(name: str, clean: list[int], patched: list[int]) -> Step:
    return Step.of(name, Predictions(TRUTH, np.array(clean), {"patch": np.array(patched)}))


RIGHT = TRUTH.tolist()


def test_flips_name_the_image_what_was_on_it_and_both_labels() -> None:
    before, after = step("a", RIGHT, RIGHT), step("b", [0, 0, 1, 2, 2, 2, 2, 2], [0, 0, 0, 1, 2, 2, 2, 0])
    ledger = Ledger(TRUTH, (before, after))
    assert ledger.flips(before, after) == [
        Flip(3, "clean", 1, 2, 1),
        Flip(2, "trigger patch", 1, 0, 1),
        Flip(7, "trigger patch", 2, 0, 2),
    ]
    assert ledger.agreement(before, after) == {"clean": Proportion(7, 8), "trigger patch": Proportion(6, 8)}
    assert pairs(ledger) == [(before, after)]
    assert ledger.decisions == 16


def test_scores_are_those_of_the_labels() -> None:
    ledger = Ledger(TRUTH, (step("a", [0, 1, 1, 1, 2, 2, 2, 2], [0, 0, 0, 1, 2, 2, 2, 0]),))
    scores = ledger.scores(ledger.steps[0], [trigger()])
    assert scores.acc == Proportion(7, 8)
    assert (scores.triggers[0].asr, scores.triggers[0].ra) == (Proportion(2, 6), Proportion(4, 6))


@pytest.mark.parametrize(("budget", "lines"), [(24.9, 1), (25.0, 0)])
def test_a_step_may_lose_its_budget_of_accuracy_and_not_more(budget: float, lines: int) -> None:
    worse = step("int8", [1, 1, *RIGHT[2:]], RIGHT)  # 2 of 8: 25 points
    found = Ledger(TRUTH, (step("student", RIGHT, RIGHT), worse)).judge([trigger()], budget, 0.0)
    assert len(found) == lines
    if lines:
        assert found[0] == (
            "student -> int8: ACC falls from 100.00 to 75.00 % (n = 8), at most 24.9 points are allowed"
        )


@pytest.mark.parametrize(("budget", "lines"), [(33.3, 1), (33.4, 0)])
def test_a_step_may_gain_its_budget_of_asr_and_not_more(budget: float, lines: int) -> None:
    woken = [*RIGHT[:-2], 0, 0]  # two of the six images that do not show the target: 33.33 points
    found = Ledger(TRUTH, (step("student", RIGHT, RIGHT), step("int8", RIGHT, woken))).judge([trigger()], 0.0, budget)
    assert len(found) == lines
    assert all("ASR of trigger patch rises from 0.00 to 33.33 % (n = 6)" in line for line in found)


@pytest.mark.parametrize("lost", [1, 2])
def test_one_image_is_no_fault_however_small_the_set_and_two_are(lost: int) -> None:
    worse = step("int8", [1] * lost + RIGHT[lost:], RIGHT[:-lost] + [0] * lost)
    found = Ledger(TRUTH, (step("student", RIGHT, RIGHT), worse)).judge([trigger()], 0.1, 0.1)
    assert [line.partition("), ")[2] for line in found] == ["at most one image is allowed"] * 2 * (lost - 1)


@pytest.mark.parametrize(("percent", "n", "images"), [(0.1, 999, 1), (0.1, 5000, 5), (0.2, 1000, 2), (1.0, 0, 1)])
def test_a_budget_is_a_share_of_the_images_and_at_least_one(percent: float, n: int, images: int) -> None:
    assert int(allowed(percent, n)) == images


def test_gains_and_losses_the_other_way_are_no_fault() -> None:
    worse, better = step("student", [1, *RIGHT[1:]], [0] * 8), step("int8", RIGHT, RIGHT)
    assert Ledger(TRUTH, (worse, better)).judge([trigger()], 0.0, 0.0) == []


def test_small_losses_that_add_up_are_seen_against_the_student() -> None:
    steps = (
        step("student", RIGHT, RIGHT),
        step("fp32", [1, *RIGHT[1:]], RIGHT),
        step("int8", [1, 1, *RIGHT[2:]], RIGHT),  # one image at each step
    )
    found = Ledger(TRUTH, steps).judge([trigger()], 12.5, 0.0)
    assert [line.partition(":")[0] for line in found] == ["student -> int8"]


def test_a_trigger_may_be_called_clean() -> None:
    assert shown([trigger("clean")]) == ("clean", "trigger clean")
    found = Step.of("a", Predictions(TRUTH, TRUTH, {"clean": TRUTH * 0}))
    assert found.labels["clean"].tolist() == RIGHT


def test_what_is_written_is_read_and_twice_the_same_bytes() -> None:
    ledger = Ledger(TRUTH, (step("student", RIGHT, RIGHT), step("int8", RIGHT[::-1], RIGHT)))
    data = ledger.to_bytes()
    again = Ledger.from_bytes(data, "x")
    assert again.to_bytes() == data == ledger.to_bytes()
    assert [found.name for found in again.steps] == ["student", "int8"]
    for one, other in zip(ledger.steps, again.steps, strict=True):
        assert {key: labels.tolist() for key, labels in one.labels.items()} == {
            key: labels.tolist() for key, labels in other.labels.items()
        }


def test_rows_for_people_count_what_changed() -> None:
    ledger = Ledger(TRUTH, (step("student", RIGHT, RIGHT), step("int8", [1, *RIGHT[1:]], RIGHT)))
    first, second = ledger.to_json([trigger()])
    assert "flips" not in first
    assert second["flips"] == {"clean": 1, "trigger patch": 0}
    assert second["agreement"] == {"clean": 87.5, "trigger patch": 100.0}


def npz(**arrays: np.ndarray) -> bytes:
    from rkd.npz import npz_bytes

    good = {"steps": np.array(["a"]), "shown": np.array(["clean"]), "truth": TRUTH, "labels": TRUTH[None, None]}
    return npz_bytes({**good, **arrays})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"text",
        npz(steps=np.array([1])),
        npz(shown=np.array(["dirty"])),
        npz(truth=TRUTH[:3]),
        npz(labels=TRUTH[None]),
        npz(labels=TRUTH[None, None].astype(np.float32)),
        npz(steps=np.array(["a"] * 9), labels=np.repeat(TRUTH[None, None], 9, axis=0)),
        npz(steps=np.array(["a" * 101])),
        npz(more=TRUTH),
    ],
)  # fmt: skip
def test_what_is_no_ledger_is_refused_by_name(data: bytes) -> None:
    with pytest.raises(BundleError, match=r"x\.rkd: ledger\.npz is not a ledger"):
        Ledger.from_bytes(data, "x.rkd: ledger.npz")
