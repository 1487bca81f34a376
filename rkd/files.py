"""The only place that writes files, and where those from outside are opened.

A file or a checkpoint directory is either there whole or not there at all: it is written under a temporary name beside
its destination, flushed, fsynced and renamed, and then the directory that holds it is fsynced. A failed write leaves no
temporary behind. Tests inject faults through this module's `os`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import Any

from rkd.errors import ConfigError, StorageError

_TEMPORARY = ".rkd-tmp-"


def sha256(data: bytes) -> str:
    """Hexadecimal SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def to_json(value: object) -> bytes:
    """JSON as it is written everywhere: indented, sorted as given, no NaN, one newline at the end.

    Raises:
        ValueError: `value` holds a NaN or an infinity.
    """
    return (json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode()


def open_regular(path: Path) -> BufferedReader:
    """Open a file from outside for reading; a pipe or a device, at which a reader may wait for ever, is refused.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # opening a folder raises by itself
        raise OSError(errno.EINVAL, "is a pipe, a socket or a device, expected a regular file; save it to one first")
    return path.open("rb")


def read_bytes(path: Path, limit_bytes: int = 2**30) -> bytes:
    """All of a file from outside.

    Raises:
        OSError: as for `open_regular`; also when the file is larger than `limit_bytes`.
    """
    with open_regular(path) as file:
        size_bytes = os.fstat(file.fileno()).st_size
        if size_bytes > limit_bytes:
            raise OSError(errno.EFBIG, f"{size_bytes:,} bytes, files of its kind have at most {limit_bytes:,}")
        return file.read(size_bytes)  # what is appended meanwhile is left; `read` takes room for what it is asked for


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file from outside, of which a part is held at a time.

    Raises:
        OSError: as for `open_regular`.
    """
    found = hashlib.sha256()
    with open_regular(path) as file:
        while part := file.read(2**20):
            found.update(part)
    return found.hexdigest()


def read_json(path: Path, limit_bytes: int = 2**24) -> Any:
    """Read a JSON file.

    Raises:
        StorageError: it cannot be read, or is larger than `limit_bytes`.
        ValueError: it is not JSON.
    """
    with storage_errors(path):
        data = read_bytes(path, limit_bytes)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an `OSError` about `path` into one clear `StorageError`."""
    try:
        yield
    except OSError as error:
        raise StorageError(_explain(error, path)) from error


def _explain(error: OSError, path: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"No space left on {path.parent}: {path.name} was not written, nothing else was changed; free some space and run again"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission for {path}: check its owner and mode, or choose another folder"
    if error.errno == errno.ENOENT:
        return f"no such file or folder: {path}"
    if error.errno == errno.ELOOP:
        return f"{path} is a symbolic link, through which nothing is written; remove it"
    return f"{path}: {error.strerror or error}"


def write_file(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write `data` to `path` atomically and durably; an existing file is replaced.

    Args:
        path: where.
        data: what.
        mode: permissions, from which the umask is taken away; 0o600 for secrets.

    Raises:
        StorageError: the disk is full, read-only or fails; `path` is then as it was before (where only the fsync of its
            folder failed, it is whole and new).
    """
    temporary = _temporary(path)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.unlink(missing_ok=True)  # left by a killed process of the same number, as containers have them
            _write(temporary, data, mode)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_directory(path.parent)


def write_new_file(path: Path, data: bytes, mode: int = 0o666) -> bool:
    """As `write_file`, but never in the place of another file: of two processes that try, one does.

    Returns:
        False where something is there already.

    Raises:
        StorageError: as for `write_file`; nothing is there then.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode))
        except FileExistsError:
            return False
    try:
        write_file(path, data, mode)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return True


@contextmanager
def open_log(path: Path) -> Iterator[BufferedWriter]:
    """A log to append to; a link in its place is not followed.

    Raises:
        StorageError: it cannot be opened, or what the block writes to it cannot be written.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
        with os.fdopen(descriptor, "ab") as file:
            yield file


def check_writable(path: Path) -> None:
    """See that `path` can be written, before long work whose result goes there.

    Raises:
        StorageError: its folder is missing or read-only, or it is a folder itself.
    """
    with storage_errors(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a folder, expected a file")
        if not path.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, "no such folder")
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, "no permission")


def check_output(out: Path, inputs: Iterable[Path]) -> None:
    """See that an output would not replace what it is made from.

    Raises:
        ConfigError: `out` is one of the inputs, be it by another name.
        StorageError: one of them cannot be looked at.
    """
    for path in inputs:
        with storage_errors(path):
            same = out.exists() and path.exists() and out.samefile(path)
        if same:
            raise ConfigError(f"--out {out} would replace {path}, which is read here; give the output another name")


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory to fill that appears as `path` when the block ends, and not at all where the block raises.

    Whoever fills it sees that its files are on disk; its folders are.

    Raises:
        StorageError: as for `write_file`; also when `path` exists and is not empty.
    """
    temporary = _temporary(path)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            yield temporary
            for folder in (temporary, *(below for below in temporary.rglob("*") if below.is_dir())):
                _sync_directory(folder)
            os.replace(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync_directory(path.parent)


def write_directory(path: Path, members: Mapping[str, bytes]) -> None:
    """Write a directory of files that appears whole or not at all; the last member is written last.

    A member's name may hold one folder, as in `triggers/patch.npz`.

    Raises:
        StorageError: as for `write_file`; also when `path` exists and is not empty.
    """
    with new_directory(path) as folder:
        for name, data in members.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            _write(folder / name, data)


def move(path: Path, goal: Path) -> None:
    """Give a file or directory another place on the same disk; the folders on the way to it are made.

    Raises:
        StorageError: as for `write_file`; also when `goal` is a directory that is not empty.
    """
    with storage_errors(path):
        goal.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, goal)
        for folder in {path.parent, goal.parent}:
            _sync_directory(folder)


def fill_directory(path: Path, members: Mapping[str, bytes]) -> None:
    """Write files into a directory that is there and empty, as a mount point is; of two processes one does.

    The directory itself stays. A kill in the middle leaves it half filled, the last member being written last.

    Raises:
        StorageError: as for `write_file`; also when `path` is not empty, or another process is filling it.
    """
    claim = path / f"{_TEMPORARY}claim"
    with storage_errors(path):
        claim.mkdir()
        try:
            if any(entry != claim for entry in path.iterdir()):
                raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
            for name, data in members.items():
                write_file(path / name, data)
        finally:
            shutil.rmtree(claim, ignore_errors=True)


def append_line(path: Path, line: str) -> None:
    """Append one line to a log; a failed write leaves no part of it, a kill can cut short the last line only.

    Raises:
        StorageError: the disk is full, read-only or fails.
    """
    with storage_errors(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
        try:
            size_bytes = os.fstat(descriptor).st_size
            try:
                _write_all(descriptor, (line + "\n").encode())
                os.fsync(descriptor)  # a checkpoint that survives a power cut must not be ahead of its log
            except OSError:
                os.ftruncate(descriptor, size_bytes)
                raise
        finally:
            os.close(descriptor)


def remove_temporaries(folder: Path) -> None:
    """Remove what a killed process left half-written in `folder` (not below it)."""
    for leftover in folder.glob(f"{_TEMPORARY}*"):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    if not path.name:
        raise StorageError(f"{path} is a folder, expected the name of a file")
    return path.with_name(f"{_TEMPORARY}{os.getpid()}-{path.name}")


def _write(path: Path, data: bytes, mode: int = 0o666) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    try:
        _write_all(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _sync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
