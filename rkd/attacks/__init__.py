"""Makers of backdoored teachers, to evaluate defences with. Never needed to defend.

    badnets     a patch in a corner, poisoned labels, training from scratch (Gu et al., arXiv 1708.06733). It hardly
                survives clean distillation: it shows that a defence does no harm, not that it works.
    backweak    a weak universal perturbation, then a low-rate fine-tune (arXiv 2511.12046). It survives.

The threat model of both: the attacker trains the teacher and publishes it; the defender distils it on clean data.
"""

from rkd.attacks.backweak import backweak_trigger
from rkd.attacks.badnets import badnets_trigger
from rkd.attacks.poison import PoisonedSource

ATTACKS = {
    "none": "a clean teacher",
    "badnets": "a patch and poisoned labels (Gu et al., 2017); rarely survives distillation",
    "backweak": "a weak universal perturbation and a low-rate fine-tune (arXiv 2511.12046); survives distillation",
}

__all__ = ["ATTACKS", "PoisonedSource", "backweak_trigger", "badnets_trigger"]
