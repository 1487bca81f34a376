"""What a run is started with: checked before anything is written, stored whole in run.json."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from typing_extensions import Self

from rkd.distill.batches import AUGMENTATIONS
from rkd.distill.objectives import METHODS
from rkd.errors import ConfigError, RunError
from rkd.run import Run

S = TypeVar("S", bound="TrainingSettings")

_PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """What teachers and students are both trained with.

    Attributes:
        data: as `rkd.data.open_dataset` takes it.
        epochs, batch, lr, augmentation, seed: see `rkd.distill.loop.Recipe`; augmentation may also be `auto`.
        split_seed: of the test split, where the data comes without one.
        precision: `auto`, `fp32`, `bf16` or `fp16`.
        image_size: pixels; 0 for the teacher's or the data's own.
        device: `auto`, `cpu` or `cuda`.
        threads: CPU threads; 0 for all.
        checkpoint_every: steps.
    """

    data: str
    epochs: int = 40
    batch: int = 128
    lr: float = 0.1
    augmentation: str = "auto"
    seed: int = 0
    split_seed: int = 0
    precision: str = "auto"
    image_size: int = 0
    device: str = "auto"
    threads: int = 0
    checkpoint_every: int = 500

    def check(self) -> None:
        """Refuse what no run can be started with.

        Raises:
            ConfigError: naming the option.
        """
        at_least = {
            "epochs": 1,
            "batch": 2,
            "checkpoint_every": 1,
            "threads": 0,
            "seed": 0,
            "split_seed": 0,
            "image_size": 0,
        }
        for name, least in at_least.items():
            value = getattr(self, name)
            if not least <= value < 2**32:
                raise ConfigError(f"--{name.replace('_', '-')} {value}: expected {least} or more")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ConfigError(f"--lr {self.lr:g}: expected a number above 0")
        for name, known in (("augmentation", AUGMENTATIONS), ("precision", _PRECISIONS)):
            if getattr(self, name) not in ("auto", *known):
                raise ConfigError(f"--{name} {getattr(self, name)!r}: expected auto, {', '.join(known)}")

    @classmethod
    def from_run(cls, run: Run) -> Self:
        """The settings that a run was started with.

        Raises:
            RunError: run.json does not hold them.
        """
        values: dict[str, Any] = {field.name: run.setting(field.name) for field in fields(cls)}
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        try:
            return cls(**values)
        except TypeError as error:
            raise RunError(f"{run.path}: its settings are damaged: {error}") from error


@dataclass(frozen=True, kw_only=True)
class DistillSettings(TrainingSettings):
    """Everything that decides what a distillation makes; stored whole in run.json; see also `TrainingSettings`.

    Attributes:
        teacher: path of the checkpoint.
        student: a name from `rkd.models`.
        method: one of `METHODS`.
        triggers: paths of the triggers to test with; no method ever sees them.
        undefended: also train a student of the undefended teacher (OFD), to compare with.
        accuracy_budget: points of clean accuracy that the detoxified teacher may lose.
        cap: upper end of RobustKD's mask.
        hardening: radius, in 255ths, of the universal perturbations that the student of a feature distillation is
            hardened against; 0 for none (the paper's form); None for 8 with robustkd and 0 with ofd.
        clean_budget: training images to use, a number or a share such as `10%`; empty for all.
        arch, normalize: of the teacher; empty to take them from its file.
    """

    teacher: str
    student: str
    method: str = "robustkd"
    triggers: tuple[str, ...] = ()
    undefended: bool = False
    accuracy_budget: float = 1.0
    cap: float = 0.05
    hardening: float | None = None
    clean_budget: str = ""
    epochs: int = 40
    arch: str = ""
    normalize: str = ""

    def __post_init__(self) -> None:
        self.check()
        if self.method not in METHODS:
            raise ConfigError(f"--method {self.method!r}: expected one of {', '.join(METHODS)}")
        if not 0 <= self.accuracy_budget <= 100:
            raise ConfigError(f"--accuracy-budget {self.accuracy_budget:g}: expected 0 to 100 points")
        if not 0 < self.cap <= 1:
            raise ConfigError(f"--cap {self.cap:g}: expected above 0 and at most 1")
        if self.hardening is None:
            object.__setattr__(self, "hardening", 8.0 if self.method == "robustkd" else 0.0)
        if not 0 <= self.radius <= 255:
            raise ConfigError(f"--hardening {self.radius:g}: expected 0 to 255 (255ths of a pixel's range)")
        if self.radius and self.method not in ("robustkd", "ofd"):
            raise ConfigError(f"--hardening works with --method robustkd and ofd, not with {self.method}")
        if ".py" in self.student:
            raise ConfigError(f"--student {self.student}: students go by name (`rkd students`), not by file")

    @property
    def radius(self) -> float:
        """The radius that is used, in 255ths."""
        return self.hardening or 0.0
