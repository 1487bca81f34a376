"""Read and write .npz archives that strangers may have made (numpy only).

No pickle, no object arrays, no member larger than announced, no more bytes than the caller allows: a file of a few
kilobytes cannot make the reader allocate gigabytes.
"""

from __future__ import annotations

import io
import math
import sys
import warnings
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any, BinaryIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from rkd.errors import first_line
from rkd.zips import open_zip

_MEMBERS = 64


class OtherArrayError(TypeError):
    """An array is not the one that was asked for."""


def read_npz(
    file: BinaryIO, limit_bytes: int, members: int = _MEMBERS, only: Collection[str] | None = None
) -> dict[str, NDArray[Any]]:
    """Read every array of an .npz.

    Args:
        file: a seekable binary file.
        limit_bytes: what all arrays together may take in memory.
        members: how many arrays there may be.
        only: names of arrays; the others are not read.

    Raises:
        ValueError: not an .npz, an object array, a header that lies about its size, or beyond a limit.
    """
    with _opened(file, members) as (archive, entries):
        wanted = {name: entry for name, entry in entries.items() if only is None or name in only}
        total = sum(entry.file_size for entry in wanted.values())
        if total > limit_bytes:
            raise ValueError(f"{total:,} bytes when unpacked, at most {limit_bytes:,} allowed")
        return {name: _read_npy(archive, entry) for name, entry in wanted.items()}


def read_npz_rows(
    file: BinaryIO, name: str, dtype: type[np.generic], row: tuple[int, ...], size: int
) -> Iterator[NDArray[Any]]:
    """Read one array of an .npz from its first row to its last, `size` rows at a time.

    Args:
        file: a seekable binary file.
        name: of the array.
        dtype: what the array must hold.
        row: the shape that each of its rows must have.
        size: rows at once, of which no more are held.

    Raises:
        OtherArrayError: there is no such array, or it is of another kind or shape, or in Fortran's order.
        ValueError: not an .npz, or a header that lies about its size.
    """
    with _opened(file, _MEMBERS) as (archive, entries):
        if name not in entries:
            raise OtherArrayError(f"there is no {name}")
        with archive.open(entries[name]) as member:
            shape, fortran, found = _header(member, entries[name])
            if found != dtype or not shape or shape[1:] != row:
                raise OtherArrayError(f"{name} is {found}{shape}")
            if fortran and shape[0] > 1:
                raise OtherArrayError(f"{name} is in Fortran's order; save np.ascontiguousarray({name})")
            row_bytes = math.prod(row) * found.itemsize
            for start in range(0, shape[0], size):
                count = min(size, shape[0] - start)
                yield np.frombuffer(_exactly(member, count * row_bytes), found).reshape(count, *row)
            member.read(1)  # at its end the archive checks the whole array


@contextmanager
def _opened(file: BinaryIO, members: int) -> Iterator[tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]]:
    """An archive and its arrays by name; what goes wrong while it is read is a ValueError.

    Raises:
        ValueError: not an archive, more than `members` arrays, two of one name, or damaged while it is read.
    """
    try:
        with open_zip(file, index_bytes=members * 2**10) as archive:
            entries = archive.infolist()
            if len(entries) > members:
                raise ValueError(f"{len(entries)} arrays, at most {members} expected")
            names = [entry.filename.removesuffix(".npy") for entry in entries]
            if len(set(names)) < len(names):
                raise ValueError(f"two arrays have the same name ({', '.join(names)[:200]})")
            yield archive, dict(zip(names, entries, strict=True))
    except (ValueError, OtherArrayError):
        raise
    except Exception as error:  # zipfile leaks struct.error, NotImplementedError, zlib.error, TypeError and more
        raise ValueError(f"not a readable .npz ({type(error).__name__}: {first_line(error)})") from error


def _read_npy(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> NDArray[Any]:
    with archive.open(entry) as member:
        shape, fortran, dtype = _header(member, entry)
        data = _exactly(member, math.prod(shape) * dtype.itemsize)
    array = np.frombuffer(data, dtype=dtype)
    if dtype.kind == "U" and data and array.view(np.dtype("u4").newbyteorder(dtype.byteorder)).max() > sys.maxunicode:
        raise ValueError(f"{entry.filename}: holds a character that does not exist")  # numpy raises SystemError later
    return array.reshape(shape, order="F" if fortran else "C")


def _header(member: IO[bytes], entry: zipfile.ZipInfo) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """An array's shape, whether it is in Fortran's order, and its type.

    Raises:
        ValueError: not what numpy writes, or it announces more than there is.
    """
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{entry.filename}: numpy does not compress by method {entry.compress_type}")
    version = npy.read_magic(member)
    read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if read_header is None:
        raise ValueError(f"{entry.filename}: .npy version {version}, expected 1.0 or 2.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a header that makes Python's parser warn was not written by numpy
        shape, fortran, dtype = read_header(member)
    if dtype.hasobject or dtype.kind not in "biufU":
        raise ValueError(f"{entry.filename}: arrays of {dtype} are not accepted")
    if min(shape, default=0) < 0:
        raise ValueError(f"{entry.filename}: shape {shape} is impossible")
    announced = math.prod(shape) * dtype.itemsize
    if announced > entry.file_size:
        raise ValueError(f"{entry.filename}: its header announces {announced:,} bytes, it holds fewer")
    return shape, fortran, dtype


def _exactly(member: IO[bytes], size_bytes: int) -> bytearray:
    data = bytearray(member.read(size_bytes))
    if len(data) != size_bytes:
        raise ValueError(f"{member.name}: cut short")
    return data


def npz_bytes(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """An uncompressed .npz; equal arrays give equal bytes."""
    buffer = io.BytesIO()
    np.savez(buffer, **{name: np.ascontiguousarray(array) for name, array in arrays.items()})  # type: ignore[arg-type]
    return buffer.getvalue()
