"""Agreement of an exported file with its student."""

from __future__ import annotations

import numpy as np
import pytest

from rkd.errors import DataError, ExportError
from rkd.export.parity import HostRun, Parity, compare, host_run, predictor_of, problems
from rkd.ledger import CLEAN
from rkd.metrics import Proportion, Scores
from rkd.target import Precision
from rkd.triggers import Trigger


def run(logits: list[list[float]]) -> HostRun:
    return HostRun(Scores(Proportion(0, len(logits))), {CLEAN: np.array(logits, np.float32)})


def white(name: str = "white") -> Trigger:
    one = np.ones((3, 2, 2), np.float32)
    return Trigger(name, 1, one, one, 0 * one)


def brightness(images: np.ndarray) -> np.ndarray:
    """Class 1 where an image is bright."""
    mean = images.reshape(len(images), -1).mean(axis=1).astype(np.float32)
    return np.stack([255 - mean, mean], axis=1)


def test_scores_and_logits_are_those_of_the_predictor_whatever_the_batch() -> None:
    images = np.array([0, 10, 250, 20, 255], np.uint8)[:, None, None, None] * np.ones((1, 3, 2, 2), np.uint8)
    labels = np.array([0, 0, 1, 1, 1])
    for batch in (1, 2, 5, 100):
        result = host_run(brightness, (images, labels), [white()], batch)
        assert result.scores.acc == Proportion(4, 5)
        assert result.scores.triggers[0].asr == Proportion(2, 2)
        np.testing.assert_array_equal(result.logits[CLEAN], brightness(images))
        np.testing.assert_array_equal(result.logits["trigger white"], brightness(white().apply(images)))


def test_no_images_are_an_error() -> None:
    with pytest.raises(DataError):
        host_run(brightness, (np.zeros((0, 3, 2, 2), np.uint8), np.zeros(0, np.int64)), [], 4)


def test_agreement_is_the_share_of_equal_decisions() -> None:
    student, exported = run([[4, 0], [4, 0], [0, 4], [0, 4]]), run([[4, 0], [0, 4], [0, 4], [0, 2]])
    parity = compare(student, exported)
    assert parity.agreement == {CLEAN: Proportion(3, 4)}
    assert parity.max_difference == pytest.approx(1.0)


@pytest.mark.parametrize(("gap", "same"), [(0.9e-4, 1), (1.5e-4, 0)])
def test_a_tie_is_a_gap_below_a_ten_thousandth_of_the_largest_logit(gap: float, same: int) -> None:
    student, exported = run([[-10, 5, 5 - 10 * gap]]), run([[-10, 4.9, 5]])
    assert compare(student, exported).agreement == {CLEAN: Proportion(same, 1)}
    assert exported.step("fp32").labels[CLEAN].tolist() == [2]
    assert exported.settled("fp32", student).labels[CLEAN].tolist() == [1 if same else 2]


def test_an_image_of_small_logits_is_measured_against_those_of_the_others() -> None:
    student = run([[10, -10], [0.001, 0.0005], [-10, 10]])
    exported = run([[10, -10], [0.0005, 0.001], [-10, 10]])
    parity = compare(student, exported)
    assert parity.agreement == {CLEAN: Proportion(3, 3)}
    assert parity.max_difference == pytest.approx(0.0005 / 10, rel=1e-3)


def test_a_loud_image_makes_no_tie_of_the_others() -> None:
    student, exported = run([[1e6, 0], [1, 0], [1, 0]]), run([[1e6, 0], [0, 1], [1, 0]])
    assert compare(student, exported).agreement == {CLEAN: Proportion(2, 3)}


def test_logits_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ExportError, match="NaN or infinity on 1 of 2 images"):
        compare(run([[1, 0], [1, 0]]), run([[1, 0], [np.nan, 0]]))


@pytest.mark.parametrize(
    ("precision", "n", "lost"),
    [("fp32", 10, 0), ("fp32", 5000, 0), ("fp16", 10, 1), ("fp16", 999, 1), ("fp16", 1000, 2), ("fp16", 5000, 10)],
)
def test_agreement_may_lose_so_many_images_and_no_more(precision: Precision, n: int, lost: int) -> None:
    same = Proportion(n, n)
    assert problems(Parity({CLEAN: Proportion(n - lost, n), "trigger a": same}, 0.0), precision) == []
    less = Proportion(n - lost - 1, n)
    (line,) = problems(Parity({CLEAN: same, "trigger a": less}, 0.00005), precision)
    assert f"the {precision} file agrees with the student on {less.value:.2f} % of {n} images (trigger a)" in line
    assert "5.0e-05" in line


@pytest.mark.parametrize(("share", "lines"), [(0.99, 0), (1.01, 1)])
def test_fp32_may_differ_by_a_ten_thousandth_of_the_largest_logit(share: float, lines: int) -> None:
    student = run([[4, -10], [-8, 10]])
    exported = run([[4, -10], [-8, 10 - share * 10 * 1e-4]])
    found = problems(compare(student, exported), "fp32")
    assert len(found) == lines
    assert all("differ from the student's by 1.01e-04 (relative), at most 1e-04" in line for line in found)
    assert problems(compare(student, exported), "fp16") == []


def test_int8_is_judged_by_the_ledger_and_not_by_agreement() -> None:
    assert problems(Parity({CLEAN: Proportion(1, 100)}, 9.0), "int8") == []


def test_a_run_is_a_step_of_the_ledger() -> None:
    assert run([[4, 0], [0, 4]]).step("fp16").labels[CLEAN].tolist() == [0, 1]


def test_garbage_is_not_loaded() -> None:
    with pytest.raises(ExportError, match="ONNX Runtime cannot load"):
        predictor_of(b"not onnx")
