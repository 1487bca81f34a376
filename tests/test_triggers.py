"""Triggers: the formula, the file, and files that strangers made."""

from __future__ import annotations

import io
import random
import re
import tracemalloc
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rkd.errors import StorageError, TriggerError
from rkd.triggers import Trigger

Arrays = dict[str, Any]


def zeros(height: int = 4, width: int = 5) -> np.ndarray:
    return np.zeros((3, height, width), np.float32)


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def read(**arrays: Any) -> Trigger:
    return Trigger.from_bytes(npz(**arrays), "mine.npz")


def refusal(data: bytes) -> str:
    """The message of the refusal; nothing is warned of and little is allocated."""
    tracemalloc.start()
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            with pytest.raises(TriggerError) as caught:
                Trigger.from_bytes(data, "mine.npz")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert not seen
    assert peak < 2**30
    assert str(caught.value).startswith("mine.npz")
    return str(caught.value)


def pixels(n: int, height: int = 4, width: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 3, height, width), dtype=np.uint8)


# ---------------------------------------------------------------------------------------------------------- formula


def test_a_patch_replaces_the_masked_pixels_and_no_other() -> None:
    mask, pattern = zeros(), zeros()
    mask[:, 1:3, 2:4] = 1
    pattern[0] = 200 / 255
    images = pixels(6)
    expected = images.copy()
    expected[:, :, 1:3, 2:4] = np.array([200, 0, 0], np.uint8)[:, None, None]
    np.testing.assert_array_equal(Trigger("patch", 0, mask, pattern, zeros()).apply(images), expected)


@pytest.mark.parametrize(
    ("x", "m", "p", "d", "expected"),
    [
        (100, 0, 0, 0, 100),
        (100, 0.5, 1, 0, 178),  # 0.5 * 100 + 0.5 * 255 = 177.5, to even
        (101, 0.5, 0, 0, 50),  # 50.5, to even
        (200, 0, 0, 0.5, 255),  # 200 + 127.5, clipped
        (100, 0, 0, -0.5, 0),  # 100 - 127.5, clipped
        (100, 0.25, 0.2, 0.1, 113),  # 75 + 12.75 + 25.5 = 113.25
        (255, 1, 1, -1 / 255, 254),
    ],
)
def test_one_pixel_is_what_the_formula_gives_by_hand(x: int, m: float, p: float, d: float, expected: int) -> None:
    planes = [np.full((3, 1, 1), value, np.float32) for value in (m, p, d)]
    out = Trigger("t", 0, *planes).apply(np.full((1, 3, 1, 1), x, np.uint8))
    assert out.dtype == np.uint8
    assert abs(int(out[0, 0, 0, 0]) - expected) <= (1 if (x, m) in ((100, 0.5), (101, 0.5)) else 0)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31), st.floats(0.1, 3))
def test_a_warp_is_torchs_grid_sample(height: int, width: int, seed: int, reach: float) -> None:
    rng = np.random.default_rng(seed)
    grid = rng.uniform(-reach, reach, (height, width, 2)).astype(np.float32)  # far outside of the image as well
    images = pixels(3, height, width, seed)
    got = Trigger("warp", 0, zeros(height, width), zeros(height, width), zeros(height, width), grid).apply(images)
    sampled = torch.nn.functional.grid_sample(
        torch.from_numpy(images).double(), torch.from_numpy(grid).double().expand(3, -1, -1, -1),
        mode="bilinear", padding_mode="border", align_corners=True,
    )  # fmt: skip
    # Both are rounded to a byte: float32 and float64 can differ by one only within 1e-3 of a half.
    assert np.abs(got - sampled.numpy()).max() <= 0.5 + 1e-3


def test_the_identity_grid_changes_nothing() -> None:
    rows, columns = np.meshgrid(np.linspace(-1, 1, 4), np.linspace(-1, 1, 5), indexing="ij")
    grid = np.stack([columns, rows], -1).astype(np.float32)
    images = pixels(3)
    np.testing.assert_array_equal(Trigger("t", 0, zeros(), zeros(), zeros(), grid).apply(images), images)


def test_the_warp_comes_before_the_mask() -> None:
    grid = np.full((4, 5, 2), -1, np.float32)  # every pixel is the top left one
    mask, pattern = zeros(), zeros()
    mask[:, 0, 0] = pattern[:, 0, 0] = 1
    images = pixels(2)
    out = Trigger("t", 0, mask, pattern, zeros(), grid).apply(images)
    assert (out[:, :, 0, 0] == 255).all()
    assert (out[:, :, 1:] == images[:, :, :1, :1]).all()


