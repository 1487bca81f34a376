"""What a run is started with: checked before anything is written, stored whole in run.json."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from rkd.distill.batches import AUGMENTATIONS
from rkd.distill.methods import PURIFIED, Method
from rkd.errors import ConfigError, RunError
from rkd.measure import named_device
from rkd.network import Normalisation
from rkd.run import Run

S = TypeVar("S", bound="TrainingSettings")

_RANGES = {
    "epochs": (1, 2**32 - 1),
    "batch": (2, 2**32 - 1),
    "checkpoint_every": (1, 2**32 - 1),
    "threads": (0, 4096),
    "seed": (0, 2**32 - 1),
    "split_seed": (0, 2**32 - 1),
    "image_size": (0, 2**32 - 1),
}
_BUDGET = re.compile(r"(\d{1,18}(?:\.\d{1,18})?)(%?)")

_PRECISIONS = ("fp32", "bf16", "fp16")
_PURIFY_STEPS = 400
_PURIFY_EPOCHS = 3  # with robustkd: more wear a teacher down that has few clean images (docs/defaults.md)
_NO_PURIFIER = "none"
_VARIANTS: dict[str, tuple[float, float, str | None]] = {
    # of RobustKD: radius of hardening in 255ths, the mask's cap, what purifies the teacher; docs/defaults.md says why
    "default": (12.0, 0.0, "finetune"),
    "paper": (0.0, 0.9, None),
}
_OF_A_DEFENCE = frozenset(
    {
        "variant", "cap", "hardening", "harden_from", "harden_share", "perturbations", "purify", "purify_steps", "purify_lr",
        "mask", "variance", "replacement", "taps", "teacher_mode", "input_noise",
    }
)  # fmt: skip
_CHOICES = {
    "variant": tuple(_VARIANTS),
    "mask": ("position", "channel"),
    "perturbations": ("teacher", "student"),
    "purify": (_NO_PURIFIER, *PURIFIED),
    "replacement": ("mean", "zero", "random"),
    "teacher_mode": ("eval", "train"),
}


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
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            if not least <= value <= most:
                wanted = f"{least} or more" if value < least else f"at most {most:,}"
                raise ConfigError(f"--{name.replace('_', '-')} {value}: expected {wanted}")
        named_device(self.device)
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ConfigError(f"--lr {self.lr:g}: expected a number above 0")
        for name, known in (("augmentation", AUGMENTATIONS), ("precision", _PRECISIONS)):
            if getattr(self, name) not in ("auto", *known):
                raise ConfigError(
                    f"--{name} {getattr(self, name)!r}: expected auto, {', '.join(known[:-1])} or {known[-1]}"
                )

    @classmethod
    def from_run(cls: type[S], run: Run) -> S:  # noqa: PYI019 - typing.Self came with Python 3.11
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
        method: a name of `rkd.distill.methods`.
        triggers: paths of the triggers to test with; no method ever sees them.
        undefended: also train a student of the undefended teacher (OFD), to compare with.
        accuracy_budget: points of clean accuracy that the detoxified teacher may lose, where there is a mask.
        variant: of RobustKD: `default`, or `paper` for the paper's form (no hardening, a cap of 0.9, nothing purified).
        cap: upper end of RobustKD's mask; 0 for no mask; None for the variant's.
        hardening: radius, in 255ths, of the universal perturbations that the student is hardened against; 0 for none;
            None for the variant's with robustkd and 0 with other methods.
        harden_from: share of the steps after which hardening begins.
        harden_share: share of a batch's images that carry a perturbation from then on.
        perturbations: where they are looked for: on the `teacher` before, or on the `student` in training; None for the
            teacher, for the student where the method has no teacher, and without hardening.
        mask: `position` or `channel`: what has a mask value of its own.
        variance: whether the mask lowers the features' variance (the ablation leaves only cross-entropy).
        replacement: where the replacement starts: `mean`, `zero` or `random`.
        taps: which of the teacher's taps are used: `all`, `last`, or numbers from the input such as `1,3`.
        teacher_mode: `eval`, or `train` for a teacher whose BNs use each batch's statistics.
        input_noise: deviation, in 255ths, of Gaussian noise on the student's images.
        purify: with robustkd, what the teacher goes through before its features are distilled: `none`, `finetune`,
            `prune`, `nad` or `anp`; None for the variant's, and for other methods, whose name says it.
        purify_steps: of the stage that purifies the teacher; None for 400, with robustkd for half of the student's or
            three epochs where that is less, and without a purifier.
        purify_lr: its highest learning rate; 0 for the method's own.
        labels: whether the training images' labels are used; otherwise the teacher's answers stand in for them.
        clean_budget: training images to use, a number or a share such as `10%`; empty for all.
        arch, normalize: of the teacher; empty to take them from its file.
    """

    teacher: str
    student: str
    method: str = "robustkd"
    triggers: tuple[str, ...] = ()
    undefended: bool = False
    accuracy_budget: float = 1.0
    variant: str = "default"
    cap: float | None = None
    hardening: float | None = None
    harden_from: float = 0.5
    harden_share: float = field(default=0.1, metadata={"before": {"with": "hardening", "value": 0.3}})
    perturbations: str | None = None
    mask: str = "position"
    variance: bool = True
    replacement: str = "mean"
    taps: str = "all"
    teacher_mode: str = "eval"
    input_noise: float = 0.0
    purify: str | None = None
    purify_steps: int | None = None
    purify_lr: float = 0.0
    labels: bool = True
    clean_budget: str = ""
    epochs: int = 40
    arch: str = ""
    normalize: str = ""

    def __post_init__(self) -> None:
        self.check()
        method = Method.parse(self.method)
        object.__setattr__(self, "method", str(method))
        self._fill_in(method)
        for name, known in _CHOICES.items():
            if getattr(self, name) not in (*known, *((None,) if name in ("perturbations", "purify") else ())):
                option = name.replace("_", "-")
                raise ConfigError(f"--{option} {getattr(self, name)!r}: expected {' or '.join(known)}")
        if self.cap and method.treatment != "robustkd":
            raise ConfigError(f"--cap changes nothing with --method {self.method}: it needs robustkd")
        if not 0 <= self.accuracy_budget <= 100:
            raise ConfigError(f"--accuracy-budget {self.accuracy_budget:g}: expected 0 to 100 points")
        if not 0 <= self.mask_cap <= 1 or not 0 <= self.harden_from < 1 or not 0 < self.harden_share <= 1:
            raise ConfigError(
                f"--cap {self.mask_cap:g}, --harden-from {self.harden_from:g}, --harden-share {self.harden_share:g}: expected "
                "0 (no mask) to 1, 0 (from the start) to less than 1, and more than 0 (no hardening is --hardening 0) to 1"
            )
        for option, value in (("hardening", self.radius), ("input-noise", self.input_noise)):
            if not 0 <= value <= 255:
                raise ConfigError(f"--{option} {value:g}: expected 0 to 255 (255ths of a pixel's range)")
        steps = _PURIFY_STEPS if self.purify_steps is None else self.purify_steps
        if not 1 <= steps < 2**32 or not 0 <= self.purify_lr < math.inf:
            raise ConfigError(f"--purify-steps {steps}, --purify-lr {self.purify_lr:g}: expected 1 or more, 0 or more")
        _ = self.chosen_taps
        if self.clean_budget:
            share_of(self.clean_budget)
        if self.normalize:
            Normalisation.parse(self.normalize)
        self._check_together(method)
        if ".py" in self.student:
            raise ConfigError(f"--student {self.student}: students go by name (`rkd students`), not by file")

    def _fill_in(self, method: Method) -> None:
        """What was left open becomes the variant's, or the method's."""
        radius, cap, purify = _VARIANTS.get(self.variant, (0.0, 0.0, None))
        if self.purify is None and method.treatment == "robustkd":
            object.__setattr__(self, "purify", purify)
        if self.cap is None:
            object.__setattr__(self, "cap", cap)
        if self.hardening is None:
            object.__setattr__(self, "hardening", radius if method.treatment == "robustkd" else 0.0)
        if self.perturbations is None and self.radius:
            object.__setattr__(self, "perturbations", _searched(method))

    def _check_together(self, method: Method) -> None:
        """Refuse what the method would ignore: an ablation that changes nothing is a mistake."""
        defaults = {field.name: field.default for field in fields(self)}
        defaults["perturbations"] = _searched(method) if self.radius else None
        needs = {
            "robustkd": (method.treatment == "robustkd", ("variant", "purify")),
            "hardening (--hardening 12)": (self.radius > 0, ("harden_from", "harden_share", "perturbations")),
            "a purifier (robustkd, or finetune, prune, nad or anp before it)": (
                self.purifier is not None, ("purify_steps", "purify_lr"),
            ),
            "robustkd with a mask (--cap 0.05, or --variant paper)": (
                self.masked,
                ("mask", "variance", "replacement"),
            ),
            "robustkd, or one with ofd or at": (
                method.treatment == "robustkd" or method.objective in ("ofd", "at"), ("taps", "teacher_mode"),
            ),
        }  # fmt: skip
        for wanted, (fits, names) in needs.items():
            changed = [name for name in names if getattr(self, name) != defaults[name]]
            if changed and not fits:
                given = "--no-variance" if changed[0] == "variance" else f"--{changed[0].replace('_', '-')}"
                raise ConfigError(f"{given} changes nothing with --method {self.method}: it needs {wanted}")
        if method.objective == "ce" and self.perturbations == "teacher":
            raise ConfigError(f"--perturbations {self.perturbations}: --method ce has no teacher; it takes student")
        if method.treatment == "robustkd" and not (self.radius or self.mask_cap):
            rest = f"{self.purifier}+{method.objective}" if self.purifier else method.objective
            raise ConfigError(
                f"--method {self.method} without hardening and without a mask is not RobustKD: give --variant paper for the "
                f"mask alone, or --method {rest}"
            )

    @property
    def uses_teacher(self) -> bool:
        """Whether the student depends on the teacher: one by `ce` learns from images and labels alone."""
        return Method.parse(self.method).objective != "ce" or not self.labels

    @property
    def radius(self) -> float:
        """The radius that is used, in 255ths."""
        return self.hardening or 0.0

    @property
    def mask_cap(self) -> float:
        """The cap that is used."""
        return _VARIANTS[self.variant][1] if self.cap is None else self.cap

    @property
    def purifier(self) -> str | None:
        """What changes the teacher's weights before the student sees it; None for nothing."""
        found = self.purify or Method.parse(self.method).purifier
        return None if found == _NO_PURIFIER else found

    def steps_to_purify(self, steps: int) -> int:
        """Of the stage that purifies the teacher, where the student is trained for `steps`."""
        if self.purify_steps is not None:
            return self.purify_steps
        if self.purify is None:
            return _PURIFY_STEPS
        return max(1, min(_PURIFY_STEPS, steps // 2, _PURIFY_EPOCHS * steps // self.epochs))

    @property
    def masked(self) -> bool:
        """Whether the teacher's features are detoxified by a mask."""
        return Method.parse(self.method).treatment == "robustkd" and self.mask_cap > 0

    @property
    def chosen_taps(self) -> tuple[int, ...] | None:
        """The taps that are used, as `rkd.taps.TappedNetwork` takes them; None for all.

        Raises:
            ConfigError: `taps` is malformed.
        """
        if self.taps in ("all", "last"):
            return None if self.taps == "all" else (-1,)
        numbers = self.taps.split(",")
        if not all(n.strip().isdecimal() and 1 <= int(n) <= 99 for n in numbers):
            raise ConfigError(f"--taps {self.taps!r}: expected all, last, or numbers from the input such as 1,3")
        return tuple(int(n) - 1 for n in numbers)

    def undefended_twin(self, teacher: str, triggers: tuple[str, ...]) -> DistillSettings:
        """The same run without a defence: OFD from the teacher as it is."""
        defence: dict[str, Any] = {f.name: f.default for f in fields(self) if f.name in _OF_A_DEFENCE}
        return replace(self, method="ofd", undefended=False, teacher=teacher, triggers=triggers, **defence)


def _searched(method: Method) -> str:
    """Where hardening looks for its perturbations, where the user does not say."""
    return "student" if method.objective == "ce" else "teacher"


def share_of(budget: str, images: int | None = None) -> float:
    """The share of so many images that a clean budget is: `1000` images, or `10%` of them.

    Raises:
        ConfigError: it is none of these, or more than there are; as far as that can be told where `images` is None.
    """
    match = _BUDGET.fullmatch(budget.strip())
    share = float(match[1]) / (100 if match[2] else images or 2**63) if match else 0
    if not 0 < share <= 1:
        there = "a number of images" if images is None else f"1 to {images} images"
        raise ConfigError(f"--clean-budget {budget!r}: expected {there}, or a share such as 10%")
    return share
