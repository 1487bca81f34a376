"""`open_dataset` on folders, held in memory and streamed, and on names; expectations are worked out by hand."""

from __future__ import annotations

import gzip
import logging
import os
import struct
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import folder, noise, save
from PIL import Image
from sklearn.datasets import load_digits
from torchvision import datasets

from rkd.data import ArraySource, FolderSource, open_dataset
from rkd.errors import DataError, MissingExtraError, StorageError


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    return folder(tmp_path / "pets", {"train": {"dog": 4, "cat": 3}, "test": {"cat": 2, "dog": 1}})


def everything(source: Any) -> tuple[np.ndarray, np.ndarray]:
    return source.batch(np.arange(len(source)))


# ------------------------------------------------------------------------------------------------------ image folders


def test_a_folder_gives_exactly_the_pixels_and_the_sorted_classes_of_its_files(pets: Path) -> None:
    dataset = open_dataset(str(pets))
    assert dataset.name == "pets"
    assert dataset.classes == ("cat", "dog")
    assert dataset.size == (6, 6)
    assert dataset.notes == ()
    images, labels = everything(dataset.train)
    assert images.dtype == np.uint8
    assert images.flags.c_contiguous
    assert labels.dtype == np.int64
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 1] == dataset.train.labels.tolist()
    expected = [noise(seed) for seed in (4, 5, 6, 0, 1, 2, 3)]  # dogs were drawn first, cats come first
    np.testing.assert_array_equal(images, np.stack(expected).transpose(0, 3, 1, 2))
    assert dataset.test.labels.tolist() == [0, 0, 1]


def test_classes_are_the_ones_of_torchvisions_imagefolder(tmp_path: Path) -> None:
    names = {"b": 1, "10": 1, "9": 1, "B": 1, "a b": 1, "é": 1}
    root = folder(tmp_path, {"train": names, "test": names})
    assert list(open_dataset(str(root)).classes) == datasets.ImageFolder(str(root / "train")).classes


@pytest.mark.parametrize("name", ["test", "val", "valid", "validation", "Test"])
def test_the_test_split_may_have_any_of_its_usual_names(tmp_path: Path, name: str) -> None:
    root = folder(tmp_path, {"train": {"a": 2, "b": 1}, name: {"a": 1, "b": 3}})
    dataset = open_dataset(str(root))
    assert (len(dataset.train), len(dataset.test)) == (3, 4)


def test_test_is_preferred_to_val_and_the_note_says_what_is_not_used(tmp_path: Path) -> None:
    root = folder(tmp_path, {"train": {"a": 1, "b": 1}, "val": {"a": 1, "b": 1}, "test": {"a": 2, "b": 2}})
    dataset = open_dataset(str(root))
    assert len(dataset.test) == 4
    assert dataset.notes == ("not used: val/",)


def test_files_are_found_below_class_folders_in_any_case_and_hidden_ones_are_not(pets: Path) -> None:
    save(pets / "train/cat/sub/deep/x.png", noise(50)).rename(pets / "train/cat/sub/deep/x.PNG")
    save(pets / "train/cat/.hidden.png", noise(51))
    save(pets / "train/.cache/x.png", noise(52))
    (pets / "train/cat/notes.txt").write_text("no image")
    (pets / "train/cat/png").write_text("no image")
    dataset = open_dataset(str(pets))
    assert dataset.classes == ("cat", "dog")
    assert dataset.train.labels.tolist() == [0] * 4 + [1] * 4


def test_links_to_folders_do_not_loop_and_links_to_files_count(pets: Path) -> None:
    (pets / "train/cat/loop").symlink_to(pets / "train")
    (pets / "train/cat/link.png").symlink_to(save(pets / "other.png", noise(60)))
    (pets / "train/cat/dangling.png").symlink_to(pets / "nowhere.png")
    os.mkfifo(pets / "train/cat/pipe.png")
    assert np.bincount(open_dataset(str(pets)).train.labels).tolist() == [4, 4]


