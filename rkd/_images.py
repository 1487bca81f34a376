"""Image files to pixels: list class folders, decode, convert to RGB, fit to one size, name what failed.

The files come from strangers: only the formats of `EXTENSIONS` are decoded, headers that announce more than
64 megapixels are refused, and whatever a decoder raises becomes one failed image, not a failed run.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rkd.errors import DataError, MissingExtraError
from rkd.files import open_regular, storage_errors

if TYPE_CHECKING:
    from PIL.Image import Image

EXTENSIONS = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"))
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # others start programs (EPS) or are rarely tested
MAX_SIDE = 4096  # pixels of an image that a network gets
_MAX_PIXELS = 64 * 2**20  # of a file
_LOG = logging.getLogger("rkd.data")
_CHUNK = 64  # images a task at most: one future an image would cost as much as a small image
_TRAIN_FOLDER = "train"
_TEST_FOLDERS = ("test", "val", "valid", "validation")
_SPLIT_FOLDERS = (_TRAIN_FOLDER, "training", *_TEST_FOLDERS, "testing")
_SAMPLED_HEADERS = 256
_MAX_INFERRED_SIDE = 512
_ALWAYS_TOLERATED = 10  # undecodable images of a streamed split, however small it is
_NAMED = 3  # how many images, classes or sizes a message lists
_CHANGED = {  # what was done to an image -> what is said about it
    "grey": "grey {} converted to RGB",
    "16-bit": "16-bit grey {} scaled to 8 bits and converted to RGB",
    "palette": "palette {} converted to RGB",
    "alpha": "transparent {} put on black",
    "colour": "CMYK or other colour-space {} converted to RGB",
    "fitted": "{} scaled or cropped to one size",
}
_LARGE_PIXELS = 32 * 2**20
_LARGE_READ_BYTES = 2**20
_ONE_LARGE = threading.Lock()  # eight threads with a large image each would take gigabytes
_QUIET = threading.Lock()  # warning filters belong to the process, not to a thread

Size = tuple[int, int]  # height, width
Pixels = NDArray[np.uint8]
Changes = tuple[str, ...]  # keys of _CHANGED
Load = Callable[[int], tuple[Pixels, Changes]]  # index -> (3, H, W) and what was done to get there
Progress = Callable[[int, int], None]  # images done, images in all


@dataclass
class Decoded:
    """What came out of decoding images 0 to N - 1.

    Attributes:
        images: (N, 3, H, W); the rows of failed images hold zeros.
        failed: index -> why it could not be decoded.
        changes: how many images were changed in which way.
    """

    images: Pixels
    failed: dict[int, str] = field(default_factory=dict)
    changes: Counter[str] = field(default_factory=Counter)

    def change_notes(self) -> list[str]:
        """One line for each way in which images were changed."""
        return [
            f"{n} {text.format('image' if n == 1 else 'images')}"
            for change, text in _CHANGED.items()
            if (n := self.changes[change])
        ]


def require_pillow() -> None:
    """Raise if images cannot be decoded here.

    Raises:
        MissingExtraError: pillow is not installed.
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("pillow", "train") from error


@dataclass(frozen=True)
class Listing:
    """Image files below one root, with their classes.

    Attributes:
        paths: relative to the root, by split, class and name.
        labels: (N,) indices into `classes`.
        classes: folder names, sorted as torchvision's ImageFolder sorts them.
        n_train: the first so many are for training; None where the folder is not split.
        notes: what was passed over, a line each.
    """

    paths: list[str]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    n_train: int | None = None
    notes: tuple[str, ...] = ()


def list_folder(root: Path) -> Listing:
    """List `root`: train/ and test/ (or val/) with class folders inside, or class folders only.

    Raises:
        DataError: it is laid out otherwise, a class has no image, or the splits have different classes.
        StorageError: a folder cannot be read.
    """
    folders = {name.lower(): name for name in _subfolders(root)}
    test = next((name for name in _TEST_FOLDERS if name in folders), None)
    if _TRAIN_FOLDER not in folders or test is None:
        for name in _SPLIT_FOLDERS:
            if name in folders and _subfolders(root / folders[name]):
                raise DataError(
                    f"{root} has {folders[name]}/; expected train/ and test/, or class folders: add or rename"
                )
        return Listing(*_list_classes(root, ""))
    train_name, test_name = folders.pop(_TRAIN_FOLDER), folders.pop(test)
    train_paths, train_labels, classes = _list_classes(root, train_name)
    test_paths, test_labels, test_classes = _list_classes(root, test_name)
    if classes != test_classes:
        only = [f"{shown(c)} is only in {train_name}/" for c in classes if c not in test_classes]
        only += [f"{shown(c)} is only in {test_name}/" for c in test_classes if c not in classes]
        raise DataError(f"{root}: the splits have different classes ({first(only)}); give both the same class folders")
    unused = [f"{shown(name)}/" for name in sorted(folders.values())]
    return Listing(
        train_paths + test_paths,
        np.concatenate([train_labels, test_labels]),
        classes,
        len(train_paths),
        (f"not used: {first(unused)}",) if unused else (),
    )


