"""The one function that writes files, with faults injected into every call that it makes to the operating system."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rkd import files
from rkd.errors import ConfigError, StorageError
from rkd.files import (
    append_line,
    check_output,
    move,
    new_directory,
    open_log,
    read_bytes,
    read_json,
    remove_temporaries,
    to_json,
    write_directory,
    write_file,
    write_new_file,
)

FAULTS = {"open": os.open, "write": os.write, "fsync": os.fsync, "replace": os.replace}
ERRORS = {errno.ENOSPC: "No space left on", errno.EIO: "Input/output error", errno.EACCES: "no permission for"}
OLD, NEW = b"old content", b"new content" * 100
MEMBERS = {"a": b"a" * 10, "b": b"b" * 20, "digests.json": b"{}"}


class FaultyOs:
    """`os` whose `nth` call of `name` fails; other calls go through. Counts calls of `name`."""

    def __init__(self, name: str = "", nth: int = 0, code: int = 0, write: Callable[..., int] = os.write) -> None:
        self._name, self._nth, self._code, self._write_as = name, nth, code, write
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        real = self._write_as if name == "write" else getattr(os, name)
        if name != self._name:
            return real

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == self._nth:
                raise OSError(self._code, os.strerror(self._code))
            return real(*args, **kwargs)

        return call


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def count(monkeypatch: pytest.MonkeyPatch, name: str, work: Callable[[], None]) -> int:
    """How often `work` calls `os.<name>`."""
    counting = FaultyOs(name)
    monkeypatch.setattr(files, "os", counting)
    work()
    return counting.calls


@pytest.mark.parametrize("code", ERRORS)
@pytest.mark.parametrize("name", FAULTS)
def test_whatever_fails_a_file_is_whole_and_no_temporary_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    path = tmp_path / "run.json"
    calls = count(monkeypatch, name, lambda: write_file(path, NEW))
    assert calls >= 1
    for nth in range(1, calls + 1):
        path.write_bytes(OLD)
        monkeypatch.setattr(files, "os", FaultyOs(name, nth, code))
        with pytest.raises(StorageError) as caught:
            write_file(path, NEW)
        assert ERRORS[code] in str(caught.value)
        assert str(path if code != errno.ENOSPC else tmp_path) in str(caught.value)
        # After the rename only the folder's fsync is left: then the new content is there, whole.
        renamed = name in ("open", "fsync") and nth == calls
        assert path.read_bytes() == (NEW if renamed else OLD)
        assert names(tmp_path) == {"run.json"}


@pytest.mark.parametrize("code", ERRORS)
@pytest.mark.parametrize("name", FAULTS)
def test_whatever_fails_a_new_file_is_not_there_or_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    calls = count(monkeypatch, name, lambda: write_file(tmp_path / "counted", NEW))
    (tmp_path / "counted").unlink()
    for nth in range(1, calls + 1):
        path = tmp_path / f"{nth}"
        monkeypatch.setattr(files, "os", FaultyOs(name, nth, code))
        with pytest.raises(StorageError):
            write_file(path, NEW)
        assert not path.exists() or path.read_bytes() == NEW
    assert not [name for name in names(tmp_path) if name.startswith(".")]


@pytest.mark.parametrize("code", ERRORS)
@pytest.mark.parametrize("name", FAULTS)
def test_whatever_fails_a_directory_is_there_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    calls = count(monkeypatch, name, lambda: write_directory(tmp_path / "counted", MEMBERS))
    assert calls >= (1 if name == "replace" else len(MEMBERS))
    for nth in range(1, calls + 1):
        path = tmp_path / f"{nth:08}"
        monkeypatch.setattr(files, "os", FaultyOs(name, nth, code))
        with pytest.raises(StorageError, match=ERRORS[code]):
            write_directory(path, MEMBERS)
        if path.exists():
            assert {p.name: p.read_bytes() for p in path.iterdir()} == MEMBERS
        else:
            assert nth < calls or name in ("write", "replace")
    assert not [name for name in names(tmp_path) if name.startswith(".")]


@pytest.mark.parametrize("code", ERRORS)
@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_whatever_fails_what_is_moved_is_in_one_of_the_two_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    def moved(number: int) -> tuple[Path, Path]:
        path, goal = tmp_path / f"{number}" / "run", tmp_path / f"{number}" / "aside" / "run-2"
        write_directory(path, MEMBERS)
        return path, goal

    path, goal = moved(0)
    calls = count(monkeypatch, name, lambda: move(path, goal))
    assert {goal / member for member in MEMBERS} == set(goal.iterdir())
    assert not path.exists()
    assert calls == {"fsync": 2, "replace": 1}[name]
    for nth in range(1, calls + 1):
        monkeypatch.setattr(files, "os", os)
        path, goal = moved(nth)
        monkeypatch.setattr(files, "os", FaultyOs(name, nth, code))
        with pytest.raises(StorageError, match=ERRORS[code]):
            move(path, goal)
        assert path.exists() != goal.exists()


def test_a_directory_that_could_not_be_filled_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(KeyError), new_directory(tmp_path / "set") as folder:
        (folder / "half").write_bytes(b"x")
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_not_empty_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "mine").write_bytes(OLD)
    with pytest.raises(StorageError):
        write_directory(tmp_path / "d", MEMBERS)
    assert names(tmp_path) == {"d", "d/mine"}


@pytest.mark.parametrize("at_most", [1, 7])
def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_most: int) -> None:
    monkeypatch.setattr(files, "os", FaultyOs(write=lambda fd, data: os.write(fd, data[:at_most])))
    write_file(tmp_path / "f", NEW)
    write_directory(tmp_path / "d", MEMBERS)
    append_line(tmp_path / "log", "a line")
    assert (tmp_path / "f").read_bytes() == NEW
    assert {p.name: p.read_bytes() for p in (tmp_path / "d").iterdir()} == MEMBERS
    assert (tmp_path / "log").read_text() == "a line\n"


def test_an_interrupt_leaves_no_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "os", FaultyOs(write=interrupted))
    for write in (lambda: write_file(tmp_path / "f", NEW), lambda: write_directory(tmp_path / "d", MEMBERS)):
        with pytest.raises(KeyboardInterrupt):
            write()
    assert names(tmp_path) == set()


def test_data_is_on_disk_before_the_name_and_the_name_before_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    class Watching:
        def __getattr__(self, name: str) -> Any:
            real = getattr(os, name)
            if name not in ("write", "fsync", "replace"):
                return real

            def call(*args: Any) -> Any:
                kind = "folder" if name == "fsync" and stat.S_ISDIR(os.fstat(args[0]).st_mode) else "file"
                seen.append(f"{name} {kind}" if name == "fsync" else name)
                return real(*args)

            return call

    monkeypatch.setattr(files, "os", Watching())
    write_file(tmp_path / "f", NEW)
    assert seen == ["write", "fsync file", "replace", "fsync folder"]
    seen.clear()
    write_directory(tmp_path / "d", {"a": b"1", "b": b"2"})
    assert seen == ["write", "fsync file", "write", "fsync file", "fsync folder", "replace", "fsync folder"]
    seen.clear()
    append_line(tmp_path / "log", "a line")  # a checkpoint that follows must not be ahead of it
    assert seen == ["write", "fsync file"]


def test_what_a_killed_process_of_the_same_number_left_is_not_in_the_way(tmp_path: Path) -> None:
    """In a container every process may have the same number."""
    for name in ("f", "d"):
        (tmp_path / f".rkd-tmp-{os.getpid()}-{name}").write_bytes(b"half")
    write_file(tmp_path / "f", NEW)
    (tmp_path / f".rkd-tmp-{os.getpid()}-d").unlink()
    (tmp_path / f".rkd-tmp-{os.getpid()}-d").mkdir()
    (tmp_path / f".rkd-tmp-{os.getpid()}-d" / "a").write_bytes(b"half")
    write_directory(tmp_path / "d", MEMBERS)
    assert names(tmp_path) == {"f", "d", *(f"d/{name}" for name in MEMBERS)}
    assert (tmp_path / "f").read_bytes() == NEW


def test_a_planted_link_under_the_temporary_name_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(OLD)
    (tmp_path / f".rkd-tmp-{os.getpid()}-f").symlink_to(victim)
    write_file(tmp_path / "f", NEW)
    assert victim.read_bytes() == OLD
    assert (tmp_path / "f").read_bytes() == NEW
    assert not (tmp_path / "f").is_symlink()


def test_a_link_that_is_planted_just_before_the_temporary_is_made_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(OLD)

    class Planting:
        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        def open(self, path: Path, *rest: Any) -> int:
            if ".rkd-tmp-" in str(path) and not os.path.lexists(path):
                Path(path).symlink_to(victim)
            return os.open(path, *rest)

    monkeypatch.setattr(files, "os", Planting())
    for write in (lambda: write_file(tmp_path / "f", NEW), lambda: write_new_file(tmp_path / "g", NEW)):
        with pytest.raises(StorageError, match="File exists"):
            write()
    assert victim.read_bytes() == OLD
    assert names(tmp_path) == {"victim"}


def test_logs_are_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(OLD)
    (tmp_path / "log").symlink_to(tmp_path / "victim")
    with pytest.raises(StorageError, match="is a symbolic link, through which nothing is written"):
        append_line(tmp_path / "log", "a line")
    with pytest.raises(StorageError, match="is a symbolic link"), open_log(tmp_path / "log"):
        pytest.fail("opened")
    assert (tmp_path / "victim").read_bytes() == OLD


def test_a_new_file_takes_nobody_s_place(tmp_path: Path) -> None:
    path = tmp_path / "f"
    assert write_new_file(path, NEW, 0o600)
    assert not write_new_file(path, OLD)
    assert (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) == (NEW, 0o600)
    (tmp_path / "g").symlink_to(tmp_path / "nowhere")
    assert not write_new_file(tmp_path / "g", NEW)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("name", list(FAULTS))
def test_a_new_file_that_cannot_be_written_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(files, "os", FaultyOs(name, 1, errno.ENOSPC))
    with pytest.raises(StorageError, match="No space left"):
        write_new_file(tmp_path / "f", NEW)
    assert names(tmp_path) == set()


def test_no_more_of_a_file_is_read_than_its_kind_may_have(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b"[" + b" " * 100 + b"]")
    assert read_json(tmp_path / "x.json", 102) == []
    with pytest.raises(StorageError, match="102 bytes, files of its kind have at most 101"):
        read_json(tmp_path / "x.json", 101)
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(OSError, match="files of its kind have at most"):
        read_bytes(tmp_path / "sparse")


def test_the_mode_comes_from_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "f", NEW)
        write_directory(tmp_path / "d", MEMBERS)
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("f", "d", "d/a")]
    assert modes == [0o640, 0o750, 0o640]


@pytest.mark.parametrize("path", [Path(), Path("/"), Path("..")])
def test_a_path_without_a_file_name_is_refused(path: Path) -> None:
    with pytest.raises(StorageError):
        write_file(path, NEW)
    with pytest.raises(StorageError):
        write_directory(path, MEMBERS)


def test_a_folder_in_the_way_and_a_file_where_a_folder_should_be_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(OLD)
    with pytest.raises(StorageError):
        write_file(tmp_path / "folder", NEW)
    with pytest.raises(StorageError):
        write_file(tmp_path / "file" / "below", NEW)
    assert names(tmp_path) == {"folder", "file"}


# -------------------------------------------------------------------------------------------------------------- log


@pytest.mark.parametrize("code", ERRORS)
def test_a_log_keeps_its_earlier_lines_when_a_line_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    log = tmp_path / "metrics.jsonl"
    append_line(log, "first")
    for name in ("open", "write"):
        monkeypatch.setattr(files, "os", FaultyOs(name, 1, code))
        with pytest.raises(StorageError, match=ERRORS[code]):
            append_line(log, "second")
        assert log.read_text() == "first\n"


def test_half_a_line_that_a_full_disk_left_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "metrics.jsonl"
    append_line(log, "first")
    done = []

    def some_then_full(descriptor: int, data: memoryview) -> int:
        if done:
            raise OSError(errno.ENOSPC, "full")
        done.append(1)
        return os.write(descriptor, data[:3])

    monkeypatch.setattr(files, "os", FaultyOs(write=some_then_full))
    with pytest.raises(StorageError, match="No space left"):
        append_line(log, "second")
    monkeypatch.undo()
    append_line(log, "third")
    assert log.read_text() == "first\nthird\n"


def test_temporaries_of_killed_processes_are_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".rkd-tmp-1-file").write_bytes(b"")
    (tmp_path / ".rkd-tmp-2-folder").mkdir()
    (tmp_path / ".rkd-tmp-2-folder" / "a").write_bytes(b"")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / ".rkd-tmp-3-deeper").write_bytes(b"")
    (tmp_path / ".rkd-tmp-4-link").symlink_to(tmp_path / "kept")
    remove_temporaries(tmp_path)
    assert names(tmp_path) == {"kept", "kept/.rkd-tmp-3-deeper"}


# ------------------------------------------------------------------------------------------------------------- JSON


def test_json_is_written_one_way_and_has_no_nan() -> None:
    assert to_json({"b": 1, "a": ["é"]}) == '{\n  "b": 1,\n  "a": [\n    "é"\n  ]\n}\n'.encode()
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON"):
            to_json([value])


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[" * 100_000])
def test_what_is_no_json_is_a_value_error_that_names_the_file(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.json is not JSON"):
        read_json(tmp_path / "x.json")
    with pytest.raises(StorageError, match="no such file"):
        read_json(tmp_path / "y.json")


def test_an_output_may_be_anything_but_an_input(tmp_path: Path) -> None:
    source, link = tmp_path / "a", tmp_path / "b"
    source.write_bytes(b"x")
    link.symlink_to(source)
    check_output(tmp_path / "c", [source, tmp_path / "missing"])
    for out in (source, link, tmp_path / "." / "a"):
        with pytest.raises(ConfigError, match="would replace"):
            check_output(out, [source])


def test_nothing_else_writes_or_renames() -> None:
    """Streams are left out: the logs of children, and switches of the kernel."""
    package = Path(files.__file__).parent
    sources = [path for root in (package, *package.iterdir()) for path in root.rglob("*.py")]  # some are links
    assert {"bench", "export", "suite"} <= {path.parent.name for path in sources}
    forbidden = re.compile(
        r"os\.(replace|rename|renames|link|symlink)\(|\.rename\(|\.write_(text|bytes)\(|shutil\.(move|copy\w*)\(|\bopen\((?:[^)]*,\s*)?[\"'][wax]b?[\"']"
    )
    found = {
        f"{path.relative_to(package)}: {line.strip()}"
        for path in sources
        if path != package / "files.py"
        for line in path.read_text().splitlines()
        if forbidden.search(line)
    }
    assert {line for line in found if not re.search("as (log|output|knob):", line)} == set()