# ------------------------------------------------------------------------------------------ folder: what is wrong


def refusal(spec: Path | str, **kwargs: Any) -> str:
    with pytest.raises(DataError) as caught:
        open_dataset(str(spec), **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    assert f"no such folder or file: {tmp_path}/nothing" in refusal(tmp_path / "nothing")


def test_a_file_that_is_no_npz_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.zip").write_bytes(b"PK")
    assert "expected a folder of images or an .npz" in refusal(tmp_path / "data.zip")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    assert "no class folders" in refusal(tmp_path)


def test_images_without_class_folders_get_a_hint(tmp_path: Path) -> None:
    save(tmp_path / "1.png", noise(1))
    assert "holds images but no class folders; move each image into a folder of its class" in refusal(tmp_path)


def test_class_folders_without_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert "holds no images; expected .bmp" in refusal(tmp_path)


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_empty_class_is_named(pets: Path, split: str) -> None:
    for other in ("train", "test"):
        save(pets / other / "newt" / "1.png", noise(70 if other == "train" else 71))
    (pets / split / "newt" / "1.png").unlink()
    message = refusal(pets)
    assert "no images of class newt" in message
    assert str(pets / split) in message


def test_one_class_is_refused(tmp_path: Path) -> None:
    assert "one class only (cat)" in refusal(folder(tmp_path, {"": {"cat": 5}}))


def test_classes_that_differ_between_the_splits_are_named(pets: Path) -> None:
    (pets / "test/dog").rename(pets / "test/wolf")
    message = refusal(pets)
    assert "dog is only in train/" in message
    assert "wolf is only in test/" in message


@pytest.mark.parametrize("names", [["train"], ["test"], ["training", "testing"], ["train", "extra"]])
def test_a_split_without_its_counterpart_is_not_taken_for_a_class(tmp_path: Path, names: list[str]) -> None:
    root = folder(tmp_path, {name: {"a": 2, "b": 2} for name in names})
    assert "expected train/ and test/" in refusal(root)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    root = folder(tmp_path, {"": {"train": 5, "tram": 5}})
    assert open_dataset(str(root)).classes == ("train", "tram")


def test_a_folder_without_permission_is_a_storage_error(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def guarded(path: Path) -> Any:
        if Path(path) == pets / "train/cat":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)  # the tests may run as root, whom no mode keeps out
    with pytest.raises(StorageError, match="no permission"):
        open_dataset(str(pets))


def test_names_with_newlines_and_bytes_that_are_no_utf8_stay_on_one_printable_line(tmp_path: Path) -> None:
    root = folder(tmp_path, {"": {"a": 3, "b\nc": 3}})
    Path(os.fsdecode(os.fsencode(root) + b"/\xff")).mkdir()
    assert "no images of class \\udcff" in refusal(root)
    save(Path(os.fsdecode(os.fsencode(root) + b"/\xff/1.png")), noise(90))
    save(Path(os.fsdecode(os.fsencode(root) + b"/\xff/2.png")), noise(91))
    for memory_bytes in (0, 2**30):
        dataset = open_dataset(str(root), memory_bytes=memory_bytes)
        assert dataset.classes == ("a", "b\\nc", "\\udcff")
        assert everything(dataset.train)[0].any(axis=(1, 2, 3)).all()


# ------------------------------------------------------------------------------------------------------------ streaming


def test_streaming_gives_what_memory_gives(tmp_path: Path) -> None:
    root = folder(tmp_path, {"train": {"a": 30, "b": 40}, "test": {"a": 10, "b": 5}})
    save(root / "train/a/rgba.png", noise(999, 6, 6, 4))
    held, streamed = open_dataset(str(root)), open_dataset(str(root), memory_bytes=0)
    assert isinstance(held.train, ArraySource)
    assert isinstance(streamed.train, FolderSource)
    assert (held.size, held.classes) == (streamed.size, streamed.classes)
    for a, b in ((held.train, streamed.train), (held.test, streamed.test)):
        assert a.labels.tolist() == b.labels.tolist()
        order = np.random.default_rng(1).permutation(len(a))
        for expected, got in zip(a.batches(16, order), b.batches(16, order), strict=True):
            np.testing.assert_array_equal(got[0], expected[0])
            np.testing.assert_array_equal(got[1], expected[1])
            assert got[0].flags.c_contiguous


def test_memory_that_just_suffices_is_used(pets: Path) -> None:
    needed = 10 * 3 * 6 * 6
    assert isinstance(open_dataset(str(pets), memory_bytes=needed).train, ArraySource)
    assert isinstance(open_dataset(str(pets), memory_bytes=needed - 1).train, FolderSource)


def test_streaming_drops_damaged_images_and_reports_each_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = folder(tmp_path, {"train": {"a": 6, "b": 6}, "test": {"a": 2, "b": 2}})
    (root / "train/a/2.png").write_bytes(b"")
    (root / "train/b/5.png").write_bytes(b"junk")
    source = open_dataset(str(root), memory_bytes=0).train
    assert isinstance(source, FolderSource)
    assert len(source) == 12
    with caplog.at_level(logging.WARNING, "rkd"):
        for _ in range(2):
            batches = list(source.batches(5))
            assert [len(labels) for _, labels in batches] == [4, 5, 1]
            assert np.concatenate([labels for _, labels in batches]).tolist() == [0] * 5 + [1] * 5
            assert all(images.any(axis=(1, 2, 3)).all() for images, _ in batches)
    assert source.corrupt == ("train/a/2.png", "train/b/5.png")
    assert [record.getMessage().split(" (")[0] for record in caplog.records] == [
        "left out, cannot be decoded: train/a/2.png",
        "left out, cannot be decoded: train/b/5.png",
    ]


def test_a_batch_of_nothing_but_damage_is_passed_over(tmp_path: Path) -> None:
    root = folder(tmp_path, {"train": {"a": 4, "b": 4}, "test": {"a": 2, "b": 2}})
    for i in (0, 1):
        (root / f"train/a/{i}.png").write_bytes(b"")
    source = open_dataset(str(root), size=6, memory_bytes=0).train
    assert [labels.tolist() for _, labels in source.batches(2)] == [[0, 0], [1, 1], [1, 1]]
    images, labels = source.batch(np.array([0, 1]))
    assert images.shape == (0, 3, 6, 6)
    assert labels.shape == (0,)


def test_streaming_stops_at_the_eleventh_damaged_image_of_a_small_split(tmp_path: Path) -> None:
    root = folder(tmp_path, {"train": {"a": 20, "b": 4}, "test": {"a": 2, "b": 2}})
    for i in range(11):
        (root / f"train/a/{i}.png").write_bytes(b"")
    source = open_dataset(str(root), size=6, memory_bytes=0).train
    first_ten = np.array([sorted(f"{i}.png" for i in range(20)).index(f"{i}.png") for i in range(10)])
    assert len(source.batch(first_ten)[1]) == 0
    with pytest.raises(DataError, match="11 of 24 images cannot be decoded"):
        source.subset(np.array([2, 20])).batch(np.array([0]))  # 10.png comes third


def test_an_image_that_disappears_while_streaming_is_left_out(pets: Path) -> None:
    source = open_dataset(str(pets), memory_bytes=0).train
    (pets / "train/cat/1.png").unlink()
    assert everything(source)[1].tolist() == [0, 0, 1, 1, 1, 1]


def test_streaming_from_several_threads_gives_the_same(tmp_path: Path) -> None:
    root = folder(tmp_path, {"train": {"a": 40, "b": 40}, "test": {"a": 2, "b": 2}})
    source = open_dataset(str(root), memory_bytes=0).train
    expected = everything(source)[0]
    orders = [np.random.default_rng(i).permutation(80) for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for order, (images, _) in zip(orders, pool.map(source.batch, orders), strict=True):
            np.testing.assert_array_equal(images, expected[order])


@pytest.mark.parametrize("memory_bytes", [0, 2**30])
def test_a_subset_of_a_subset_is_the_one_of_its_indices(pets: Path, memory_bytes: int) -> None:
    train = open_dataset(str(pets), memory_bytes=memory_bytes).train
    part = train.subset(np.array([6, 2, 4, 0])).subset(np.array([2, 0]))
    assert len(part) == 2
    assert part.labels.tolist() == [1, 1]
    np.testing.assert_array_equal(everything(part)[0], everything(train)[0][[4, 6]])
    assert part.size == train.size


def test_progress_ends_at_the_number_of_images_and_never_goes_back(pets: Path) -> None:
    seen: list[tuple[int, int]] = []
    open_dataset(str(pets), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (10, 10)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_an_interruption_is_passed_on_and_leaves_no_thread(pets: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        open_dataset(str(pets), progress=interrupt)
    assert threading.active_count() == before
    assert len(open_dataset(str(pets)).train) == 7  # and no lock


# ------------------------------------------------------------------------------------------- split, duplicates, digest


def identities(source: Any) -> set[bytes]:
    return {image.tobytes() for image in everything(source)[0]}


def test_one_folder_is_split_a_fifth_of_each_class_by_seed(tmp_path: Path) -> None:
    root = folder(tmp_path, {"": {"a": 20, "b": 10, "c": 2, "d": 1}})
    first, again, other = (open_dataset(str(root), seed=seed) for seed in (1, 1, 2))
    assert np.bincount(first.test.labels, minlength=4).tolist() == [4, 2, 1, 0]
    assert np.bincount(first.train.labels, minlength=4).tolist() == [16, 8, 1, 1]
    assert not identities(first.train) & identities(first.test)
    assert len(identities(first.train) | identities(first.test)) == 33
    assert (
        identities(first.test)
        == identities(again.test)
        == identities(open_dataset(str(root), seed=1, memory_bytes=0).test)
    )
    assert first.digest == again.digest != other.digest
    assert identities(first.test) != identities(other.test)
    assert first.notes == ("no test split: 7 of 33 images set aside by seed 1",)


def test_one_image_a_class_cannot_be_split(tmp_path: Path) -> None:
    assert "one image a class" in refusal(folder(tmp_path, {"": {"a": 1, "b": 1}}), memory_bytes=0)


def test_training_images_whose_pixels_are_in_the_test_set_are_removed(pets: Path) -> None:
    Image.open(pets / "test/cat/1.png").save(pets / "train/cat/copy.bmp")  # other bytes, same pixels
    (pets / "train/dog/copy.png").write_bytes((pets / "test/cat/1.png").read_bytes())  # and another class
    save(pets / "train/dog/0again.png", noise(0))  # twice in train is no leak
    dataset = open_dataset(str(pets))
    assert dataset.notes == ("2 training images removed: the same pixels are in the test set",)
    assert len(dataset.train) == 8
    assert not identities(dataset.train) & identities(dataset.test)


def test_streamed_training_images_whose_files_are_in_the_test_set_are_removed(pets: Path) -> None:
    (pets / "train/dog/copy.png").write_bytes((pets / "test/cat/1.png").read_bytes())
    same_size = bytearray((pets / "test/cat/1.png").read_bytes())
    same_size[-20] ^= 1
    (pets / "train/dog/other.png").write_bytes(same_size)  # as many bytes, but others
    dataset = open_dataset(str(pets), memory_bytes=0)
    assert dataset.removed == 1
    assert "1 training image removed: the same file is in the test set" in dataset.notes
    assert len(dataset.train) == 8
    for i in range(3):
        (pets / f"test/cat/t{i}.png").write_bytes((pets / f"train/cat/{i}.png").read_bytes())
    assert "no training images of class cat" in refusal(pets, memory_bytes=0)


def test_a_training_class_that_is_wholly_in_the_test_set_is_refused(pets: Path) -> None:
    for i in range(3):
        (pets / f"test/cat/t{i}.png").write_bytes((pets / f"train/cat/{i}.png").read_bytes())
    assert "no training images of class cat (3 training images removed" in refusal(pets)


@pytest.mark.parametrize("memory_bytes", [0, 2**30])
def test_the_digest_stays_when_nothing_changes_and_changes_with_any_image_or_class(
    pets: Path, tmp_path: Path, memory_bytes: int
) -> None:
    def digest() -> str:
        return open_dataset(str(pets), memory_bytes=memory_bytes).digest

    seen = [digest()]
    assert digest() == seen[0]
    pets.rename(tmp_path / "moved")
    (tmp_path / "moved").rename(pets)
    assert digest() == seen[0]
    save(pets / "train/cat/0.png", np.zeros((6, 6, 3), dtype=np.uint8))
    seen.append(digest())
    (pets / "train/cat/2.png").rename(pets / "test/cat/2.png")
    seen.append(digest())
    for split in ("train", "test"):
        (pets / split / "cat").rename(pets / split / "car")
    seen.append(digest())
    assert len(set(seen)) == 4


# ------------------------------------------------------------------------------------------- digits, names, torchvision


def test_digits_have_1297_training_and_500_test_images_whatever_the_seed() -> None:
    dataset, other = open_dataset("digits"), open_dataset("Digits", seed=9)
    assert (len(dataset.train), len(dataset.test), dataset.size) == (1297, 500, (32, 32))
    assert dataset.classes == tuple("0123456789")
    assert dataset.digest == other.digest
    assert not identities(dataset.train) & identities(dataset.test)
    assert everything(dataset.train)[0].max() == 255
    rows = np.sort(np.random.default_rng(0).permutation(1797)[:500])  # figures measured on another set do not compare
    assert dataset.test.labels.tolist() == load_digits().target[rows].tolist()


def test_digits_at_their_own_size_are_sklearns_scaled_to_255() -> None:
    dataset = open_dataset("digits", size=8)
    images = np.concatenate([everything(dataset.train)[0], everything(dataset.test)[0]])
    assert (images[:, 0] == images[:, 2]).all()
    expected = sorted(np.rint(image * 255 / 16).astype(np.uint8).tobytes() for image in load_digits().images)
    assert sorted(image[0].tobytes() for image in images) == expected


@pytest.mark.parametrize(
    ("typed", "meant"), [("cifar1", "cifar10"), ("digit", "digits"), ("fashion-mnist", "fashionmnist")]
)
def test_an_unknown_name_gets_a_suggestion_and_the_list(typed: str, meant: str) -> None:
    message = refusal(typed)
    assert f"did you mean {meant}?" in message
    assert "gtsrb" in message


@pytest.mark.parametrize(
    "spec",
    ["", "zzzzzz", "a\nb", "x" * 5000, "a\0b", "~nobody-at-all/x", "torchvision:nonsense", "torchvision:FakeData"],
)
def test_names_that_mean_nothing_are_data_errors(spec: str) -> None:
    refusal(spec)


def pixels(n: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (n, *shape), dtype=np.uint8)


def idx(array: np.ndarray) -> bytes:
    """The IDX format of http://yann.lecun.com/exdb/mnist: magic, big-endian lengths, bytes."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def mnist(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    arrays = {
        "train-images-idx3-ubyte": pixels(20, 28, 28),
        "train-labels-idx1-ubyte": np.tile(np.arange(10, dtype=np.uint8), 2),
        "t10k-images-idx3-ubyte": pixels(5, 28, 28),
        "t10k-labels-idx1-ubyte": np.array([5, 0, 4, 1, 9], dtype=np.uint8),
    }
    raw = tmp_path / "root/MNIST/raw"
    raw.mkdir(parents=True)
    for name, array in arrays.items():
        (raw / name).write_bytes(idx(array))
        (raw / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
    return tmp_path / "root", arrays


@pytest.mark.parametrize("spec", ["mnist", "MNIST", "torchvision:mnist"])
def test_a_torchvision_set_is_read_into_memory(mnist: tuple[Path, dict[str, np.ndarray]], spec: str) -> None:
    root, arrays = mnist
    dataset = open_dataset(spec, root=root)
    assert (dataset.name, dataset.size, len(dataset.classes)) == ("mnist", (28, 28), 10)
    assert dataset.classes[7] == "7 - seven"
    images, labels = everything(dataset.train)
    np.testing.assert_array_equal(images[:, 1], arrays["train-images-idx3-ubyte"])
    assert labels.tolist() == list(range(10)) * 2
    assert everything(dataset.test)[1].tolist() == [5, 0, 4, 1, 9]
    assert dataset.notes == ("25 grey images converted to RGB",)


def test_torchvision_sets_are_looked_for_where_the_environment_says(
    mnist: tuple[Path, dict[str, np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RKD_DATA", str(mnist[0]))
    assert len(open_dataset("mnist", size=14).train) == 20
    monkeypatch.delenv("RKD_DATA")
    (mnist[0].parent / "rkd").mkdir()
    mnist[0].rename(mnist[0].parent / "rkd/data")
    monkeypatch.setenv("XDG_CACHE_HOME", str(mnist[0].parent))
    assert len(open_dataset("mnist").train) == 20


def test_an_existing_folder_wins_over_a_name_and_the_prefix_over_the_folder(
    mnist: tuple[Path, dict[str, np.ndarray]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder(tmp_path / "mnist", {"": {"a": 5, "b": 5}})
    monkeypatch.chdir(tmp_path)
    assert open_dataset("mnist", root=mnist[0]).classes == ("a", "b")
    assert len(open_dataset("torchvision:mnist", root=mnist[0]).classes) == 10


def test_a_download_without_a_network_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> Any:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    message = refusal("cifar10", root=tmp_path / "new")
    assert f"could not be downloaded to {tmp_path}/new" in message
    assert "Name or service not known" in message
    assert "check the network" in message


def test_a_torchvision_set_too_large_for_the_memory_is_refused(mnist: tuple[Path, dict[str, np.ndarray]]) -> None:
    assert "give a smaller --image-size" in refusal("mnist", root=mnist[0], size=2048, memory_bytes=0)


class Split:
    """What torchvision's sets with `split=` look like: PIL images of several sizes, labels, no class names."""

    def __init__(self, root: str, split: str = "trainval", download: bool = False) -> None:
        if split == "test":
            raise ValueError("Unknown value 'test' for argument split. Valid values are {'trainval', 'val'}.")
        assert download
        self.items = [(Image.fromarray(noise(len(split) * 10 + i, 8 + i, 8)), i % 3) for i in range(6)]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Any:
        if i >= len(self.items):
            raise IndexError(i)
        return self.items[i]


def test_a_torchvision_set_with_named_splits_is_opened_by_its_signature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "GTSRB", Split)
    assert "different sizes" in refusal("gtsrb", root=tmp_path)
    dataset = open_dataset("gtsrb", root=tmp_path, size=8)
    assert dataset.classes == ("0", "1", "2")
    assert (len(dataset.train), len(dataset.test)) == (6, 6)
    assert dataset.notes == ("10 images scaled or cropped to one size",)  # all but the 8x8 one of each split


# ---------------------------------------------------------------------------------------------------- missing packages


@pytest.mark.parametrize(
    ("spec", "module", "package"),
    [
        ("FOLDER", "PIL.Image", "pillow"),
        ("digits", "sklearn.datasets", "scikit-learn"),
        ("mnist", "torchvision", "torchvision"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    pets: Path, monkeypatch: pytest.MonkeyPatch, spec: str, module: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"{package} is not installed; .*whl\[train\]"):
        open_dataset(spec.replace("FOLDER", str(pets)))


def test_importing_the_module_imports_no_torch_pillow_or_sklearn() -> None:
    code = "import sys, rkd.data; print([m for m in ('torch', 'torchvision', 'PIL', 'sklearn') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
