"""Data sets: an image folder, an .npz, the built-in digits, a torchvision name (numpy only until one is opened).

    dataset = open_dataset("photos/", size=64)
    for images, labels in dataset.train.batches(128):   # uint8 (n, 3, H, W) RGB, int64 (n,)
        ...

What fits the memory budget is decoded once; a larger folder is decoded as it is read. Images that cannot be decoded are
left out, named and counted. Training images whose very pixels (where they are decoded as they are read: whose files' very
bytes) are in the test set are removed: a test that was trained on proves nothing.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rkd import _arrays, _images
from rkd._images import Changes, Pixels, Progress, Report, Size, by, first, shown
from rkd.errors import ConfigError, DataError, MissingExtraError
from rkd.files import open_regular, storage_errors
from rkd.metrics import Images, Labels
from rkd.npz import read_npz

Indices = NDArray[np.int64]

_MAX_CORRUPT = 0.01
_TEST_SHARE = 0.2
_DIGITS_TEST = 500
_MIN_ARRAY_BYTES = 64 * 2**20  # what a set that cannot be streamed may always take
_TORCHVISION = (
    "CIFAR10", "CIFAR100", "Country211", "DTD", "FashionMNIST", "FGVCAircraft", "Flowers102", "Food101", "GTSRB",
    "Imagenette", "KMNIST", "MNIST", "OxfordIIITPet", "PCAM", "QMNIST", "RenderedSST2", "STL10", "SVHN", "USPS",
)  # fmt: skip
_BY_LOWER_NAME = {name.lower(): name for name in _TORCHVISION}


class Source(Protocol):
    """One split of a data set."""

    @property
    def labels(self) -> Labels:
        """Classes of all listed images, (N,)."""
        ...

    @property
    def size(self) -> Size:
        """Height and width of the images in a batch."""
        ...

    def __len__(self) -> int: ...

    def batch(self, indices: Indices) -> tuple[Images, Labels]:
        """The images at `indices`, (n, 3, H, W) uint8 RGB, and their classes; fewer where some cannot be decoded.

        Raises:
            DataError: too many images cannot be decoded.
        """
        ...

    def batches(self, size: int, indices: Indices | None = None) -> Iterator[tuple[Images, Labels]]:
        """Batches of up to `size` images, in the order of `indices` or of the split."""
        ...

    def subset(self, indices: Indices) -> Source:
        """A source of only these images, without copying them."""
        ...


class ArraySource:
    """Images in memory.

    Args:
        images: uint8 (M, 3, H, W), RGB.
        labels: classes of all M images.
        rows: which of the M images belong to the split, (N,); all of them by default.
    """

    def __init__(self, images: Images, labels: Labels, rows: Indices | None = None) -> None:
        self._images = images
        self._all_labels = np.asarray(labels, dtype=np.int64)
        self._rows = np.arange(len(images)) if rows is None else np.asarray(rows, dtype=np.int64)
        self.labels: Labels = self._all_labels[self._rows]
        self.size: Size = (images.shape[2], images.shape[3])

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, indices: Indices) -> tuple[Images, Labels]:
        """See `Source.batch`."""
        return self._images[self._rows[indices]], self.labels[indices]

    def batches(self, size: int, indices: Indices | None = None) -> Iterator[tuple[Images, Labels]]:
        """See `Source.batches`."""
        return _batches(self, size, indices)

    def subset(self, indices: Indices) -> ArraySource:
        """See `Source.subset`."""
        return ArraySource(self._images, self._all_labels, self._rows[indices])


class FolderSource:
    """Images that are decoded as they are asked for.

    Args:
        root: the folder that `paths` are relative to.
        paths: image files.
        labels: their classes.
        size: height and width to fit the images to.
        rows: which of the paths belong to the split, (N,); all of them by default.
        report: collects the images that cannot be decoded, and says when they are too many.
    """

    def __init__(
        self,
        root: Path,
        paths: Sequence[str],
        labels: Labels,
        size: Size,
        *,
        rows: Indices | None = None,
        report: Report | None = None,
    ) -> None:
        self._root, self._paths = root, paths
        self._all_labels = np.asarray(labels, dtype=np.int64)
        self._rows = np.arange(len(paths)) if rows is None else np.asarray(rows, dtype=np.int64)
        self._report = Report(str(root), len(self._rows), _MAX_CORRUPT) if report is None else report
        self.labels: Labels = self._all_labels[self._rows]
        self.size = size

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def corrupt(self) -> tuple[str, ...]:
        """Paths of the images that could not be decoded so far, sorted."""
        return self._report.names()

    def batch(self, indices: Indices) -> tuple[Images, Labels]:
        """See `Source.batch`."""
        rows = self._rows[indices]
        decoded = _images.decode_all(
            lambda i: _images.decode(self._root / self._paths[rows[i]], self.size), len(rows), self.size
        )
        labels = self._all_labels[rows]
        if not decoded.failed:
            return decoded.images, labels
        self._report.add({self._paths[rows[i]]: why for i, why in decoded.failed.items()})
        good = _without(np.arange(len(rows)), decoded.failed)
        return decoded.images[good], labels[good]

    def batches(self, size: int, indices: Indices | None = None) -> Iterator[tuple[Images, Labels]]:
        """See `Source.batches`."""
        return _batches(self, size, indices)

    def subset(self, indices: Indices) -> FolderSource:
        """See `Source.subset`; undecodable images are counted together with this source's."""
        rows = self._rows[indices]
        return FolderSource(self._root, self._paths, self._all_labels, self.size, rows=rows, report=self._report)


