"""Where an attack's stages work: the run directory, the data, the device, and what every stage does with them."""

from __future__ import annotations

import math
import shlex
from typing import TYPE_CHECKING

import numpy as np
import torch

from rkd.attacks.perturb import Form, Loss, search
from rkd.data import Dataset, Source, is_name
from rkd.distill.batches import steps_per_epoch
from rkd.distill.loop import Recipe, Trainer
from rkd.distill.objectives import Objective
from rkd.distill.training import monitor, train
from rkd.files import write_file
from rkd.measure import choose_device
from rkd.metrics import Scores, evaluate
from rkd.models import build
from rkd.network import Network, Normalisation
from rkd.progress import progress, say
from rkd.run import CLEAN, TRIGGER, Run
from rkd.signals import StopRequest
from rkd.triggers import Trigger

if TYPE_CHECKING:
    from rkd.attacks.session import TeacherSettings

_EVALUATION_BATCH = 256
_SEARCH_STEPS = 200


class Lab:
    """One teacher's run, as its stages see it."""

    def __init__(
        self, run: Run, settings: TeacherSettings, data: Dataset, stop: StopRequest, moved: str | None = None
    ) -> None:
        self.run, self.settings, self.data, self.stop = run, settings, data, stop
        self.resume_hint = resume_command(run, moved)
        self.device = choose_device(settings.device)

    def has(self, name: str) -> bool:
        """Whether a stage's file is there."""
        return (self.run.path / name).is_file()

    def load(self, name: str) -> Network:
        """The network that an earlier stage made, in eval mode on the device."""
        network = Network.load(self.run.path / name, trusted=self.settings.arch)
        self.place(network)
        network.module.eval()
        return network

    def trigger(self, name: str = TRIGGER) -> Trigger:
        """The trigger that an earlier stage made."""
        return Trigger.load(self.run.path / name)

    def keep_trigger(self, trigger: Trigger, name: str = TRIGGER) -> None:
        """Write a trigger."""
        write_file(self.run.path / name, trigger.to_bytes())

    def keep(self, network: Network, name: str) -> None:
        """Write a finished network; the checkpoints that led to it go."""
        # a path would make other bytes in every folder, and tell strangers of it
        named = {"data_spec": self.settings.data} if is_name(self.settings.data) else {}
        network.provenance = {
            "attack": "none" if name == CLEAN else self.settings.attack,
            "seed": self.settings.seed,
            "data": self.data.digest,
            **named,
        }
        network.save(self.run.path / name)
        self.run.drop_checkpoints()

    def fresh(self, arch: str, *, stream: int = 0) -> Network:
        """A network with fresh weights from the run's seed, or from a stream of random numbers of its own."""
        seed = self.settings.seed
        torch.manual_seed(int(np.random.default_rng([seed, stream]).integers(2**63)) if stream else seed)
        module = build(arch, len(self.data.classes), self.data.size)
        scaling = Normalisation.parse(self.settings.normalize)
        network = Network(module, arch, self.data.classes, self.data.size, scaling)
        network.check_runs()
        return network

    def place(self, network: Network) -> None:
        """Bring a network to the device."""
        network.module.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def recipe(self, epochs: int, lr: float, seed: int, *, least_steps: int = 1) -> Recipe:
        """How a stage trains: for so many epochs, and for as many more as `least_steps` take."""
        batch = min(self.settings.batch, len(self.data.train))
        needed = math.ceil(least_steps / steps_per_epoch(len(self.data.train), batch))
        return Recipe(
            epochs=max(epochs, needed), lr=lr, seed=seed, batch=batch,
            augmentation=self.settings.augmentation, precision=self.settings.precision,
        )  # fmt: skip

    def fit(
        self,
        network: Network,
        objective: Objective,
        source: Source,
        recipe: Recipe,
        *,
        title: str,
        frozen: frozenset[str] = frozenset(),
    ) -> None:
        """Train `network`, from the run's newest checkpoint of this stage if there is one."""
        torch.manual_seed(recipe.seed)  # an earlier stage must not matter: it may have been done by another process
        objective.extra.to(self.device)
        trainer = Trainer(network.module, objective, source, network.normalisation, recipe, self.device, frozen)
        train(
            trainer, self.run, self.stop, stage=title, resume_hint=self.resume_hint,
            checkpoint_every=self.settings.checkpoint_every,
            on_epoch=monitor(network, self.data.test, recipe.seed, self.device),
        )  # fmt: skip

    def search(
        self, twin: Network, form: Form, loss: Loss, *, target: int | None = None, budget: float | None = None
    ) -> Trigger:
        """A weak trigger, found on the clean twin, named after the attack; target and budget are the settings' by default."""
        settings = self.settings
        with progress("find the trigger", _SEARCH_STEPS) as bar:
            return search(
                twin, self.data.train, form, loss, name=settings.attack, linf=settings.radius,
                target=settings.target if target is None else target,
                budget=settings.budget if budget is None else budget, seed=settings.seed, device=self.device, steps=_SEARCH_STEPS,
                on_step=lambda step, asr: bar.update(step, ASR=f"{asr:.1f}"),
            )  # fmt: skip

    def measure(self, role: str, network: Network, triggers: tuple[Trigger, ...]) -> Scores:
        """ACC, ASR and RA on the whole test set."""
        say(f"evaluate the {role} on {len(self.data.test):,} test images")
        scores, _ = evaluate(network.predictor(self.device), self.data.test.batches(_EVALUATION_BATCH), triggers)
        return scores


def resume_command(run: Run, moved: str | None) -> str:
    """The command that goes on with a teacher's run; `moved` is where its data is now, None for where it was."""
    return f"rkd teacher --resume {run.path}{'' if moved is None else f' --data {shlex.quote(moved)}'}"
