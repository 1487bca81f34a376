"""Data sets in .npz archives, honest and hostile."""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rkd import _images
from rkd.data import open_dataset
from rkd.errors import DataError


def refusal(spec: Path | str, **kwargs: Any) -> str:
    with pytest.raises(DataError) as caught:
        open_dataset(str(spec), **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def everything(source: Any) -> tuple[np.ndarray, np.ndarray]:
    return source.batch(np.arange(len(source)))


def identities(source: Any) -> set[bytes]:
    return {image.tobytes() for image in everything(source)[0]}


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def pixels(n: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (n, *shape), dtype=np.uint8)


def test_an_npz_with_both_splits_is_taken_as_it_is(tmp_path: Path) -> None:
    x, x_test = pixels(4, 5, 6, 3), pixels(3, 5, 6, 3)
    path = npz(tmp_path / "mine.npz", x=x, y=[0, 1, 1, 0], x_test=x_test, y_test=[1, 1, 0], classes=["no", "yes"])
    dataset = open_dataset(str(path))
    assert (dataset.name, dataset.classes, dataset.size, dataset.notes) == ("mine", ("no", "yes"), (5, 6), ())
    images, labels = everything(dataset.train)
    np.testing.assert_array_equal(images, x.transpose(0, 3, 1, 2))
    assert labels.tolist() == [0, 1, 1, 0]
    np.testing.assert_array_equal(everything(dataset.test)[0], x_test.transpose(0, 3, 1, 2))


def test_an_npz_without_test_is_split_by_seed(tmp_path: Path) -> None:
    path = npz(tmp_path / "x.npz", x=pixels(20, 4, 4, 3), y=np.repeat([0, 1], 10))
    dataset, other = open_dataset(str(path), seed=3), open_dataset(str(path), seed=4)
    assert np.bincount(dataset.test.labels).tolist() == [2, 2]
    assert not identities(dataset.train) & identities(dataset.test)
    assert identities(dataset.test) != identities(other.test)
    assert dataset.classes == ("0", "1")


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 1)])
def test_a_grey_npz_is_repeated_over_the_channels(tmp_path: Path, shape: tuple[int, ...]) -> None:
    x = pixels(4, *shape)
    dataset = open_dataset(str(npz(tmp_path / "x.npz", x=x, y=[0, 1, 0, 1], x_test=pixels(2, *shape), y_test=[0, 1])))
    np.testing.assert_array_equal(everything(dataset.train)[0], np.repeat(x.reshape(4, 1, 4, 4), 3, axis=1))


def test_an_npz_with_alpha_is_put_on_black_as_an_image_file_is(tmp_path: Path) -> None:
    every = np.stack(np.meshgrid(np.arange(256), np.arange(256), indexing="ij"), axis=-1).astype(np.uint8)
    rgba = every[..., [0, 0, 0, 1]]  # each value with each alpha
    x = np.stack([rgba, 255 - rgba])
    dataset = open_dataset(str(npz(tmp_path / "x.npz", x=x, y=[0, 1], x_test=x[:, ::-1], y_test=[0, 1])))
    exact = np.floor(every[..., 0] * (every[..., 1] / 255.0) + 0.5)
    got = everything(dataset.train)[0][0, 0]
    np.testing.assert_array_equal(got, exact)
    from_file, _ = _images.to_pixels(Image.fromarray(rgba), (256, 256))
    np.testing.assert_array_equal(from_file[0], got)


