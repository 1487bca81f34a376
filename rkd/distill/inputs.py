"""What a distillation starts from: the teacher, the images and the triggers, opened and checked against each other."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rkd.data import Dataset, Source, open_dataset
from rkd.distill.batches import steps_per_epoch
from rkd.distill.loop import Recipe, autocast
from rkd.distill.settings import DistillSettings, share_of
from rkd.errors import ConfigError, DataError, RunError
from rkd.measure import choose_device, choose_precision, use_threads
from rkd.network import Network, Normalisation
from rkd.progress import Bar, progress
from rkd.run import TEACHER, Run
from rkd.teacher import choose_teacher, likelier_scaling, open_teacher, read_checkpoint, scaling_of
from rkd.triggers import Trigger

_TRIED = 64  # test images on which a trigger must change something


@dataclass(frozen=True)
class Inputs:
    """What a distillation starts from, opened and checked."""

    data: Dataset
    train: Source
    teacher: Network
    teacher_sha256: str
    triggers: tuple[Trigger, ...]
    device: torch.device
    recipe: Recipe
    notes: tuple[str, ...]

    @classmethod
    def open(cls, settings: DistillSettings, teacher_path: Path, data: Dataset | None = None) -> Inputs:
        """Open the teacher, the data (unless it is open) and the triggers, and check that they go together.

        Raises:
            RkdError: one of them cannot be used; the message says which and why.
        """
        use_threads(settings.threads)
        device = choose_device(settings.device)
        checkpoint = read_checkpoint(teacher_path)
        wanted = settings.image_size or _header_size(checkpoint.header)
        scaling = Normalisation.parse(settings.normalize) if settings.normalize else None
        scaling_of(checkpoint, scaling)  # asked, as the triggers are read, before the images are
        triggers = tuple(Trigger.load(Path(path)) for path in settings.triggers)
        data = data or open_with_progress(settings.data, wanted or None, settings.split_seed)
        candidates = open_teacher(
            checkpoint, arch=settings.arch or None, normalisation=scaling, classes=data.classes, size=data.size
        )
        train_source = clean_budget(data.train, settings.clean_budget, settings.seed, by_class=settings.labels)
        teacher, found = choose_teacher(candidates, train_source, device)
        _check_class_order(teacher, data)
        low, high = found.interval
        doubt = likelier_scaling(teacher, train_source, device) if scaling and checkpoint.header is None else None
        notes = (
            *checkpoint.notes,
            *_contradiction(checkpoint.header, scaling),
            *((doubt,) if doubt else ()),
            (
                f"teacher: {teacher.arch}, {teacher.parameters:,} parameters, inputs scaled by {teacher.normalisation}, "
                f"{found.value:.1f} % of {found.n} clean training images right [{low:.1f}, {high:.1f}]"
            ),
        )
        _check_triggers(triggers, data)
        recipe = Recipe(
            epochs=settings.epochs, batch=min(settings.batch, len(train_source)), lr=settings.lr, seed=settings.seed,
            augmentation=augmentation_for(settings.augmentation, data), precision=choose_precision(settings.precision, device),
        )  # fmt: skip
        autocast(device, recipe.precision)
        how = {
            "crop": "cropped, not mirrored", "none": "not augmented",
            "crop-flip": "cropped and mirrored; where a mirrored image is of another class, give --augmentation crop",
        }  # fmt: skip
        notes = (*notes, f"training images are {how.get(recipe.augmentation, '?')}")
        return cls(data, train_source, teacher, checkpoint.sha256, triggers, device, recipe, notes)

    @property
    def steps(self) -> int:
        """Of the student's training."""
        return steps_per_epoch(len(self.train), self.recipe.batch) * self.recipe.epochs

    def check_same(self, run: Run) -> None:
        """Refuse to go on with other data, or from another teacher, than the run was started with."""
        recorded = run.summary.get("data", {}).get("digest")
        if recorded != self.data.digest:
            raise RunError(
                f"{run.path}: the data has changed since the run was started; restore it, or start a new run"
            )
        if run.summary.get("teacher", {}).get("converted_sha256") != self.teacher_sha256:
            raise RunError(
                f"{run.path / TEACHER} has changed since the run was started; restore it, or start a new run"
            )

    def clean_batches(self, count: int) -> list[torch.Tensor]:
        """A few batches of clean training images, normalised, for statistics."""
        draws = np.random.default_rng([self.recipe.seed, 0xC1EA]).permutation(len(self.train))[
            : count * self.recipe.batch
        ]
        batches = []
        for images, _ in self.train.batches(self.recipe.batch, np.sort(draws)):
            inputs = torch.from_numpy(images).to(self.device).contiguous(memory_format=torch.channels_last)
            batches.append(self.teacher.normalisation(inputs))
        return batches


