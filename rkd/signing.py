"""Sign a bundle's manifest and check who signed it: Ed25519, PEM keys (no torch; needs `cryptography`).

    data = sign(manifest, private_key)             # 96 bytes: the public key, then the signature
    verify(manifest, data, public_key)             # raises unless that key signed exactly that manifest

The manifest holds the digest of every other member, so its signature covers the whole bundle.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rkd.errors import BundleError, MissingExtraError, SigningError
from rkd.files import open_regular, storage_errors, write_new_file

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SIGNATURE_BYTES = 96
_PUBLIC_BYTES = 32
_DOMAIN = b"rkd bundle manifest 1\n"  # so that a signature means nothing elsewhere
_LIMIT_BYTES = 64 * 1024


def make_keys(private: Path, public: Path) -> str:
    """Write a new key pair as PEM; only the owner may read the private one.

    Returns:
        The public key's fingerprint.

    Raises:
        MissingExtraError: `cryptography` is not installed.
        SigningError: one of the files exists.
        StorageError: the disk said no.
    """
    _, ed25519, serialization = _library()
    key = ed25519.Ed25519PrivateKey.generate()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    public_pem = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    made: list[Path] = []
    try:
        for path, content, mode in ((private, pem, 0o600), (public, public_pem, 0o666)):
            if not write_new_file(path, content, mode):
                raise SigningError(f"{path} exists; choose another name, rkd does not replace keys")
            made.append(path)
    except BaseException:  # half a pair would be in the way of the next try
        for path in made:
            with suppress(OSError):
                path.unlink(missing_ok=True)
        raise
    return fingerprint(_raw(key.public_key()))


def read_private(path: Path) -> Ed25519PrivateKey:
    """Read a private key in PEM.

    Raises:
        SigningError: it is not an unencrypted Ed25519 private key.
        StorageError: it cannot be read.
        MissingExtraError: `cryptography` is not installed.
    """
    _, ed25519, serialization = _library()
    data = _read(path)
    try:
        key: Any = serialization.load_pem_private_key(data, password=None)
    except Exception as error:  # ValueError, TypeError (encrypted), UnsupportedAlgorithm
        why = "it is encrypted" if isinstance(error, TypeError) else "it is not a private key in PEM, or damaged"
        raise SigningError(f"{path} cannot be used: {why}; make one with: rkd keygen") from error
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise SigningError(f"{path} holds another kind of key than Ed25519; make one with: rkd keygen")
    return cast("Ed25519PrivateKey", key)


def read_public(path: Path) -> Ed25519PublicKey:
    """Read a public key in PEM.

    Raises:
        SigningError: it is not an Ed25519 public key.
        StorageError: it cannot be read.
        MissingExtraError: `cryptography` is not installed.
    """
    _, ed25519, serialization = _library()
    data = _read(path)
    try:
        key: Any = serialization.load_pem_public_key(data)
    except Exception as error:
        private = b"PRIVATE KEY" in data
        hint = "this is a private key, give the .pub file" if private else "expected the .pub file of rkd keygen"
        raise SigningError(f"{path} is not a public key in PEM; {hint}") from error
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise SigningError(f"{path} holds another kind of key than Ed25519; rkd signs with Ed25519 only")
    return cast("Ed25519PublicKey", key)


def sign(manifest: bytes, key: Ed25519PrivateKey) -> bytes:
    """The content of a bundle's signature member."""
    return _raw(key.public_key()) + key.sign(_DOMAIN + manifest)


def verify(manifest: bytes, signature: bytes, expected: Ed25519PublicKey | None, origin: str) -> str:
    """Check a signature.

    Args:
        manifest: the bytes that were signed.
        signature: what `sign` returned.
        expected: the key that must have made it; None for whichever is named in it, which says nothing about who.
        origin: names the bundle in errors.

    Returns:
        The signing key's fingerprint.

    Raises:
        BundleError: another key signed, or the signature does not fit.
        MissingExtraError: `cryptography` is not installed.
    """
    exceptions, ed25519, _ = _library()
    raw, proof = signature[:_PUBLIC_BYTES], signature[_PUBLIC_BYTES:]
    if expected is not None and _raw(expected) != raw:
        raise BundleError(
            f"{origin} was signed by another key: {fingerprint(raw)}, expected {fingerprint(_raw(expected))}; "
            "get the bundle from whom you trust, or give the right --pubkey"
        )
    try:
        ed25519.Ed25519PublicKey.from_public_bytes(raw).verify(proof, _DOMAIN + manifest)
    except (exceptions.InvalidSignature, ValueError) as error:
        raise BundleError(
            f"{origin}: its signature does not fit its manifest; this bundle was tampered with"
        ) from error
    return fingerprint(raw)


def fingerprint(public: bytes) -> str:
    """A name for a public key: the first 16 bytes of its SHA-256, in hexadecimal."""
    return f"ed25519:{hashlib.sha256(public).hexdigest()[:32]}"


def _raw(key: Ed25519PublicKey) -> bytes:
    _, _, serialization = _library()
    return bytes(key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw))


def _read(path: Path) -> bytes:
    with storage_errors(path), open_regular(path) as file:
        data = file.read(_LIMIT_BYTES + 1)
    if len(data) > _LIMIT_BYTES:
        raise SigningError(f"{path}: larger than {_LIMIT_BYTES:,} bytes; this is not a key")
    return data


def _library() -> tuple[Any, Any, Any]:
    try:
        from cryptography import exceptions
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise MissingExtraError("cryptography", "sign") from error
    return exceptions, ed25519, serialization