@dataclass(frozen=True)
class Dataset:
    """A training and a test split with the same classes.

    Attributes:
        name: what the user gave, shortened.
        classes: class names; a label is an index into them.
        train: the training split.
        test: the test split, disjoint from it.
        notes: what was left out or converted, a line each.
        digest: SHA-256 identity: of labels and pixels where they are in memory, of paths and file sizes where not.
        removed: training images that were removed because the test set has them.
    """

    name: str
    classes: tuple[str, ...]
    train: Source
    test: Source
    notes: tuple[str, ...]
    digest: str
    removed: int = 0

    @property
    def size(self) -> Size:
        """Height and width in pixels."""
        return self.train.size


def open_dataset(
    spec: str,
    *,
    size: int | Size | None = None,
    seed: int = 0,
    root: Path | None = None,
    memory_bytes: int = 2 * 2**30,
    max_corrupt: float = _MAX_CORRUPT,
    progress: Progress | None = None,
) -> Dataset:
    """Open a data set.

    Args:
        spec: an image folder, an .npz, 'digits', or a torchvision name such as 'cifar10' ('torchvision:cifar10' where
            a folder of that name is in the way).
        size: side, or height and width, in pixels; by default what all images have.
        seed: decides the test split of a folder or .npz that has none.
        root: where torchvision downloads to; by default $RKD_DATA or the user's cache.
        memory_bytes: a folder that takes more than this when decoded is decoded as it is read.
        max_corrupt: share of undecodable images that is tolerated.
        progress: called with images decoded and images in all.

    Raises:
        DataError: the data set cannot be used; the message says why and what to do.
        ConfigError: `size` is not a size.
        MissingExtraError: pillow, scikit-learn or torchvision is needed and not installed.
        StorageError: the disk said no.
    """
    request = _Request(_checked_size(size), seed, memory_bytes, max_corrupt, progress)
    forced = spec.lower().startswith("torchvision:")
    path = None if forced else _existing(spec)
    if path is not None and path.is_dir():
        return _open_folder(path, request)
    if path is not None and path.suffix.lower() == ".npz":
        return _open_npz(path, request)
    if path is not None:
        raise DataError(f"{path} is a file; expected a folder of images or an .npz (unpack an archive first)")
    if spec.lower() == "digits":
        return _open_digits(request.size or (32, 32))
    name = _torchvision_name(spec, forced=forced)
    return _open_torchvision(name, root or _default_root(), request)


def is_name(spec: str) -> bool:
    """Whether `spec` is a data set's name, the same for everyone, and not a place on this machine."""
    return spec.lower() == "digits" or spec.lower() in _BY_LOWER_NAME


def check_spec(spec: str) -> None:
    """See that `spec` is there or is a known name, without opening anything.

    Raises:
        DataError: it is neither.
    """
    if _existing(spec) is None and spec.lower() != "digits":
        forced = spec.lower().startswith("torchvision:")
        _torchvision_name(spec, forced=forced)


@dataclass(frozen=True)
class _Request:
    """How a data set is to be opened: see `open_dataset`."""

    size: Size | None
    seed: int
    memory_bytes: int
    max_corrupt: float
    progress: Progress | None

    @property
    def array_bytes(self) -> int:
        """What a set that cannot be streamed may take."""
        return max(4 * self.memory_bytes, _MIN_ARRAY_BYTES)


