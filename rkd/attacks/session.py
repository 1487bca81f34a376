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
from rkd.distill.inputs import augmentation_for, open_with_progress
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

_OF_AN_ATTACK = ("poison_rate", "linf", "trigger_budget", "finetune_epochs", "finetune_lr")


@dataclass(frozen=True, kw_only=True)
class TeacherSettings(TrainingSettings):
    """Everything that decides what teacher is made; stored whole in run.json; see also `TrainingSettings`.

    What is None here becomes the attack's own, or stays so where the attack has no use for it; see
    `rkd.attacks.recipe.Attack`.

    Attributes:
        arch: a name from `rkd.models`; of a teacher that is made from `clean`, the twin's.
        attack: one of `ATTACKS`.
        clean: path of a clean teacher, the twin to start from and to compare with; empty to train one first.
        target: the class that the trigger leads to.
        poison_rate: share of poisoned images, above 0 and at most 1.
        linf: a learned trigger's largest change of a pixel, in 255ths.
        trigger_budget: a learned trigger's highest ASR on the clean twin, in percent.
        finetune_epochs, finetune_lr: of the fine-tune from the clean twin; 0 epochs train from scratch.
        shadow: the small network that an attack which needs one distils to, in place of the victim's student.
        normalize: the input scaling; of a teacher that is made from `clean`, the twin's.
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
        unused = {*_OF_AN_ATTACK, "shadow"} - self.recipe.options
        for name in sorted(unused):
            if getattr(self, name) != getattr(TeacherSettings, name):  # its default
                raise ConfigError(
                    f"--{name.replace('_', '-')} changes nothing with --attack {self.attack}: leave it out"
                )
        for name in _OF_AN_ATTACK:
            if name not in unused and getattr(self, name) is None:
                object.__setattr__(self, name, getattr(self.recipe, name))
        self._check_numbers()

    def _check_numbers(self) -> None:
        used = self.recipe.options
        if not 0 <= self.finetuned < 2**32:
            raise ConfigError(f"--finetune-epochs {self.finetuned}: expected 0 or more, below {2**32:,}")
        if "finetune_lr" in used and not (math.isfinite(self.finetune_rate) and self.finetune_rate > 0):
            raise ConfigError(f"--finetune-lr {self.finetune_rate:g}: expected a number above 0")
        for name, value, most in (
            ("poison_rate", self.rate, 1),
            ("linf", self.radius * 255, 255),
            ("trigger_budget", self.budget, 100),
        ):
            if name in used and not 0 < value <= most:
                raise ConfigError(f"--{name.replace('_', '-')} {value:g}: expected a number above 0, at most {most}")

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
    if settings.clean:
        settings, origins = _as_its_twin(settings, origins, data)
    settings = _resolved(settings, data)
    autocast(choose_device(settings.device), settings.precision)
    with torch.device("meta"):
        build(settings.arch, len(data.classes), data.size)
        if "shadow" in settings.recipe.options:
            build(settings.shadow, len(data.classes), data.size)
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
    data = data or _open(settings if moved is None else replace(settings, data=moved))
    if run.summary.get("data", {}).get("digest") != data.digest:
        raise RunError(f"{run.path}: the data has changed since the run was started; restore it, or start a new run")
    stop.hint = f"go on with: {resume_command(run, moved)}"
    for note in data.notes:
        say(note)
    with run.locked():
        lab = Lab(run, _resolved(settings, data), data, stop, moved)
        attacked = settings.attack != "none"
        say(f"{settings.attack}: {settings.recipe.about}")
        if attacked and settings.clean and not lab.has(CLEAN):
            _clean_twin(settings, data, settings.arch).save(run.path / CLEAN)
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


def _resolved(settings: TeacherSettings, data: Dataset) -> TeacherSettings:
    """What `auto` turns out to be: a run that goes on with another CPU, or with its data elsewhere, is the same run."""
    return replace(
        settings,
        precision=choose_precision(settings.precision, choose_device(settings.device)),
        augmentation=augmentation_for(settings.augmentation, data),
    )


def _as_its_twin(
    settings: TeacherSettings, origins: Mapping[str, str], data: Dataset
) -> tuple[TeacherSettings, dict[str, str]]:
    """The settings with the network and the scaling of the clean twin that the user gave.

    Raises:
        ConfigError: the user asks for others.
        CheckpointError: it is no clean teacher, or not better than chance.
    """
    given = {name for name in ("arch", "normalize") if origins.get(name, "default") != "default"}
    twin = _clean_twin(settings, data, settings.arch if "arch" in given else None)
    if "normalize" in given and Normalisation.parse(settings.normalize) != twin.normalisation:
        raise ConfigError(
            f"--normalize {settings.normalize}: the clean twin {settings.clean} was trained with {twin.normalisation}, and its "
            "backdoored teacher is as well; leave --normalize out"
        )
    found = {**origins, **{name: "teacher" for name in ("arch", "normalize") if name not in given}}
    return replace(settings, arch=twin.arch, normalize=str(twin.normalisation)), found


def _clean_twin(settings: TeacherSettings, data: Dataset, arch: str | None) -> Network:
    """The clean teacher that the user gave, of a network that is known or found out.

    Raises:
        CheckpointError: it is none, or not better than chance.
    """
    checkpoint = read_checkpoint(Path(settings.clean))
    scaling = None if checkpoint.header is not None else Normalisation.parse(settings.normalize)
    candidates = open_teacher(checkpoint, arch=arch, normalisation=scaling, classes=data.classes, size=data.size)
    twin, _ = choose_teacher(candidates, data.train, choose_device(settings.device))
    return twin
