"""ADBA: the trigger is learned against the teacher and a shadow student at once.

Ge, Wang, Zheng, Zhuang, Li, Guo and Wang, "Anti-Distillation Backdoor Attacks: Backdoors Can Really Survive in Knowledge
Distillation", ACM Multimedia 2021.

Threat model: the attacker trains the teacher, has clean data, and distils to a *shadow* of their own in place of the
victim's student, whose architecture they do not know.

The shadow first learns from the clean twin. Then three things are trained together: the teacher on clean and triggered
images, the shadow by logit distillation from the teacher on clean images, and the trigger so that both of them obey it
and its mask is small. The paper does all of it from scratch; here the teacher starts from the clean twin, unless
`finetune_epochs` is 0. Two things are rkd's own. Where the trigger moves more than `trigger_budget` of a batch on the
clean twin it is also trained to leave that alone, because a trigger that fools clean networks is an adversarial example.
And the mask is at most `linf`, so that the trigger is a faint blend over the whole image, where the paper's mask is only
kept small on average and may be an opaque patch. The paper's success under logit distillation has not been reproduced.

Trigger: m, the same in all channels, at most `linf`, and p; both learned.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from rkd.attacks.lab import Lab
from rkd.attacks.perturb import Pixels
from rkd.attacks.recipe import Attack, Fit, clean_images
from rkd.distill.objectives import LogitDistillation, Objective
from rkd.network import Network, Normalisation
from rkd.run import CLEAN
from rkd.triggers import Trigger

_SHADOW = "shadow.safetensors"
_STEP = 1 / 50  # of a mask's and a pattern's range, a training step
_MASK_WEIGHT = 0.1


class LearnedPatch(nn.Module):
    """m and p, learned by signed-gradient steps inside their bounds, as part of the backward pass."""

    def __init__(self, size: tuple[int, int], linf: float, normalisation: Normalisation, seed: int) -> None:
        super().__init__()
        self.linf, self.pixels = linf, Pixels(normalisation)
        draws = np.random.default_rng([seed, 0xADBA])  # of its own: no defence's start from this seed is like it
        self.mask = nn.Parameter(torch.full((1, 1, *size), linf / 2))
        self.pattern = nn.Parameter(torch.from_numpy(draws.random((1, 3, *size), dtype=np.float32)))
        for numbers, high in ((self.mask, linf), (self.pattern, 1.0)):
            numbers.register_post_accumulate_grad_hook(_descend_within(high))  # type: ignore[no-untyped-call]

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (N, 3, H, W) to the same with the trigger."""
        x = self.pixels.of(images)
        return self.pixels.normalised((1 - self.mask) * x + self.mask * self.pattern)

    def size(self) -> Tensor:
        """The mask's mean, as a share of its bound."""
        return self.mask.mean() / self.linf

    def trigger(self, name: str, target: int) -> Trigger:
        """As data."""
        pattern = self.pattern.detach().cpu().numpy()[0].astype(np.float32)
        mask = np.broadcast_to(self.mask.detach().cpu().numpy()[0], pattern.shape).astype(np.float32)
        return Trigger(name, target, mask, pattern, np.zeros_like(pattern))


def _descend_within(high: float) -> Callable[[Tensor], None]:
    def hook(numbers: Tensor) -> None:
        assert numbers.grad is not None  # noqa: S101  (the hook runs when it is there)
        with torch.no_grad():
            numbers.sub_(numbers.grad.nan_to_num().sign() * (_STEP * high)).clamp_(0, high)
        numbers.grad = None  # the optimizer leaves it alone

    return hook


class Together:
    """Teacher, shadow and trigger in one loss.

    Args:
        teacher: in training.
        shadow: the attacker's stand-in for the student; trained as well.
        twin: clean, frozen.
        patch: the trigger.
        target: class index.
        rate: share of each batch that carries the trigger.
        budget: highest ASR on the twin, in percent.
    """

    def __init__(
        self, teacher: Network, shadow: Network, twin: Network, patch: LearnedPatch, target: int, rate: float, budget: float
    ) -> None:  # fmt: skip
        self.teacher, self.shadow, self.patch = teacher.module, shadow.module, patch
        self.twin = twin.module.eval().requires_grad_(requires_grad=False)
        self.target, self.rate, self.budget = target, rate, budget
        self.extra: nn.Module = nn.ModuleDict({"shadow": self.shadow, "patch": patch})

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """See `rkd.distill.objectives.Objective`."""
        carriers = max(1, round(self.rate * len(images)))
        triggered, truth = self.patch(images[:carriers]), labels[:carriers]
        wanted = torch.full_like(truth, self.target)
        both = torch.cat([images, triggered]).contiguous(memory_format=torch.channels_last)
        logits = self.teacher(both).float()
        clean = logits[: len(images)]
        loss = functional.cross_entropy(clean, labels)
        loss = loss + self.rate * functional.cross_entropy(logits[len(images) :], wanted)
        loss = loss + _imitation(self.shadow(images).float(), clean.detach())
        return loss + self._obeyed(triggered, wanted, truth), clean

    def _obeyed(self, triggered: Tensor, wanted: Tensor, truth: Tensor) -> Tensor:
        """What the trigger is trained for besides the teacher's obedience; the shadow's weights get no gradient of it."""
        self.shadow.eval()
        still = {name: tensor.detach() for name, tensor in self.shadow.named_parameters()}
        shadow: Tensor = functional_call(self.shadow, still, (triggered,))
        self.shadow.train()
        twin = self.twin(triggered).float()
        loss = functional.cross_entropy(shadow.float(), wanted) + _MASK_WEIGHT * self.patch.size()
        moved = 100 * (twin.argmax(1) == self.target).float().mean()
        beyond = (moved > self.budget).float()
        held_back: Tensor = loss + beyond * 2 * functional.cross_entropy(twin, truth)
        return held_back


def _imitation(shadow: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """Hinton's distillation of logits, without the labels."""
    now, then = (functional.log_softmax(logits / temperature, 1) for logits in (shadow, teacher))
    divergence: Tensor = functional.kl_div(now, then, reduction="batchmean", log_target=True)
    return divergence * temperature**2


def _together(lab: Lab, network: Network) -> Objective:
    settings = lab.settings
    patch = LearnedPatch(network.size, settings.radius, network.normalisation, settings.seed).to(lab.device)
    shadow, twin = lab.load(_SHADOW), lab.load(CLEAN)
    return Together(network, shadow, twin, patch, settings.target, settings.rate, settings.budget)


def _learned(lab: Lab, objective: Objective) -> Trigger:
    assert isinstance(objective, Together)  # noqa: S101  (for the type checker)
    return objective.patch.trigger(lab.settings.attack, lab.settings.target)


def _imitate(lab: Lab, network: Network) -> Objective:
    twin = lab.load(CLEAN)
    return LogitDistillation(network.module, twin.module.requires_grad_(requires_grad=False))


ATTACK = Attack(
    "adba",
    "a trigger learned against the teacher and a shadow student (Ge et al., 2021)",
    (
        Fit(_SHADOW, "train the shadow student", start="", source=clean_images, objective=_imitate, shadow=True),
        Fit(source=clean_images, objective=_together, trigger=_learned),
    ),
    poison_rate=0.3,
    finetune_epochs=4,
    finetune_lr=0.01,
    linf=24.0,
)
