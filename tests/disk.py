"""A disk that fails at the Nth write, fsync or rename, and what must hold of a command that it failed."""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from rkd import files
from rkd.cli import app

CALLS = ("write", "fsync", "replace")
SAID = {errno.ENOSPC: "No space left on", errno.EACCES: "no permission for"}
MIXED = {"write": errno.ENOSPC, "fsync": errno.EIO, "replace": errno.EACCES}


class Disk:
    """Stands in for the `os` of `rkd.files`: counts calls, and fails one of them."""

    def __init__(self, call: str = "", number: int = -1, code: int = 0) -> None:
        self.call, self.number, self.code = call, number, code
        self.counts = dict.fromkeys(CALLS, 0)

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        return functools.partial(self._count, name, real) if name in CALLS else real

    def _count(self, name: str, real: Callable[..., Any], *args: Any) -> Any:
        self.counts[name] += 1
        if name == self.call and self.counts[name] == self.number + 1:
            if name == "write":
                real(args[0], bytes(args[1])[: len(args[1]) // 2])  # a full disk takes what fits
            raise OSError(self.code, os.strerror(self.code))
        return real(*args)

    def failing(self, codes: Mapping[str, int]) -> Iterator[Disk]:
        """A disk for each call that was counted here, on which that call fails."""
        for call in CALLS:
            for number in range(self.counts[call]):
                yield Disk(call, number, codes[call])

    def __repr__(self) -> str:
        return f"{self.call} {self.number}: {errno.errorcode.get(self.code)}"


def rkd(disk: Disk, *arguments: object) -> Result:
    """Run a command on this disk, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "os", disk)
        return CliRunner().invoke(app, [str(argument) for argument in arguments])


def check_refusal(disk: Disk, failed: Result, folder: Path) -> None:
    """Exit 1, one line that says what the disk said, and nothing half-written in `folder`."""
    said = failed.stderr.splitlines()
    lines = [line for line in said if line.startswith("rkd: ")]
    assert failed.exit_code == 1, disk
    assert len(lines) == 1, disk
    assert said[-1] == lines[0], disk
    assert "Traceback" not in failed.stderr, disk
    assert "internal error" not in lines[0], disk
    assert SAID.get(disk.code, os.strerror(disk.code)) in lines[0], disk
    assert not list(folder.rglob(".rkd-tmp-*")), disk
