"""The teacher's answers in place of labels: in order, and never the true ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from rkd.data import ArraySource, Source, open_dataset
from rkd.distill.labels import RelabelledSource, answers, check_labels
from rkd.errors import DataError


def array_source(count: int = 23) -> ArraySource:
    rng = np.random.default_rng(0)
    return ArraySource(rng.integers(0, 256, (count, 3, 4, 4), dtype=np.uint8), np.zeros(count, np.int64))


def by_brightness(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Logits of three classes that depend on the image alone."""
    level = images.astype(np.float32).mean((1, 2, 3))
    return -np.abs(level[:, None] - np.array([100, 128, 156], np.float32))


def wanted(source: Source) -> NDArray[np.int64]:
    images, _ = source.batch(np.arange(len(source)))
    return by_brightness(images).argmax(1)


def test_the_answers_come_in_the_order_of_the_images_whatever_the_batch() -> None:
    source = array_source()
    for size in (1, 5, 23, 100):
        assert np.array_equal(np.concatenate(list(answers(by_brightness, source, size))), wanted(source))


def test_every_way_to_an_image_gives_its_new_label_and_its_own_pixels() -> None:
    source = array_source()
    labels = np.arange(100, 123)
    relabelled = RelabelledSource(source, labels)
    assert (len(relabelled), relabelled.size) == (23, (4, 4))
    assert np.array_equal(relabelled.labels, labels)
    rows = np.array([7, 3, 3, 22])
    images, got = relabelled.batch(rows)
    assert np.array_equal(images, source.batch(rows)[0])
    assert got.tolist() == [107, 103, 103, 122]
    part = relabelled.subset(np.array([5, 9, 1]))
    assert part.batch(np.array([2, 0]))[1].tolist() == [101, 105]
    assert [label for _, batch in part.batches(2) for label in batch] == [105, 109, 101]
    assert [label for _, batch in part.batches(2, np.array([1])) for label in batch] == [109]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Nine grey squares a class, each of its own brightness; the fourth cannot be decoded."""
    for split, count in (("train", 9), ("test", 2)):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                level = 20 * i + (10 if name == "b" else 0) + (1 if split == "test" else 0)
                Image.new("RGB", (4, 4), (level, level, level)).save(tmp_path / split / name / f"{i}.png")
    (tmp_path / "train" / "a" / "3.png").write_bytes(b"no image")
    return tmp_path


def test_an_image_that_cannot_be_decoded_shifts_no_label(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = open_dataset(str(folder), memory_bytes=0).train
    labels = np.concatenate(list(answers(by_brightness, source, 4)))
    relabelled = RelabelledSource(source, labels)
    seen = 0
    for images, got in relabelled.batches(5):
        assert np.array_equal(got, by_brightness(images).argmax(1))
        seen += len(got)
    assert seen == 17
    assert "3.png" in caplog.text


def test_a_batch_of_nothing_but_damaged_images_is_left_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = open_dataset(str(folder), memory_bytes=0).train
    relabelled = RelabelledSource(source, np.arange(len(source)))
    images, labels = relabelled.batch(np.array([3]))
    assert (len(images), len(labels)) == (0, 0)
    assert list(relabelled.batches(1, np.array([3]))) == []
    assert "3.png" in caplog.text


@pytest.mark.parametrize(
    "labels",
    [[999, 0], [-2, 0], [np.nan, 0], [0.5, 0], ["a", "b"], [True, False], [0], [[0, 1]], np.array([2**64 - 1, 0], np.uint64)],
)  # fmt: skip
def test_what_no_teacher_answers_is_no_label(labels: Any) -> None:
    check_labels(np.array([2, -1]), 2, 3)
    with pytest.raises(ValueError, match="expected int64|not one of the 3 classes"):
        check_labels(np.asarray(labels), 2, 3)


def test_an_image_of_which_the_teacher_was_not_asked_has_no_label() -> None:
    images = ArraySource(np.zeros((3, 3, 4, 4), np.uint8), np.zeros(3, np.int64))
    with pytest.raises(DataError, match="could not be when the teacher was asked"):
        RelabelledSource(images, np.array([0, -1, 0])).batch(np.arange(3))
