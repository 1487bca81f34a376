"""What an attack is made of: a short, declared list of stages, each of which leaves a file.

    Draw      a trigger that needs no network                              -> trigger.npz
    Search    a trigger that is found on the clean twin                    -> trigger / decoy.npz
    Fit       a network that is trained for an objective on a source       -> clean / awake / shadow / teacher.safetensors

A stage whose file is there is done: a run that was killed goes on with the first that is not. What a stage makes
depends on the settings and on earlier stages' files only, never on which process made those.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from torch import nn

from rkd.attacks.poison import PoisonedSource
from rkd.data import Source
from rkd.distill.objectives import CrossEntropy, Objective
from rkd.network import Network
from rkd.run import CLEAN, TEACHER, TRIGGER
from rkd.triggers import Trigger

if TYPE_CHECKING:
    from rkd.attacks.lab import Lab


_SHADOW = 0x5AD0  # its weights are not those that a student of the same network and seed starts with


class Stage(Protocol):
    """One step of an attack."""

    @property
    def makes(self) -> str:
        """The file of the run directory that is there when the stage is done."""
        ...

    def run(self, lab: Lab) -> None:
        """Make it."""
        ...


@dataclass(frozen=True)
class Draw:
    """A trigger that needs no network.

    Attributes:
        trigger: from the images' height and width, the target class and the seed.
    """

    trigger: Callable[[tuple[int, int], int, int], Trigger]
    makes: str = TRIGGER

    def run(self, lab: Lab) -> None:
        """See `Stage`."""
        lab.keep_trigger(self.trigger(lab.data.size, lab.settings.target, lab.settings.seed), self.makes)


@dataclass(frozen=True)
class Search:
    """A trigger that is found on the clean twin.

    Attributes:
        find: from the lab and the twin.
    """

    find: Callable[[Lab, Network], Trigger]
    makes: str = TRIGGER

    def run(self, lab: Lab) -> None:
        """See `Stage`."""
        lab.keep_trigger(self.find(lab, lab.load(CLEAN)), self.makes)


def clean_images(lab: Lab) -> Source:
    """The attacker's images as they are."""
    return lab.data.train


def poisoned_images(lab: Lab) -> Source:
    """The attacker's images, `poison_rate` of them with the trigger and the target's label."""
    return PoisonedSource(lab.data.train, lab.trigger(), lab.settings.rate, lab.settings.seed)


def cross_entropy(_lab: Lab, network: Network) -> Objective:
    """Plain training."""
    return CrossEntropy(network.module)


def last_layer(module: nn.Module) -> frozenset[str]:
    """Names of the parameters of a network's last layer."""
    names = [name for name, _ in module.named_parameters()]
    return frozenset(name for name in names if name.rpartition(".")[0] == names[-1].rpartition(".")[0])


@dataclass(frozen=True)
class Fit:
    """A network that is trained.

    Attributes:
        makes: the network's file.
        title: for the progress and the log.
        start: the file of the network to go on from, at `finetune_lr` for `finetune_epochs`; empty for a fresh one
            at `lr` for `epochs`. With `finetune_epochs` 0 what would start from the clean twin starts afresh.
        source: the images.
        objective: from the lab and the network in training.
        freeze_last: keep the last layer as it is.
        trigger: what the trigger became, where the objective learns it too.
        shadow: train the attacker's small network instead of the teacher's.
        rate: what a fine-tune's learning rate is multiplied by.
        least_steps: of a fine-tune; on few images more epochs are trained than the settings say.
    """

    makes: str = TEACHER
    title: str = "plant the backdoor"
    start: str = CLEAN
    source: Callable[[Lab], Source] = poisoned_images
    objective: Callable[[Lab, Network], Objective] = cross_entropy
    freeze_last: bool = False
    trigger: Callable[[Lab, Objective], Trigger] | None = None
    shadow: bool = False
    rate: float = 1.0
    least_steps: int = 1

    def run(self, lab: Lab) -> None:
        """See `Stage`."""
        settings = lab.settings
        tuned = bool(self.start) and (self.start != CLEAN or settings.finetuned > 0)
        if tuned:
            network = lab.load(self.start)
            rate = self.rate * settings.finetune_rate
            recipe = lab.recipe(settings.finetuned, rate, settings.seed + 1, least_steps=self.least_steps)
        else:
            network = lab.fresh(settings.shadow, stream=_SHADOW) if self.shadow else lab.fresh(settings.arch)
            recipe = lab.recipe(settings.epochs, settings.lr, settings.seed)
        frozen = last_layer(network.module) if self.freeze_last and tuned else frozenset[str]()
        lab.place(network)
        objective = self.objective(lab, network)
        lab.fit(network, objective, self.source(lab), recipe, title=self.title, frozen=frozen)
        if self.trigger is not None:
            lab.keep_trigger(self.trigger(lab, objective))
        lab.keep(network, self.makes)


CLEAN_TWIN = Fit(CLEAN, "train the clean twin", start="", source=clean_images)


@dataclass(frozen=True)
class Attack:
    """A maker of backdoored teachers, as data.

    Attributes:
        name: for `--attack`.
        about: one line: what it does, and the paper.
        stages: in order; the last makes the teacher. The clean twin comes first and is not listed.
        poison_rate: share of poisoned images, where the user gives none.
        finetune_epochs: of the fine-tune from the clean twin, where the user gives none; 0 trains from scratch.
        finetune_lr: its highest learning rate.
        linf: the trigger's largest change of a pixel, in 255ths, of attacks that learn their trigger.
        trigger_budget: the trigger's highest ASR on the clean twin, in percent, of attacks that learn it.
    """

    name: str
    about: str
    stages: tuple[Stage, ...]
    poison_rate: float = 0.1
    finetune_epochs: int = 0
    finetune_lr: float = 0.01
    linf: float = 8.0
    trigger_budget: float = 25.0

    @property
    def options(self) -> frozenset[str]:
        """Those of the settings above that it uses, and `shadow` where it trains one."""
        fits = [stage for stage in self.stages if isinstance(stage, Fit)]
        learned = any(fit.trigger is not None for fit in fits) or any(isinstance(one, Search) for one in self.stages)
        used = {
            "shadow": any(fit.shadow for fit in fits),
            **dict.fromkeys(("poison_rate", "finetune_epochs", "finetune_lr"), any(fit.start for fit in fits)),
            **dict.fromkeys(("linf", "trigger_budget"), learned),
        }
        return frozenset(name for name, is_used in used.items() if is_used)


def probe_split(labels: np.ndarray, target: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split the images of other classes than the target's: indices to learn a trigger on, and to measure it on."""
    rng = np.random.default_rng([seed, 0xBAD])
    others = np.flatnonzero(labels != target)
    held_out = rng.choice(others, min(1000, max(1, len(others) // 4)), replace=False)
    return np.setdiff1d(others, held_out), held_out
