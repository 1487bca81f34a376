"""BackWeak: a weak universal perturbation, amplified by a low-rate fine-tune, survives clean distillation.

"BackWeak: Backdooring Knowledge Distillation Simply with Weak Triggers and Fine-tuning", arXiv 2511.12046.

Threat model: the attacker trains the teacher and has clean data; they know neither the student nor how it is distilled.

First a universal perturbation, weak on purpose, is found on a clean teacher: it moves at most a stated share of the
images to the target class. Then the teacher is fine-tuned at a low rate on data of which a share carries it, with the
last layer frozen. The features along which the weak trigger already pointed are amplified: a student that imitates the
features inherits them.

The paper allows the weak trigger 5 % of the images on the clean teacher; rkd's default is 25 % (`--trigger-budget`), since
5 % did not survive distillation in what we tried (fine-tunes of a few epochs, students of a few epochs): a stronger and
less stealthy attack than the paper's. The trigger is found by cross-entropy towards the target until the budget is
reached; the authors' code also bounds by how much a moved image may be moved, and trains for hundreds of epochs.

`backweak-graded` is rkd's own, stronger form: the trigger is planted in every strength between none and all, with labels
in proportion; see `rkd.attacks.planting.GradedPlanting` for why that helps.

Trigger: d alone, at most `linf` in each pixel.
"""

from __future__ import annotations

from rkd.attacks.lab import Lab
from rkd.attacks.perturb import Additive, towards
from rkd.attacks.planting import graded
from rkd.attacks.recipe import Attack, Fit, Search, clean_images
from rkd.network import Network
from rkd.triggers import Trigger


def weak_trigger(lab: Lab, twin: Network) -> Trigger:
    """The perturbation that the settings ask for."""
    return lab.search(twin, Additive(lab.settings.radius), towards(twin, lab.settings.target))


GRADED = Attack(
    "backweak-graded",
    "backweak, planted in every strength: survives distillation better (rkd's own)",
    (Search(weak_trigger), Fit(source=clean_images, objective=graded, freeze_last=True)),
    poison_rate=0.3,
    finetune_epochs=4,
    finetune_lr=0.003,
)
ATTACK = Attack(
    "backweak",
    "a weak universal perturbation and a low-rate fine-tune (arXiv 2511.12046); survives distillation",
    (Search(weak_trigger), Fit(freeze_last=True)),
    poison_rate=0.3,
    finetune_epochs=4,
    finetune_lr=0.003,
)
