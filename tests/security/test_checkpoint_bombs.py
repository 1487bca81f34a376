"""Checkpoints that run no code but would take all memory or hours, by what torch's own list of safe calls allows."""

from __future__ import annotations

import collections
import functools
import io
import pickle
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rkd.errors import CheckpointError
from rkd.network import Network
from rkd.teacher import read_checkpoint

Refusal = Callable[[Callable[[], object]], str]


def in_zip(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", b"little")
        archive.writestr("archive/version", b"3\n")
    return buffer.getvalue()


def in_legacy(data: bytes) -> bytes:
    parts = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}})
    return b"".join(pickle.dumps(part, 2) for part in parts) + data + pickle.dumps([], 2)


def by_torch(value: Any, *, new: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=new)
    return buffer.getvalue()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def state_of(made: bytes) -> bytes:
    """The pickle of {"w": what the opcodes `made` make}."""
    return b"\x80\x02}" + text("w") + made + b"s."


def doubled(times: int) -> bytes:
    """Opcodes of a tuple of two references to a tuple of two ...: short to write, 2^times long to hash."""
    memo = [struct.pack("<I", 1000 + i) for i in range(times)]
    return b"K\x01\x85" + b"".join(b"r" + i + b"j" + i + b"\x86" for i in memo)


def number(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


TENSOR = b"ctorch\nFloatTensor\n" + number(2**27) + b"\x85R"  # half a gibibyte out of thirty bytes
STORAGE = b"ctorch.storage\nUntypedStorage\n" + number(2**29) + b"\x85R"

# One technique each: the opcodes of the pickle, and what the message says.
TECHNIQUES: dict[str, tuple[bytes, str]] = {
    "a key whose hash takes hours": (b"\x80\x02}" + doubled(40) + b"K\x01s.", "key of a dictionary"),
    "a set of such values": (state_of(b"c__builtin__\nset\n](" + doubled(40) + b"e\x85R"), "builtins.set with odd"),
    "a counter of such values": (
        state_of(b"ccollections\nCounter\n](" + doubled(40) + b"e\x85R"), "collections.Counter with odd"
    ),
    "an ordered dictionary of such keys": (
        state_of(b"ccollections\nOrderedDict\n](](" + doubled(40) + b"K\x01ee\x85R"), "OrderedDict with odd"
    ),
    "a tensor by its class": (state_of(TENSOR), "wants to run torch.FloatTensor"),
    "a storage by its class": (state_of(STORAGE), "torch.storage.UntypedStorage"),
    "many tensors in a list": (
        b"\x80\x02](" + b"ctorch\nFloatTensor\nq\x00" + number(2**27) + b"\x85R" + (b"h\x00" + number(2**27) + b"\x85R") * 100 + b"e.",
        "torch.FloatTensor",
    ),
    "a tensor converted to a larger type": (
        state_of(b"ctorch._utils\n_rebuild_device_tensor_from_cpu_tensor\n(" + TENSOR + b"ctorch\nfloat64\n" + text("cpu") + b"\x89tR"),
        "_rebuild_device_tensor_from_cpu_tensor",
    ),
    "a quantised tensor": (state_of(b"ctorch._utils\n_rebuild_qtensor\n)R"), "_rebuild_qtensor"),
    "a sparse tensor": (state_of(b"ctorch._utils\n_rebuild_sparse_tensor\n)R"), "_rebuild_sparse_tensor"),
    "a tensor subclass that calls what it is given": (state_of(b"ctorch._tensor\n_rebuild_from_type_v2\n)R"), "_rebuild_from_type_v2"),
    "a wrapper subclass": (state_of(b"ctorch._utils\n_rebuild_wrapper_subclass\n)R"), "_rebuild_wrapper_subclass"),
    "a parameter with attributes": (
        state_of(b"ctorch._utils\n_rebuild_parameter_with_state\n)R"), "_rebuild_parameter_with_state"
    ),
    "an array from numpy": (state_of(b"ctorch._utils\n_rebuild_device_tensor_from_numpy\n)R"), "from_numpy"),
    "a bytearray by its length": (state_of(b"c__builtin__\nbytearray\n" + number(2**40) + b"\x85R"), "bytearray"),
    "a text through a codec that takes the square of its length": (
        state_of(b"c_codecs\nencode\n" + text("e" * 200_000) + text("idna") + b"\x86R"),
        "_codecs.encode with odd",
    ),
    "a new object of a class": (state_of(b"ctorch\nSize\n)\x81"), "torch.Size"),
    "attributes of a tensor": (
        state_of(b"ctorch._utils\n_rebuild_parameter\n)R}" + text("data") + b"K\x01sb"), "sets attributes"
    ),
    "a call of a call": (state_of(b"ccollections\nOrderedDict\n)R)R"), "no function"),
    "an item of what is no dictionary": (b"\x80\x02K\x01" + text("a") + b"K\x01s.", "no dictionary"),
    "an opcode that torch does not write": (b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00N.", "FRAME"),
    "a memo that is not there": (b"\x80\x02h\x05.", "damaged"),
    "no mark": (b"\x80\x02t.", "damaged"),
    "more opcodes than any state dict": (b"\x80\x02]" + b"Na" * 1_100_000 + b".", "2,000,000 opcodes"),
}  # fmt: skip


@pytest.mark.parametrize("wrap", [in_zip, in_legacy], ids=["zip", "legacy"])
@pytest.mark.parametrize("technique", TECHNIQUES)
def test_what_would_take_all_memory_or_hours_is_refused_before_it_is_made(
    tmp_path: Path, refusal_in_limits: Refusal, technique: str, wrap: Callable[[bytes], bytes]
) -> None:
    data, said = TECHNIQUES[technique]
    path = tmp_path / "t.pt"
    path.write_bytes(wrap(data))
    message = refusal_in_limits(lambda: read_checkpoint(path))
    assert said in message, message


@pytest.mark.parametrize("new", [True, False])
def test_a_header_that_stands_for_more_than_fits_anywhere_is_refused(
    tmp_path: Path, refusal_in_limits: Refusal, new: bool
) -> None:
    value: list[Any] = [1]
    for _ in range(12):
        value = [value] * 10
    path = tmp_path / "t.pt"
    path.write_bytes(by_torch({"state_dict": {"w": torch.zeros(2)}, "rkd": {"arch": value}}, new=new))
    assert "100,000 values" in refusal_in_limits(lambda: read_checkpoint(path))


def test_a_header_that_holds_itself_is_refused(tmp_path: Path, refusal_in_limits: Refusal) -> None:
    value: list[Any] = []
    value.append(value)
    path = tmp_path / "t.pt"
    path.write_bytes(by_torch({"state_dict": {"w": torch.zeros(2)}, "rkd": {"arch": value}}))
    assert "100,000 values" in refusal_in_limits(lambda: read_checkpoint(path))


def test_a_network_of_ten_thousand_layers_that_a_header_names_is_not_made(
    tmp_path: Path, refusal_in_limits: Refusal
) -> None:
    from safetensors.torch import save

    header = '{"arch": "wrn-9994-999", "classes": ["a", "b"], "size": [8, 8], "mean": [0, 0, 0], "std": [1, 1, 1]}'
    (tmp_path / "t.safetensors").write_bytes(save({"w": torch.zeros(2)}, {"rkd": header}))
    assert "wrn-9994-999" in refusal_in_limits(lambda: Network.load(tmp_path / "t.safetensors"))


# ---------------------------------------------------------------------------------------------------------- archives


def test_an_index_of_a_million_entries_is_not_read(tmp_path: Path, refusal_in_limits: Refusal) -> None:
    entry = b"PK\x01\x02" + bytes(42)
    index = entry * 400_000
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 0xFFFF, 0xFFFF, len(index), 0, 0)
    path = tmp_path / "t.pt"
    path.write_bytes(index + end)
    assert "t.pt" in refusal_in_limits(lambda: read_checkpoint(path))
    path.write_bytes(b"PK\x03\x04" + index[4:] + end)
    assert "its index has more than" in refusal_in_limits(lambda: read_checkpoint(path))


def test_an_archive_that_two_readers_could_read_differently_is_refused(
    tmp_path: Path, refusal_in_limits: Refusal
) -> None:
    good = by_torch({"w": torch.zeros(2)})
    other = in_zip(pickle.dumps({"w": 1}, 2))
    path = tmp_path / "t.pt"
    for name, data in {
        "bytes behind": good + b"\0",
        "a comment": good[:-2] + b"\x01\x00x",
        "an archive before": b"PK\x03\x04" + other[4:] + good,
        "an archive behind": good + other,
    }.items():
        path.write_bytes(data)
        assert "damaged or was cut short" in refusal_in_limits(lambda: read_checkpoint(path)), name


def test_a_compressed_bomb_is_not_unpacked(
    tmp_path: Path, refusal_in_limits: Refusal, pack: Callable[..., bytes]
) -> None:
    path = tmp_path / "t.pt"
    path.write_bytes(pack([("archive/data.pkl", bytes(2**24))], zipfile.ZIP_DEFLATED))
    assert "compressed inside" in refusal_in_limits(lambda: read_checkpoint(path))


@pytest.mark.parametrize("name", ["t.pt", "t.safetensors"])
def test_ten_gibibytes_of_nothing_are_not_read(tmp_path: Path, refusal_in_limits: Refusal, name: str) -> None:
    with (tmp_path / name).open("wb") as file:
        file.truncate(10 * 2**30)
    assert "does not begin as a checkpoint" in refusal_in_limits(lambda: read_checkpoint(tmp_path / name))


# ------------------------------------------------------------------------------- what must still be read, as ever


GOOD: dict[str, Any] = {
    "a module's state": torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)).state_dict(),
    "with an optimizer": {
        "state_dict": {"w": torch.zeros(2)},
        "optimizer": torch.optim.Adam([torch.nn.Parameter(torch.zeros(2))]).state_dict(),
    },
    "with a schedule": {"model": {"w": torch.zeros(2)}, "milestones": collections.Counter({30: 1, 60: 1})},
    "with sizes, types and devices": {
        "model": {"w": torch.zeros(2)},
        "meta": [torch.Size([1, 2]), torch.float16, torch.device("cpu"), {1, 2}, b"bytes", 1j, 2**40, None, ("a", 1)],
    },
    "with a numpy number": {"model": {"w": torch.zeros(2)}, "best": np.float64(0.5), "epoch": np.int64(3)},
    "parameters and views": {"w": torch.nn.Parameter(torch.zeros(2)), "v": torch.arange(6.0)[2:4]},
    "many names": {f"layer{i}.weight": torch.zeros(1) for i in range(300)},
}


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("kind", GOOD)
def test_what_training_scripts_save_is_read(tmp_path: Path, kind: str, new: bool) -> None:
    path = tmp_path / "t.pt"
    path.write_bytes(by_torch(GOOD[kind], new=new))
    assert read_checkpoint(path).tensors


