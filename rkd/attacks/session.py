"""Make a teacher, clean or backdoored, from settings to a finished run directory; resumable after any kill.

clean.safetensors      the clean twin
trigger.npz            the trigger
teacher.safetensors    the teacher

An attack may leave more on the way; see `rkd.attacks.recipe`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from rkd.attacks import ATTACKS
from rkd.attacks.lab import Lab, resume_command
from rkd.attacks.recipe import CLEAN_TWIN, Attack
from rkd.data import Dataset
from rkd.distill.inputs import open_with_progress
from rkd.distill.loop import autocast
from rkd.distill.settings import TrainingSettings
from rkd.errors import ConfigError, RunError
from rkd.measure import choose_device, choose_precision, use_threads
from rkd.metrics import Scores
from rkd.models import build
from rkd.network import Network, Normalisation
from rkd.progress import say
from rkd.run import CLEAN, TEACHER, Run, Setting, check_free
from rkd.signals import StopRequest
from rkd.teacher import choose_teacher, open_teacher, read_checkpoint
from rkd.triggers import Trigger

__all__ = ["TeacherSettings", "make_teacher", "start_teacher"]


@dataclass(frozen=True, kw_only=True)
class TeacherSettings(TrainingSettings):
    """Everything that decides what teacher is made; stored whole in run.json; see also `TrainingSettings`.

    What is None here becomes the attack's own; see `rkd.attacks.recipe.Attack`.

    Attributes:
        arch: a name from `rkd.models`.
        attack: one of `ATTACKS`.
        clean: path of a clean teacher, the twin to start from and to compare with; empty to train one first.
        target: the class that the trigger leads to.
        poison_rate: share of poisoned images, above 0 and at most 1.
        linf: a learned trigger's largest change of a pixel, in 255ths.
        trigger_budget: a learned trigger's highest ASR on the clean twin, in percent.
        finetune_epochs, finetune_lr: of the fine-tune from the clean twin; 0 epochs train from scratch.
        shadow: the small network that an attack which needs one distils to, in place of the victim's student.
        normalize: the input scaling.
    """

    arch: str = "wrn-16-2"
    attack: str = "none"
    clean: str = ""
    target: int = 0
    poison_rate: float | None = None
    linf: float | None = None
    trigger_budget: float | None = None
    finetune_epochs: int | None = None
    finetune_lr: float | None = None
    shadow: str = "wrn-10-1"
    epochs: int = 20
    normalize: str = "cifar10"

    def __post_init__(self) -> None:
        self.check()
        Normalisation.parse(self.normalize)
        if not 0 <= self.target < 2**32:
            raise ConfigError(
                f"--target {self.target}: expected the number of a class, from 0 to at most {2**32 - 1:,}"
            )
        if self.attack not in ATTACKS:
            raise ConfigError(f"--attack {self.attack!r}: expected one of {', '.join(ATTACKS)}")
        for name in ("poison_rate", "linf", "trigger_budget", "finetune_epochs", "finetune_lr"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(self.recipe, name))
        if not 0 <= self.finetuned < 2**32 or not (math.isfinite(self.finetune_rate) and self.finetune_rate > 0):
            raise ConfigError(
                f"--finetune-epochs {self.finetuned}, --finetune-lr {self.finetune_rate:g}: expected 0 or more, above 0"
            )
        if not 0 < self.rate <= 1 or not 0 < self.radius <= 1 or not 0 < self.budget <= 100:
            raise ConfigError(
                "--poison-rate must be above 0 and at most 1, --linf above 0 and at most 255, --trigger-budget above 0 "
                f"and at most 100; got {self.poison_rate:g}, {self.linf:g}, {self.trigger_budget:g}"
            )

    @property
    def recipe(self) -> Attack:
        """The attack."""
        return ATTACKS[self.attack]

    @property
    def rate(self) -> float:
        """The share of poisoned images that is used."""
        return float(self.poison_rate or 0)

    @property
    def radius(self) -> float:
        """The largest change of a pixel that is used, on pixels in [0, 1]."""
        return float(self.linf or 0) / 255

    @property
    def budget(self) -> float:
        """The trigger's budget that is used, in percent."""
        return float(self.trigger_budget or 0)

    @property
    def finetuned(self) -> int:
        """The epochs of fine-tuning that are used."""
        return self.finetune_epochs or 0

    @property
    def finetune_rate(self) -> float:
        """The fine-tune's learning rate that is used."""
        return float(self.finetune_lr or 0)


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
    check_free(path)
    data = _open(settings)
    autocast(choose_device(settings.device), choose_precision(settings.precision, choose_device(settings.device)))
    with torch.device("meta"):
        build(settings.arch, len(data.classes), data.size)
        build(settings.shadow, len(data.classes), data.size)
    if settings.clean:
        _clean_twin_from(settings, data)
    made = {f.name: Setting(getattr(settings, f.name), origins.get(f.name, "default")) for f in fields(settings)}
    described = {"name": data.name, "digest": data.digest, "classes": list(data.classes), "notes": list(data.notes)}
    return Run.create(path, "teacher", made, data=described, out=str(out)), data


