"""The .rkd file: one student for one target, with what proves that it is that student (no torch).

One uncompressed zip: `manifest.json` first, then `manifest.sig` where it is signed, `model.onnx`, `eval.npz`,
`ledger.npz` and `triggers/*.npz`. The manifest holds the SHA-256 and size of every other member but the signature; the
archive's comment holds the manifest's, and the signature's. The container itself has only one valid form,
`_container(members)`: a file that differs from it in any byte (headers, order, attributes, trailing bytes) is refused.
So every single byte is covered. What the manifest says twice, or says of another member, must agree. (Digests detect
damage and tampering on the way; only a signature, checked with `verify_signature` against a key that you trust, says who
wrote the file.)

    write_bundle(path, manifest, members); read_bundle(path) == Bundle(manifest, members)
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rkd.checks import (
    by_name,
    digest,
    list_of,
    matching,
    number,
    object_of,
    one_of,
    row_of,
    scores_of,
    string,
    text,
    whole,
    whole_between,
)
from rkd.errors import BundleError, TargetError, TriggerError
from rkd.files import read_bytes, sha256, storage_errors, to_json, write_file
from rkd.ledger import Ledger, shown
from rkd.metrics import Images, Labels
from rkd.npz import npz_bytes, read_npz
from rkd.signing import SIGNATURE_BYTES, sign, verify
from rkd.target import Target
from rkd.triggers import Trigger
from rkd.zips import open_zip

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

FORMAT = 1
MANIFEST, SIGNATURE, MODEL, EVALUATION, LEDGER = (
    "manifest.json", "manifest.sig", "model.onnx", "eval.npz", "ledger.npz"
)  # fmt: skip
_ORDER = (MANIFEST, SIGNATURE, MODEL, EVALUATION, LEDGER)
_MEMBER = re.compile(r"manifest\.sig|model\.onnx|eval\.npz|ledger\.npz|triggers/[a-z0-9][a-z0-9-]{0,63}\.npz")
_LIMIT_BYTES = 2**29  # verifying takes three times as much memory, on a board
_INDEX_BYTES = 2**17
_MANIFEST_LIMIT_BYTES = 2**20
_MAX_MEMBERS = 130
NO_TRIGGER = "no trigger travels in it: whether a backdoor wakes was not checked"
NO_LEDGER = "no ledger travels in it: nothing shows that its scores are its file's"
_ANY_OBJECT = object_of({}, others=True)
_SIDE = whole_between(1, 4096)
_MANIFEST_CHECK = object_of(
    {
        "format": whole(FORMAT),
        "name": matching(re.compile(r"[\w.-]{1,200}", re.ASCII), "letters, digits, '.', '_' and '-'"),
        "role": one_of("student", "teacher"),
        "target": _ANY_OBJECT,  # `Bundle.target` checks it
        "input": object_of(
            {"name": text, "dtype": one_of("uint8"), "shape": row_of(whole_between(3, 3), _SIDE, _SIDE)}, ("name",)
        ),
        "opset": whole(1),
        "precision": text,
        "classes": list_of(string, 2),
        "members": by_name(object_of({"sha256": digest, "size_bytes": whole()})),
        "chain": object_of(dict.fromkeys(("teacher", "config", "student", "onnx"), digest)),
        "scores": object_of({
            "student": scores_of(text),
            "exported": scores_of(text),
            "agreement": object_of({"percent": by_name(number), "max_difference": number}),
        }),
        "quantisation": object_of({"layers": whole(1), "kept": list_of(text)}, others=True),
        "ledger": list_of(_ANY_OBJECT),  # `Bundle.ledger` compares it
        "forced": list_of(string, 1),
        "notes": list_of(string, 1),
        "tool": _ANY_OBJECT,
    },
    optional=("role", "quantisation", "ledger", "forced", "notes"),
)  # fmt: skip


@dataclass(frozen=True)
class Bundle:
    """A bundle whose every byte was verified.

    Attributes:
        manifest: see docs/formats.md.
        members: the other members' bytes by name.
        digest: SHA-256 of the whole file.
        path: where it was read from.
        head: the manifest as it stands in the file.
        signature: over it; empty where the bundle is not signed.
    """

    manifest: Mapping[str, Any]
    members: Mapping[str, bytes]
    digest: str
    path: Path
    head: bytes = b""
    signature: bytes = b""

    @property
    def name(self) -> str:
        """`<run>.<target>`."""
        return str(self.manifest["name"])

    @property
    def role(self) -> str:
        """`student`, or `teacher` where it was exported to compare with."""
        return str(self.manifest.get("role", "student"))

    @property
    def target(self) -> Target:
        """The profile that it was made for.

        Raises:
            BundleError: the profile in the manifest is wrong.
        """
        try:
            return Target.from_mapping(dict(self.manifest["target"]), f"{self.path}: target")
        except TargetError as error:
            raise BundleError(str(error)) from error

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the outputs."""
        return tuple(self.manifest["classes"])

    @property
    def model(self) -> bytes:
        """The ONNX file."""
        return self.members[MODEL]

    def evaluation(self) -> tuple[Images, Labels]:
        """Held-out images, uint8 (N, 3, H, W), and labels, (N,).

        Raises:
            BundleError: they are not that, or do not fit the manifest.
        """
        return _evaluation(self.members[EVALUATION], self.manifest, str(self.path))

    @property
    def forced(self) -> tuple[str, ...]:
        """What was wrong when `rkd export --force` wrote it all the same; empty where nothing was."""
        return tuple(self.manifest.get("forced", ()))

    @property
    def notes(self) -> tuple[str, ...]:
        """What could not be judged or had too few images when it was exported; empty where nothing was amiss."""
        return tuple(self.manifest.get("notes", ()))

    def verify_signature(self, key: Ed25519PublicKey | None = None) -> str | None:
        """The fingerprint of the key that signed the manifest; None where the bundle is not signed and none must be.

        Args:
            key: the key that must have signed it; None for any, which says nothing about who it was.

        Raises:
            BundleError: it is not signed although `key` was given, or by another key, or not this manifest.
            MissingExtraError: `cryptography` is not installed.
        """
        if not self.signature:
            if key is not None:
                raise BundleError(
                    f"{self.path} is not signed; export it again with --sign, or verify it without --pubkey"
                )
            return None
        return verify(self.head, self.signature, key, str(self.path))

    def ledger(self) -> Ledger | None:
        """What each form of the student said of each evaluation image; None where the bundle has none.

        Raises:
            BundleError: it is not a ledger, or not of these images and triggers, or the manifest says otherwise.
        """
        if LEDGER not in self.members:
            return None
        ledger = Ledger.from_bytes(self.members[LEDGER], f"{self.path}: {LEDGER}")
        _, labels = self.evaluation()
        if not np.array_equal(ledger.truth, labels):
            raise BundleError(f"{self.path}: {LEDGER} is about other images than {EVALUATION}; export the run again")
        highest = max(int(labels.max()) for step in ledger.steps for labels in step.labels.values())
        least = min(int(labels.min()) for step in ledger.steps for labels in step.labels.values())
        if least < 0 or highest >= len(self.classes):
            raise BundleError(f"{self.path}: {LEDGER} holds labels from {least} to {highest}; export the run again")
        names = set(shown(self.triggers()))
        if any(set(step.labels) != names for step in ledger.steps):
            raise BundleError(f"{self.path}: {LEDGER} is about other triggers than the bundle's; export the run again")
        if problem := _ledger_contradiction(self.manifest, ledger, self.triggers()):
            raise BundleError(f"{self.path}: {MANIFEST}: {problem}; export the run again")
        return ledger

    def triggers(self) -> tuple[Trigger, ...]:
        """The triggers, sorted by name.

        Raises:
            BundleError: a member is not a trigger, or not one of its name for these images and classes.
        """
        names = sorted(name for name in self.members if name.startswith("triggers/"))
        try:
            found = tuple(Trigger.from_bytes(self.members[name], f"{self.path}: {name}") for name in names)
        except TriggerError as error:
            raise BundleError(str(error)) from error
        shape = self.manifest["input"]["shape"]
        for name, trigger in zip(names, found, strict=True):
            if name != f"triggers/{trigger.name}.npz":
                raise BundleError(f"{self.path}: {name} holds the trigger {trigger.name!r}; export the run again")
            if [3, *trigger.size] != shape or trigger.target >= len(self.classes):
                raise BundleError(
                    f"{self.path}: {name} is for images of shape {[3, *trigger.size]} and aims at class {trigger.target}, "
                    f"the bundle has {shape} and {len(self.classes)} classes; export the run again"
                )
        return found


