"""Checkpoints that want to run code: refused, with nothing run, by canary file and audit hook."""

from __future__ import annotations

import builtins
import code
import copyreg
import ctypes
import functools
import importlib
import io
import marshal
import operator
import os
import pathlib
import pickle
import pty
import pydoc
import re
import runpy
import shutil
import struct
import subprocess
import sys
import tarfile
import types
import webbrowser
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save as save_safetensors

from rkd.errors import CheckpointError
from rkd.inspection import inspect_path
from rkd.teacher import read_checkpoint

# ------------------------------------------------------------------------------------------------------------ watch

_FORBIDDEN = (
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.remove", "os.rename", "os.mkdir", "os.chmod",
    "subprocess.", "pty.", "shutil.", "socket.", "webbrowser.", "ctypes.", "pickle.find_class", "marshal.", "urllib.",
)  # fmt: skip
_watched: list[str] | None = None


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched is None:
        return
    if event.startswith(_FORBIDDEN):
        _watched.append(event)
    elif event == "open" and (
        str(arguments[1] or "r")[0] in "wax" or int(arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
    ):
        _watched.append(f"open {arguments[0]} to write")
    elif event == "exec" and getattr(arguments[0], "co_filename", "") == "<canary>":
        _watched.append(event)


sys.addaudithook(_hook)


@contextmanager
def watched() -> Iterator[list[str]]:
    """What code that was run on purpose of others would raise while inside."""
    global _watched  # noqa: PLW0603
    _watched = seen = []
    try:
        yield seen
    finally:
        _watched = None


# --------------------------------------------------------------------------------------------------------- payloads


class Call:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


class Stateful:
    """Pickles as an object of `kind` whose state is set."""

    def __init__(self, kind: Callable[..., Any], arguments: tuple[Any, ...], state: Any) -> None:
        self.parts = kind, arguments, state

    def __reduce__(self) -> Any:
        return self.parts


class Item:
    """Pickles as a mapping that is filled item by item."""

    def __init__(self, kind: Callable[..., Any], value: Any) -> None:
        self.parts = kind, value

    def __reduce__(self) -> Any:
        kind, value = self.parts
        return kind, (), None, None, iter([("key", value)])


def canary_code(canary: str) -> str:
    return f"open({canary!r}, 'w').close()"


def payloads(canary: str) -> dict[str, tuple[Any, str]]:
    """Objects that touch `canary` when unpickled by `pickle`, and the global that must be named."""
    touch, script = f"touch {canary}", canary_code(canary)
    compiled = marshal.dumps(compile(script, "<canary>", "exec"))
    evil = pickle.dumps(Call(os.system, touch))
    return {
        "os.system": (Call(os.system, touch), "posix.system"),
        "os.popen": (Call(os.popen, touch), "os.popen"),
        "os.execvp": (Call(os.execvp, "touch", ["touch", canary]), "os.execvp"),
        "eval": (Call(eval, script), "eval"),
        "exec": (Call(exec, script), "exec"),
        "open": (Call(open, canary, "w"), "open"),
        "getattr": (Call(getattr, "text", "encode"), "getattr"),
        "__import__": (Call(builtins.__import__, "os"), "__import__"),
        "import_module": (Call(importlib.import_module, "this"), "importlib.import_module"),
        "Popen": (Call(subprocess.Popen, ["touch", canary]), "(commands|subprocess).Popen"),
        "check_output": (Call(subprocess.check_output, ["touch", canary]), "(commands|subprocess).check_output"),
        "pty.spawn": (Call(pty.spawn, ["touch", canary]), "pty.spawn"),
        "pydoc.pipepager": (Call(pydoc.pipepager, "", touch), "pydoc.pipepager"),
        "runpy.run_path": (Call(runpy.run_path, canary), "runpy.run_path"),
        "runpy._run_code": (Call(runpy._run_code, script, {}), "runpy._run_code"),
        "code.interact": (Call(code.interact), "code.interact"),
        "shutil.copy": (Call(shutil.copy, os.devnull, canary), "shutil.copy"),
        "shutil.rmtree": (Call(shutil.rmtree, canary), "shutil.rmtree"),
        "pathlib": (Call(pathlib.PosixPath, canary), "pathlib"),
        "partial": (Call(functools.partial, os.system, touch), "functools.partial"),
        "attrgetter": (Call(operator.attrgetter, "system"), "operator.attrgetter"),
        "methodcaller": (Call(operator.methodcaller, "touch"), "operator.methodcaller"),
        "ctypes": (Call(ctypes.CDLL, "libc.so.6"), "ctypes.CDLL"),
        "webbrowser": (Call(webbrowser.open, "http://127.0.0.1:9"), "webbrowser.open"),
        "marshal": (Call(marshal.loads, compiled), "marshal.loads"),
        "marshal in eval": (Call(eval, Call(marshal.loads, compiled)), "eval|marshal.loads"),
        "pickle in a pickle": (Call(pickle.loads, evil), "(_pickle|cPickle|pickle).loads"),
        "copyreg": (Call(copyreg._reconstructor, dict, dict, {}), "copyreg._reconstructor"),
        "torch.load": (Call(torch.load, canary), "torch.serialization.load"),
        "torch.hub": (Call(torch.hub.load, "me/evil", "f"), "torch.hub.load"),
        "torch.jit": (Call(torch.jit.load, canary), "torch.jit"),
        "torch.ops": (Call(torch.from_file, canary, True, 4), "torch.*from_file|getattr"),
        "numpy.load": (Call(np.load, canary), "numpy.load"),
        "a network": (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        "state of a stranger": (Stateful(types.SimpleNamespace, (), {"__class__": 1}), "types.SimpleNamespace"),
        "nested": ({"a": [({"b": Call(os.system, touch)},)]}, "posix.system"),
        "as an item": ({"x": Item(OrderedDict, Call(os.system, touch))}, "posix.system"),
        "behind tensors": ({"w": torch.zeros(2), "hook": Call(os.system, touch)}, "posix.system"),
        "beside a state dict": ({"state_dict": {"w": torch.zeros(2)}, "args": Call(os.system, touch)}, "posix.system"),
        "in the header": ({"state_dict": {"w": torch.zeros(2)}, "rkd": {"arch": Call(os.system, touch)}}, "posix.system"),
    }  # fmt: skip


KINDS = list(payloads("unused"))
WITH_TENSORS = ("a network", "behind tensors", "beside a state dict", "in the header")  # only torch can write them

RAW = {  # opcodes that `pickle` never writes for these
    "protocol 0": b"cposix\nsystem\n(S'touch %s'\ntR.",
    "INST": b"(S'touch %s'\niposix\nsystem\n.",
    "OBJ": b"(cposix\nsystem\nS'touch %s'\no.",
    "STACK_GLOBAL": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x7ftouch %s",
    "NEWOBJ_EX": b"\x80\x04cposix\nsystem\n)}\x92.",
    "renamed module": b"\x80\x02c__builtin__\neval\nX\x01\x00\x00\x001\x85R.",
    "persistent identifier": b"\x80\x02(U\x06modulecposix\nsystem\ntQ.",
    "persistent text": b"Pposix.system\n.",
    "extension": b"\x80\x02\x82\x01.",
    "stack underflow": b"\x80\x02R.",
    "memo that is not there": b"\x80\x02h\x05.",
    "no end": b"\x80\x02}",
    "state of an ordered dict": b"\x80\x02ccollections\nOrderedDict\n)R}U\x09__class__cposix\nsystem\nsb.",
    "call of a tensor": b"\x80\x02ctorch._utils\n_rebuild_parameter\n(cposix\nsystem\nI1\nNtR.",
}


# ------------------------------------------------------------------------------------------------------- containers


def pickled(value: Any) -> bytes:
    return value if isinstance(value, bytes) else pickle.dumps(value, 2)


def bare(value: Any) -> bytes:
    return pickled(value)


def in_zip(value: Any, **other: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickled(value))
        archive.writestr("archive/byteorder", b"little")
        archive.writestr("archive/version", b"3\n")
        for name, data in other.items():
            archive.writestr(f"archive/{name}", data)
    return buffer.getvalue()


def by_torch(value: Any, *, new: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=new)
    return buffer.getvalue()


def legacy(value: Any) -> bytes:
    head = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
    info = pickle.dumps({"protocol_version": 1001, "little_endian": True, "type_sizes": {}}, 2)
    return head + info + pickled(value) + pickle.dumps([], 2)


def in_legacy_head(value: Any) -> bytes:
    return pickled(value) + legacy({})


def broken_crc(value: Any) -> bytes:
    data = bytearray(in_zip(value))
    for mark, offset in ((b"PK\x03\x04", 14), (b"PK\x01\x02", 16)):
        struct.pack_into("<I", data, data.index(mark) + offset, 0xDEADBEEF)
    return bytes(data)


def two_records(value: Any) -> bytes:
    """The harmless record first: parsers disagree which of two members of a name counts."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps({}, 2))
        archive.writestr("b/data.pkl", pickled(value))
    return buffer.getvalue()


def in_tar(value: Any) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            data = pickled(value)
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def after_junk(value: Any) -> bytes:
    return b"\x00" * 7 + in_zip(value)


CONTAINERS: dict[str, tuple[Callable[[Any], bytes], str]] = {
    "bare": (bare, "t.pt"),
    "zip": (in_zip, "t.pt"),
    "legacy": (legacy, "t.pth.tar"),
    "legacy, in its head": (in_legacy_head, "t.pt"),
    "zip with a broken CRC": (broken_crc, "t.pt"),
    "zip with two records": (two_records, "t.pt"),
    "legacy tar": (in_tar, "t.tar"),
    "renamed to safetensors": (in_zip, "t.safetensors"),
    "bare, renamed to safetensors": (bare, "t.safetensors"),
    "behind junk": (after_junk, "t.pt"),
}


def refused(path: Path, canary: Path) -> str:
    with watched() as seen, pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert seen == []
    assert not canary.exists()
    return str(caught.value)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


@pytest.fixture(scope="module", autouse=True)
def _warm_up(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Modules that reading imports on first use are imported before anything is watched."""
    folder = tmp_path_factory.mktemp("warm")
    (folder / "a.pt").write_bytes(by_torch({"w": torch.zeros(2)}))
    (folder / "b.safetensors").write_bytes(save_safetensors({"w": torch.zeros(2)}))
    (folder / "c.pt").write_bytes(b"junk")
    (folder / "d.pt").write_bytes(legacy({}))
    for make in (bare, in_zip, legacy, in_tar):
        (folder / f"{make.__name__}.pt").write_bytes(make(Call(os.getpid)))
    for path in sorted(folder.iterdir()):
        try:
            read_checkpoint(path)
        except CheckpointError:
            continue


# ------------------------------------------------------------------------------------------------------------ tests


def test_the_watch_sees_what_pickle_would_do(tmp_path: Path, canary: Path) -> None:
    """The payloads are live, and the hook and the canary notice them."""
    for kind, event in {"os.system": "os.system", "eval": "open", "Popen": "subprocess.Popen", "open": "open"}.items():
        with watched() as seen:
            result = pickle.loads(pickle.dumps(payloads(str(canary))[kind][0], 2))  # noqa: S301
        if isinstance(result, subprocess.Popen):
            result.wait()
        elif isinstance(result, io.IOBase):
            result.close()
        assert any(name.startswith(event) for name in seen), (kind, seen)
        assert canary.exists()
        canary.unlink()


@pytest.mark.parametrize("container", ["bare", "zip", "legacy"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_payload_runs_and_the_global_that_it_wanted_is_named(
    tmp_path: Path, canary: Path, kind: str, container: str
) -> None:
    value, wanted = payloads(str(canary))[kind]
    make, name = CONTAINERS[container]
    (tmp_path / name).write_bytes(by_torch(value, new=container != "legacy") if kind in WITH_TENSORS else make(value))
    message = refused(tmp_path / name, canary)
    assert re.search(rf"wants to run \S*({wanted})", message), message
    assert "nothing was run" in message


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("kind", ["os.system", "eval", "torch.load", "nested"])
def test_no_container_runs_a_payload(tmp_path: Path, canary: Path, kind: str, container: str) -> None:
    make, name = CONTAINERS[container]
    (tmp_path / name).write_bytes(make(payloads(str(canary))[kind][0]))
    refused(tmp_path / name, canary)


@pytest.mark.parametrize("container", ["bare", "zip", "legacy"])
@pytest.mark.parametrize("kind", RAW)
def test_hand_made_pickles_run_nothing(tmp_path: Path, canary: Path, kind: str, container: str) -> None:
    raw = RAW[kind].replace(b"%s", str(canary).encode())
    make, name = CONTAINERS[container]
    (tmp_path / name).write_bytes(make(raw))
    refused(tmp_path / name, canary)


def test_the_gadget_of_loading_again_without_care_is_refused(tmp_path: Path, canary: Path) -> None:
    inner = tmp_path / "inner.pt"
    inner.write_bytes(bare(Call(os.system, f"touch {canary}")))
    careless = functools.partial(torch.load, weights_only=False)
    for outer in (Call(torch.load, str(inner)), Call(careless, str(inner)), Call(torch.load, str(inner), None, None)):
        path = tmp_path / "outer.pt"
        path.write_bytes(bare(outer))
        assert "wants to run" in refused(path, canary)


@pytest.mark.parametrize("container", ["bare", "zip", "legacy"])
@pytest.mark.parametrize("kind", ["os.system", "eval", "Popen", "nested"])
def test_torch_itself_is_asked_to_run_nothing(
    tmp_path: Path, canary: Path, monkeypatch: pytest.MonkeyPatch, kind: str, container: str
) -> None:
    """The second door holds without the first, which looks at the opcodes."""
    monkeypatch.setattr("rkd.teacher.check_pickle", lambda *_: None)
    make, name = CONTAINERS[container]
    (tmp_path / name).write_bytes(make(payloads(str(canary))[kind][0]))
    with watched() as seen, pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / name)
    assert seen == []
    assert not canary.exists()


def test_inspect_runs_nothing_either(tmp_path: Path, canary: Path) -> None:
    (tmp_path / "t.pt").write_bytes(in_zip(Call(os.system, f"touch {canary}")))
    with watched() as seen, pytest.raises(CheckpointError, match=r"posix\.system"):
        inspect_path(tmp_path / "t.pt")
    assert seen == []
    assert not canary.exists()


def test_the_environment_cannot_turn_the_safety_off(
    tmp_path: Path, canary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    (tmp_path / "t.pt").write_bytes(bare(Call(os.system, f"touch {canary}")))
    refused(tmp_path / "t.pt", canary)
