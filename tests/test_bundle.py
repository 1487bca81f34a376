"""The .rkd file: what was written is read, and nothing else is."""

from __future__ import annotations

import dataclasses
import io
import json
import random
import re
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rkd.bundle import Bundle, evaluation_bytes, parse_bundle, read_bundle, write_bundle
from rkd.errors import BundleError, StorageError
from rkd.files import sha256, to_json
from rkd.ledger import Ledger, Step
from rkd.metrics import Proportion
from rkd.signing import make_keys, read_private, read_public
from rkd.target import load_target
from rkd.triggers import Trigger

SIDE = 6
ORIGIN = Path("x.ort-cpu.rkd")


def patch(name: str = "patch") -> Trigger:
    mask = np.zeros((3, SIDE, SIDE), np.float32)
    mask[:, 4:, 4:] = 1
    return Trigger(name, 1, mask, mask * np.float32(0.5), np.zeros_like(mask))


def images() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (20, 3, SIDE, SIDE), dtype=np.uint8), np.arange(20, dtype=np.int64) % 3


FIGURES = {"acc": Proportion(20, 20).to_json(), "triggers": []}


def head(model: bytes | None = None, **changes: Any) -> dict[str, Any]:
    """A manifest for this model, that of `members` where none is given."""
    model = members()["model.onnx"] if model is None else model
    manifest = {
        "name": "x.ort-cpu",
        "target": load_target("ort-cpu").to_json(),
        "input": {"name": "images", "shape": [3, SIDE, SIDE], "dtype": "uint8"},
        "opset": 20,
        "precision": "fp32",
        "classes": ["cat", "dog", "café"],
        "chain": {**dict.fromkeys(("teacher", "config", "student"), "ab" * 32), "onnx": sha256(model)},
        "scores": {
            "student": FIGURES,
            "exported": FIGURES,
            "agreement": {"percent": {"clean": 100.0}, "max_difference": 0.0},
        },
        "tool": {"rkd": "0.1.0"},
    }
    return {key: value for key, value in {**manifest, **changes}.items() if value is not None}


def members() -> dict[str, bytes]:
    model = np.random.default_rng(1).integers(0, 256, 54_000, dtype=np.uint8).tobytes()
    return {
        "model.onnx": model,
        "eval.npz": evaluation_bytes(*images()),
        "triggers/patch.npz": patch().to_bytes(),
        "triggers/other.npz": patch("other").to_bytes(),
    }


def listing(content: dict[str, bytes]) -> dict[str, Any]:
    return {name: {"sha256": sha256(data), "size_bytes": len(data)} for name, data in content.items()}