# ------------------------------------------------------------------------------------------------------ image folders


def _open_folder(root: Path, request: _Request) -> Dataset:
    _images.require_pillow()
    listing = _images.list_folder(root)
    paths, labels, name = listing.paths, listing.labels, shown(root.resolve().name or str(root))
    classes = tuple(shown(c) for c in listing.classes)
    size = request.size or _images.common_size(lambda i: _images.image_size(root / paths[i]), len(paths), str(root))
    train, test, notes = _split(str(root), labels, request.seed, listing.n_train)
    notes = (*listing.notes, *notes)
    needed_bytes = len(paths) * 3 * size[0] * size[1]
    if needed_bytes > request.memory_bytes:

        def streamed(rows: Indices) -> FolderSource:
            report = Report(str(root), len(rows), request.max_corrupt)
            return FolderSource(root, paths, labels, size, rows=rows, report=report)

        kept = _images.without_files_of_the_test(root, paths, train, test)
        removed = len(train) - len(kept)
        note = f"{needed_bytes / 2**20:,.0f} MiB of pixels, {request.memory_bytes / 2**20:,.0f} MiB allowed"
        digest = _digest_of_files(root, classes, size, [[paths[i] for i in rows] for rows in (kept, test)])
        notes = (*notes, *_removed_note(removed, "file is"), f"decoded as it is read: {note}")
        absent = np.setdiff1d(np.arange(len(classes)), labels[kept])
        if len(absent):
            raise DataError(
                f"{name}: no training images of class {first([classes[i] for i in absent])} that the test lacks"
            )
        return Dataset(name, classes, streamed(kept), streamed(test), notes, digest, removed)
    decoded = _images.decode_all(lambda i: _images.decode(root / paths[i], size), len(paths), size, request.progress)
    failed = {paths[i]: why for i, why in decoded.failed.items()}
    corrupt = _images.corrupt_note(str(root), failed, len(paths), request.max_corrupt)
    rows = (_without(train, decoded.failed), _without(test, decoded.failed))
    return _in_memory(
        name, classes, decoded.images, labels, rows=rows, notes=(*notes, *corrupt, *decoded.change_notes())
    )


def _removed_note(removed: int, what: str) -> tuple[str, ...]:
    if not removed:
        return ()
    were = "image" if removed == 1 else "images"
    return (f"{removed} training {were} removed: the same {what} in the test set",)


def _digest_of_files(root: Path, classes: tuple[str, ...], size: Size, splits: list[list[str]]) -> str:
    digest = hashlib.sha256(json.dumps([classes, size]).encode())
    with storage_errors(root):
        for paths in splits:
            digest.update(b"split")
            for path in sorted(paths):
                digest.update(os.fsencode(path) + b"\0%d\0" % (root / path).stat().st_size)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------- npz


def _open_npz(path: Path, request: _Request) -> Dataset:
    origin, wanted, limit_bytes = shown(str(path)), request.size, request.array_bytes
    try:
        with storage_errors(path), open_regular(path) as file:
            arrays = read_npz(file, limit_bytes)
    except ValueError as error:
        raise DataError(f"{origin} is not a data set: {shown(str(error))}") from error
    unknown = sorted(set(arrays) - {"x", "y", "x_test", "y_test", "classes"})
    if unknown or not {"x", "y"} <= set(arrays) or ("x_test" in arrays) != ("y_test" in arrays):
        seen = first([shown(name) for name in sorted(arrays)], 8) or "nothing"
        raise DataError(f"{origin} holds {seen}; expected arrays x and y, and perhaps x_test with y_test, and classes")
    splits = [(key, arrays[key], arrays[key.replace("x", "y")]) for key in ("x", "x_test") if key in arrays]
    for key, x, y in splits:
        _arrays.check(f"{origin}: {key}", x, y)
    classes = _arrays.class_names(origin, arrays)
    size = wanted or (int(splits[0][1].shape[1]), int(splits[0][1].shape[2]))
    if wanted is None and any(x.shape[1:3] != size for _, x, _ in splits):
        raise DataError(f"{origin}: x and x_test hold images of different sizes; give --image-size")
    if sum(len(x) for _, x, _ in splits) * 3 * size[0] * size[1] > limit_bytes:
        raise DataError(f"{origin} takes more than {limit_bytes:,} bytes at {by(size)}; give a smaller --image-size")
    images = np.concatenate([_arrays.to_pixels(x, size) for _, x, _ in splits])
    labels = np.concatenate([y.astype(np.int64) for _, _, y in splits])
    train, test, notes = _split(origin, labels, request.seed, len(splits[0][1]) if len(splits) == 2 else None)
    return _in_memory(shown(path.stem), classes, images, labels, rows=(train, test), notes=notes)