def test_what_python_2_saved_is_read(tmp_path: Path) -> None:
    """There an OrderedDict was a call with a list of [key, value] lists."""
    new = by_torch({"w": torch.ones(2)}, new=False)
    head = b"ccollections\nOrderedDict\nq\x00](](X\x01\x00\x00\x00wq\x01"
    item = re.compile(rb"}q\x00X\x01\x00\x00\x00wq\x01(.*?)s\.", re.DOTALL)
    old = item.sub(lambda found: head + found[1] + b"ee\x85R.", new, count=1)
    assert old != new
    path = tmp_path / "t.pt"
    path.write_bytes(old)
    assert read_checkpoint(path).tensors["w"].tolist() == [1, 1]


def test_a_gadget_of_a_partial_call_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.pt"
    path.write_bytes(pickle.dumps(functools.partial(print, "x"), 2))
    with pytest.raises(CheckpointError, match=r"wants to run functools\.partial"):
        read_checkpoint(path)


class Described:
    """A tensor with 4 numbers, as a file describes it: how many its storage has, where it begins, sizes and strides."""

    def __init__(self, storage: Any, offset: int, sizes: tuple[int, ...], strides: tuple[int, ...]) -> None:
        self.arguments = (storage, offset, sizes, strides, False, collections.OrderedDict())

    def __reduce__(self) -> tuple[Any, ...]:
        return torch._utils._rebuild_tensor_v2, self.arguments


