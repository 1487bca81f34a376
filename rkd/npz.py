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
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from rkd.zips import open_zip


def read_npz(file: BinaryIO, limit_bytes: int, members: int = 64) -> dict[str, NDArray[Any]]:
    """Read every array of an .npz.

    Args:
        file: a seekable binary file.
        limit_bytes: what all arrays together may take in memory.
        members: how many arrays there may be.

    Raises:
        ValueError: not an .npz, an object array, a header that lies about its size, or beyond a limit.
    """
    try:
        with open_zip(file, index_bytes=members * 2**10) as archive:
            entries = archive.infolist()
            if len(entries) > members:
                raise ValueError(f"{len(entries)} arrays, at most {members} expected")
            total = sum(entry.file_size for entry in entries)
            if total > limit_bytes:
                raise ValueError(f"{total:,} bytes when unpacked, at most {limit_bytes:,} allowed")
            names = [entry.filename.removesuffix(".npy") for entry in entries]
            if len(set(names)) < len(names):
                raise ValueError(f"two arrays have the same name ({', '.join(names)[:200]})")
            return {name: _read_npy(archive, entry) for name, entry in zip(names, entries, strict=True)}
    except ValueError:
        raise
    except Exception as error:  # zipfile leaks struct.error, NotImplementedError, zlib.error and more
        raise ValueError(f"not a readable .npz ({type(error).__name__}: {error})") from error


def _read_npy(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> NDArray[Any]:
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{entry.filename}: numpy does not compress by method {entry.compress_type}")
    with archive.open(entry) as member:
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
        count = math.prod(shape)
        if count * dtype.itemsize > entry.file_size:
            raise ValueError(f"{entry.filename}: its header announces {count * dtype.itemsize:,} bytes, it holds fewer")
        data = bytearray(member.read(count * dtype.itemsize))
    if len(data) != count * dtype.itemsize:
        raise ValueError(f"{entry.filename}: cut short")
    array = np.frombuffer(data, dtype=dtype)
    if dtype.kind == "U" and data and array.view(np.dtype("u4").newbyteorder(dtype.byteorder)).max() > sys.maxunicode:
        raise ValueError(f"{entry.filename}: holds a character that does not exist")  # numpy raises SystemError later
    return array.reshape(shape, order="F" if fortran else "C")


def npz_bytes(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """An uncompressed .npz; equal arrays give equal bytes."""
    buffer = io.BytesIO()
    np.savez(buffer, **{name: np.ascontiguousarray(array) for name, array in arrays.items()})  # type: ignore[arg-type]
    return buffer.getvalue()
