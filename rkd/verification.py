"""What `rkd verify` finds out about a bundle (no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rkd.bench.external import refuse_external_data
from rkd.bundle import MODEL, Bundle, read_bundle
from rkd.errors import MissingExtraError
from rkd.ledger import Flip, pairs
from rkd.signing import read_public


@dataclass(frozen=True)
class Verified:
    """A bundle whose digests fit, whose parts could be read and agree, and perhaps whose signer is known.

    Attributes:
        bundle: it.
        signer: fingerprint of the key that signed it; None where it is not signed.
        trusted: whether that is the key that was asked for.
        note: why a signature could not be checked; empty where it was, or where there is none.
        flips: by pair of steps, the images whose label changed.
    """

    bundle: Bundle
    signer: str | None
    trusted: bool
    note: str
    flips: dict[str, list[Flip]]

    def to_json(self, *, flips: bool) -> dict[str, Any]:
        """As `rkd verify --json` prints it; each flip only where asked for."""
        bundle = self.bundle
        return {
            "path": str(bundle.path),
            "sha256": bundle.digest,
            "name": bundle.name,
            "role": bundle.role,
            "target": bundle.target.name,
            "precision": bundle.target.precision,
            "signer": self.signer,
            "trusted": self.trusted,
            "note": self.note,
            "chain": dict(bundle.manifest["chain"]),
            "forced": list(bundle.forced),
            "notes": list(bundle.notes),
            "ledger": bundle.manifest.get("ledger", []),
            "quantisation": bundle.manifest.get("quantisation"),
            "flips": {
                pair: [dict(flip.__dict__) for flip in found] if flips else len(found)
                for pair, found in self.flips.items()
            },
        }


def verify_bundle(path: Path, public_key: Path | None = None) -> Verified:
    """Verify a bundle: every byte of it, and that what it says agrees.

    Args:
        path: the bundle.
        public_key: the key, in PEM, that must have signed it; None for whichever did.

    Raises:
        BundleError: it is not exactly what was written, contradicts itself, or is not signed by that key.
        SigningError: the key cannot be used.
        MissingExtraError: `cryptography` is not installed and `public_key` was given.
        StorageError: a file cannot be read.
    """
    key = read_public(public_key) if public_key is not None else None
    bundle = read_bundle(path)
    refuse_external_data(bundle.model, f"{path}: {MODEL}")
    bundle.evaluation()
    bundle.triggers()
    note = ""
    try:
        signer = bundle.verify_signature(key)
    except MissingExtraError as error:
        if key is not None:
            raise
        signer, note = None, f"signed, but its signature was not checked: {error}"
    ledger = bundle.ledger()
    flips = {f"{a.name} -> {b.name}": ledger.flips(a, b) for a, b in pairs(ledger)} if ledger else {}
    return Verified(bundle, signer, key is not None, note, flips)
