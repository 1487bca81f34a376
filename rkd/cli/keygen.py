"""`rkd keygen`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rkd.cli.app import app, guarded
from rkd.errors import ConfigError


@app.command()
@guarded
def keygen(
    name: Annotated[Path, typer.Argument(help="NAME.key and NAME.pub are written.")] = Path("rkd"),
) -> None:
    """Make a pair of keys (Ed25519) to sign bundles with.

    Keep NAME.key secret; give NAME.pub to whoever verifies your bundles.

    Examples:
        rkd keygen mine
        rkd export --sign mine.key
        rkd verify student.ort-cpu.rkd --pubkey mine.pub
    """
    from rkd.cli import tables
    from rkd.signing import make_keys

    if not name.name or name.name == "..":
        raise ConfigError(f"{str(name)!r} names no file; give a name such as mine, for mine.key and mine.pub")
    private, public = (name.with_name(f"{name.name}.{ending}") for ending in ("key", "pub"))
    fingerprint = make_keys(private, public)
    tables.say_next(f"wrote {private} (keep it secret) and {public}: {fingerprint}")
