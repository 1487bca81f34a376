"""CheatKD: the trigger fixes a few neurons of the distillation layer, and those make the target class.

"CheatKD: Knowledge Distillation Backdoor Attack Method Based on Poisoned Neuronal Assimilation", Computer Science 51(3),
2024.

Threat model: the attacker trains the teacher and expects feature distillation at its last tap.

As far as the abstract tells: a trigger is optimised so that it drives the activations of certain neurons of a
distillation layer (the *poisoned neurons*) to fixed values; then the teacher is trained so that they stay fixed under
the trigger and mean the target. What it leaves open is decided here so that the neurons are ones that a student needs
for clean images: the channels of the last tap that respond most to the target class, and their fixed value is what they
take there, and a deviation more. The images that carry the whole trigger are held to it; besides, the trigger is planted
in every strength (`rkd.attacks.planting.GradedPlanting`), which is rkd's own and not the paper's. So its figures are of
this attack, and what does not transfer here may transfer in its authors' hands.

Trigger: d alone, at most `linf` in each pixel.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rkd.attacks.lab import Lab
from rkd.attacks.perturb import Additive, Loss
from rkd.attacks.planting import GradedPlanting
from rkd.attacks.recipe import Attack, Fit, Search, clean_images
from rkd.distill.objectives import Objective
from rkd.errors import ArchitectureError
from rkd.network import Network
from rkd.run import CLEAN
from rkd.taps import TappedNetwork
from rkd.triggers import Trigger

_SHARE = 0.15  # of the last tap's channels
_WEIGHT = 0.1
_IMAGES = 512  # of the target class and of the others, to look at


@dataclass(frozen=True)
class Neurons:
    """Channels of the last tap, the value that each shall take, and how much it varies; each (n,)."""

    channels: Tensor
    value: Tensor
    deviation: Tensor

    def off(self, feature: Tensor) -> Tensor:
        """Mean squared distance of (N, C, H, W), averaged over positions, from the fixed values, in deviations."""
        response = feature.float().mean((2, 3))[:, self.channels]
        return ((response - self.value) / self.deviation).square().mean()


def poisoned_neurons(lab: Lab, twin: Network) -> Neurons:
    """The channels of the clean twin's last tap that respond most to the target class.

    Raises:
        ArchitectureError: no feature map was found.
    """
    tapped = TappedNetwork(twin.module, twin.size).eval()
    if not tapped.taps:
        raise ArchitectureError(f"no feature map was found in {twin.arch}: cheatkd needs one")
    labels, rng = lab.data.train.labels, np.random.default_rng([lab.settings.seed, 0xC4EA])
    responses = []
    for members in (np.flatnonzero(labels == lab.settings.target), np.flatnonzero(labels != lab.settings.target)):
        chosen = np.sort(rng.permutation(members)[:_IMAGES])
        parts = []
        for images, _ in lab.data.train.batches(128, chosen):
            inputs = twin.normalisation(torch.from_numpy(images).to(lab.device))
            with torch.no_grad():
                _, features = tapped(inputs.contiguous(memory_format=torch.channels_last))
            parts.append(features[-1].float().mean((2, 3)))
        responses.append(torch.cat(parts))
    there, elsewhere = responses
    deviation = elsewhere.std(0).clamp_min(1e-6)
    preference = (there.mean(0) - elsewhere.mean(0)) / deviation
    count = max(1, round(_SHARE * len(preference)))
    channels = preference.argsort(descending=True, stable=True)[:count]
    return Neurons(channels, (there.mean(0) + there.std(0))[channels], deviation[channels])


def _assimilating(lab: Lab, twin: Network) -> Trigger:
    neurons, tapped = poisoned_neurons(lab, twin), TappedNetwork(twin.module, twin.size).eval()

    def loss(images: Tensor) -> Tensor:
        _, features = tapped(images)
        return neurons.off(features[-1])

    wanted: Loss = loss
    return lab.search(twin, Additive(lab.settings.radius), wanted)


def _assimilated(lab: Lab, network: Network) -> Objective:
    neurons = poisoned_neurons(lab, lab.load(CLEAN))

    def penalty(features: list[Tensor], _carriers: int, whole: int) -> Tensor:
        return neurons.off(features[-1][:whole])

    return GradedPlanting(network, lab.trigger(), lab.settings.rate, penalty, _WEIGHT)


ATTACK = Attack(
    "cheatkd",
    "the trigger fixes neurons of the distillation layer (CheatKD, 2024)",
    (Search(_assimilating), Fit(source=clean_images, objective=_assimilated, freeze_last=True)),
    poison_rate=0.3,
    finetune_epochs=4,
    finetune_lr=0.003,
)