def image_files(folder: Path) -> list[str]:
    """Paths, relative to `folder`, of the image files in it and below it, sorted.

    Hidden files and folders are skipped, and so are folders that are symbolic links, since those can form loops.

    Raises:
        StorageError: a folder cannot be read.
    """
    found: list[str] = []
    pending = [""]
    while pending:
        below = pending.pop()
        with storage_errors(folder / below), os.scandir(folder / below) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    pending.append(f"{below}{entry.name}/")
                elif _is_image_name(entry.name) and entry.is_file():
                    found.append(below + entry.name)
    return sorted(found)


def _is_image_name(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS  # noqa: PTH122  (a Path for each of a million names is slow)


def _list_classes(root: Path, below: str) -> tuple[list[str], NDArray[np.int64], tuple[str, ...]]:
    """Paths relative to `root`, labels and classes of the class folders in `root / below`."""
    folder = root / below
    classes = tuple(_subfolders(folder))
    if not classes:
        with storage_errors(folder):
            flat = any(_is_image_name(path.name) for path in folder.iterdir())
        if flat:
            raise DataError(f"{folder} holds images but no class folders; move each image into a folder of its class")
        raise DataError(f"{folder} holds no class folders; expected one folder a class with its images inside")
    files = [image_files(folder / name) for name in classes]
    if not any(files):
        raise DataError(f"{folder} holds no images; expected {', '.join(sorted(EXTENSIONS))} in class folders")
    empty = [shown(name) for name, found in zip(classes, files, strict=True) if not found]
    if empty:
        raise DataError(f"{folder}: no images of class {first(empty)}; add some or remove the folder")
    if len(classes) == 1:
        raise DataError(f"{folder} holds one class only ({shown(classes[0])}); expected at least two class folders")
    prefix = f"{below}/" if below else ""
    paths = [f"{prefix}{name}/{file}" for name, found in zip(classes, files, strict=True) for file in found]
    return paths, np.repeat(np.arange(len(classes)), [len(found) for found in files]), classes


def _subfolders(folder: Path) -> list[str]:
    with storage_errors(folder), os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())


def image_size(path: Path) -> Size:
    """Height and width from an image's header.

    Raises:
        Exception: whatever a damaged file makes the decoder raise.
    """
    with _open(path) as image:
        return image.height, image.width


def decode(path: Path, size: Size) -> tuple[Pixels, Changes]:
    """Decode one file and fit it to `size`.

    Returns:
        Pixels (3, H, W), and what was done to the image to get them.

    Raises:
        Exception: whatever a damaged file makes the decoder raise.
    """
    with _open(path) as image:
        return to_pixels(image, size)


def to_pixels(image: Image, size: Size) -> tuple[Pixels, Changes]:
    """Convert to RGB and fit to `size`; as `decode`, for an image that is already open."""
    rgb, changes = _to_rgb(image)
    if (rgb.height, rgb.width) != size:
        rgb, changes = fit(rgb, size), (*changes, "fitted")
    return np.asarray(rgb).transpose(2, 0, 1), changes