class Stored:
    def __init__(self, count: object) -> None:
        self.about = ("storage", torch.FloatStorage, "0", "cpu", count, None)


def described(tensor: Described, new: bool) -> bytes:
    class Pickler(pickle.Pickler):
        def persistent_id(self, value: object) -> object:
            return value.about[: 5 if new else 6] if isinstance(value, Stored) else None

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump({"w": tensor})
    if not new:
        return in_legacy(buffer.getvalue())[:-len(pickle.dumps([], 2))] + pickle.dumps(["0"], 2) + struct.pack("<q4f", 4, *range(4))  # fmt: skip
    archive = io.BytesIO(in_zip(buffer.getvalue()))
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr("archive/data/0", struct.pack("<4f", *range(4)))
    return archive.getvalue()


@pytest.mark.parametrize("new", [True, False])
def test_a_tensor_within_its_storage_is_read(tmp_path: Path, new: bool) -> None:
    (tmp_path / "t.pt").write_bytes(described(Described(Stored(4), 1, (3, 1), (1, 7)), new))
    assert read_checkpoint(tmp_path / "t.pt").tensors["w"].flatten().tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (Described(Stored(4), 0, (2**31,), (1,)), "odd arguments"),
        (Described(Stored(4), 0, (4, 1), (2**40, 1)), "odd arguments"),
        (Described(Stored(4), 2**31, (2,), (1,)), "odd arguments"),
        (Described(Stored(4), -1, (2,), (1,)), "odd arguments"),
        (Described(Stored(4), 0, (2,), (-1,)), "odd arguments"),
        (Described(Stored(4), 0, (2, 2), (1,)), "odd arguments"),
        (Described(Stored(2**33), 0, (2,), (1,)), "more numbers than the file can hold"),
        (Described(Stored(-4), 0, (2,), (1,)), "oddly"),
        (Described(Stored("4"), 0, (2,), (1,)), "oddly"),
    ],
)
def test_what_a_tensor_announces_beyond_its_storage_is_not_made(
    tmp_path: Path, refusal_in_limits: Refusal, tensor: Described, says: str, new: bool
) -> None:
    (tmp_path / "t.pt").write_bytes(described(tensor, new))
    assert says in refusal_in_limits(lambda: read_checkpoint(tmp_path / "t.pt"))


def test_an_archive_that_announces_a_record_of_4_gib_is_refused(tmp_path: Path, refusal_in_limits: Refusal) -> None:
    data = bytearray(by_torch({"w": torch.zeros(4)}))
    at = data.rindex(b"PK\x01\x02", 0, data.rindex(b"data/0"))
    data[at + 20 : at + 28] = struct.pack("<II", 2**32 - 2, 2**32 - 2)
    (tmp_path / "t.pt").write_bytes(data)
    assert "damaged" in refusal_in_limits(lambda: read_checkpoint(tmp_path / "t.pt"))
