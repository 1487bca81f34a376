"""Archives of arrays that strangers made: read exactly, or refused with a ValueError."""

from __future__ import annotations

import io
import pickle
import random
import struct
import tracemalloc
import warnings
import zipfile
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rkd.npz import npz_bytes, read_npz, read_npz_rows

LIMIT = 2**20


def read(data: bytes, limit: int = LIMIT, **kwargs: Any) -> dict[str, np.ndarray]:
    return read_npz(io.BytesIO(data), limit, **kwargs)


def npy(header: str, payload: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    text = header.encode("latin1") + b"\n"
    length = struct.pack("<H" if version == b"\x01\x00" else "<I", len(text))
    return b"\x93NUMPY" + version + length + text + payload


def archive(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return buffer.getvalue()


def header(shape: str, descr: str = "'<f4'", order: str = "False") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(
        st.from_regex(r"[a-z]{1,8}", fullmatch=True).filter(lambda name: name not in ("file", "args")),
        hnp.arrays(
            st.sampled_from(["u1", "i8", "f4", "f8", "?", "<U3"]), hnp.array_shapes(min_dims=1, max_dims=3, max_side=4)
        ),
        max_size=4,
    )
)
def test_what_is_written_is_read_and_equal_arrays_give_equal_bytes(arrays: dict[str, np.ndarray]) -> None:
    data = npz_bytes(arrays)
    assert npz_bytes({name: array.copy() for name, array in arrays.items()}) == data
    found = read(data)
    assert set(found) == set(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_numpys_own_archives_are_read(save: Any) -> None:
    arrays = {"f": np.asfortranarray(np.arange(12).reshape(3, 4)), "scalar": np.array(5), "empty": np.zeros((0, 3))}
    buffer = io.BytesIO()
    save(buffer, **arrays)
    found = read(buffer.getvalue())
    for name, array in arrays.items():
        assert found[name].shape == array.shape
        np.testing.assert_array_equal(found[name], array)


def test_big_endian_and_version_2_headers_are_read() -> None:
    data = archive(
        {
            "a.npy": npy(header("(2,)", "'>i4'"), struct.pack(">ii", 7, -7)),
            "b.npy": npy(header("(1,)"), struct.pack("<f", 0.5), b"\x02\x00"),
        }
    )
    found = read(data)
    assert found["a"].tolist() == [7, -7]
    assert found["b"].tolist() == [0.5]


class Boom:
    def __reduce__(self) -> Any:
        return pytest.fail, ("a pickle was run",)


HOSTILE = {
    "object array": archive({"x.npy": npy(header("(1,)", "'|O'"), pickle.dumps([Boom()]))}),
    "record array": archive({"x.npy": npy(header("(1,)", "[('a', '<f4')]"), bytes(4))}),
    "sub-array type": archive({"x.npy": npy(header("(1,)", "('<f4', (2, 2))"), bytes(16))}),
    "dates": archive({"x.npy": npy(header("(1,)", "'<M8[s]'"), bytes(8))}),
    "complex": archive({"x.npy": npy(header("(1,)", "'<c8'"), bytes(8))}),
    "bytes": archive({"x.npy": npy(header("(1,)", "'|S4'"), bytes(4))}),
    "header announces more": archive({"x.npy": npy(header("(1000000000, 1000000000)"), bytes(64))}),
    "header announces a little more": archive({"x.npy": npy(header("(17,)"), bytes(64))}),
    "negative length": archive({"x.npy": npy(header("(-1,)"), bytes(64))}),
    "two negative lengths": archive({"x.npy": npy(header("(-2, -2)"), bytes(64))}),
    "zero-width texts without end": archive({"x.npy": npy(header("(10**18,)".replace("10**18", "9" * 18), "'<U0'"))}),
    "shape is code": archive({"x.npy": npy(header("(__import__('os').getpid(),)"), bytes(4))}),
    "header is no dictionary": archive({"x.npy": npy("[1, 2]", bytes(4))}),
    "header nested deeply": archive({"x.npy": npy("(" * 9000 + ")" * 9000, bytes(4))}),
    "python 2 integers": archive({"x.npy": npy(header("(1L,)"), bytes(4))}),
    "invalid escape in the header": archive({"x.npy": npy(header("(1,)", "'\\d'"), bytes(4))}),
    "version 3": archive({"x.npy": npy(header("(1,)"), bytes(4), b"\x03\x00")}),
    "version 9": archive({"x.npy": npy(header("(1,)"), bytes(4), b"\x09\x00")}),
    "not an array": archive({"x.npy": b"hello"}),
    "empty member": archive({"x.npy": b""}),
    "encrypted": bytearray(archive({"x.npy": npy(header("(1,)"), bytes(4))})),
    "bomb": archive({"x.npy": npy(header("(8388608,)"), bytes(2**25))}, zipfile.ZIP_DEFLATED),
    "too many arrays": archive({f"{i}.npy": npy(header("(1,)"), bytes(4)) for i in range(65)}),
    "a bare array": npy(header("(1,)"), bytes(4)),
    "a pickle": pickle.dumps({"x": [1]}),
    "nothing": b"",
    "text": b"PK is not enough",
}
_central = HOSTILE["encrypted"].index(b"PK\x01\x02")
HOSTILE["encrypted"][_central + 8] |= 1


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_archives_are_refused_without_allocating_or_warning(kind: str) -> None:
    tracemalloc.start()
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            with pytest.raises(ValueError, match=r".") as caught:
                read(bytes(HOSTILE[kind]))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert not seen
    assert caught.type is ValueError
    assert peak < 16 * LIMIT


def test_a_bomb_that_lies_about_its_size_in_the_index_gives_no_more_than_it_announced() -> None:
    data = bytearray(HOSTILE["bomb"])
    central = data.index(b"PK\x01\x02")
    struct.pack_into("<I", data, central + 24, 1000)  # size when unpacked
    with pytest.raises(ValueError, match=r"announces|CRC|fewer"):
        read(bytes(data))


def test_the_limits_are_of_all_arrays_together() -> None:
    two = archive({f"{name}.npy": npy(header("(100,)"), bytes(400)) for name in "ab"})
    size = sum(entry.file_size for entry in zipfile.ZipFile(io.BytesIO(two)).infolist())
    assert set(read(two, size)) == {"a", "b"}
    with pytest.raises(ValueError, match="allowed"):
        read(two, size - 1)
    with pytest.raises(ValueError, match="at most 1 expected"):
        read(two, members=1)


def test_mutated_archives_are_read_or_refused_and_nothing_else() -> None:
    rng = random.Random(0)
    seeds = [
        npz_bytes({"x": np.arange(12, dtype=np.float32), "name": np.array("abc")}),
        archive({"x.npy": npy(header("(3, 4)"), bytes(48))}, zipfile.ZIP_DEFLATED),
    ]
    refused = 0
    for _ in range(3000):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.2:
            del data[rng.randrange(len(data)) :]
        try:
            read(bytes(data))
        except ValueError:
            refused += 1
    assert refused > 500


@pytest.mark.parametrize("order", "<>")
def test_text_with_a_character_that_does_not_exist_is_refused(order: str) -> None:
    header = f"{{'descr': '{order}U2', 'fortran_order': False, 'shape': (1,), }}"
    spelled = struct.pack(f"{order}2I", 0x41, 0x10FFFF)
    assert read(archive({"name.npy": npy(header, spelled)}))["name"][0] == "A\U0010ffff"
    with pytest.raises(ValueError, match=r"name\.npy: holds a character that does not exist"):
        read(archive({"name.npy": npy(header, struct.pack(f"{order}2I", 0x41, 0x110000))}))


# ---------------------------------------------------------------------------------------------------- row by row


def rows(data: bytes, size: int = 3, row: tuple[int, ...] = (2, 5)) -> list[np.ndarray]:
    return list(read_npz_rows(io.BytesIO(data), "x", np.uint8, row, size))


def compressed(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


@pytest.mark.parametrize("size", [1, 3, 7, 100])
@pytest.mark.parametrize("write", [npz_bytes, lambda arrays: compressed(**arrays)])
def test_rows_are_those_of_the_whole_array(size: int, write: Any) -> None:
    x = np.random.default_rng(0).integers(0, 256, (7, 2, 5), dtype=np.uint8)
    parts = rows(write({"a": np.zeros(3), "x": x, "z": np.ones(2)}), size)
    assert all(len(part) == size for part in parts[:-1])
    np.testing.assert_array_equal(np.concatenate(parts), x)


def test_no_more_rows_are_held_than_were_asked_for() -> None:
    data = compressed(x=np.zeros((2000, 100, 100), np.uint8))  # 20 MB
    tracemalloc.start()
    try:
        assert sum(len(part) for part in read_npz_rows(io.BytesIO(data), "x", np.uint8, (100, 100), 10)) == 2000
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("x", "says"),
    [
        (np.zeros((4, 2, 6), np.uint8), r"x is uint8\(4, 2, 6\)"),
        (np.zeros((4, 2, 5), np.float32), r"x is float32\(4, 2, 5\)"),
        (np.zeros(4, np.uint8), r"x is uint8\(4,\)"),
        (np.zeros((5, 2, 4), np.uint8).T.copy().reshape(4, 2, 5, order="F"), "x is in Fortran's order"),
    ],
)
def test_rows_of_another_kind_are_named(x: np.ndarray, says: str) -> None:
    with pytest.raises(TypeError, match=says):
        rows(npz_bytes({"x": x}) if "Fortran" not in says else fortran(x))


def fortran(x: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, x=np.asfortranarray(x))
    return buffer.getvalue()


def test_an_absent_array_is_named() -> None:
    with pytest.raises(TypeError, match="there is no x"):
        rows(npz_bytes({"y": np.zeros(3)}))


def test_a_damaged_row_is_a_value_error_once_all_are_read() -> None:
    good = npz_bytes({"x": np.arange(70, dtype=np.uint8).reshape(7, 2, 5)})
    at = good.index(bytes(range(10, 30)))
    with pytest.raises(ValueError, match="CRC"):
        rows(good[:at] + b"\xff" + good[at + 1 :])
    with pytest.raises(ValueError, match="cut short"):
        rows(archive({"x.npy": npy(header("(9, 2, 5)", "'|u1'"), bytes(70))}))


def test_arrays_that_were_not_asked_for_are_not_read_and_do_not_count() -> None:
    data = npz_bytes({"x": np.zeros(LIMIT, np.uint8), "y": np.arange(3)})
    assert list(read(data, 1000, only=("y", "z"))) == ["y"]
    with pytest.raises(ValueError, match="at most"):
        read(data, 1000)
