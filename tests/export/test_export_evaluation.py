"""The images that travel with a bundle."""

from __future__ import annotations

import numpy as np
import pytest

from rkd.data import ArraySource
from rkd.errors import DataError
from rkd.export import choose_evaluation


def source(labels: list[int]) -> ArraySource:
    """Image i is all i."""
    n = len(labels)
    images = np.broadcast_to(np.arange(n, dtype=np.uint8)[:, None, None, None], (n, 3, 2, 2))
    return ArraySource(images, np.array(labels))


def test_all_images_in_order_where_they_fit() -> None:
    images, labels = choose_evaluation(source([2, 0, 1, 0]), seed=0)
    assert images.dtype == np.uint8
    assert labels.dtype == np.int64
    assert images[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert labels.tolist() == [2, 0, 1, 0]


def test_part_keeps_the_shares_of_the_classes_and_the_order() -> None:
    truth = [0] * 120 + [1] * 60 + [2] * 20
    images, labels = choose_evaluation(source(truth), seed=3, limit_images=50)
    assert len(labels) == 50
    for label, share in ((0, 0.6), (1, 0.3), (2, 0.1)):
        assert abs((labels == label).sum() - 50 * share) <= 1
    indices = images[:, 0, 0, 0].astype(int)
    assert (np.diff(indices) > 0).all()
    assert labels.tolist() == [truth[i] for i in indices]


def test_rare_classes_are_there() -> None:
    _, labels = choose_evaluation(source([0] * 197 + [1, 2, 3]), seed=0, limit_images=10)
    assert set(labels.tolist()) == {0, 1, 2, 3}


def test_seed_decides() -> None:
    test = source([0, 1] * 100)
    first, again, other = (choose_evaluation(test, seed, limit_images=20)[0] for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_bytes_are_limited_but_one_image_is_taken() -> None:
    assert len(choose_evaluation(source([0, 1] * 10), 0, limit_bytes=12 * 7 + 5)[0]) == 7
    assert len(choose_evaluation(source([0, 1] * 10), 0, limit_bytes=1)[0]) == 1


def test_images_that_cannot_be_decoded_are_left_out() -> None:
    class Damaged(ArraySource):
        def batch(self, indices):
            images, labels = super().batch(indices)
            good = labels == 0
            return images[good], labels[good]

    clean = source([0, 1, 0, 0, 1])
    damaged = Damaged(clean.batch(np.arange(5))[0], clean.labels)
    images, labels = choose_evaluation(damaged, 0)
    assert images[:, 0, 0, 0].tolist() == [0, 2, 3]
    assert labels.tolist() == [0, 0, 0]


def test_nothing_to_take_is_an_error() -> None:
    with pytest.raises(DataError, match="no image"):
        choose_evaluation(source([0]).subset(np.zeros(0, np.int64)), 0)