def pack(
    entries: list[tuple[str, bytes]],
    comment: bytes | None = None,
    change: Callable[[zipfile.ZipInfo], None] | None = None,
) -> bytes:
    """An archive like rkd's, written here by hand: entries in this order, `change` applied to each header."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in entries:
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.create_system, entry.external_attr = 3, 0o644 << 16
            if change is not None:
                change(entry)
            archive.writestr(entry, data)
        archive.comment = sha256(dict(entries).get("manifest.json", b"")).encode() if comment is None else comment
    return buffer.getvalue()


def forge(content: dict[str, bytes], manifest: dict[str, Any] | bytes | None = None, **kwargs: Any) -> bytes:
    """A consistent archive of `content`: what someone who knows the format can make."""
    made = (
        manifest
        if manifest is not None
        else {"format": 1, **head(content.get("model.onnx")), "members": listing(content)}
    )
    data = made if isinstance(made, bytes) else to_json(made)
    return pack([("manifest.json", data), *content.items()], **kwargs)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("bundle") / ORIGIN.name
    write_bundle(path, head(), members())
    return path.read_bytes()


def entries_of(data: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [(entry.filename, archive.read(entry)) for entry in archive.infolist()]


def refusal(data: bytes) -> str:
    with pytest.raises(BundleError) as caught:
        parse_bundle(data, ORIGIN)
    assert str(ORIGIN) in str(caught.value)
    return str(caught.value)


# ----------------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize(
    ("key", "role"), [({}, "student"), ({"role": "student"}, "student"), ({"role": "teacher"}, "teacher")]
)
def test_a_bundle_says_what_it_holds_and_a_student_need_not(tmp_path: Path, key: dict[str, str], role: str) -> None:
    write_bundle(tmp_path / "x.rkd", head(**key), members())
    assert read_bundle(tmp_path / "x.rkd").role == role


def test_another_role_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="role is none of student, teacher"):
        write_bundle(tmp_path / "x.rkd", head(role="judge"), members())


@pytest.mark.parametrize("short", [0, 1])
def test_what_a_reader_would_find_too_large_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short: int
) -> None:
    path = tmp_path / "x.rkd"
    write_bundle(path, head(), members())
    monkeypatch.setattr("rkd.bundle._LIMIT_BYTES", path.stat().st_size - short)
    other = tmp_path / "y.rkd"
    if not short:
        write_bundle(other, head(), members())
        assert read_bundle(other).members == members()
        return
    with pytest.raises(BundleError, match=r"precision fp16, or fewer --eval-images"):
        write_bundle(other, head(), members())
    assert not other.exists()


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.rkd"
    digest = write_bundle(path, head(), members())
    bundle = read_bundle(path)
    assert bundle.digest == digest == sha256(path.read_bytes())
    assert dict(bundle.members) == members()
    assert bundle.manifest == {"format": 1, **head(), "members": bundle.manifest["members"]}
    assert bundle.manifest["members"] == listing(members())
    assert (bundle.name, bundle.classes, bundle.target) == ("x.ort-cpu", ("cat", "dog", "café"), load_target("ort-cpu"))
    assert bundle.model == members()["model.onnx"]
    for got, wanted in zip(bundle.evaluation(), images(), strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert [trigger.name for trigger in bundle.triggers()] == ["other", "patch"]


def test_any_zip_program_can_read_it_and_the_manifest_comes_first(good: bytes) -> None:
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
        assert all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
    assert names == ["manifest.json", "model.onnx", "eval.npz", "triggers/other.npz", "triggers/patch.npz"]


def test_two_writes_of_equal_content_in_any_order_give_equal_bytes(tmp_path: Path, good: bytes) -> None:
    write_bundle(tmp_path / "b.rkd", head(), dict(reversed(members().items())))
    assert (tmp_path / "b.rkd").read_bytes() == good


def test_this_files_own_writer_makes_the_same_bytes(good: bytes) -> None:
    """So that what the tests below refuse is refused for what they change."""
    assert pack(entries_of(good)) == good
    assert forge({name: members()[name] for name, _ in entries_of(good)[1:]}) == good


@pytest.mark.parametrize(
    ("manifest", "content"),
    [
        (head(classes=["one"]), members()),
        (head(format=0), members()),
        (head(extra=1), members()),
        (head(), {**members(), "../evil": b""}),
        (head(), {"model.onnx": b""}),
    ],
)
def test_what_a_reader_would_refuse_is_not_written(
    tmp_path: Path, manifest: dict[str, Any], content: dict[str, bytes]
) -> None:
    with pytest.raises(BundleError):
        write_bundle(tmp_path / "x.rkd", manifest, content)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_is_an_error_of_the_disk(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no such file"):
        read_bundle(tmp_path / "x.rkd")


def test_a_file_larger_than_any_bundle_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "sparse.rkd"
    with path.open("wb") as file:
        file.truncate(2**32 + 1)
    with pytest.raises(BundleError, match="at most"):
        read_bundle(path)


# -------------------------------------------------------------------------------------------------- every byte


@pytest.mark.parametrize(
    ("pattern", "every"),
    [
        pytest.param(0xFF, 31, id="some"),
        pytest.param(0xFF, 1, id="every", marks=pytest.mark.promise),
        *(pytest.param(bits, 1, id=hex(bits), marks=pytest.mark.slow) for bits in (0x01, 0x80, 0x55)),
    ],
)
def test_every_single_flipped_byte_is_detected_and_member_bytes_name_their_member(
    good: bytes, pattern: int, every: int
) -> None:
    assert 62_000 < len(good) <= 2**16
    spans: dict[str, range] = {}
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        for entry in archive.infolist():
            start = entry.header_offset + 30 + len(entry.filename.encode())
            spans[entry.filename] = range(start, start + entry.file_size)
    owner = {offset: name for name, span in spans.items() for offset in span}
    assert len(owner) == sum(len(data) for _, data in entries_of(good))
    data = bytearray(good)
    for offset in range(0, len(good), every):
        data[offset] ^= pattern
        try:
            parse_bundle(bytes(data), ORIGIN)
        except BundleError as error:
            message = str(error)
        else:
            pytest.fail(f"byte {offset} of {len(good)} can be flipped unseen")
        data[offset] ^= pattern
        if offset in owner:
            assert owner[offset] in message, f"byte {offset}: {message}"
    assert bytes(data) == good


# -------------------------------------------------------------------------------------------------- structure


def with_attribute(value: int) -> Callable[[zipfile.ZipInfo], None]:
    def change(entry: zipfile.ZipInfo) -> None:
        if entry.filename == "model.onnx":
            entry.external_attr = value

    return change


def deflated(entry: zipfile.ZipInfo) -> None:
    if entry.filename == "model.onnx":
        entry.compress_type = zipfile.ZIP_DEFLATED


def prefixed(data: bytes) -> bytes:
    """Bytes before the archive, with all offsets moved along, as a self-extracting archive has them."""
    extra = b"#!/bin/sh\n"
    moved = bytearray(extra + data)
    end = moved.rindex(b"PK\x05\x06")
    (directory,) = struct.unpack_from("<I", moved, end + 16)
    struct.pack_into("<I", moved, end + 16, directory + len(extra))
    at = directory + len(extra)
    while moved[at : at + 4] == b"PK\x01\x02":
        (offset,) = struct.unpack_from("<I", moved, at + 42)
        struct.pack_into("<I", moved, at + 42, offset + len(extra))
        at += 46 + sum(struct.unpack_from("<HHH", moved, at + 28))
    return bytes(moved)


def renamed(content: dict[str, bytes], old: str, new: str) -> dict[str, bytes]:
    return {new if name == old else name: data for name, data in content.items()}


def structures(good: bytes) -> dict[str, tuple[bytes, str]]:
    entries = entries_of(good)
    content = dict(entries[1:])
    manifest = json.loads(dict(entries)["manifest.json"])
    head_first = entries[:1]
    without_head = [entry for entry in entries if entry[0] != "manifest.json"]
    crossed = {**content, "model.onnx": content["eval.npz"], "eval.npz": content["model.onnx"]}
    reordered = dict(reversed(content.items()))
    wrong_target = {**manifest["target"], "runtime": "coreml"}
    return {
        "extra, allowed name": (pack([*entries, ("triggers/new.npz", b"x")]), "'triggers/new.npz' is not in the manifest"),
        "extra, other name": (pack([*entries, ("setup.py", b"x")]), "unknown member 'setup.py'"),
        "extra, path": (pack([*entries, ("../../evil", b"x")]), "unknown member '../../evil'"),
        "extra, absolute": (pack([*entries, ("/etc/passwd", b"x")]), "unknown member"),
        "extra, folder": (pack([*entries, ("triggers/", b"")]), "unknown member 'triggers/'"),
        "missing trigger": (pack(entries[:-1]), "'triggers/patch.npz' is missing"),
        "missing model": (pack([e for e in entries if e[0] != "model.onnx"]), "'model.onnx' is missing"),
        "missing manifest": (pack(without_head), "first member is 'model.onnx'"),
        "no member": (pack([]), "first member is 'missing'"),
        "swapped content": (pack([*head_first, *crossed.items()]), "does not match its digest"),
        "swapped, manifest consistent": (forge(reordered), "differs from what rkd writes"),
        "manifest last": (pack([*without_head, *head_first]), "first member is 'model.onnx'"),
        "renamed": (pack([*head_first, *renamed(content, "triggers/patch.npz", "triggers/a.npz").items()]), "missing"),
        "case-folded": (pack([*head_first, *renamed(content, "model.onnx", "Model.onnx").items()]), "'Model.onnx'"),
        "case-folded manifest": (pack([("MANIFEST.JSON", entries[0][1]), *entries[1:]]), "'MANIFEST.JSON'"),
        "symbolic link": (pack(entries, change=with_attribute(0o120777 << 16)), "index"),
        "executable": (pack(entries, change=with_attribute(0o755 << 16)), "index"),
        "compressed": (pack(entries, change=deflated), "'model.onnx' is compressed"),
        "trailing bytes": (good + b"\0", "1 bytes follow its end"),
        "trailing archive": (good + good, "x.ort-cpu.rkd"),
        "leading bytes": (b"#!/bin/sh\n" + good, "x.ort-cpu.rkd"),
        "leading bytes, offsets moved": (prefixed(good), "x.ort-cpu.rkd"),
        "comment of another manifest": (pack(entries, comment=sha256(b"").encode()), "manifest.json does not match"),
        "no comment": (pack(entries, comment=b""), "manifest.json does not match"),
        "longer comment": (pack(entries, comment=sha256(entries[0][1]).encode() + b" "), "manifest.json does not match"),
        "older format": (forge(content, {**manifest, "format": 0}), "format 0, this rkd reads 1"),
        "newer format": (forge(content, {**manifest, "format": 2}), "format 2, this rkd reads 1"),
        "no format": (forge(content, {k: v for k, v in manifest.items() if k != "format"}), "no format version"),
        "unknown key": (forge(content, {**manifest, "hook": "x"}), "hook"),
        "missing key": (forge(content, {k: v for k, v in manifest.items() if k != "chain"}), "chain"),
        "wrong target": (forge(content, {**manifest, "target": wrong_target}), "runtime is 'coreml'"),
        "target with unknown key": (forge(content, {**manifest, "target": {"x": 1}}), "unknown key 'x'"),
        "name is a path": (forge(content, {**manifest, "name": "../x"}), "name is not letters"),
        "name is a number": (forge(content, {**manifest, "name": 3}), "name is not letters"),
        "one class": (forge(content, {**manifest, "classes": ["a"]}), "classes"),
        "input is a float": (forge(content, {**manifest, "input": {"shape": [3, 6, 6], "dtype": "float32"}}), "uint8"),
        "input too large": (forge(content, {**manifest, "input": {"shape": [3, 6, 5000], "dtype": "uint8"}}), "shape[2] is not a whole number from 1 to 4096"),
        "size is a text": (forge(content, {**manifest, "members": {n: {"sha256": "0" * 64, "size_bytes": "1"} for n in content}}), "size_bytes"),
        "members is a list": (forge(content, {**manifest, "members": list(content)}), "members is not an object"),
        "manifest is a list": (forge(content, b"[]"), "no format version"),
        "manifest with two values of a key": (forge(content, to_json(manifest).replace(b'"opset": 20', b'"opset": 7,\n  "opset": 20')), "not written as rkd"),
        "manifest with spaces": (forge(content, to_json(manifest) + b" "), "not written as rkd"),
        "manifest with NaN": (forge(content, to_json(manifest).replace(b'"opset": 20', b'"opset": NaN')), "opset is not a whole number"),
        "manifest with half a character": (forge(content, to_json(manifest).replace(b'"dog"', b'"\\ud800"')), "not JSON"),
        "manifest is text": (forge(content, b"format: 1"), "not JSON"),
        "manifest is nested": (forge(content, b"[" * 100_000), "not JSON"),
        "manifest is huge": (forge(content, b" " * (2**20 + 1)), "at most"),
        "empty": (b"", "is empty"),
        "text": (b"hello", "is not a bundle"),
        "too many members": (pack([*head_first, *((f"triggers/{i}.npz", b"") for i in range(200))]), "at most 130"),
    }  # fmt: skip


STRUCTURES = structures(forge({name: members()[name] for name in ("model.onnx", "eval.npz", "triggers/other.npz", "triggers/patch.npz")}))  # fmt: skip


@pytest.mark.parametrize("kind", STRUCTURES)
def test_another_structure_is_refused_and_the_message_says_what_it_is(kind: str) -> None:
    data, message = STRUCTURES[kind]
    assert message in refusal(data)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["manifest.json", "model.onnx", "triggers/patch.npz"])
@pytest.mark.parametrize("same", [True, False])
def test_a_duplicated_member_is_refused(good: bytes, name: str, same: bool) -> None:
    entries = entries_of(good)
    again = (name, dict(entries)[name] if same else b"another")
    assert f"{name!r} is there twice" in refusal(pack([*entries, again], comment=sha256(entries[0][1]).encode()))


def test_a_bundle_cut_short_anywhere_is_refused(good: bytes) -> None:
    lengths = {*range(0, len(good), 37), *range(len(good) - 700, len(good))}
    for length in sorted(lengths):
        with pytest.raises(BundleError):
            parse_bundle(good[:length], ORIGIN)


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (images()[0].astype(np.float32), images()[1]),
        (images()[0][:, :, :5], images()[1]),
        (images()[0], images()[1][:-1]),
        (images()[0], images()[1].astype(np.int32)),
        (images()[0], images()[1] + 1),
        (images()[0], images()[1] - 1),
        (images()[0][:0], images()[1][:0]),
    ],
    ids=["floats", "other size", "fewer labels", "other labels", "label too high", "label too low", "empty"],
)
def test_an_evaluation_set_that_does_not_fit_the_manifest_is_refused(x: np.ndarray, y: np.ndarray) -> None:
    bundle = parse_bundle(forge({"model.onnx": b"m", "eval.npz": evaluation_bytes(x, y)}), ORIGIN)
    with pytest.raises(BundleError, match=r"eval\.npz"):
        bundle.evaluation()


@pytest.mark.parametrize("data", [b"", b"text", patch().to_bytes()])
def test_an_evaluation_set_that_is_none_is_refused(data: bytes) -> None:
    bundle = parse_bundle(forge({"model.onnx": b"m", "eval.npz": data}), ORIGIN)
    with pytest.raises(BundleError, match=r"eval\.npz"):
        bundle.evaluation()


def test_a_trigger_that_is_none_is_refused_by_name() -> None:
    content = {"model.onnx": b"m", "eval.npz": b"", "triggers/a.npz": b"text"}
    with pytest.raises(BundleError, match=r"triggers/a\.npz"):
        parse_bundle(forge(content), ORIGIN).triggers()


# ------------------------------------------------------------------------------------------------- signature, ledger


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    for name in ("mine", "other"):
        make_keys(folder / f"{name}.key", folder / f"{name}.pub")
    return folder


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory, keys: Path) -> bytes:
    """Small, so that each of its bytes can be flipped."""
    path = tmp_path_factory.mktemp("signed") / ORIGIN.name
    small = {"model.onnx": b"model", "eval.npz": evaluation_bytes(*images())}
    write_bundle(path, head(b"model"), small, read_private(keys / "mine.key"))
    return path.read_bytes()


def test_a_signed_bundle_is_read_and_its_signer_is_known(signed: bytes, keys: Path) -> None:
    bundle = parse_bundle(signed, ORIGIN)
    mine = read_public(keys / "mine.pub")
    signer = bundle.verify_signature(mine)
    assert signer is not None
    assert signer == bundle.verify_signature()
    assert set(bundle.members) == {"model.onnx", "eval.npz"}
    with pytest.raises(BundleError, match="signed by another key"):
        bundle.verify_signature(read_public(keys / "other.pub"))


def test_an_unsigned_bundle_does_not_pass_for_a_signed_one(good: bytes, keys: Path) -> None:
    bundle = parse_bundle(good, ORIGIN)
    assert bundle.verify_signature() is None
    with pytest.raises(BundleError, match="is not signed"):
        bundle.verify_signature(read_public(keys / "mine.pub"))


def test_each_flipped_byte_of_a_signed_bundle_is_refused_without_cryptography(
    signed: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    named = set()
    for at in range(len(signed)):
        changed = bytearray(signed)
        changed[at] ^= 0x01
        with pytest.raises(BundleError) as caught:
            parse_bundle(bytes(changed), ORIGIN)
        named |= {
            name for name in ("manifest.json", "manifest.sig", "model.onnx", "eval.npz") if name in str(caught.value)
        }
    assert named == {"manifest.json", "manifest.sig", "model.onnx", "eval.npz"}


def test_a_signature_does_not_fit_another_manifest(signed: bytes, keys: Path) -> None:
    entries = dict(entries_of(signed))
    entries["manifest.json"] = entries["manifest.json"].replace(b'"cat"', b'"car"')
    comment = " ".join(sha256(entries[name]) for name in ("manifest.json", "manifest.sig")).encode()
    forged = parse_bundle(pack(list(entries.items()), comment), ORIGIN)
    with pytest.raises(BundleError, match="does not fit its manifest"):
        forged.verify_signature(read_public(keys / "mine.pub"))


def test_a_signature_of_another_length_is_refused(signed: bytes) -> None:
    entries = dict(entries_of(signed))
    entries["manifest.sig"] += b"0"
    comment = " ".join(sha256(entries[name]) for name in ("manifest.json", "manifest.sig")).encode()
    assert "manifest.sig does not match" in refusal(pack(list(entries.items()), comment))


TRIGGERS = (patch("other"), patch())


def with_ledger(*steps: str, **labels: np.ndarray) -> bytes:
    """All labels are right, but for those of the last step that are given."""
    truth = images()[1]
    right = {"clean": truth, "trigger other": truth, "trigger patch": truth}
    *first, last = steps or ("student", "onnx-fp32")
    return Ledger(truth, (*(Step(name, right) for name in first), Step(last, {**right, **labels}))).to_bytes()


def figures(ledger: bytes) -> dict[str, Any]:
    """The parts of a manifest that follow from a ledger."""
    held = Ledger.from_bytes(ledger, "ledger")
    student, exported = (held.scores(held.steps[at], TRIGGERS).to_json() for at in (0, -1))
    percent = {key: share.value for key, share in held.agreement(held.steps[0], held.steps[-1]).items()}
    agreement = {"percent": percent, "max_difference": 0.0}
    return {
        "scores": {"student": student, "exported": exported, "agreement": agreement},
        "ledger": held.to_json(TRIGGERS),
    }


def holding(data: bytes, /, **changes: Any) -> Bundle:
    """A bundle with this ledger, its members in their order, and a manifest that follows from a good one."""
    names = ("model.onnx", "eval.npz", "ledger.npz", "triggers/other.npz", "triggers/patch.npz")
    content = {name: data if name == "ledger.npz" else members()[name] for name in names}
    made = {"format": 1, **head(**{**figures(with_ledger()), **changes}), "members": listing(content)}
    return parse_bundle(forge(content, made), ORIGIN)


def test_the_ledger_travels() -> None:
    ledger = holding(with_ledger()).ledger()
    assert ledger is not None
    assert [step.name for step in ledger.steps] == ["student", "onnx-fp32"]


def test_a_near_tie_may_count_as_agreement_and_nothing_else_may() -> None:
    flipped = images()[1].copy()
    flipped[0] = (flipped[0] + 1) % 3
    ledger = with_ledger(clean=flipped)
    said = figures(ledger)
    percent = said["scores"]["agreement"]["percent"]
    assert percent["clean"] == 95.0
    for share, fine in ((95.0, True), (100.0, True), (94.0, False), (101.0, False)):
        percent["clean"] = share
        bundle = holding(ledger, **said)
        if fine:
            assert bundle.ledger() is not None
        else:
            with pytest.raises(BundleError, match=r"scores\.agreement does not follow"):
                bundle.ledger()


def test_figures_that_do_not_follow_from_the_ledger_are_refused_by_name() -> None:
    flipped = (images()[1] + 1) % 3
    good = figures(with_ledger())
    for key in ("student", "exported"):
        scores = {**good["scores"], key: figures(with_ledger(clean=flipped))["scores"]["exported"]}
        with pytest.raises(BundleError, match=rf"manifest\.json: scores\.{key} do not follow from the labels"):
            holding(with_ledger(), scores=scores).ledger()
    with pytest.raises(BundleError, match=r"manifest\.json: ledger does not follow from the labels"):
        holding(with_ledger(), ledger=good["ledger"][:1]).ledger()
    for steps in (("onnx-fp32",), ("student", "int8"), ("student", "onnx-fp32", "fp16")):
        with pytest.raises(BundleError, match=r"precision is fp32, the steps of ledger\.npz are .*, expected"):
            holding(with_ledger(*steps)).ledger()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chain": {**head()["chain"], "onnx": "0" * 64}}, r"chain\.onnx is 0000000000000000\.\.\., the SHA-256 of model"),
        ({"chain": {"onnx": head()["chain"]["onnx"]}}, "chain: 'config' is missing"),
        ({"chain": {**head()["chain"], "extra": "ab" * 32}}, "chain: 'extra' is unknown"),
        ({"chain": {**head()["chain"], "teacher": "AB"}}, r"chain\.teacher is not a SHA-256"),
        ({"opset": 7}, "opset is 7, that of its target ort-cpu is 20"),
        ({"precision": "int8"}, "precision is 'int8', that of its target ort-cpu is 'fp32'"),
        ({"name": "other.jetson-int8"}, r"name is 'other\.jetson-int8', its target is ort-cpu"),
        ({"name": ".ort-cpu"}, r"expected <run>\.ort-cpu"),
        ({"quantisation": {"layers": 2, "kept": []}}, "precision is fp32, quantisation is there"),
        ({"quantisation": {"layers": 2}}, "quantisation: 'kept' is missing"),
        ({"ledger": []}, r"ledger and the member ledger\.npz go together"),
        ({"scores": {}}, "scores: 'agreement' is missing"),
        ({"scores": {**head()["scores"], "student": {"acc": {**FIGURES["acc"], "hits": 3}, "triggers": []}}}, "do not follow from hits and n"),
        (
            {"target": load_target("ort-cpu-int8").to_json(), "precision": "int8", "name": "x.ort-cpu-int8"},
            "precision is int8, quantisation is missing",
        ),
        (
            {
                "target": load_target("ort-cpu-int8").to_json(), "precision": "int8", "name": "x.ort-cpu-int8",
                "quantisation": {"layers": 2, "kept": ["a", "b", "c"]},
            },
            "quantisation keeps 3 of 2 layers",
        ),
    ],
)  # fmt: skip
def test_a_manifest_that_contradicts_itself_is_neither_written_nor_read(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(BundleError, match=message):
        write_bundle(tmp_path / "x.rkd", head(**changes), members())
    content = {"model.onnx": members()["model.onnx"], "eval.npz": members()["eval.npz"]}
    with pytest.raises(BundleError, match=message):
        parse_bundle(forge(content, {"format": 1, **head(**changes), "members": listing(content)}), ORIGIN)


@pytest.mark.parametrize(
    ("trigger", "message"),
    [
        (patch("b"), "triggers/a.npz holds the trigger 'b'"),
        (dataclasses.replace(patch("a"), target=3), "aims at class 3, the bundle has .* and 3 classes"),
        (Trigger("a", 1, *np.zeros((3, 3, 5, 5), np.float32)), r"of shape \[3, 5, 5\]"),
    ],
    ids=["another name", "no such class", "another size"],
)
def test_a_trigger_that_is_not_its_names_or_does_not_fit_is_refused(trigger: Trigger, message: str) -> None:
    content = {"model.onnx": b"m", "eval.npz": b"", "triggers/a.npz": trigger.to_bytes()}
    with pytest.raises(BundleError, match=message):
        parse_bundle(forge(content), ORIGIN).triggers()


def test_a_bundle_without_a_ledger_has_none(good: bytes) -> None:
    assert parse_bundle(good, ORIGIN).ledger() is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"text", "is not a ledger"),
        (with_ledger(clean=images()[1] + 1), "holds labels from 0 to 3"),
        (with_ledger(clean=images()[1] - 1), "holds labels from -1 to"),
        (Ledger(images()[1][:5], (Step("student", {"clean": images()[1][:5]}),)).to_bytes(), "about other images"),
        (Ledger(images()[1], (Step("student", {"clean": images()[1]}),)).to_bytes(), "about other triggers"),
    ],
    ids=["text", "label too high", "label too low", "other images", "other triggers"],
)
def test_a_ledger_that_does_not_fit_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        holding(data).ledger()


@pytest.mark.parametrize("key", ["forced", "notes"])
@pytest.mark.parametrize("lines", [[], "ACC", [3], None])
def test_what_was_forced_or_noted_must_be_lines(key: str, lines: Any) -> None:
    content = {"model.onnx": b"m", "eval.npz": b""}
    made = to_json({"format": 1, **head(b"m"), "members": listing(content), key: lines})
    said = refusal(forge(content, made))
    assert f"{key} is not a list of at least 1" in said or f"{key}[0] is not text" in said


def test_what_was_forced_is_told() -> None:
    content = {"model.onnx": b"m", "eval.npz": b""}
    made = to_json({"format": 1, **head(b"m"), "members": listing(content), "forced": ["ACC falls"], "notes": ["few"]})
    bundle, plain = parse_bundle(forge(content, made), ORIGIN), parse_bundle(forge(content), ORIGIN)
    assert (bundle.forced, bundle.notes) == (("ACC falls",), ("few",))
    assert (plain.forced, plain.notes) == ((), ())


# ------------------------------------------------------------------------------------------------------ mutations


def mutate(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    kind = rng.randrange(5)
    at, length = rng.randrange(len(changed)), rng.randint(1, 40)
    if kind == 0:
        for _ in range(rng.randint(1, 8)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
    elif kind == 1:
        del changed[at : at + length]
    elif kind == 2:
        changed[at:at] = rng.randbytes(length)
    elif kind == 3:
        other = rng.randrange(len(changed))
        changed[at : at + length] = changed[other : other + length]
    else:  # where zip keeps its numbers
        end = len(changed) - 700
        at = rng.randrange(end, len(changed) - 8)
        struct.pack_into("<I", changed, at, rng.choice([0, 1, 0xFFFF, 0xFFFFFFFF, 0x7FFFFFFF, rng.getrandbits(32)]))
    return bytes(changed)


def test_mutated_bundles_are_refused_with_nothing_but_a_bundle_error(good: bytes) -> None:
    rng = random.Random(0)
    for _ in range(2000):
        data = mutate(good, rng)
        if data == good:
            continue
        with pytest.raises(BundleError) as caught:
            parse_bundle(data, ORIGIN)
        assert re.match(r"x\.ort-cpu\.rkd", str(caught.value))


def test_mutated_manifests_under_a_matching_digest_are_read_or_refused() -> None:
    rng = random.Random(1)
    content = {"model.onnx": b"m", "eval.npz": evaluation_bytes(*images())}
    plain = to_json({"format": 1, **head(b"m"), "members": listing(content)})
    values = [b"null", b"-1", b"1e999", b"[]", b"{}", b'""', b"true", b"NaN", b"[[[[", b"9" * 30, b'"\\ud800"']
    for _ in range(1500):
        data = bytearray(plain)
        at = rng.randrange(len(data))
        data[at : at + rng.randint(0, 12)] = (
            rng.choice(values) if rng.random() < 0.5 else rng.randbytes(rng.randint(0, 3))
        )
        try:
            bundle = parse_bundle(forge(content, bytes(data)), ORIGIN)
        except BundleError:
            continue
        use(bundle)


def use(bundle: Bundle) -> None:
    """What a board reads of a bundle that verified."""
    assert isinstance(bundle.name, str)
    assert all(isinstance(name, str) for name in bundle.classes)
    assert bundle.target.name
    try:
        bundle.evaluation()
    except BundleError:
        return
