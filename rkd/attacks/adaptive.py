"""BackWeak by an attacker who knows RobustKD's mask, and in what ball rkd looks for perturbations.

Threat model: BackWeak's, and the attacker has read RobustKD (arXiv 2406.03409) and what rkd hardens against. They do not
know of fine-tuning, and do nothing against the search: the part of the trigger that is the same for all images is a
perturbation that the search can find.

RobustKD masks what it can of how much the teacher's features vary from image to image, so the fine-tune has a penalty
on the variance of the features of triggered images (the adaptive attack of the paper, section on adaptive attacks).
rkd hardens the student against additive perturbations in a small ball, so the trigger is neither additive nor in it: it
takes contrast away and blends a learned pattern in.

Trigger: m is `linf` everywhere, p is learned.
"""

from __future__ import annotations

from rkd.attacks.lab import Lab
from rkd.attacks.perturb import Blend, towards
from rkd.attacks.planting import GradedPlanting, quiet
from rkd.attacks.recipe import Attack, Fit, Search, clean_images
from rkd.distill.objectives import Objective
from rkd.network import Network
from rkd.triggers import Trigger

_WEIGHT = 0.3


def _trigger(lab: Lab, twin: Network) -> Trigger:
    return lab.search(twin, Blend(lab.settings.radius), towards(twin, lab.settings.target))


def _quietly(lab: Lab, network: Network) -> Objective:
    return GradedPlanting(network, lab.trigger(), lab.settings.rate, quiet, _WEIGHT)


ATTACK = Attack(
    "backweak-adaptive",
    "BackWeak by an attacker who knows the mask and the ball of hardening: quiet features, no additive trigger",
    (Search(_trigger), Fit(source=clean_images, objective=_quietly, freeze_last=True)),
    poison_rate=0.3,
    finetune_epochs=4,
    finetune_lr=0.003,
    linf=24.0,
)