def open_with_progress(spec: str, size: int | tuple[int, int] | None, seed: int) -> Dataset:
    """`open_dataset` with a bar where decoding takes long."""
    with ExitStack() as stack:
        bars: list[Bar] = []

        def show(done: int, total: int) -> None:
            if not bars:
                bars.append(stack.enter_context(progress("read the images", total, done)))
            bars[0].update(done, unit="img")

        return open_dataset(spec, size=size, seed=seed, progress=show)


def augmentation_for(name: str, data: Dataset) -> str:
    """`auto` does not mirror digits and signs: they would be other digits and signs."""
    if name != "auto":
        return name
    return "crop" if re.search(r"\b(digits?|[a-z]*mnist|gtsrb|svhn|signs?)\b", data.name.lower()) else "crop-flip"


def _contradiction(header: Mapping[str, Any] | None, given: Normalisation | None) -> tuple[str, ...]:
    """A note where `--normalize` is not what the teacher's file says."""
    if given is None or header is None or "mean" not in header or "std" not in header:
        return ()
    if (header["mean"], header["std"]) == (list(given.mean), list(given.std)):
        return ()
    said = f"{header['mean']};{header['std']}"[:100].replace(" ", "")
    return (f"--normalize {given} is used, although the teacher's file says {said}",)


def _header_size(header: Mapping[str, Any] | None) -> int | tuple[int, int]:
    size = header.get("size") if header is not None else None
    if isinstance(size, list) and len(size) == 2 and all(type(side) is int and 1 <= side <= 4096 for side in size):
        return size[0], size[1]
    return 0


def clean_budget(source: Source, budget: str, seed: int, *, by_class: bool = True) -> Source:
    """A part of the training images, class-stratified where their labels may be looked at."""
    if not budget:
        return source
    share = share_of(budget, len(source))
    rng = np.random.default_rng([seed, 0xB0D6])
    if not by_class:
        return source.subset(np.sort(rng.permutation(len(source))[: max(1, round(share * len(source)))]))
    chosen: list[NDArray[np.int64]] = []
    for label in np.unique(source.labels):
        members = rng.permutation(np.flatnonzero(source.labels == label))
        chosen.append(members[: max(1, round(share * len(members)))])
    return source.subset(np.sort(np.concatenate(chosen)))


def _check_class_order(teacher: Network, data: Dataset) -> None:
    if teacher.classes != data.classes and set(teacher.classes) == set(data.classes):
        raise DataError(
            f"the teacher's classes come in another order ({', '.join(teacher.classes[:3])}, ...) than the data's "
            f"({', '.join(data.classes[:3])}, ...); rename the class folders so that they sort in the teacher's order"
        )


def _check_triggers(triggers: Sequence[Trigger], data: Dataset) -> None:
    names = [trigger.name for trigger in triggers]
    if len(set(names)) < len(names):
        raise ConfigError(f"two triggers have the same name ({', '.join(names)}); rename one (its array 'name')")
    for trigger in triggers:
        if trigger.target >= len(data.classes):
            raise ConfigError(
                f"trigger {trigger.name} aims at class {trigger.target}, the data has {len(data.classes)} classes"
            )
        images, _ = data.test.batch(np.arange(min(len(data.test), _TRIED)))
        if np.array_equal(trigger.apply(images), images):
            raise ConfigError(
                f"trigger {trigger.name} changes none of the first {len(images)} test images; check its arrays m, p and d"
            )
