"""The purifying stage of a run: what every purifier is given, and what it leaves behind.

purified.safetensors    the purified teacher; where it is, the stage is done
finetuned.safetensors   nad: the fine-tuned copy
pruned.safetensors      prune: before fine-tuning
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from safetensors.torch import load as load_safetensors
from torch import nn

from rkd.data import Source
from rkd.distill.batches import steps_per_epoch
from rkd.distill.loop import Recipe, Trainer
from rkd.distill.objectives import Objective
from rkd.distill.training import train
from rkd.errors import CheckpointError
from rkd.files import sha256
from rkd.metrics import Proportion
from rkd.network import LARGEST_BYTES, Network
from rkd.progress import say
from rkd.run import PURIFIED, Run
from rkd.signals import StopRequest

_EVALUATION_BATCH = 256
_PRUNING_POINTS = 4.0  # of held-out accuracy that pruning may cost; fine-pruning's


@dataclass(frozen=True)
class Purification:
    """What a purifier works with.

    Attributes:
        run: where its files, log and checkpoints go.
        stop: asked after every step.
        teacher: as it came; it is not changed.
        clean: the clean images to learn on.
        held_out: clean images of the same budget that nothing is learned on.
        recipe: batch, augmentation, precision and seed.
        steps: of training.
        lr: highest learning rate; 0 for the purifier's own.
        device: where to compute.
        checkpoint_every: steps.
        resume_hint: the command that goes on.
    """

    run: Run
    stop: StopRequest
    teacher: Network
    clean: Source
    held_out: Source
    recipe: Recipe
    steps: int
    lr: float
    device: torch.device
    checkpoint_every: int
    resume_hint: str

    def copy(self) -> Network:
        """The teacher on the device with weights of its own."""
        module: nn.Module = copy.deepcopy(self.teacher.module).requires_grad_(requires_grad=True)
        module = module.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return replace(self.teacher, module=module)

    def stored(self, name: str) -> Network | None:
        """The network of a file that `Run.keep` wrote; None where it is not there.

        Raises:
            RunError: it has changed since.
            CheckpointError: it does not fit the teacher.
        """
        data = self.run.kept(name, LARGEST_BYTES)
        if data is None:
            return None
        network = self.copy()
        try:
            network.module.load_state_dict(load_safetensors(data))
        except Exception as error:
            raise CheckpointError(f"{self.run.path / name} is damaged: {error}") from error
        return network

    def train(
        self,
        network: Network,
        objective: Objective,
        stage: str,
        *,
        steps: int,
        lr: float,
        frozen: frozenset[str] = frozenset(),
        weight_decay: float = 5e-4,
    ) -> None:
        """Train `network` for about so many steps, from the run's newest checkpoint of this stage if there is one.

        Raises:
            StoppedError: stopped by a signal, after saving.
        """
        batch = min(self.recipe.batch, len(self.clean))
        epochs = max(1, round(steps / steps_per_epoch(len(self.clean), batch)))
        recipe = replace(self.recipe, batch=batch, epochs=epochs, lr=self.lr or lr, weight_decay=weight_decay)
        torch.manual_seed(recipe.seed)  # an earlier stage must not matter: it may have been done by another process
        module = network.module
        trainer = Trainer(module, objective, self.clean, network.normalisation, recipe, self.device, frozen)
        train(
            trainer, self.run, self.stop, stage=stage, resume_hint=self.resume_hint,
            checkpoint_every=self.checkpoint_every,
        )  # fmt: skip
        module.eval()

    def trained_once(self, name: str, make: Callable[[], Network]) -> Network:
        """The network that a file of the run holds; made and written first where the file is not there."""
        network = self.stored(name)
        if network is None:
            self.run.keep(name, make().to_bytes())
            self.run.drop_checkpoints()
            network = cast("Network", self.stored(name))
        return network

    def accuracy(self, network: Network) -> Proportion:
        """On the held-out images."""
        predict, hits, n = network.predictor(self.device), 0, 0
        for images, labels in self.held_out.batches(_EVALUATION_BATCH):
            hits += int((predict(images).argmax(1) == labels).sum())
            n += len(labels)
        return Proportion(hits, n)

    def pruned(self, counts: Iterable[int], prune: Callable[[Network, int], None]) -> tuple[Network, int]:
        """The teacher with as much pruned as held-out accuracy allows, and how much that is.

        Args:
            counts: how much to try to prune, rising.
            prune: prunes so much of a fresh copy of the teacher, in place.
        """
        before, kept, most = self.accuracy(self.teacher).value, self.copy(), 0
        for count in counts:
            trial = self.copy()
            prune(trial, count)
            if before - self.accuracy(trial).value > _PRUNING_POINTS:
                break
            kept, most = trial, count
        return kept, most

    def finish(self, network: Network, **facts: Any) -> None:
        """Say and store what became of the teacher; its file is written last."""
        before, after = self.accuracy(self.teacher), self.accuracy(network)
        data = network.to_bytes()
        self.run.keep(
            PURIFIED, data, purified={
                "teacher_accuracy": round(before.value, 3), "accuracy": round(after.value, 3), "held_out": after.n,
                "sha256": sha256(data), **facts,
            }
        )  # fmt: skip
        self.run.drop_checkpoints()
        say(
            f"purified: the teacher's accuracy on {after.n} held-out clean images went from {before.value:.1f} to "
            f"{after.value:.1f}"
        )


def purified(how: str, work: Purification) -> Network:
    """The purified teacher: taken from the run, or made.

    Args:
        how: `finetune`, `prune`, `nad` or `anp`.
        work: see `Purification`.

    Raises:
        StoppedError: stopped by a signal, after saving.
        ArchitectureError: this teacher cannot be purified so.
        RunError: a file of the run has changed since it was made.
        CheckpointError: a file of the run does not fit the teacher.
    """
    from rkd.purify.anp import adversarial_neuron_pruning
    from rkd.purify.finetune import finetune, neural_attention_distillation
    from rkd.purify.prune import fine_pruning

    purifiers: Mapping[str, Callable[[Purification], None]] = {
        "finetune": finetune,
        "prune": fine_pruning,
        "nad": neural_attention_distillation,
        "anp": adversarial_neuron_pruning,
    }
    network = work.stored(PURIFIED)
    if network is None:
        purifiers[how](work)
        network = cast("Network", work.stored(PURIFIED))
    network.module.eval()
    return network
