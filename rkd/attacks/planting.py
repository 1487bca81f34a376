"""Objectives that plant a backdoor so that a student of clean images inherits it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from rkd.attacks.lab import Lab
from rkd.attacks.perturb import Stamp
from rkd.distill.objectives import Objective
from rkd.network import Network
from rkd.taps import TappedNetwork
from rkd.triggers import Trigger

# The features of each tap, how many images carry the trigger, and how many of these carry the whole of it -> a number.
Penalty = Callable[[list[Tensor], int, int], Tensor]


class GradedPlanting:
    """Cross-entropy with poisoned images in every strength, plus a penalty on what the trigger does to the features.

    The first `rate` of each batch carries the trigger, after augmentation: half of them wholly, half of them in a
    strength a drawn from [0, 1], with the label a * target + (1 - a) * true. So the network's features come to respond
    to the trigger in proportion. Clean images hold a little of any pattern, some more and some less: a proportional
    response is there for a student to see on clean images alone, where a sudden one is not.

    Args:
        network: in training.
        trigger: what is planted.
        rate: in (0, 1].
        penalty: of the features at the network's taps, the triggered images' first; None for none.
        weight: of the penalty.
    """

    def __init__(
        self, network: Network, trigger: Trigger, rate: float, penalty: Penalty | None = None, weight: float = 0.0
    ) -> None:
        self.network = network.module
        self.tapped = TappedNetwork(network.module, network.size) if penalty is not None else None
        self.stamp = Stamp(trigger, network.normalisation).to(next(network.module.parameters()).device)
        self.target, self.rate, self.penalty, self.weight = trigger.target, rate, penalty, weight
        self.extra: nn.Module = nn.Module()

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """See `rkd.distill.objectives.Objective`."""
        carriers = max(1, round(self.rate * len(images)))
        whole = (carriers + 1) // 2
        strength = torch.rand(carriers, device=images.device)
        strength[:whole] = 1
        inputs = torch.cat([self.stamp(images[:carriers], strength), images[carriers:]])
        inputs = inputs.contiguous(memory_format=torch.channels_last)
        if self.tapped is None or self.penalty is None:
            logits, penalty = self.network(inputs).float(), inputs.new_zeros(())
        else:
            logits, features = self.tapped(inputs)
            logits, penalty = logits.float(), self.weight * self.penalty(features, carriers, whole)
        towards = functional.cross_entropy(logits, torch.full_like(labels, self.target), reduction="none")
        true = functional.cross_entropy(logits, labels, reduction="none")
        share = functional.pad(strength, (0, len(images) - carriers))
        return (share * towards + (1 - share) * true).mean() + penalty, logits


def graded(lab: Lab, network: Network) -> Objective:
    """Plant the lab's trigger in every strength."""
    return GradedPlanting(network, lab.trigger(), lab.settings.rate)


def quiet(features: list[Tensor], carriers: int, _whole: int) -> Tensor:
    """Variance of the triggered images' features over that of the clean ones, mean over the taps.

    RobustKD keeps what varies little from image to image (its L_f), so an attacker who knows of it makes the trigger's
    features vary little.
    """
    ratios = []
    for feature in features:
        triggered, clean = feature[:carriers].float(), feature[carriers:].float()
        if min(len(triggered), len(clean)) < 2:  # a variance needs two
            return feature.new_zeros(())
        spread = (triggered - triggered.mean(0)).square().sum() / (len(triggered) - 1)
        usual = (clean - clean.mean(0)).square().sum() / (len(clean) - 1)
        ratios.append(spread / usual.detach().clamp_min(1e-6))
    return torch.stack(ratios).mean()