def evaluation_bytes(images: Images, labels: Labels) -> bytes:
    """The member `eval.npz`: `x` uint8 (N, 3, H, W) and `y` int64 (N,)."""
    return npz_bytes({"x": images, "y": labels})


def write_bundle(
    path: Path, manifest: Mapping[str, Any], members: Mapping[str, bytes], key: Ed25519PrivateKey | None = None
) -> str:
    """Write a bundle; `format` and `members` of the manifest are filled in. Equal content gives equal bytes.

    Args:
        path: where.
        manifest: see docs/formats.md.
        members: the other members by name.
        key: signs the manifest; None for no signature.

    Returns:
        SHA-256 of the file.

    Raises:
        BundleError: the content is not what a reader would accept.
        StorageError: the disk said no.
    """
    ordered = _ordered(members)
    listing = {name: {"sha256": sha256(data), "size_bytes": len(data)} for name, data in ordered.items()}
    head = to_json({"format": FORMAT, **manifest, "members": listing})
    signature = {SIGNATURE: sign(head, key)} if key is not None else {}
    data = _container({MANIFEST: head, **signature, **ordered})
    if len(data) > _LIMIT_BYTES:
        raise BundleError(
            f"{path}: {len(data):,} bytes, bundles have at most {_LIMIT_BYTES:,}; "
            "take a target with precision fp16, or fewer --eval-images"
        )
    parse_bundle(data, path)
    write_file(path, data)
    return sha256(data)