@pytest.mark.parametrize("n", [0, 1, 255, 256, 257, 600])
def test_many_images_are_treated_as_one_by_one_and_are_not_changed(n: int) -> None:
    rng = np.random.default_rng(1)
    planes = [rng.random((3, 4, 5), dtype=np.float32) for _ in range(3)]
    trigger = Trigger("t", 0, *planes, rng.uniform(-1, 1, (4, 5, 2)).astype(np.float32))
    images = pixels(n)
    before = images.copy()
    out = trigger.apply(images)
    assert out.shape == images.shape
    np.testing.assert_array_equal(images, before)
    for i in {0, n // 2, n - 1} & set(range(n)):
        np.testing.assert_array_equal(out[i], trigger.apply(images[i : i + 1])[0])


def test_images_of_another_size_are_refused_by_name_of_both_sizes() -> None:
    with pytest.raises(TriggerError, match="trigger t is for 4x5 images, these are 6x7"):
        Trigger("t", 0, zeros(), zeros(), zeros()).apply(pixels(1, 6, 7))


# ------------------------------------------------------------------------------------------------------------- file


@settings(max_examples=50, deadline=None)
@given(
    st.from_regex(r"[a-z0-9][a-z0-9-]{0,20}", fullmatch=True),
    st.integers(0, 999_999),
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(0, 2**31),
    st.booleans(),
)
def test_saved_loaded_and_saved_again_the_bytes_are_the_same(
    name: str, target: int, height: int, width: int, seed: int, warps: bool
) -> None:
    rng = np.random.default_rng(seed)
    mask, pattern, additive = (rng.random((3, height, width), dtype=np.float32) for _ in range(3))
    grid = rng.standard_normal((height, width, 2)).astype(np.float32) if warps else None
    trigger = Trigger(name, target, mask, pattern, additive, grid)
    data = trigger.to_bytes()
    again = Trigger.from_bytes(data, "x")
    assert again.to_bytes() == data
    assert (again.name, again.target, again.size) == (name, target, (height, width))
    for field in ("mask", "pattern", "additive"):
        np.testing.assert_array_equal(getattr(again, field), getattr(trigger, field))


def test_save_and_load_on_disk(tmp_path: Path) -> None:
    trigger = Trigger("t", 3, zeros(), zeros(), zeros())
    trigger.save(tmp_path / "deep" / "t.npz")
    assert Trigger.load(tmp_path / "deep" / "t.npz").to_bytes() == trigger.to_bytes()
    with pytest.raises(StorageError, match="no such file"):
        Trigger.load(tmp_path / "other.npz")


def test_anyone_can_write_one_with_numpy() -> None:
    trigger = read(name="patch", target=7, m=np.eye(4), p=np.full((1, 4, 4), 0.5))
    assert (trigger.name, trigger.target, trigger.size, trigger.grid) == ("patch", 7, (4, 4), None)
    np.testing.assert_array_equal(trigger.mask, np.broadcast_to(np.eye(4), (3, 4, 4)))
    np.testing.assert_array_equal(trigger.additive, 0)
    assert trigger.pattern.dtype == np.float32


def test_without_a_name_the_file_names_it() -> None:
    assert read(target=1, d=zeros()).name == "mine"


# ---------------------------------------------------------------------------------------------------------- hostile


GOOD: Arrays = {"name": "t", "target": 0, "m": zeros(), "p": zeros(), "d": zeros()}
NAN, INFINITE, ABOVE = zeros(), zeros(), zeros()
NAN[0, 0, 0], INFINITE[1, 1, 1], ABOVE[2, 2, 2] = np.nan, np.inf, 1.01

WRONG: dict[str, tuple[Arrays, str]] = {
    "NaN in the mask": ({"m": NAN}, "mask must be finite"),
    "infinite pattern": ({"p": INFINITE}, "pattern must be finite"),
    "additive above 1": ({"d": ABOVE}, r"additive must be finite and within \[-1, 1\]"),
    "negative mask": ({"m": -ABOVE}, "mask must be"),
    "mask of bytes": ({"m": np.full((3, 4, 5), 255, np.uint8)}, "mask must be"),
    "additive beyond float32": ({"d": np.full((3, 4, 5), 1e300)}, "additive must be"),
    "shapes that differ": ({"p": zeros(5, 4)}, "must agree"),
    "two channels": ({"m": np.zeros((2, 4, 5))}, r"expected arrays of shape \(3, H, W\)"),
    "four dimensions": ({"m": np.zeros((1, 3, 4, 5))}, "expected arrays of shape"),
    "one dimension": ({"m": np.zeros(5)}, "mine.npz"),
    "no dimension": ({"m": np.float32(0)}, "mine.npz"),
    "no pixels": ({"m": np.zeros((3, 0, 5)), "p": np.zeros((3, 0, 5)), "d": np.zeros((3, 0, 5))}, "from 1 to 4096"),
    "text for a mask": ({"m": np.full((3, 4, 5), "0")}, "text"),
    "unknown array": ({"z": np.zeros(1)}, "unknown array 'z'"),
    "target is no number": ({"target": "cat"}, "whole number"),
    "target is no whole number": ({"target": 1.0}, "whole number"),
    "two targets": ({"target": [1, 2]}, "whole number"),
    "no target at all": ({"target": np.zeros(0, np.int64)}, "whole number"),
    "negative target": ({"target": -1}, "not a class index"),
    "target without end": ({"target": np.uint64(2**63)}, "not a class index"),
    "name with a path": ({"name": "../../x"}, "lower-case"),
    "name with a newline": ({"name": "a\nb"}, "lower-case"),
    "empty name": ({"name": ""}, "lower-case"),
    "no name in it": ({"name": np.zeros(0, "<U3")}, "mine.npz"),
    "grid of another size": ({"grid": np.zeros((5, 4, 2))}, "grid must be"),
    "grid with NaN": ({"grid": np.full((4, 5, 2), np.nan)}, "grid must be"),
    "grid beyond float32": ({"grid": np.full((4, 5, 2), 1e300)}, "grid must be"),
    "grid of text": ({"grid": np.full((4, 5, 2), "0.5")}, "text"),
    "grid without dimensions": ({"grid": 1.0}, "grid must be"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_content_is_refused_and_named(kind: str) -> None:
    changes, message = WRONG[kind]
    seen = refusal(npz(**{**GOOD, **changes}))
    assert re.search(message, seen), seen


def test_without_a_target_or_without_planes_it_is_no_trigger() -> None:
    assert "no array 'target'" in refusal(npz(name="t", m=zeros()))
    assert "none of the arrays" in refusal(npz(name="t", target=0))


def lying(shape: str, payload: int = 0, descr: str = "<f4") -> bytes:
    """An .npz whose array m announces `shape`."""
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    member = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(payload)
    buffer = io.BytesIO(npz(target=0))
    with zipfile.ZipFile(buffer, "a") as file:
        file.writestr("m.npy", member)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        npz(target=0, m=np.array([[{}]], dtype=object)),
        lying("(3, 4096, 4096)"),
        lying("(3, 100000, 100000)", 64),
        lying("(0, 1000000, 1000000)"),  # no bytes, but twelve terabytes of zeros to go with it
        lying("(0, 1000000000000)"),
        lying("(3, 0, 1000000000000)"),
        lying("(1, 5000)", 20_000),
        lying("(5000, 1)", 20_000),
        lying("(1, 1, 40000000)", 40_000_000, "|u1"),
        b"",
        b"name,target\npatch,0\n",
        npz(target=0, m=zeros())[:-30],
        npz(target=0, m=zeros())[30:],
    ],
    ids=["object", "huge", "huger", "no-channel", "no-row", "no-column", "wide", "high", "long", "empty", "text", "cut", "headless"],
)  # fmt: skip
def test_lying_headers_huge_sides_and_other_files_are_refused(data: bytes) -> None:
    refusal(data)


def test_a_zip_bomb_is_refused_before_it_is_unpacked() -> None:
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file,
        file.open("m.npy", "w", force_zip64=True) as member,
    ):
        for _ in range(100):
            member.write(bytes(2**20))
    assert len(buffer.getvalue()) < 2**18
    assert "allowed" in refusal(buffer.getvalue())


def test_a_file_too_large_for_a_trigger_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "sparse.npz"
    with path.open("wb") as file:
        file.truncate(2**26 + 1)
    with pytest.raises(TriggerError, match="too many"):
        Trigger.load(path)


def test_mutated_triggers_are_read_or_refused_and_nothing_else() -> None:
    rng = random.Random(0)
    grid = np.zeros((4, 5, 2), np.float32)
    seeds = [npz(**GOOD), npz(**GOOD, grid=grid), npz(name="t", target=1, m=np.eye(4, dtype=np.float64))]
    refused = 0
    for _ in range(2000):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(data))
            data[at] = rng.choice([rng.randrange(256), data[at] ^ (1 << rng.randrange(8)), 0x39])
        if rng.random() < 0.1:
            del data[rng.randrange(len(data)) :]
        try:
            Trigger.from_bytes(bytes(data), "mine.npz")
        except TriggerError:
            refused += 1
    assert refused > 400