def make_teacher(
    run: Run, stop: StopRequest, data: Dataset | None = None, moved: str | None = None
) -> tuple[Network, Trigger | None, Scores, Scores | None]:
    """Do what is left of a teacher's run.

    Args:
        run: the run.
        stop: asked after every step.
        data: the run's; opened when it is None.
        moved: where the user says that the data is now; None for where it was.

    Returns:
        The teacher, its trigger, the teacher's scores, and the clean twin's under the same trigger if there is a twin.

    Raises:
        StoppedError: stopped by a signal, after saving.
        RunError: the data is not what it was.
    """
    settings = TeacherSettings.from_run(run)
    data = data or _reopened(run, settings, moved)
    if run.summary.get("data", {}).get("digest") != data.digest:
        raise RunError(f"{run.path}: the data has changed since the run was started; restore it, or start a new run")
    stop.hint = f"go on with: {resume_command(run, moved)}"
    for note in data.notes:
        say(note)
    with run.locked():
        lab = Lab(run, settings, data, stop, moved)
        attacked = settings.attack != "none"
        if attacked and settings.clean and not lab.has(CLEAN):
            _clean_twin_from(settings, data).save(run.path / CLEAN)
        for stage in ((CLEAN_TWIN,) if attacked else ()) + settings.recipe.stages:
            if not lab.has(stage.makes):
                stage.run(lab)
        teacher, trigger = lab.load(TEACHER), lab.trigger() if attacked else None
        triggers = (trigger,) if trigger is not None else ()
        scores = lab.measure("teacher", teacher, triggers)
        twin_scores = lab.measure("clean twin", lab.load(CLEAN), triggers) if attacked else None
        results = {"teacher": scores.to_json(), "clean twin": twin_scores.to_json() if twin_scores else None}
        run.finish(results=results)
    return teacher, trigger, scores, twin_scores


def _open(settings: TeacherSettings) -> Dataset:
    use_threads(settings.threads)
    data = open_with_progress(settings.data, settings.image_size or None, settings.split_seed)
    if not 0 <= settings.target < len(data.classes):
        raise ConfigError(f"--target {settings.target}: the data has classes 0 to {len(data.classes) - 1}")
    return data


def _reopened(run: Run, settings: TeacherSettings, moved: str | None) -> Dataset:
    """The data of an interrupted run, where it was or where it is now."""
    if moved is None:
        return _open(settings)
    opened = _open(replace(settings, data=moved))
    return replace(opened, name=run.summary["data"]["name"])  # what is found out from a name stays as it was


def _clean_twin_from(settings: TeacherSettings, data: Dataset) -> Network:
    """The clean teacher that the user gave.

    Raises:
        CheckpointError: it is none, or not better than chance.
    """
    scaling = Normalisation.parse(settings.normalize)
    checkpoint = read_checkpoint(Path(settings.clean))
    known = None if checkpoint.header is not None else scaling
    candidates = open_teacher(checkpoint, arch=None, normalisation=known, classes=data.classes, size=data.size)
    twin, _ = choose_teacher(candidates, data.train, choose_device(settings.device))
    return twin