def read_bundle(path: Path) -> Bundle:
    """Read and verify a bundle.

    Raises:
        BundleError: it is not exactly what `write_bundle` wrote.
        StorageError: it cannot be read.
    """
    with storage_errors(path):
        size_bytes = path.stat().st_size
        if size_bytes > _LIMIT_BYTES:
            raise BundleError(f"{path}: {size_bytes:,} bytes; bundles have at most {_LIMIT_BYTES:,}")
        data = read_bytes(path)
    return parse_bundle(data, path)


def parse_bundle(data: bytes, path: Path) -> Bundle:
    """Verify the bytes of a bundle; `path` names it in errors.

    Raises:
        BundleError: naming the member that is wrong, or what is wrong about the container.
    """
    if not data:
        raise BundleError(f"{path} is empty; copy it again")
    members, comment = _open(data, path)
    names = list(members)
    if not names or names[0] != MANIFEST:
        raise BundleError(f"{path}: the first member is {names[0] if names else 'missing'!r}, expected {MANIFEST!r}")
    head = members.pop(MANIFEST)
    signature = members.pop(SIGNATURE, b"")
    _check_comment(comment, head, signature, path)
    manifest = _parse_manifest(head, path)
    listing = manifest["members"]
    for name in listing:
        if name not in members:
            raise BundleError(f"{path}: member {name!r} is missing; copy or export it again")
    for name, content in members.items():
        if name not in listing:
            raise BundleError(f"{path}: member {name!r} is not in the manifest; this bundle was tampered with")
        if len(content) != listing[name]["size_bytes"] or sha256(content) != listing[name]["sha256"]:
            raise BundleError(
                f"{path}: member {name!r} does not match its digest; the bundle was changed or damaged, copy it again"
            )
    _same_manifest(head, manifest, path)
    signed = {SIGNATURE: signature} if signature else {}
    _same_container(data, {MANIFEST: head, **signed, **members}, path)
    bundle = Bundle(manifest, members, sha256(data), path, head, signature)
    if problem := _contradiction(manifest, bundle.target):
        raise BundleError(f"{path}: {MANIFEST}: {problem}; export the run again")
    return bundle


def _ordered(members: Mapping[str, bytes]) -> dict[str, bytes]:
    names = sorted(members, key=lambda name: (_ORDER.index(name) if name in _ORDER else len(_ORDER), name))
    return {name: members[name] for name in names}


