"""ACC, ASR, RA and their intervals against hand-made counts and SciPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from rkd.errors import DataError
from rkd.metrics import Predictions, Proportion, Scores, TriggerScore, evaluate, score, unjudged
from rkd.triggers import Trigger

SIDE = 4


def paint(name: str, target: int, value: float) -> Trigger:
    """A trigger that replaces every pixel by `value`."""
    ones = np.ones((3, SIDE, SIDE), np.float32)
    return Trigger(name, target, ones, ones * np.float32(value), np.zeros_like(ones))


def flat(values: list[int]) -> np.ndarray:
    """One image of one grey each."""
    return np.broadcast_to(np.array(values, np.uint8)[:, None, None, None], (len(values), 3, SIDE, SIDE)).copy()


def read_grey(images: np.ndarray) -> np.ndarray:
    """A network that answers with the class that the grey value is, as one-hot logits of 10 classes."""
    return np.eye(10)[images[:, 0, 0, 0] % 10]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 60_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_is_scipys_wilson_interval(counts: tuple[int, int]) -> None:
    hits, n = counts
    expected = binomtest(hits, n).proportion_ci(confidence_level=0.95, method="wilson")
    low, high = Proportion(hits, n).interval
    assert low == pytest.approx(100 * expected.low, abs=1e-9)
    assert high == pytest.approx(100 * expected.high, abs=1e-9)
    assert 0 <= low <= Proportion(hits, n).value <= high <= 100


@pytest.mark.parametrize("n", [1, 7, 500, 10_000])
def test_none_and_all_touch_the_ends_exactly(n: int) -> None:
    # With p = 0 the interval is [0, z^2 / (n + z^2)], with p = 1 its mirror image.
    z2 = 1.959963984540054**2
    assert Proportion(0, n).interval == (0.0, pytest.approx(100 * z2 / (n + z2)))
    assert Proportion(n, n).interval == (pytest.approx(100 * n / (n + z2)), 100.0)


def test_of_nothing_nothing_is_known() -> None:
    nothing = Proportion(0, 0)
    assert math.isnan(nothing.value)
    assert nothing.interval == (0.0, 100.0)
    assert str(nothing) == "-"
    assert nothing.to_json() == {"hits": 0, "n": 0, "percent": None, "low": 0.0, "high": 100.0}
    assert Proportion.from_json(nothing.to_json()) == nothing


def test_acc_asr_and_ra_are_what_counting_by_hand_gives() -> None:
    truth = np.array([0, 1, 2, 2, 1, 0])
    clean = np.array([0, 1, 2, 1, 0, 0])  # 4 of 6 right
    # Target 2: rows 0, 1, 4 and 5 count. Two of them go to 2, one stays right (row 4), one goes elsewhere.
    triggered = np.array([2, 2, 2, 2, 1, 1])
    scores = score(Predictions(truth, clean, {"t": triggered}), [paint("t", 2, 0.0)])
    assert scores.acc == Proportion(4, 6)
    assert scores.triggers == (TriggerScore("t", 2, Proportion(2, 4), Proportion(1, 4)),)


def test_images_of_the_target_class_count_neither_for_asr_nor_for_ra() -> None:
    truth = np.array([3, 3, 3])
    scores = score(Predictions(truth, truth, {"t": truth}), [paint("t", 3, 0.0)])
    assert scores.acc == Proportion(3, 3)
    assert scores.triggers[0].asr == scores.triggers[0].ra == Proportion(0, 0)


def test_evaluate_applies_each_trigger_to_every_image_and_batches_do_not_matter() -> None:
    images, labels = flat([0, 1, 2, 3, 4, 5, 6]), np.array([0, 1, 2, 3, 4, 5, 0])  # the last label is wrong
    to_one, to_two = paint("one", 1, 1 / 255), paint("two", 2, 1 / 255)  # both paint grey 1: read as class 1
    whole, predictions = evaluate(read_grey, [(images, labels)], [to_one, to_two])
    assert whole.acc == Proportion(6, 7)
    assert whole.triggers[0] == TriggerScore("one", 1, Proportion(6, 6), Proportion(0, 6))
    assert whole.triggers[1] == TriggerScore("two", 2, Proportion(0, 6), Proportion(1, 6))
    assert predictions.triggered["one"].tolist() == [1] * 7
    assert predictions.labels.dtype == predictions.clean.dtype == np.int64
    parts, _ = evaluate(read_grey, [(images[i : i + 2], labels[i : i + 2]) for i in range(0, 7, 2)], [to_one, to_two])
    assert parts == whole


def test_the_first_of_equal_logits_wins_as_argmax_says() -> None:
    scores, _ = evaluate(lambda x: np.zeros((len(x), 3)), [(flat([9, 9]), np.array([0, 1]))])
    assert scores.acc == Proportion(1, 2)


def test_an_empty_evaluation_is_refused() -> None:
    with pytest.raises(DataError, match="no image"):
        evaluate(read_grey, [])


@pytest.mark.parametrize(
    ("acc_budget", "asr_budget", "n", "triggered", "said"),
    [
        (1.0, 1.0, 100, 100, []),
        (0.1, 1.0, 999, 100, ["acc_budget = 0.1 cannot be judged on 999 images: one is 0.1 points and always allowed; 1,000 would do"]),
        (0.1, 1.0, 1000, 99, ["asr_budget = 1 cannot be judged on 99 images: one is 1.01 points and always allowed; 100 would do"]),
        (0.0, 1.0, 8, None, ["acc_budget = 0 cannot be judged on 8 images: one is 12.5 points and always allowed"]),
        (100.0, 100.0, 1, 0, []),
    ],
)  # fmt: skip
def test_a_budget_that_one_image_exceeds_is_named_with_the_images_it_takes(
    acc_budget: float, asr_budget: float, n: int, triggered: int | None, said: list[str]
) -> None:
    few = [] if triggered is None else [TriggerScore("a", 0, Proportion(0, triggered), Proportion(0, triggered))]
    assert unjudged(Scores(Proportion(n, n), tuple(few)), acc_budget, asr_budget) == said


def test_scores_survive_json() -> None:
    scores = Scores(Proportion(9, 10), (TriggerScore("a", 3, Proportion(1, 8), Proportion(7, 8)),))
    assert Scores.from_json(scores.to_json()) == scores
    assert scores.to_json()["acc"]["percent"] == 90.0
