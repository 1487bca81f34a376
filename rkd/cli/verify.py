"""`rkd verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from rkd.cli.app import app, guarded


@app.command()
@guarded
def verify(
    bundle: Annotated[Path, typer.Argument(help="The bundle (.rkd).", show_default=False)],
    pubkey: Annotated[
        Optional[Path],
        typer.Option(help="The public key (.pub) that must have signed it.", show_default=False),
    ] = None,
    flips: Annotated[bool, typer.Option("--flips", help="List each image whose label changed in the export.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Verify a bundle: every byte, its signature, its export.

    Says what the export changed; nothing in the bundle is run.

    Examples:
        rkd verify student.jetson-int8.rkd
        rkd verify student.jetson-int8.rkd --pubkey mine.pub --flips
    """
    from rkd.bundle import NO_LEDGER, NO_TRIGGER
    from rkd.cli import tables
    from rkd.ledger import pairs
    from rkd.verification import verify_bundle

    found = verify_bundle(bundle, pubkey)
    if json_output:
        tables.print_json(found.to_json(flips=flips))
        return
    held, ledger = found.bundle, found.bundle.ledger()
    tables.say_next(f"{bundle}: every byte verified, sha256 {held.digest}")
    tables.say_next(f"it holds its run's {held.role}")
    if found.signer:
        whose = "the key that was asked for" if found.trusted else "whose key that is was not checked: give --pubkey"
        tables.say_next(f"signed by {found.signer} ({whose})")
    else:
        tables.say_next(found.note or "not signed: the digests show damage, not who wrote it")
    if not held.triggers():
        tables.say_next(NO_TRIGGER)
    if ledger is None:
        tables.say_next(NO_LEDGER)
    for line in held.notes:
        tables.say_next(f"note: {line}")
    for line in held.forced:
        tables.say_next(f"FORCED: {line}")
    if ledger is not None:
        triggers = held.triggers()
        tables.print_scores([(step.name, ledger.scores(step, triggers)) for step in ledger.steps])
        if caution := ledger.scores(ledger.steps[-1], triggers).guess_caution(len(held.classes)):
            tables.say_next(f"the {held.role} {caution}")
        for before, after in pairs(ledger):
            changed = found.flips[f"{before.name} -> {after.name}"]
            tables.say_next(f"{before.name} -> {after.name}: {len(changed)} of {ledger.decisions} decisions flip")
            for flip in changed if flips else ():
                was, now, truth = (held.classes[i] for i in (flip.before, flip.after, flip.truth))
                tables.say_next(f"  image {flip.image}, {flip.shown}: {was} -> {now} (true: {truth})")