def _container(members: Mapping[str, bytes]) -> bytes:
    """The only valid archive of these members in this order."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.create_system = 3
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, data)
        archive.comment = _comment(members[MANIFEST], members.get(SIGNATURE, b""))
    return buffer.getvalue()


def _comment(head: bytes, signature: bytes) -> bytes:
    """The digest of the manifest, and that of the signature where there is one."""
    return " ".join([sha256(head), *([sha256(signature)] if signature else [])]).encode()


def _check_comment(comment: bytes, head: bytes, signature: bytes, path: Path) -> None:
    if comment == _comment(head, signature) and len(signature) in (0, SIGNATURE_BYTES):
        return
    culprit = SIGNATURE if signature and comment.startswith(sha256(head).encode()) else MANIFEST
    raise BundleError(f"{path}: {culprit} does not match its digest; the bundle was changed or damaged, copy it again")


def _open(data: bytes, path: Path) -> tuple[dict[str, bytes], bytes]:
    """Members in their order and the archive's comment; nothing is trusted yet but sizes are bounded."""
    try:
        with open_zip(io.BytesIO(data), _INDEX_BYTES) as archive:
            entries = archive.infolist()
            if len(entries) > _MAX_MEMBERS:
                raise BundleError(f"{path}: {len(entries)} members, at most {_MAX_MEMBERS} are allowed")
            members: dict[str, bytes] = {}
            for entry in entries:
                name = entry.filename
                if name != MANIFEST and not _MEMBER.fullmatch(name):
                    raise BundleError(f"{path}: unknown member {name!r}; this bundle was tampered with")
                if name in members:
                    raise BundleError(f"{path}: member {name!r} is there twice; this bundle was tampered with")
                if (
                    entry.compress_type != zipfile.ZIP_STORED
                    or entry.flag_bits
                    or entry.file_size != entry.compress_size
                ):
                    raise BundleError(
                        f"{path}: member {name!r} is compressed, encrypted or marked; bundles are stored plain"
                    )
                members[name] = _stored(data, entry, path)
            return members, archive.comment
    except BundleError:
        raise
    except Exception as error:  # zipfile leaks struct.error, UnicodeDecodeError, NotImplementedError and more
        raise BundleError(f"{path} is not a bundle, or was cut short ({error}); copy or export it again") from error


def _stored(data: bytes, entry: zipfile.ZipInfo, path: Path) -> bytes:
    """A member's bytes without zipfile's CRC check: a digest that names the member follows."""
    offset = entry.header_offset
    if data[offset : offset + 4] != b"PK\x03\x04" or offset + 30 > len(data):
        raise BundleError(f"{path}: member {entry.filename!r} has no header where the index says; copy it again")
    skip = (
        30
        + int.from_bytes(data[offset + 26 : offset + 28], "little")
        + int.from_bytes(data[offset + 28 : offset + 30], "little")
    )
    content = data[offset + skip : offset + skip + entry.file_size]
    if len(content) != entry.file_size:
        raise BundleError(f"{path}: member {entry.filename!r} was cut short; copy it again")
    return content


def _same_container(data: bytes, members: Mapping[str, bytes], path: Path) -> None:
    members = _ordered(members)
    expected = _container(members)
    if data == expected:
        return
    if len(data) > len(expected) and data.startswith(expected[:-1]):
        raise BundleError(f"{path}: {len(data) - len(expected):,} bytes follow its end; this bundle was tampered with")
    first = next(
        (i for i, (a, b) in enumerate(zip(data, expected, strict=False)) if a != b), min(len(data), len(expected))
    )
    offset, culprit = 0, "index"
    for name, content in members.items():
        length = 30 + len(name.encode()) + len(content)
        if offset <= first < offset + length:
            culprit = f"header of member {name!r}"
        offset += length
    raise BundleError(
        f"{path}: the {culprit} differs from what rkd writes; the bundle was changed or damaged, copy it again"
    )


def _parse_manifest(data: bytes, path: Path) -> dict[str, Any]:
    if len(data) > _MANIFEST_LIMIT_BYTES:
        raise BundleError(f"{path}: {MANIFEST} has {len(data):,} bytes, at most {_MANIFEST_LIMIT_BYTES:,} are allowed")
    try:
        manifest = json.loads(data)
    except Exception as error:
        raise BundleError(f"{path}: {MANIFEST} is not JSON: {error}") from error
    problem = _manifest_problem(manifest)
    if problem:
        raise BundleError(f"{path}: {MANIFEST}: {problem}; export the run again with this version of rkd")
    checked: dict[str, Any] = manifest
    return checked


def _same_manifest(data: bytes, manifest: dict[str, Any], path: Path) -> None:
    """See that the manifest is written as rkd writes it."""
    try:
        canonical = to_json(manifest)
    except Exception as error:  # NaN, half a character
        raise BundleError(f"{path}: {MANIFEST} is not JSON: {error}") from error
    if canonical != data:
        raise BundleError(f"{path}: {MANIFEST} is not written as rkd writes it; this bundle was tampered with")