def test_an_npz_is_fitted_to_the_size_asked_for(tmp_path: Path) -> None:
    x = pixels(2, 8, 8, 3)
    path = npz(tmp_path / "x.npz", x=x, y=[0, 1], x_test=pixels(3, 4, 4), y_test=[0, 1, 1])
    assert "different sizes; give --image-size" in refusal(path)
    dataset = open_dataset(str(path), size=4)
    expected = np.asarray(Image.fromarray(x[1]).resize((4, 4), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    np.testing.assert_array_equal(everything(dataset.train)[0][1], expected)


X, Y = pixels(4, 4, 4, 3), np.array([0, 1, 0, 1])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": X.astype(np.float32), "y": Y}, "x is float32; expected uint8"),
        ({"x": X, "y": Y.astype(float)}, "labels float64"),
        ({"x": X, "y": Y[:3]}, "expected 4 whole numbers"),
        ({"x": X, "y": Y[:, None]}, "expected 4 whole numbers"),
        ({"x": pixels(4, 3, 5, 5), "y": Y}, "transpose it"),
        ({"x": X[0, 0], "y": Y}, "expected \\(N, H, W\\)"),
        ({"x": X[:0], "y": Y[:0]}, "shape \\(0, 4, 4, 3\\)"),
        ({"x": np.zeros((2, 1, 5000), np.uint8), "y": [0, 1]}, "1 to 4096 pixels"),
        ({"x": X, "y": Y - 1}, "labels go from -1 to 0"),
        ({"x": X, "y": Y * 2}, "no training images of class 1"),
        ({"x": X, "y": Y * 0}, "one class only"),
        ({"x": X, "y": np.array([0, 1, 0, 2**63], np.uint64)}, "labels go from 0 to 9223372036854775808"),
        ({"x": X, "y": Y, "classes": ["one"]}, "labels go from 0 to 1"),
        ({"x": X, "y": Y, "classes": ["a", "b", "c"]}, "no training images of class c"),
        ({"x": X, "y": Y, "classes": [1, 2]}, "classes is int64"),
        ({"x": X, "y": Y, "x_test": X}, "x_test with y_test"),
        ({"x": X, "y": Y, "x_test": X[:1] + 1, "y_test": [2]}, "no training images of class 2"),
        ({"X": X, "Y": Y}, "holds X, Y; expected arrays x and y"),
        ({"x": X, "y": Y, "X_test": X}, "holds X_test, x, y; expected"),
        ({"x": X[:2], "y": Y[:2]}, "one image a class"),
    ],
)
def test_an_npz_that_is_no_data_set_says_what_was_seen_and_expected(
    tmp_path: Path, arrays: dict[str, Any], message: str
) -> None:
    assert re.search(message, refusal(npz(tmp_path / "x.npz", **arrays)))


class Canary:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_an_object_array_is_refused_and_not_unpickled(tmp_path: Path) -> None:
    array = np.empty(1, dtype=object)
    array[0] = Canary(tmp_path / "executed")
    np.savez(tmp_path / "x.npz", x=X, y=array)
    assert "not accepted" in refusal(tmp_path / "x.npz")
    assert not (tmp_path / "executed").exists()
    pickle.loads(pickle.dumps(array[0]))  # noqa: S301  (the canary does sing)
    assert (tmp_path / "executed").exists()


def test_a_header_that_announces_more_than_there_is_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": (2**40, 32, 32, 3)})
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("x.npy", buffer.getvalue())
    assert "announces" in refusal(tmp_path / "x.npz")


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", bytes(65 * 2**20))
    assert (tmp_path / "x.npz").stat().st_size < 10**5
    assert "when unpacked" in refusal(tmp_path / "x.npz", memory_bytes=2**20)


def test_a_small_npz_that_would_grow_beyond_the_memory_is_refused(tmp_path: Path) -> None:
    path = npz(tmp_path / "x.npz", x=pixels(4, 1, 1), y=Y)
    assert "give a smaller --image-size" in refusal(path, size=4096, memory_bytes=0)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_damaged_npz_is_a_data_error_or_a_data_set(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, x=pixels(8, 2, 2), y=np.array([0, 1] * 4))
    mutant = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 3))):
        mutant[data.draw(st.integers(0, len(mutant) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "mutant.npz"
    path.write_bytes(mutant[: data.draw(st.integers(0, len(mutant)))] if data.draw(st.booleans()) else mutant)
    try:
        dataset = open_dataset(str(path))
    except DataError:
        return
    assert len(dataset.train) + len(dataset.test) <= 8
