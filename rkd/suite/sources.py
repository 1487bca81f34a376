"""The data sets of a suite: where they are, how many images they have, and unpacked where they come as a .tar."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from rkd import _images
from rkd.data import check_spec, open_dataset
from rkd.errors import DataError
from rkd.files import new_directory, remove_temporaries, storage_errors
from rkd.progress import progress
from rkd.suite.file import Suite

_MOST_MEMBERS, _LARGEST_BYTES = 5_000_000, 2**40


@dataclass(frozen=True)
class Facts:
    """What an estimate needs to know of a data set.

    Attributes:
        train, test: images.
        size: height and width in pixels.
        known: whether it was looked at; False where it is not on this machine yet.
    """

    train: int
    test: int
    size: tuple[int, int]
    known: bool = True


def find_sources(suite: Suite, root: Path | None, used: Collection[str]) -> dict[str, Path | str]:
    """Where each data set is: a folder, an .npz or a .tar, or a name that `--data` knows.

    Args:
        suite: its [data].
        root: the folder that has them, as NAME/, NAME.npz or NAME.tar; None for the working folder.
        used: the entries that are needed.

    Raises:
        DataError: one is nowhere and is no known name.
    """
    found: dict[str, Path | str] = {}
    for entry in [entry for entry in suite.axes["data"] if entry.name in used]:
        base = (root or Path()) / entry.source
        if not base.name:
            raise DataError(
                f"[data.{entry.name}]: data = {entry.source!r} names nothing; expected a folder, a file or a name"
            )
        with storage_errors(base):
            there = [p for p in (base, *(base.with_name(base.name + end) for end in (".npz", ".tar"))) if p.exists()]
        if there:
            found[entry.name] = there[0].resolve()
            continue
        try:
            check_spec(entry.source)
        except DataError as error:
            raise DataError(f"[data.{entry.name}]: {error}; --data-root DIR says where data sets are") from error
        found[entry.name] = entry.source
    return found


def ready_sources(found: Mapping[str, Path | str], folder: Path) -> dict[str, str]:
    """What `--data` takes for each data set; what comes as a .tar is unpacked below `folder`, once.

    Raises:
        DataError: a .tar is damaged or not a data set.
        StorageError: the disk said no.
    """
    ready = {}
    for name, source in found.items():
        is_tar = isinstance(source, Path) and source.suffix == ".tar"
        ready[name] = str(_unpacked(source, folder / name) if isinstance(source, Path) and is_tar else source)
    return ready


def facts_of(source: Path | str, image_size: int) -> Facts:
    """How large a data set is, from its listing; a set that would have to be downloaded or unpacked is guessed.

    Raises:
        DataError: it cannot be used.
    """
    side = (image_size, image_size) if image_size else None
    if isinstance(source, Path) and source.is_dir():
        listing = _images.list_folder(source)
        train = listing.n_train if listing.n_train is not None else round(0.8 * len(listing.paths))
        size = side or _images.image_size(source / listing.paths[0])
        return Facts(train, len(listing.paths) - train, size)
    if isinstance(source, Path) and source.suffix == ".tar":
        return Facts(30_000, 5_000, side or (32, 32), known=False)
    if isinstance(source, Path) or source == "digits":
        data = open_dataset(str(source), size=side)
        return Facts(len(data.train), len(data.test), data.size)
    return Facts(50_000, 10_000, side or (32, 32), known=False)


def _unpacked(tar: Path, folder: Path) -> Path:
    """The data set in a .tar: its one folder, or all of it."""
    if not folder.is_dir():
        if folder.parent.is_dir():
            remove_temporaries(folder.parent)
        try:
            with storage_errors(tar), tarfile.open(tar) as archive, new_directory(folder) as partial:
                _extract(archive, partial, tar)
        except (tarfile.TarError, EOFError, ValueError) as error:
            raise DataError(f"{tar} cannot be unpacked: {error}") from error
    inside = [path for path in folder.iterdir() if path.is_dir()]
    return inside[0] if len(inside) == 1 else folder


def _extract(archive: tarfile.TarFile, folder: Path, tar: Path) -> None:
    """Folders and files only, below `folder` only, of bounded size."""
    members = archive.getmembers()
    odd = next((m for m in members if not (m.isfile() or m.isdir())), None)
    if odd is not None or len(members) > _MOST_MEMBERS or sum(m.size for m in members) > _LARGEST_BYTES:
        raise DataError(f"{tar} holds more than files and folders, or too much: {odd.name if odd else len(members)}")
    with progress(f"unpack {tar.name}", len(members)) as bar:
        for number, member in enumerate(members, 1):
            archive.extract(member, folder, filter="data")
            bar.update(number, unit="file")
    os.sync()  # one for all: a set has tens of thousands of files
