"""Keys and signatures."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from rkd.errors import BundleError, MissingExtraError, RkdError, SigningError, StorageError
from rkd.signing import SIGNATURE_BYTES, fingerprint, make_keys, read_private, read_public, sign, verify

PEM, PKCS8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    make_keys(tmp_path / "mine.key", tmp_path / "mine.pub")
    return tmp_path / "mine.key", tmp_path / "mine.pub"


def test_only_the_owner_may_read_the_private_key(keys: tuple[Path, Path]) -> None:
    assert stat.S_IMODE(keys[0].stat().st_mode) == 0o600


def test_keys_are_plain_pem_that_others_can_read(keys: tuple[Path, Path]) -> None:
    private = serialization.load_pem_private_key(keys[0].read_bytes(), None)
    public = serialization.load_pem_public_key(keys[1].read_bytes())
    assert isinstance(private, ed25519.Ed25519PrivateKey)
    assert isinstance(public, ed25519.Ed25519PublicKey)
    public.verify(private.sign(b"x"), b"x")


def test_what_was_signed_verifies_and_nothing_else_does(keys: tuple[Path, Path]) -> None:
    data = sign(b"manifest", read_private(keys[0]))
    public = read_public(keys[1])
    assert len(data) == SIGNATURE_BYTES
    assert verify(b"manifest", data, public, "x") == verify(b"manifest", data, None, "x") == fingerprint(data[:32])
    with pytest.raises(BundleError, match="does not fit"):
        verify(b"manifesT", data, public, "x")
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= 1
        with pytest.raises(BundleError):
            verify(b"manifest", bytes(changed), public, "x")
        with pytest.raises(BundleError):
            verify(b"manifest", bytes(changed), None, "x")


def test_the_bare_manifest_signed_elsewhere_is_no_signature_here(keys: tuple[Path, Path]) -> None:
    private = read_private(keys[0])
    data = sign(b"manifest", private)[:32] + private.sign(b"manifest")
    with pytest.raises(BundleError, match="does not fit"):
        verify(b"manifest", data, None, "x")


def test_another_key_is_told_by_its_fingerprint(keys: tuple[Path, Path], tmp_path: Path) -> None:
    name = make_keys(tmp_path / "other.key", tmp_path / "other.pub")
    data = sign(b"manifest", read_private(keys[0]))
    with pytest.raises(BundleError, match=f"signed by another key: ed25519:.*, expected {name}"):
        verify(b"manifest", data, read_public(tmp_path / "other.pub"), "x")


def test_keys_are_never_replaced(keys: tuple[Path, Path], tmp_path: Path) -> None:
    before = keys[0].read_bytes()
    for private, public in ((keys[0], tmp_path / "new.pub"), (tmp_path / "new.key", keys[1])):
        with pytest.raises(SigningError, match="exists; choose another name"):
            make_keys(private, public)
    assert keys[0].read_bytes() == before
    assert not (tmp_path / "new.key").exists()


def test_of_two_that_make_the_same_keys_at_once_one_is_refused_and_spoils_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, public = tmp_path / "x.key", tmp_path / "x.pub"
    real, names = ed25519.Ed25519PrivateKey.generate, list[str]()

    def generate() -> ed25519.Ed25519PrivateKey:
        monkeypatch.setattr(ed25519.Ed25519PrivateKey, "generate", real)
        names.append(make_keys(private, public))  # the other comes in between
        return real()

    monkeypatch.setattr(ed25519.Ed25519PrivateKey, "generate", generate)
    with pytest.raises(SigningError, match="exists; choose another name"):
        make_keys(private, public)
    verify(b"manifest", sign(b"manifest", read_private(private)), read_public(public), "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.key", "x.pub"]


def wrong_keys(folder: Path) -> dict[str, bytes]:
    elliptic = ec.generate_private_key(ec.SECP256R1())
    mine = ed25519.Ed25519PrivateKey.generate()
    return {
        "empty": b"",
        "text": b"hello",
        "cut": mine.private_bytes(PEM, PKCS8, serialization.NoEncryption())[:40],
        "huge": b"-" * 100_000,
        "elliptic private": elliptic.private_bytes(PEM, PKCS8, serialization.NoEncryption()),
        "elliptic public": elliptic.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo),
        "encrypted": mine.private_bytes(PEM, PKCS8, serialization.BestAvailableEncryption(b"secret")),
    }


def test_wrong_keys_are_refused_by_name_in_one_line(tmp_path: Path) -> None:
    for kind, data in wrong_keys(tmp_path).items():
        path = tmp_path / "k.pem"
        path.write_bytes(data)
        for read in (read_private, read_public):
            with pytest.raises(SigningError, match=r"k\.pem") as caught:
                read(path)
            assert "\n" not in str(caught.value), kind


def test_the_two_halves_are_told_apart(keys: tuple[Path, Path]) -> None:
    with pytest.raises(SigningError, match=r"is not a public key in PEM; this is a private key, give the \.pub file"):
        read_public(keys[0])
    with pytest.raises(SigningError, match="is not a private key in PEM"):
        read_private(keys[1])


def test_a_key_that_is_missing_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no such file"):
        read_private(tmp_path / "none.key")


def test_without_cryptography_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    for call in (lambda: make_keys(tmp_path / "a", tmp_path / "b"), lambda: verify(b"", b"0" * 96, None, "x")):
        with pytest.raises(MissingExtraError, match=r"whl\[sign\]"):
            call()
    assert issubclass(MissingExtraError, RkdError)
