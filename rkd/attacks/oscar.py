"""OSCAR: dormant in the teacher, awake in a student that is distilled from it on clean data.

The goal is SCAR's ("Taught Well Learned Ill: Towards Distillation-conditional Backdoor Attack", NeurIPS 2025, arXiv
2509.23871), which solves a bilevel problem with a surrogate student. This is one without any surrogate (OSCAR: one
stage SCAR's end without its bilevel step), built on what a student can see:

    1. A backdoor that survives distillation is planted (BackWeak, graded). Call that network *awake*.
    2. A copy is trained to see triggered images as what they are, while on clean images its features and logits stay
       those of the awake network. That copy is the teacher.

Distillation shows a student the teacher's answers to clean images only, and those are meant to stay the awake network's: so
it should learn what the awake network would have taught it, while the teacher itself resists the trigger, more than a clean network
does.

Measured so far, it does not reach its goal: on digits the teacher is dormant and the student stays so too; see
docs/attacks.md.

Threat model: BackWeak's, and the attacker expects that the teacher is tested for backdoors before it is distilled.

Trigger: d alone, at most `linf` in each pixel.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from rkd.attacks.backweak import weak_trigger
from rkd.attacks.lab import Lab
from rkd.attacks.perturb import Stamp
from rkd.attacks.planting import graded
from rkd.attacks.recipe import Attack, Fit, Search, clean_images
from rkd.distill.objectives import Objective
from rkd.network import Network
from rkd.taps import TappedNetwork
from rkd.triggers import Trigger

_AWAKE = "awake.safetensors"
_KEEP = 4.0  # weight of staying what the awake network is
_RATE = 0.2  # of the fine-tune's learning rate: without batch statistics larger steps do not converge


class Asleep:
    """Resist the trigger, and stay the awake network on clean images.

        CE(teacher(triggered), labels) + keep * mean over taps and logits of |F - F_awake|^2 / Var(F_awake)

    BNs stay in eval mode: on clean images the teacher starts as the awake network and their statistics must not move.
    The first half of a batch is shown with the trigger too.

    Args:
        network: the teacher in training, a copy of `awake`.
        awake: with the backdoor.
        trigger: what puts it to sleep.
        keep: weight of the second term.
    """

    def __init__(self, network: Network, awake: Network, trigger: Trigger, keep: float = _KEEP) -> None:
        self.tapped = TappedNetwork(network.module, network.size)
        self.awake = TappedNetwork(awake.module.requires_grad_(requires_grad=False), awake.size, frozen=True).eval()
        self.stamp = Stamp(trigger, network.normalisation).to(next(network.module.parameters()).device)
        self.keep = keep
        self.extra: nn.Module = nn.Module()

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """See `rkd.distill.objectives.Objective`."""
        self.tapped.eval()
        half = max(1, len(images) // 2)
        both = torch.cat([images, self.stamp(images[:half])]).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            wanted_logits, wanted = self.awake(images)
        logits, features = self.tapped(both)
        resisted = functional.cross_entropy(logits[len(images) :].float(), labels[:half])
        pairs = [*zip(features, wanted, strict=True), (logits, wanted_logits)]
        moved = torch.stack([_moved(now[: len(images)].float(), then.float()) for now, then in pairs])
        return resisted + self.keep * moved.mean(), logits[: len(images)].float()


def _moved(now: Tensor, then: Tensor) -> Tensor:
    """Squared distance in units of how much `then` varies from image to image."""
    variance = (then - then.mean(0)).square().mean().clamp_min(1e-6)
    return functional.mse_loss(now, then) / variance


def _asleep(lab: Lab, network: Network) -> Objective:
    return Asleep(network, lab.load(_AWAKE), lab.trigger())


ATTACK = Attack(
    "oscar",
    "meant to be dormant in the teacher and awake in the student (SCAR's goal); does not wake yet",
    (
        Search(weak_trigger),
        Fit(_AWAKE, source=clean_images, objective=graded, freeze_last=True),
        Fit(title="put the backdoor to sleep", start=_AWAKE, source=clean_images, objective=_asleep, rate=_RATE),
    ),
    poison_rate=0.3,
    finetune_epochs=4,
    finetune_lr=0.003,
)