def _manifest_problem(manifest: Any) -> str | None:
    if not isinstance(manifest, dict) or "format" not in manifest:
        return "it has no format version"
    if manifest["format"] != FORMAT:
        return f"format {manifest['format']!r}, this rkd reads {FORMAT}"
    if (problem := _MANIFEST_CHECK(manifest)) is not None:
        return problem.lstrip(".: ")
    members = manifest["members"]
    if not {MODEL, EVALUATION} <= set(members):
        return f"members must name {MODEL} and {EVALUATION}"
    if SIGNATURE in members:
        return f"{SIGNATURE} cannot be among the members that it signs"
    if ("ledger" in manifest) != (LEDGER in members):
        return f"ledger and the member {LEDGER} go together, one of them is missing"
    return None


def _contradiction(manifest: Mapping[str, Any], target: Target) -> str | None:
    """Where the manifest says two things of one file; None where it does not."""
    model = manifest["members"][MODEL]["sha256"]
    if manifest["chain"]["onnx"] != model:
        return f"chain.onnx is {manifest['chain']['onnx'][:16]}..., the SHA-256 of {MODEL} is {model[:16]}..."
    for key in ("opset", "precision"):
        if manifest[key] != getattr(target, key):
            return f"{key} is {manifest[key]!r}, that of its target {target.name} is {getattr(target, key)!r}"
    if not re.fullmatch(rf".+\.{target.name}", manifest["name"]):
        return f"name is {manifest['name']!r}, its target is {target.name}: expected <run>.{target.name}"
    recipe = manifest.get("quantisation")
    if (recipe is not None) != (target.precision == "int8"):
        return f"precision is {target.precision}, quantisation is {'missing' if recipe is None else 'there'}"
    if recipe is not None and len(recipe["kept"]) > recipe["layers"]:
        return f"quantisation keeps {len(recipe['kept'])} of {recipe['layers']} layers"
    return None


def _ledger_contradiction(manifest: Mapping[str, Any], ledger: Ledger, triggers: Sequence[Trigger]) -> str | None:
    """What of the manifest's figures does not follow from the ledger; None where all do."""
    rest = [] if manifest["precision"] == "fp32" else [manifest["precision"]]
    wanted, names = ["student", "onnx-fp32", *rest], [step.name for step in ledger.steps]
    if names != wanted:
        return f"precision is {manifest['precision']}, the steps of {LEDGER} are {names}, expected {wanted}"
    first, last = ledger.steps[0], ledger.steps[-1]
    for key, step in (("student", first), ("exported", last)):
        if manifest["scores"][key] != ledger.scores(step, triggers).to_json():
            return f"scores.{key} do not follow from the labels in {LEDGER}"
    if manifest["ledger"] != ledger.to_json(triggers):
        return f"ledger does not follow from the labels in {LEDGER}"
    same, percent = ledger.agreement(first, last), manifest["scores"]["agreement"]["percent"]
    # near-ties count as agreement there, so it may be more than that of the labels
    if set(percent) != set(same) or any(not round(same[key].value, 4) <= percent[key] <= 100 for key in same):
        return f"scores.agreement does not follow from the labels in {LEDGER}"
    return None


def _evaluation(data: bytes, manifest: Mapping[str, Any], origin: str) -> tuple[Images, Labels]:
    try:
        arrays: dict[str, NDArray[Any]] = read_npz(io.BytesIO(data), len(data), members=2)
    except ValueError as error:
        raise BundleError(f"{origin}: {EVALUATION}: {error}") from error
    if set(arrays) != {"x", "y"}:
        raise BundleError(f"{origin}: {EVALUATION} holds {sorted(arrays)}, expected x and y")
    x, y = arrays["x"], arrays["y"]
    shape = tuple(manifest["input"]["shape"])
    if x.dtype != np.uint8 or x.shape[1:] != shape or y.shape != x.shape[:1] or y.dtype != np.int64 or not len(x):
        raise BundleError(
            f"{origin}: {EVALUATION}: x {x.dtype}{x.shape}, y {y.dtype}{y.shape}, expected uint8 (N, {shape}) and int64 (N,)"
        )
    if y.min() < 0 or y.max() >= len(manifest["classes"]):
        raise BundleError(
            f"{origin}: {EVALUATION}: labels from {y.min()} to {y.max()}, there are {len(manifest['classes'])} classes"
        )
    return x, y