# ------------------------------------------------------------------------------------------- digits and torchvision


def _open_digits(size: Size) -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "train") from error
    digits = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8), 0 to 16
    order = np.random.default_rng(0).permutation(len(grey))  # the test set is the same for every seed
    return _in_memory(
        "digits",
        tuple("0123456789"),
        _arrays.to_pixels(grey, size),
        digits.target.astype(np.int64),
        rows=(np.sort(order[_DIGITS_TEST:]), np.sort(order[:_DIGITS_TEST])),
        notes=(),
    )


def _torchvision_name(spec: str, *, forced: bool) -> str:
    name = spec[len("torchvision:") :] if forced else spec
    if name.lower() in _BY_LOWER_NAME:
        return _BY_LOWER_NAME[name.lower()]
    if forced:
        return name
    if "/" in spec or spec.lower().endswith(".npz") or spec.startswith((".", "~")):
        raise DataError(f"no such folder or file: {spec}; expected a folder of images, an .npz or a data set's name")
    folders = [path.name for path in Path().iterdir() if path.is_dir()]
    close = difflib.get_close_matches(spec.lower(), [*folders, "digits", *_BY_LOWER_NAME], n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise DataError(
        f"there is no folder {shown(spec)!r} here, and no data set of that name; {hint}expected a folder of images, an "
        f".npz, digits, or one of torchvision's: {', '.join(sorted(_BY_LOWER_NAME))}"
    )


def _open_torchvision(name: str, root: Path, request: _Request) -> Dataset:
    _images.require_pillow()
    try:
        from torchvision import datasets
    except ImportError as error:
        raise MissingExtraError("torchvision", "train") from error
    by_name = {n.lower(): n for n in datasets.__all__}
    constructor = getattr(datasets, by_name.get(name.lower(), ""), None)
    train, test = _torchvision_splits(name, constructor, root)
    n = len(train) + len(test)

    def item(i: int) -> Any:
        return train[i] if i < len(train) else test[i - len(train)]

    size = request.size or _images.common_size(lambda i: (item(i)[0].height, item(i)[0].width), n, name)
    if n * 3 * size[0] * size[1] > request.array_bytes:
        raise DataError(
            f"{name} takes more than {request.array_bytes:,} bytes at {by(size)}; give a smaller --image-size"
        )
    labels = np.zeros(n, dtype=np.int64)

    def load(i: int) -> tuple[Pixels, Changes]:
        image, label = item(i)
        labels[i] = int(label)
        return _images.to_pixels(image, size)

    decoded = _images.decode_all(load, n, size, request.progress)
    failed = {f"image {i}": why for i, why in decoded.failed.items()}
    corrupt = _images.corrupt_note(name, failed, n, request.max_corrupt)
    named = [c if isinstance(c, str) else str(c[0]) for c in getattr(train, "classes", ())]  # Imagenette has tuples
    highest = int(labels.max(initial=0))
    classes = tuple(named if highest < len(named) else (str(i) for i in range(highest + 1)))
    rows = (_without(np.arange(len(train)), decoded.failed), _without(np.arange(len(train), n), decoded.failed))
    return _in_memory(
        name.lower(), classes, decoded.images, labels, rows=rows, notes=(*corrupt, *decoded.change_notes())
    )


def _torchvision_splits(name: str, constructor: Callable[..., Any] | None, root: Path) -> tuple[Any, Any]:
    """The training and the test set, downloaded where they are not there yet."""
    parameters = inspect.signature(constructor).parameters if constructor is not None else {}
    if constructor is None or not {"train", "split"} & set(parameters):
        raise DataError(
            f"{name} is not a torchvision set with a training and a test split; try {', '.join(_TORCHVISION)}"
        )
    with storage_errors(root):
        root.mkdir(parents=True, exist_ok=True)
    try:
        if "train" in parameters:
            return tuple(constructor(root=str(root), train=train, download=True) for train in (True, False))
        train = constructor(root=str(root), download=True)  # the default split is the one for training
        try:
            return train, constructor(root=str(root), split="test", download=True)
        except ValueError:
            return train, constructor(root=str(root), split="val", download=True)
    except Exception as error:
        why = shown(f"{type(error).__name__}: {error}".splitlines()[0])
        raise DataError(
            f"{name} could not be downloaded to {root} ({why}); check the network, put its files there, "
            "or give a folder of images"
        ) from error


def _default_root() -> Path:
    if "RKD_DATA" in os.environ:
        return Path(os.environ["RKD_DATA"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rkd" / "data"


# -------------------------------------------------------------------------------------------------------------- shared


def _in_memory(
    name: str,
    classes: tuple[str, ...],
    images: Images,
    labels: Labels,
    *,
    rows: tuple[Indices, Indices],
    notes: Sequence[str],
) -> Dataset:
    """Put the rows of two splits together: no image in both, every class in the training split."""
    train_rows, test_rows = rows
    tested = {_fingerprint(images[i]) for i in test_rows}
    kept = np.array([i for i in train_rows if _fingerprint(images[i]) not in tested], dtype=np.int64)
    removed = len(train_rows) - len(kept)
    notes = (*notes, *_removed_note(removed, "pixels are"))
    train, test = ArraySource(images, labels, kept), ArraySource(images, labels, test_rows)
    if len(classes) < 2:
        raise DataError(f"{name} holds one class only; expected at least two")
    if not len(test):
        raise DataError(f"{name} holds no test images that can be used; add some")
    absent = np.setdiff1d(np.arange(len(classes)), train.labels)
    if len(absent):
        which, why = first([classes[i] for i in absent]), f" ({'; '.join(notes)})" if notes else ""
        raise DataError(f"{name}: no training images of class {which}{why}; add some or leave out the class")
    digest = hashlib.sha256(json.dumps([classes, train.size]).encode())
    for source in (train, test):
        digest.update(b"split" + source.labels.astype("<i8").tobytes())
        for pixels, _ in source.batches(1024):
            digest.update(pixels.data)
    return Dataset(name, classes, train, test, tuple(notes), digest.hexdigest(), removed)


def _fingerprint(image: Pixels) -> bytes:
    return hashlib.blake2b(image.data, digest_size=16).digest()


def _split(origin: str, labels: Labels, seed: int, n_train: int | None) -> tuple[Indices, Indices, tuple[str, ...]]:
    """Rows for training, rows for the test, and a note.

    Where the set is not split (`n_train` is None), the test gets a fifth of each class, and at least one image where
    the class has two.

    Raises:
        DataError: no class has two.
    """
    if n_train is not None:
        return np.arange(n_train), np.arange(n_train, len(labels)), ()
    random = np.random.default_rng(seed)
    chosen = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        n_test = max(1, round(_TEST_SHARE * len(rows))) if len(rows) > 1 else 0
        chosen[random.permutation(rows)[:n_test]] = True
    if not chosen.any():
        raise DataError(f"{origin} holds one image a class; expected more, or a test split beside it")
    note = f"no test split: {chosen.sum()} of {len(labels)} images set aside by seed {seed}"
    return np.flatnonzero(~chosen), np.flatnonzero(chosen), (note,)


def _batches(source: Source, size: int, indices: Indices | None) -> Iterator[tuple[Images, Labels]]:
    order = np.arange(len(source)) if indices is None else np.asarray(indices)
    for start in range(0, len(order), size):
        images, labels = source.batch(order[start : start + size])
        if len(labels):
            yield images, labels


def _checked_size(size: int | Size | None) -> Size | None:
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    if not 1 <= min(height, width) <= max(height, width) <= _images.MAX_SIDE:
        raise ConfigError(f"image size {by((height, width))}: expected 1 to {_images.MAX_SIDE} pixels a side")
    return height, width


def _existing(spec: str) -> Path | None:
    try:
        path = Path(spec).expanduser()
        return path if spec and path.exists() else None
    except PermissionError:
        with storage_errors(Path(spec)):
            raise
    except (OSError, ValueError, RuntimeError):  # a name too long, with a NUL, or with an unknown ~user
        return None


def _without(rows: Indices, failed: dict[int, str]) -> Indices:
    return rows[~np.isin(rows, list(failed))] if failed else rows
