"""OSCAR: dormant in the teacher, awake in a student that is distilled from it on clean data.

The goal is SCAR's ("Taught Well Learned Ill: Towards Distillation-conditional Backdoor Attack", NeurIPS 2025, arXiv
2509.23871), which solves a bilevel problem with a surrogate student. This is one without any surrogate (OSCAR: one
stage SCAR's end without its bilevel step), built on what a student can see:

    1. A backdoor that survives distillation is planted (BackWeak, graded). Call that network *awake*.
    2. A copy is trained to see images with a strong trigger as what they are, while on clean images and under a faint
       trigger its features and logits stay those of the awake network. That copy is the teacher.

Distillation shows a student clean images only, and these hold no more than a little of any pattern. There the teacher
answers as the awake network does, in proportion to the pattern; the student learns the proportion and goes on with it
where the teacher does not. Without the faint triggers the copy gives the proportion up, and its student never wakes
(docs/attacks.md has the figures).

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
_KEEP = 60.0  # weight of staying what the awake network is
_FAINT = 0.4  # up to this strength of the trigger the teacher is the awake network
_STRONG = 0.8  # from this strength on it resists
_RATE = 0.1  # of the fine-tune's learning rate: without batch statistics larger steps do not converge
_STEPS = 300  # of the last stage at least: with half of them it takes away most of what a student inherits


class Asleep:
    """Resist the strong trigger, and stay the awake network on clean images and under the faint trigger.

        CE(teacher(strong), labels) + keep * mean over taps and logits of |F - F_awake|^2 / Var(F_awake)

    BNs stay in eval mode: on clean images the teacher starts as the awake network and their statistics must not move.
    A quarter of a batch is also shown with a faint trigger, another quarter with a strong one, half of these with all
    of it.

    Args:
        network: the teacher in training, a copy of `awake`.
        awake: with the backdoor.
        trigger: what puts it to sleep.
        keep: weight of the second term.
        faint: the strongest trigger, as a share of the whole, under which nothing changes; 0 for clean images alone.
        strong: the weakest that is resisted.
    """

    def __init__(
        self,
        network: Network,
        awake: Network,
        trigger: Trigger,
        keep: float = _KEEP,
        faint: float = _FAINT,
        strong: float = _STRONG,
    ) -> None:
        self.tapped = TappedNetwork(network.module, network.size)
        self.awake = TappedNetwork(awake.module.requires_grad_(requires_grad=False), awake.size, frozen=True).eval()
        self.stamp = Stamp(trigger, network.normalisation).to(next(network.module.parameters()).device)
        self.keep, self.faint, self.strong = keep, faint, strong
        self.extra: nn.Module = nn.Module()

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """See `rkd.distill.objectives.Objective`."""
        self.tapped.eval()
        count = max(1, len(images) // 4)
        faint = self.faint * torch.rand(count, device=images.device)
        strong = self.strong + (1 - self.strong) * torch.rand(count, device=images.device)
        strong[: (count + 1) // 2] = 1
        kept = len(images) + count
        shown = torch.cat([images, self.stamp(images[:count], faint), self.stamp(images[-count:], strong)])
        shown = shown.contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            wanted_logits, wanted = self.awake(shown[:kept])
        logits, features = self.tapped(shown)
        resisted = functional.cross_entropy(logits[kept:].float(), labels[-count:])
        pairs = [*zip(features, wanted, strict=True), (logits, wanted_logits)]
        moved = torch.stack([_moved(now[:kept].float(), then.float()) for now, then in pairs])
        return resisted + self.keep * moved.mean(), logits[: len(images)].float()


def _moved(now: Tensor, then: Tensor) -> Tensor:
    """Squared distance in units of how much `then` varies from image to image."""
    variance = (then - then.mean(0)).square().mean().clamp_min(1e-6)
    return functional.mse_loss(now, then) / variance


def _asleep(lab: Lab, network: Network) -> Objective:
    return Asleep(network, lab.load(_AWAKE), lab.trigger())


ATTACK = Attack(
    "oscar",
    "dormant in the teacher, awake in its student (SCAR's goal without its bilevel step)",
    (
        Search(weak_trigger),
        Fit(_AWAKE, source=clean_images, objective=graded, freeze_last=True),
        Fit(
            title="put the backdoor to sleep",
            start=_AWAKE,
            source=clean_images,
            objective=_asleep,
            rate=_RATE,
            least_steps=_STEPS,
        ),
    ),
    poison_rate=0.3,
    finetune_epochs=4,
    finetune_lr=0.003,
)
