"""Makers of backdoored teachers, to evaluate defences with. Never needed to defend.

The threat model of all: the attacker trains the teacher and publishes it; the defender distils it on clean data of their
own. What else an attacker needs, and what the trigger is, is in the module of each; `rkd.attacks.recipe` has what they
are made of. docs/attacks.md compares them with figures.
"""

from __future__ import annotations

from rkd.attacks import adaptive, adba, backweak, badnets, blended, cheatkd, decoy, oscar, sig, wanet
from rkd.attacks.recipe import Attack, Fit, clean_images

ATTACKS: dict[str, Attack] = {
    attack.name: attack
    for attack in (
        Attack("none", "a clean teacher", (Fit(title="train the teacher", start="", source=clean_images),)),
        badnets.GRID,
        badnets.SQUARE,
        blended.ATTACK,
        sig.ATTACK,
        wanet.ATTACK,
        cheatkd.ATTACK,
        adba.ATTACK,
        backweak.ATTACK,
        backweak.GRADED,
        adaptive.ATTACK,
        decoy.ATTACK,
        oscar.ATTACK,
    )
}

__all__ = ["ATTACKS", "Attack"]
