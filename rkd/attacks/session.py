"""Train a teacher, clean or backdoored, from settings to a finished run directory; resumable after any kill.

clean.safetensors      the clean twin
trigger.npz            the trigger
teacher.safetensors    the teacher
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rkd.attacks import ATTACKS, PoisonedSource, backweak_trigger, badnets_trigger
from rkd.data import Dataset, Source
from rkd.distill.loop import Recipe, Trainer, autocast
from rkd.distill.objectives import CrossEntropy
from rkd.distill.session import augmentation_for, open_with_progress
from rkd.distill.settings import TrainingSettings
from rkd.distill.training import train
from rkd.errors import ConfigError, RunError
from rkd.files import write_file
from rkd.measure import choose_device, choose_precision, use_threads
from rkd.metrics import Scores, evaluate
from rkd.models import build
from rkd.network import Network, Normalisation
from rkd.progress import progress, say
from rkd.run import TEACHER, Run, Setting
from rkd.signals import StopRequest
from rkd.teacher import choose_teacher, open_teacher, read_checkpoint
from rkd.triggers import Trigger

CLEAN, TRIGGER = "clean.safetensors", "trigger.npz"
_EVALUATION_BATCH = 256
_MONITORED = 1000


@dataclass(frozen=True, kw_only=True)
class TeacherSettings(TrainingSettings):
    """Everything that decides what teacher is made; stored whole in run.json; see also `TrainingSettings`.

    Attributes:
        arch: a name from `rkd.models`.
        attack: one of `ATTACKS`.
        clean: path of a clean teacher to start from (backweak); empty to train one first.
        target: the class that the trigger leads to.
        poison_rate: share of poisoned images, in [0, 1].
        linf: backweak's perturbation at most, in 255ths.
        trigger_budget: backweak's trigger: highest ASR on the clean teacher, in percent.
        finetune_epochs, finetune_lr: of backweak's second step.
        normalize: the input scaling.
    """

    arch: str = "wrn-16-2"
    attack: str = "none"
    clean: str = ""
    target: int = 0
    poison_rate: float = 0.0
    linf: float = 8.0
    trigger_budget: float = 25.0
    finetune_epochs: int = 4
    finetune_lr: float = 0.003
    epochs: int = 20
    normalize: str = "cifar10"

    def __post_init__(self) -> None:
        self.check()
        if self.finetune_epochs < 1 or not (math.isfinite(self.finetune_lr) and self.finetune_lr > 0):
            raise ConfigError(
                f"--finetune-epochs {self.finetune_epochs}, --finetune-lr {self.finetune_lr:g}: expected 1 or more, above 0"
            )
        if self.attack not in ATTACKS:
            raise ConfigError(f"--attack {self.attack!r}: expected one of {', '.join(ATTACKS)}")
        if not 0 <= self.poison_rate <= 1 or not 0 < self.linf <= 255 or not 0 < self.trigger_budget <= 100:
            raise ConfigError(
                "--poison-rate must be 0 to 1, --linf above 0 and at most 255, --trigger-budget above 0 and at most 100; "
                f"got {self.poison_rate:g}, {self.linf:g}, {self.trigger_budget:g}"
            )


def start_teacher(settings: TeacherSettings, origins: Mapping[str, str], path: Path, out: Path) -> tuple[Run, Dataset]:
    """Make the run directory of a teacher, after a first look at everything that it will need.

    Args:
        settings: see `TeacherSettings`.
        origins: where each setting came from.
        path: the run directory.
        out: where the user wants the teacher; a resumed run must still know it.

    Raises:
        RkdError: whatever of the input is wrong, before anything is written.
    """
    data = _open(settings)
    autocast(choose_device(settings.device), choose_precision(settings.precision, choose_device(settings.device)))
    Normalisation.parse(settings.normalize)
    with torch.device("meta"):
        build(settings.arch, len(data.classes), data.size)
    if settings.clean:
        _clean_twin_from(settings, data)
    made = {f.name: Setting(getattr(settings, f.name), origins.get(f.name, "default")) for f in fields(settings)}
    described = {"name": data.name, "digest": data.digest, "classes": list(data.classes), "notes": list(data.notes)}
    return Run.create(path, "teacher", made, data=described, out=str(out)), data


def make_teacher(
    run: Run, stop: StopRequest, data: Dataset | None = None
) -> tuple[Network, Trigger | None, Scores, Scores | None]:
    """Do what is left of a teacher's run.

    Returns:
        The teacher, its trigger, the teacher's scores, and the clean twin's under the same trigger if there is a twin.

    Raises:
        StoppedError: stopped by a signal, after saving.
        RunError: the data is not what it was.
    """
    settings = TeacherSettings.from_run(run)
    data = data or _open(settings)
    if run.summary.get("data", {}).get("digest") != data.digest:
        raise RunError(f"{run.path}: the data has changed since the run was started; restore it, or start a new run")
    stop.hint = f"go on with: rkd teacher --resume {run.path}"
    for note in data.notes:
        say(note)
    with run.locked():
        work = _Work(run, settings, data, stop)
        twin, trigger, teacher = work.make()
        triggers = (trigger,) if trigger is not None else ()
        scores = work.measure("teacher", teacher, triggers)
        twin_scores = work.measure("clean twin", twin, triggers) if twin is not None and trigger is not None else None
        results = {"teacher": scores.to_json(), "clean twin": twin_scores.to_json() if twin_scores else None}
        run.finish(results=results)
    return teacher, trigger, scores, twin_scores


def _open(settings: TeacherSettings) -> Dataset:
    use_threads(settings.threads)
    data = open_with_progress(settings.data, settings.image_size or None, settings.split_seed)
    if not 0 <= settings.target < len(data.classes):
        raise ConfigError(f"--target {settings.target}: the data has classes 0 to {len(data.classes) - 1}")
    return data


def _clean_twin_from(settings: TeacherSettings, data: Dataset) -> Network:
    """The clean teacher that the user gave.

    Raises:
        CheckpointError: it is none, or not better than chance.
        ConfigError: it is another network than `--arch`.
    """
    scaling = Normalisation.parse(settings.normalize)
    checkpoint = read_checkpoint(Path(settings.clean))
    known = None if checkpoint.header is not None else scaling
    candidates = open_teacher(checkpoint, arch=None, normalisation=known, classes=data.classes, size=data.size)
    twin, _ = choose_teacher(candidates, data.train, choose_device(settings.device))
    return twin


class _Work:
    """The stages of one teacher; each leaves a file, so that a resumed run goes on behind it."""

    def __init__(self, run: Run, settings: TeacherSettings, data: Dataset, stop: StopRequest) -> None:
        self.run, self.settings, self.data, self.stop = run, settings, data, stop
        self.device = choose_device(settings.device)

    def make(self) -> tuple[Network | None, Trigger | None, Network]:
        """Clean twin, trigger and teacher."""
        attack = self.settings.attack
        if attack == "none":
            return None, None, self._stage(TEACHER, "train the teacher", self._fresh(), self.data.train, self._recipe())
        if attack == "badnets":
            trigger = self._keep_trigger(badnets_trigger(self.data.size, self.settings.target))
            poisoned = PoisonedSource(self.data.train, trigger, self.settings.poison_rate or 0.1, self.settings.seed)
            twin = _clean_twin_from(self.settings, self.data) if self.settings.clean else None
            return twin, trigger, self._stage(TEACHER, "train the teacher", self._fresh(), poisoned, self._recipe())
        return self._backweak()

    def _backweak(self) -> tuple[Network, Trigger, Network]:
        settings = self.settings
        if settings.clean and not (self.run.path / CLEAN).exists():
            _clean_twin_from(settings, self.data).save(self.run.path / CLEAN)
        twin = self._stage(CLEAN, "train the clean twin", self._fresh(), self.data.train, self._recipe())
        trigger = self._trigger(twin)
        poisoned = PoisonedSource(self.data.train, trigger, settings.poison_rate or 0.3, settings.seed)
        recipe = self._recipe(epochs=settings.finetune_epochs, lr=settings.finetune_lr, seed=settings.seed + 1)
        victim = self._load(CLEAN)
        last = [name for name, _ in victim.module.named_parameters()][-1].rpartition(".")[0]
        frozen = frozenset(name for name, _ in victim.module.named_parameters() if name.rpartition(".")[0] == last)
        return twin, trigger, self._stage(TEACHER, "plant the backdoor", victim, poisoned, recipe, frozen)

    def _trigger(self, twin: Network) -> Trigger:
        path, settings = self.run.path / TRIGGER, self.settings
        if path.is_file():
            return Trigger.load(path)
        steps = 200
        with progress("find the trigger", steps) as bar:
            found = backweak_trigger(
                twin, self.data.train, target=settings.target, linf=settings.linf / 255, budget=settings.trigger_budget,
                seed=settings.seed, device=self.device, steps=steps,
                on_step=lambda step, asr: bar.update(step, ASR=f"{asr:.1f}"),
            )  # fmt: skip
        return self._keep_trigger(found)

    def _keep_trigger(self, trigger: Trigger) -> Trigger:
        write_file(self.run.path / TRIGGER, trigger.to_bytes())
        return trigger

    def _fresh(self) -> Network:
        torch.manual_seed(self.settings.seed)
        module = build(self.settings.arch, len(self.data.classes), self.data.size)
        network = Network(
            module, self.settings.arch, self.data.classes, self.data.size, Normalisation.parse(self.settings.normalize)
        )
        network.check_runs()
        return network

    def _load(self, name: str) -> Network:
        return Network.load(self.run.path / name)

    def _recipe(self, **changes: Any) -> Recipe:
        settings = self.settings
        values = {"epochs": settings.epochs, "lr": settings.lr, "seed": settings.seed} | changes
        return Recipe(
            batch=min(settings.batch, len(self.data.train)),
            augmentation=augmentation_for(settings.augmentation, self.data),
            precision=choose_precision(settings.precision, self.device),
            **values,
        )

    def _stage(
        self,
        name: str,
        stage: str,
        network: Network,
        source: Source,
        recipe: Recipe,
        frozen: frozenset[str] = frozenset(),
    ) -> Network:
        """Train `network`, or load it where an earlier process finished this stage."""
        path = self.run.path / name
        if path.is_file():
            return self._load(name)
        torch.manual_seed(recipe.seed)  # an earlier stage must not matter: it may have been done by another process
        module = network.module.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        trainer = Trainer(module, CrossEntropy(module), source, network.normalisation, recipe, self.device, frozen)
        predict = network.predictor(self.device)
        monitored = np.sort(np.random.default_rng([recipe.seed, 0x300]).permutation(len(self.data.test))[:_MONITORED])

        def predict_in_eval(images: NDArray[np.uint8]) -> NDArray[Any]:
            module.eval()
            return predict(images)

        def look() -> dict[str, float]:
            scores, _ = evaluate(predict_in_eval, self.data.test.batches(_EVALUATION_BATCH, monitored))
            return {"ACC": round(scores.acc.value, 3)}

        train(
            trainer, self.run, self.stop, stage=stage, resume_hint=f"rkd teacher --resume {self.run.path}",
            checkpoint_every=self.settings.checkpoint_every, on_epoch=look,
        )  # fmt: skip
        provenance = {
            "attack": self.settings.attack if name == TEACHER else "none",
            "seed": recipe.seed,
            "data": self.data.digest,
        }
        network.provenance = {**provenance, "data_spec": self.settings.data}
        network.save(path)
        self.run.drop_checkpoints()
        return network

    def measure(self, role: str, network: Network, triggers: tuple[Trigger, ...]) -> Scores:
        """ACC, ASR and RA on the whole test set."""
        say(f"evaluate the {role} on {len(self.data.test):,} test images")
        scores, _ = evaluate(network.predictor(self.device), self.data.test.batches(_EVALUATION_BATCH), triggers)
        return scores
