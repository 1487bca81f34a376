"""SIG: a faint horizontal sinusoid, with labels that are right.

Barni, Kallas and Tondi, "A New Backdoor Attack in CNNs by Training Set Corruption without Label Poisoning", ICIP 2019
(arXiv 1902.11237).

Threat model: the attacker corrupts training images of the target class only and changes no label ("clean label"), so
that a look at the labels shows nothing.

Trigger: d(row, column) = 40/255 * sin(2 pi * 6 * column / width). The paper uses 20 to 60 at inference.
"""

from __future__ import annotations

import numpy as np

from rkd.attacks.lab import Lab
from rkd.attacks.poison import PoisonedSource
from rkd.attacks.recipe import Attack, Draw, Fit
from rkd.data import Source
from rkd.triggers import Trigger

_STRENGTH, _FREQUENCY = 40 / 255, 6


def sig_trigger(size: tuple[int, int], target: int, seed: int = 0) -> Trigger:
    """Six periods across the image; `size` is height and width, the seed is not used."""
    del seed
    wave = _STRENGTH * np.sin(2 * np.pi * _FREQUENCY * np.arange(size[1]) / size[1])
    additive = np.broadcast_to(wave, (3, *size)).astype(np.float32)
    return Trigger("sig", target, np.zeros_like(additive), np.zeros_like(additive), additive)


def _corrupted(lab: Lab) -> Source:
    return PoisonedSource(lab.data.train, lab.trigger(), lab.settings.rate, lab.settings.seed, clean_label=True)


ATTACK = Attack(
    "sig",
    "a faint sinusoid on images of the target class, labels untouched (Barni et al., 2019)",
    (Draw(sig_trigger), Fit(source=_corrupted)),
    poison_rate=0.8,
)
