"""What ACC, ASR and RA are measured on: the bundle's images, or a folder or .npz of the user's.

One batch is held at a time besides what the bundle holds anyway: a folder is decoded as it is read (with Pillow), and an
.npz of any length is read from its first image to its last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from stat import S_ISDIR

import numpy as np

from rkd.bench.validity import BUDGETS
from rkd.bundle import Bundle
from rkd.errors import DataError, shortened
from rkd.files import open_regular, storage_errors
from rkd.ledger import Ledger, Step
from rkd.metrics import Images, Labels, Predictions
from rkd.npz import OtherArrayError, read_npz, read_npz_rows

_BATCH = 64  # fixed, so that two machines run the same batches
_QUICK_IMAGES = 256
_LABELS_LIMIT_BYTES = 2**28


@dataclass(frozen=True)
class EvaluationSet:
    """Images and labels, in a fixed order.

    Attributes:
        source: `bundle`, or the name of the user's folder or file.
        labels: true classes, (N,), of all that are evaluated.
        rows: their places in the whole set, (N,).
        available: images in the whole set.
        batches_of: gives them in batches of a size.
        notes: what was left out.
    """

    source: str
    labels: Labels
    rows: Labels
    available: int
    batches_of: Callable[[int], Iterator[tuple[Images, Labels]]]
    notes: tuple[str, ...] = ()

    def batches(self, most: int) -> Iterator[tuple[Images, Labels]]:
        """Batches of at most 64 images and at most `most`."""
        yield from self.batches_of(min(most, _BATCH))

    def first(self, count: int) -> EvaluationSet:
        """Only the first so many."""
        return replace(self, labels=self.labels[:count], rows=self.rows[:count])

    @property
    def classes_present(self) -> int:
        """How many classes have an image."""
        return len(np.unique(self.labels))


@dataclass(frozen=True)
class _Held:
    images: Images
    labels: Labels
    rows: Labels

    def __call__(self, size: int) -> Iterator[tuple[Images, Labels]]:
        for start in range(0, len(self.rows), size):
            part = self.rows[start : start + size]
            yield self.images[part], self.labels[part]


def evaluation_set(bundle: Bundle, data: Path | None, *, quick: bool) -> EvaluationSet:
    """The images to evaluate a bundle on.

    Args:
        bundle: whose classes and image size count.
        data: a folder or .npz instead of the bundle's own images.
        quick: at most 256 of them, the same in the same order on every machine, any beginning of which is a fair part.

    Raises:
        BundleError: the bundle's images are damaged.
        DataError: the data does not fit the bundle.
        MissingExtraError: a folder needs Pillow.
        StorageError: the data cannot be read.
    """
    if data is None:
        images, labels = bundle.evaluation()
        rows = _part(len(labels), quick=quick)
        return EvaluationSet("bundle", labels[rows], rows, len(labels), _Held(images, labels, rows))
    if data.is_file() and data.suffix.lower() == ".npz":
        return _npz(bundle, data, quick=quick)
    return _folder(bundle, data, quick=quick)


def host_labels(bundle: Bundle) -> dict[str, Labels] | None:
    """What the exporting host's file predicted for each image of the bundle; None where the bundle has no ledger.

    Returns:
        Classes, (N,), by trigger name, and under the empty name for the clean images.

    Raises:
        BundleError: the ledger is damaged.
    """
    ledger = bundle.ledger()
    if ledger is None:
        return None
    labels = ledger.steps[-1].labels
    return {"" if key == "clean" else key.removeprefix("trigger "): found for key, found in labels.items()}


def judge_step(bundle: Bundle, predictions: Predictions, rows: Labels) -> list[dict[str, str]]:
    """What this machine lost or woke against the exporting host's last step, beyond the target's budgets, as findings.

    Args:
        bundle: whose ledger and target count; without a ledger nothing is found.
        predictions: of this machine, over the images `rows`.
        rows: places in the bundle's evaluation set, (n,).

    Raises:
        BundleError: the ledger is damaged.
    """
    ledger = bundle.ledger()
    if ledger is None:
        return []
    last, target = ledger.steps[-1], bundle.target
    host = Step(last.name, {key: labels[rows] for key, labels in last.labels.items()})
    here = Ledger(predictions.labels, (host, Step.of("this machine", predictions)))
    budgets = dict(zip(BUDGETS, ((target.acc_budget, math.inf), (math.inf, target.asr_budget)), strict=True))
    return [
        {"code": code, "text": shortened(text, 2000)}
        for code, budget in budgets.items()
        for text in here.judge(bundle.triggers(), *budget)
    ]


def _part(count: int, *, quick: bool) -> Labels:
    """The images may be sorted by class: a part of them is drawn."""
    if not quick:
        return np.arange(count)
    return np.random.default_rng(0).permutation(count)[:_QUICK_IMAGES]


def _npz(bundle: Bundle, path: Path, *, quick: bool) -> EvaluationSet:
    height, width = _size(bundle)
    try:
        with storage_errors(path), open_regular(path) as file:
            arrays = read_npz(file, _LABELS_LIMIT_BYTES, only=("y", "y_test"))
    except ValueError as error:
        raise DataError(f"{path} is not an evaluation set: {error}") from error
    key = "y_test" if "y_test" in arrays else "y"
    if key not in arrays or arrays[key].ndim != 1:
        raise DataError(_expected(path, bundle.name, (height, width)))
    y = arrays[key]
    if not len(y):
        raise DataError(f"{path} holds no image; expected at least one")
    if y.dtype.kind not in "iu" or int(y.min()) < 0 or int(y.max()) >= len(bundle.classes):
        raise DataError(f"{path}: labels must be 0 to {len(bundle.classes) - 1}, the classes of {bundle.name}")
    file_images = _NpzImages(path, key.replace("y", "x"), y.astype(np.int64), (height, width), bundle.name)
    rows = _part(len(y), quick=quick)
    held = file_images.pick(rows if quick else rows[:0])
    batches: Callable[[int], Iterator[tuple[Images, Labels]]] = (
        _Held(held, file_images.labels[rows], np.arange(len(rows))) if quick else file_images
    )
    return EvaluationSet(path.name, file_images.labels[rows], rows, len(y), batches)


@dataclass(frozen=True)
class _NpzImages:
    """The images of an .npz, read from the file again for each pass."""

    path: Path
    key: str
    labels: Labels
    size: tuple[int, int]
    bundle: str

    def __call__(self, size: int) -> Iterator[tuple[Images, Labels]]:
        at = 0
        try:
            with storage_errors(self.path), open_regular(self.path) as file:
                for x in read_npz_rows(file, self.key, np.uint8, (*self.size, 3), size):
                    yield x.transpose(0, 3, 1, 2), self.labels[at : at + len(x)]
                    at += len(x)
        except ValueError as error:
            raise DataError(f"{self.path} is not an evaluation set: {error}") from error
        except OtherArrayError as error:
            raise DataError(_expected(self.path, self.bundle, self.size, str(error))) from error
        if at != len(self.labels):
            raise DataError(_expected(self.path, self.bundle, self.size, f"{at} images and {len(self.labels)} labels"))

    def pick(self, rows: Labels) -> Images:
        """Read the whole file, as a check of it, and keep these images, in this order."""
        order = np.argsort(rows)
        wanted, kept, at = rows[order], np.empty((len(rows), 3, *self.size), np.uint8), 0
        for images, _ in self(max(1, 2**20 // math.prod(self.size))):
            low, high = np.searchsorted(wanted, (at, at + len(images)))
            kept[order[low:high]] = images[wanted[low:high] - at]
            at += len(images)
        return kept


def _expected(path: Path, bundle: str, size: tuple[int, int], seen: str = "") -> str:
    return (
        f"{path}: expected x uint8 (N, {size[0]}, {size[1]}, 3) and y (N,), or x_test and y_test, as {bundle} has"
        + (f"; {seen}" if seen else "")
    )


def _folder(bundle: Bundle, root: Path, *, quick: bool) -> EvaluationSet:
    from rkd import _images
    from rkd.data import FolderSource

    _images.require_pillow()
    with storage_errors(root):
        if not S_ISDIR(root.stat().st_mode):
            raise DataError(f"{root} is not a folder of images or an .npz; expected one folder a class below it")
        below = next((name for name in ("test", "val", "valid") if (root / name).is_dir()), ".")
        place = root / below
        folders = sorted(path.name for path in place.iterdir() if path.is_dir() and not path.name.startswith("."))
    index = {name: i for i, name in enumerate(bundle.classes)}
    if not folders or (unknown := [name for name in folders if name not in index]):
        seen = f"{unknown[0]!r} is none of them" if folders else "there is no folder"
        raise DataError(
            f"{place}: {seen}; expected folders named as the classes of {bundle.name}: "
            f"{', '.join(bundle.classes[:8])}{', ...' if len(bundle.classes) > 8 else ''}"
        )
    paths = [(f"{name}/{file}", index[name]) for name in folders for file in _images.image_files(place / name)]
    if not paths:
        raise DataError(f"{place} holds no image; expected one folder a class with images in it")
    labels = np.array([label for _, label in paths], dtype=np.int64)
    rows = _part(len(paths), quick=quick)
    batches = FolderSource(place, [path for path, _ in paths], labels, _size(bundle), rows=rows).batches
    absent = [name for name in bundle.classes if name not in folders]
    notes = (f"no images of class {', '.join(absent[:8])}{', ...' if len(absent) > 8 else ''}",) if absent else ()
    return EvaluationSet(root.resolve().name or str(root), labels[rows], rows, len(paths), batches, notes)


def _size(bundle: Bundle) -> tuple[int, int]:
    _, height, width = bundle.manifest["input"]["shape"]
    return height, width