def decode_all(load: Load, n: int, size: Size, progress: Progress | None = None) -> Decoded:
    """Call `load(0)` to `load(n - 1)` on a few threads; exceptions become entries of `failed`.

    Args:
        load: decodes one image; called from several threads (decoders release the GIL).
        n: how many images.
        size: height and width of what `load` gives.
        progress: called in this thread with images done and images in all.
    """
    decoded = Decoded(np.zeros((n, 3, *size), dtype=np.uint8))

    def work(start: int) -> tuple[Counter[str], dict[int, str]]:
        changes: Counter[str] = Counter()
        failed: dict[int, str] = {}
        for i in range(start, min(start + chunk, n)):
            try:
                decoded.images[i], done = load(i)
            except Exception as error:  # noqa: BLE001  (decoders leak anything)
                failed[i] = _why(error)
            else:
                changes.update(done)
        return changes, failed

    workers = min(8, os.cpu_count() or 1)
    chunk = max(1, min(_CHUNK, n // (2 * workers)))
    with quiet(), ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(work, start) for start in range(0, n, chunk)]
        try:
            for k, future in enumerate(futures, start=1):
                changes, failed = future.result()
                decoded.changes += changes
                decoded.failed |= failed
                if progress is not None:
                    progress(min(k * chunk, n), n)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C must not wait for a million images
            raise
    return decoded


def _why(error: Exception) -> str:
    if type(error).__name__ == "UnidentifiedImageError":  # its own text is the address of a file object
        return f"not one of {', '.join(_FORMATS)}"
    return str(error) if isinstance(error, OSError | ValueError) and str(error) else f"{type(error).__name__}: {error}"


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Pillow's warnings about odd files to itself: an image is decoded or it is not."""
    with _QUIET, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        yield


def fit(image: Image, size: Size) -> Image:
    """Scale until `size` is covered (bilinear), then crop the centre: torchvision's Resize and CenterCrop.

    Raises:
        ValueError: the image is so narrow that scaling it would take more than 64 megapixels.
    """
    height, width = size
    if height * image.width >= width * image.height:  # the height decides
        scaled = height, height * image.width // image.height
    else:
        scaled = width * image.height // image.width, width
    if scaled[0] * scaled[1] > _MAX_PIXELS:
        raise ValueError(f"{image.height}x{image.width} is too narrow to be scaled to {height}x{width}")
    from PIL.Image import Resampling

    resized = image.resize((scaled[1], scaled[0]), Resampling.BILINEAR)
    top, left = round((scaled[0] - height) / 2), round((scaled[1] - width) / 2)
    return resized.crop((left, top, left + width, top + height))


class _BoundedReader(io.BufferedReader):
    """A file of which no more is asked than it has.

    Python takes memory for all that a read asks for, and a chunk of a PNG of a hundred bytes may announce gigabytes.
    """

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _LARGE_READ_BYTES:
            size = max(0, min(size, os.fstat(self.fileno()).st_size - self.tell()))
        return super().read(size)


@contextmanager
def _open(path: Path) -> Iterator[Image]:
    import PIL.Image

    with _BoundedReader(open_regular(path).detach()) as file, PIL.Image.open(file, formats=_FORMATS) as image:
        if image.width * image.height > _MAX_PIXELS:
            raise ValueError(f"{image.width * image.height:,} pixels are too many, at most {_MAX_PIXELS:,}")
        with _ONE_LARGE if image.width * image.height > _LARGE_PIXELS else nullcontext():
            yield image


def _to_rgb(image: Image) -> tuple[Image, Changes]:
    import PIL.Image

    image.load()
    mode = image.mode
    if mode == "RGB":
        return image, ()
    if mode in ("L", "1"):
        return image.convert("RGB"), ("grey",)
    if mode.startswith("I"):
        values: NDArray[Any] = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("more than 16 bits a pixel")
        scaled = values.astype(np.uint32)
        scaled *= 255
        scaled += 32767
        scaled //= 65535  # in place: this image may be large
        return PIL.Image.fromarray(scaled.astype(np.uint8)).convert("RGB"), ("16-bit",)
    if mode in ("RGBA", "LA", "PA", "La", "RGBa") or (mode == "P" and "transparency" in image.info):
        premultiplied = np.asarray(image.convert("RGBA").convert("RGBa"))  # times alpha, that is on black
        return PIL.Image.fromarray(np.ascontiguousarray(premultiplied[..., :3])), ("alpha",)
    if mode == "F":
        raise ValueError("floating-point pixels")
    return image.convert("RGB"), ("palette" if mode == "P" else "colour",)


class Report:
    """Which images of one split could not be decoded so far; used from several threads.

    Args:
        origin: names the split in errors.
        total: images in the split.
        max_corrupt: the share that may be undecodable; `_ALWAYS_TOLERATED` images always may.
    """

    def __init__(self, origin: str, total: int, max_corrupt: float) -> None:
        self._origin, self._total, self._max_corrupt = origin, total, max_corrupt
        self._reasons: dict[str, str] = {}
        self._lock = threading.Lock()

    def names(self) -> tuple[str, ...]:
        """The images, sorted."""
        with self._lock:
            return tuple(sorted(self._reasons))

    def add(self, failed: dict[str, str]) -> None:
        """Take note of images (name -> why), and log each the first time.

        Raises:
            DataError: they are too many.
        """
        with self._lock:
            fresh = {name: why for name, why in failed.items() if name not in self._reasons}
            self._reasons.update(fresh)
            reasons = dict(self._reasons)
        for name, why in fresh.items():
            _LOG.warning("left out, cannot be decoded: %s (%s)", shown(name), shown(why))
        if len(reasons) > max(_ALWAYS_TOLERATED, self._max_corrupt * self._total):
            raise _too_corrupt(self._origin, reasons, self._total, self._max_corrupt)


def common_size(size_of: Callable[[int], Size], n: int, origin: str) -> Size:
    """The one size of up to 256 spread-out images.

    Args:
        size_of: index -> height and width; may raise anything for a damaged image.
        n: how many images there are.
        origin: names them in errors.

    Raises:
        DataError: they have different sizes, one that is too large to be meant, or none can be read.
    """
    seen: dict[Size, None] = {}
    with quiet():
        for i in np.unique(np.linspace(0, n - 1, min(n, _SAMPLED_HEADERS)).astype(int)):
            try:
                seen[size_of(int(i))] = None
            except Exception:  # noqa: BLE001, S112  (damaged files are counted when they are decoded)
                continue
    if not seen:
        raise DataError(f"{origin}: none of its images can be decoded; check the files")
    if len(seen) > 1:
        sizes = " and ".join(by(size) for size in list(seen)[:2])
        raise DataError(f"{origin} holds images of different sizes, such as {sizes}; give --image-size, e.g. 64")
    size = next(iter(seen))
    if max(size) > _MAX_INFERRED_SIDE:
        raise DataError(f"{origin} holds images of {by(size)}, which is large; give --image-size, e.g. 224")
    return size


def corrupt_note(origin: str, failed: dict[str, str], total: int, max_corrupt: float) -> tuple[str, ...]:
    """A line that names the images which were left out (name -> why); none where all are good.

    Raises:
        DataError: they are more than the share `max_corrupt` of `total`.
    """
    if len(failed) > max_corrupt * total:
        raise _too_corrupt(origin, failed, total, max_corrupt)
    names = [shown(name) for name in sorted(failed)]
    return (f"corrupt: {len(failed)} of {total} images left out: {first(names)}",) if failed else ()


def _too_corrupt(origin: str, failed: dict[str, str], total: int, max_corrupt: float) -> DataError:
    return DataError(
        f"{origin}: {len(failed)} of {total} images cannot be decoded, at most {max_corrupt:.1%} may: "
        f"{first([shown(name) for name in sorted(failed)])} ({shown(failed[min(failed)])}); repair or remove them"
    )


def by(size: Size) -> str:
    """`(32, 48)` as 32x48."""
    return f"{size[0]}x{size[1]}"


def first(names: Sequence[str], n: int = _NAMED) -> str:
    """The first few names, with an ellipsis for the others."""
    return ", ".join(names[:n]) + (", ..." if len(names) > n else "")


def shown(text: str) -> str:
    """`text` as it can be printed on one line: file names may hold newlines and bytes that are no UTF-8."""
    return text if text.isprintable() else repr(text)[1:-1]


def without_files_of_the_test(
    root: Path, paths: Sequence[str], train: NDArray[np.int64], test: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Training rows whose file is not byte for byte one of the test's; only files of equal sizes are read."""
    with storage_errors(root):
        sizes = {i: (root / paths[i]).stat().st_size for i in (*train.tolist(), *test.tolist())}
        shared = {sizes[i] for i in test.tolist()} & {sizes[i] for i in train.tolist()}

        def digest(i: int) -> bytes:
            return hashlib.blake2b((root / paths[i]).read_bytes(), digest_size=16).digest()

        tested = {digest(i) for i in test.tolist() if sizes[i] in shared}
        kept = [i for i in train.tolist() if sizes[i] not in shared or digest(i) not in tested]
    return np.array(kept, dtype=np.int64)
