"""Open zip archives that strangers may have made (no torch).

`zipfile` makes an object of some hundred bytes for every entry that an archive's index announces, before anybody can
count them. Here the index is read only if it is short.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

_END, _LOCATOR, _END_64 = b"PK\x05\x06", b"PK\x06\x07", b"PK\x06\x06"


class _ShortReads:
    """A file of which one read gives at most so many bytes: zipfile reads an index by a single one."""

    def __init__(self, file: BinaryIO, limit_bytes: int) -> None:
        self._file, self.limit_bytes = file, limit_bytes

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(min(size, self.limit_bytes + 1) if size >= 0 else self.limit_bytes + 1)
        if len(data) > self.limit_bytes:
            raise ValueError(f"its index has more than {self.limit_bytes:,} bytes")
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True


@contextmanager
def open_zip(file: BinaryIO, index_bytes: int) -> Iterator[zipfile.ZipFile]:
    """Open an archive for reading, by an index of at most `index_bytes`; its members may be of any size.

    Raises:
        ValueError: the index is longer.
        Exception: zipfile leaks struct.error, UnicodeDecodeError, NotImplementedError and more for damaged archives.
    """
    short = _ShortReads(file, max(index_bytes, 2**17))  # the search for the archive's end reads 64 KiB
    with zipfile.ZipFile(short) as archive:
        short.limit_bytes = 2**63
        yield archive


def check_end(data: bytes) -> None:
    """See that an archive ends as torch ends it, so that every reader finds the same index.

    Readers disagree on an archive with bytes before it or behind it, or with two ends: one of them could be shown other
    content than the next.

    Raises:
        ValueError: it ends otherwise.
    """
    end = len(data) - 22
    if end < 0 or data[end : end + 4] != _END or data[end + 20 :] != b"\0\0":
        raise ValueError("it does not end where a zip archive ends")
    size, offset = (int.from_bytes(data[at : at + 4], "little") for at in (end + 12, end + 16))
    stop = end
    if data[end - 20 : end - 16] == _LOCATOR:
        stop = end - 76
        if data[stop : stop + 4] != _END_64 or int.from_bytes(data[end - 12 : end - 4], "little") != stop:
            raise ValueError("its two ends do not belong together")
        size, offset = (int.from_bytes(data[at : at + 8], "little") for at in (stop + 40, stop + 48))
    if offset + size != stop:
        raise ValueError("its index is not where its end says")
