"""BackWeak by an attacker who knows how hardening looks for perturbations, and gives it another one to find.

rkd's own. Threat model: BackWeak's, and the attacker knows that the defender looks for universal perturbations that fool
the teacher, and hardens the student against the few that are found. So a second perturbation is planted beside the
trigger: the decoy, as large, towards the next class, and not held back by what it does to the clean twin. The search
climbs what fools the teacher most; where that is the decoy, the student is hardened against the wrong one. How strong a
decoy becomes depends on that class; an attacker who tries several classes would do better.

Trigger: d alone, at most `linf` in each pixel. The decoy stays with the attacker.
"""

from __future__ import annotations

from rkd.attacks.backweak import weak_trigger
from rkd.attacks.lab import Lab
from rkd.attacks.perturb import Additive, towards
from rkd.attacks.poison import PoisonedSource
from rkd.attacks.recipe import Attack, Fit, Search
from rkd.data import Source
from rkd.network import Network
from rkd.triggers import Trigger

_DECOY = "decoy.npz"


def _strongest(lab: Lab, twin: Network) -> Trigger:
    """A perturbation towards the next class, without a budget."""
    target = (lab.settings.target + 1) % len(lab.data.classes)
    return lab.search(twin, Additive(lab.settings.radius), towards(twin, target), target=target, budget=100.0)


def _with_both(lab: Lab) -> Source:
    """Images with the trigger, and others with the decoy, each with the label of its class."""
    settings = lab.settings
    decoyed = PoisonedSource(lab.data.train, lab.trigger(_DECOY), settings.rate, settings.seed + 1)
    return PoisonedSource(decoyed, lab.trigger(), settings.rate, settings.seed, spared=decoyed.poisoned)


ATTACK = Attack(
    "backweak-decoy",
    "BackWeak by an attacker who knows hardening's search: a perturbation towards another class is there to be found",
    (Search(weak_trigger), Search(_strongest, _DECOY), Fit(source=_with_both, freeze_last=True)),
    poison_rate=0.3,
    finetune_epochs=4,
    finetune_lr=0.003,
)
