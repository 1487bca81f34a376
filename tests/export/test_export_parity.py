"""Agreement of an exported file with its student."""

from __future__ import annotations

import numpy as np
import pytest

from rkd.errors import DataError, ExportError
from rkd.export.parity import HostRun, Parity, compare, host_run, predictor_of, problems
from rkd.ledger import CLEAN
from rkd.metrics import Proportion, Scores
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
    assert parity.agreement == {CLEAN: 75.0}
    assert parity.max_difference == pytest.approx(1.0)


@pytest.mark.parametrize(("gap", "agreement"), [(0.9e-4, 100.0), (1.5e-4, 0.0)])
def test_a_tie_is_a_gap_below_a_ten_thousandth_of_the_largest_logit(gap: float, agreement: float) -> None:
    student, exported = run([[-10, 5, 5 - 10 * gap]]), run([[-10, 4.9, 5]])
    assert compare(student, exported).agreement == {CLEAN: agreement}


def test_logits_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ExportError, match="NaN or infinity on 1 of 2 images"):
        compare(run([[1, 0], [1, 0]]), run([[1, 0], [np.nan, 0]]))


@pytest.mark.parametrize(("precision", "passes", "fails"), [("fp32", 100.0, 99.99), ("fp16", 99.8, 99.79)])
def test_thresholds(precision: str, passes: float, fails: float) -> None:
    assert problems(Parity({CLEAN: passes, "trigger a": 100.0}, 0.0), precision) == []
    (line,) = problems(Parity({CLEAN: 100.0, "trigger a": fails}, 0.1), precision)
    assert f"the {precision} file agrees with the student on {fails:.2f} % of images (trigger a)" in line
    assert "1.0e-01" in line


def test_int8_is_judged_by_the_ledger_and_not_by_agreement() -> None:
    assert problems(Parity({CLEAN: 1.0}, 9.0), "int8") == []


def test_a_run_is_a_step_of_the_ledger() -> None:
    assert run([[4, 0], [0, 4]]).step("fp16").labels[CLEAN].tolist() == [0, 1]


def test_garbage_is_not_loaded() -> None:
    with pytest.raises(ExportError, match="ONNX Runtime cannot load"):
        predictor_of(b"not onnx")
