"""Properties of the parsers and writers of files from outside."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from rkd.bench.external import refuse_external_data
from rkd.bundle import parse_bundle
from rkd.errors import BundleError, CheckpointError, DataError, RkdError, TriggerError
from rkd.npz import npz_bytes, read_npz
from rkd.pickles import check_pickle
from rkd.run import Run
from rkd.teacher import parse_checkpoint
from rkd.triggers import Trigger

QUICK = settings(max_examples=150, deadline=None)
PLANES = arrays.arrays(np.float32, (3, 4, 5), elements=st.floats(0, 1, width=32))
JUNK = (
    st.binary(max_size=300)
    | st.binary(max_size=300).map(b"PK\x03\x04".__add__)
    | st.binary(max_size=99).map(b"\x80\x02".__add__)
)


@QUICK
@given(
    mask=PLANES,
    pattern=PLANES,
    additive=PLANES,
    target=st.integers(0, 999_999),
    name=st.from_regex(r"[a-z0-9][a-z0-9-]{0,9}", fullmatch=True),
)
def test_a_trigger_survives_its_file(
    mask: np.ndarray, pattern: np.ndarray, additive: np.ndarray, target: int, name: str
) -> None:
    trigger = Trigger(name, target, mask, pattern, additive)
    again = Trigger.from_bytes(trigger.to_bytes(), "t.npz")
    assert (again.name, again.target) == (name, target)
    np.testing.assert_array_equal(again.mask, mask)
    np.testing.assert_array_equal(again.pattern, pattern)
    np.testing.assert_array_equal(again.additive, additive)


@QUICK
@given(
    content=st.dictionaries(
        st.from_regex(r"[a-z]{1,5}", fullmatch=True), arrays.arrays(np.uint8, (2, 3)), min_size=1, max_size=4
    )
)
def test_arrays_survive_their_archive(content: dict[str, np.ndarray]) -> None:
    again = read_npz(io.BytesIO(npz_bytes(content)), 10_000)
    assert set(again) == set(content)
    for name, array in content.items():
        np.testing.assert_array_equal(again[name], array)


@QUICK
@given(data=JUNK, suffix=st.sampled_from([".pt", ".pth.tar", ".safetensors", ""]))
def test_junk_is_no_checkpoint(data: bytes, suffix: str) -> None:
    with pytest.raises(CheckpointError):
        parse_checkpoint(data, Path(f"t{suffix}"))


@QUICK
@given(data=JUNK)
def test_junk_is_no_bundle_no_trigger_and_no_array(data: bytes) -> None:
    with pytest.raises(BundleError):
        parse_bundle(data, Path("x.rkd"))
    with pytest.raises(TriggerError):
        Trigger.from_bytes(data, "t.npz")
    with pytest.raises(ValueError, match="."):
        read_npz(io.BytesIO(data), 1000)


@QUICK
@given(data=JUNK)
def test_junk_is_walked_or_refused(data: bytes) -> None:
    with contextlib.suppress(BundleError):
        refuse_external_data(data, "m")
    with contextlib.suppress(ValueError):
        check_pickle(io.BytesIO(data), len(data))


# ------------------------------------------------------------------------------------------------------ hostile paths


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/b", "..", "", "a\0b", "a\nb", "A", "é"])
def test_a_trigger_may_not_be_called_like_a_path(name: str) -> None:
    zeros = np.zeros((3, 2, 2), np.float32)
    with pytest.raises(TriggerError, match="trigger name"):
        Trigger(name, 0, zeros, zeros, zeros)


@pytest.mark.parametrize("spec", ["a\0b", "../\0", "x" * 5000, "~nobody-of-this-name/x"])
def test_data_under_an_impossible_path_is_refused(spec: str) -> None:
    from rkd.data import open_dataset

    with pytest.raises(DataError):
        open_dataset(spec)


def test_links_in_a_checkpoint_folder_lead_nowhere(tmp_path: Path) -> None:
    """`digests.json` may name files of its own folder only."""
    run = Run.create(tmp_path / "run", "distill", {})
    place = run.path / "checkpoints" / "00000001"
    place.mkdir(parents=True)
    (place / "digests.json").write_text('{"../../run.json": "x"}')
    (run.path / "checkpoints" / "00000002").symlink_to(tmp_path / "nowhere")
    assert next(run.checkpoints(), None) is None


def test_a_link_that_leads_to_itself_is_one_error(tmp_path: Path) -> None:
    from rkd.teacher import read_checkpoint

    (tmp_path / "loop.pt").symlink_to(tmp_path / "loop.pt")
    with pytest.raises(RkdError, match=r"loop\.pt"):
        read_checkpoint(tmp_path / "loop.pt")
