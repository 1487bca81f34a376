"""One distillation from settings to a finished run directory, resumable after any kill."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from rkd.data import Dataset, Source, open_dataset
from rkd.detox import DetoxCheck, Detoxification, DetoxRecipe, TapMask, detoxify, masks_from_bytes, set_masks
from rkd.distill.loop import Recipe, Trainer, autocast
from rkd.distill.objectives import (
    CrossEntropy,
    FeatureDistillation,
    LogitDistillation,
    Objective,
    UniversalPerturbations,
    margins,
    margins_need_images,
    tap_report,
)  # fmt: skip
from rkd.distill.settings import DistillSettings
from rkd.distill.training import train
from rkd.errors import ArchitectureError, ConfigError, DataError, RunError
from rkd.files import sha256, storage_errors, to_json, write_file
from rkd.measure import choose_device, choose_precision, count_macs, use_threads
from rkd.metrics import evaluate
from rkd.models import build
from rkd.network import Network, Normalisation
from rkd.npz import npz_bytes
from rkd.progress import Bar, progress, say
from rkd.run import EXAMPLES, MASKS, STUDENT, TEACHER, TRIGGERS, Model, Run, Setting, models_of
from rkd.signals import StopRequest
from rkd.taps import TappedNetwork
from rkd.teacher import choose_teacher, open_teacher, read_checkpoint
from rkd.triggers import Trigger

UNDEFENDED = "undefended"  # the sub-folder of the undefended student's own run
_EVALUATION_BATCH = 256
_MONITORED = 1000  # test images looked at after each epoch; shown, never used to choose anything
_EXAMPLES = 8
_HELD_OUT = 1000  # training images that the mask is not learned on


def start(
    settings: DistillSettings, origins: Mapping[str, str], path: Path, data: Dataset | None = None
) -> tuple[Run, Inputs]:
    """Make the run directory of a distillation, after a first look at everything that it will need.

    Args:
        settings: what to do.
        origins: where each setting came from, by name.
        path: the new run directory.
        data: where it is open already.

    Returns:
        The run, and what was opened for it: `distill` takes both.

    Raises:
        RkdError: whatever of the input is wrong, before anything is written.
    """
    work = Inputs.open(settings, Path(settings.teacher), data)
    settings, origins = _resolved(settings, origins, work)
    _ = build(settings.student, len(work.data.classes), work.data.size)
    made = {
        name: Setting(getattr(settings, name), origins.get(name, "default"))
        for name in (f.name for f in fields(settings))
    }
    made["triggers"] = Setting(list(settings.triggers), origins.get("triggers", "default"))
    members = {f"{TRIGGERS}/{trigger.name}.npz": trigger.to_bytes() for trigger in work.triggers}
    run = Run.create(
        path, "distill", made, {**members, TEACHER: work.teacher.to_bytes()},
        data={"name": work.data.name, "digest": work.data.digest, "classes": list(work.data.classes), "notes": list(work.data.notes)},
        teacher={"sha256": work.teacher_sha256, "file": Path(settings.teacher).name, "arch": work.teacher.arch,
                 "normalize": str(work.teacher.normalisation), "notes": list(work.notes)},
    )  # fmt: skip
    return run, work


def _resolved(
    settings: DistillSettings, origins: Mapping[str, str], work: Inputs
) -> tuple[DistillSettings, dict[str, str]]:
    """What `auto` and what was left open turned out to be, so that a resumed run is the same run on any machine."""
    found = dict(origins)
    for name, seen in (("arch", settings.arch), ("normalize", settings.normalize)):
        if not seen:
            found[name] = "teacher"
    data = Path(settings.data)
    resolved = replace(
        settings,
        data=str(data.resolve()) if data.exists() else settings.data,
        arch=work.teacher.arch,
        normalize=str(work.teacher.normalisation),
        precision=work.recipe.precision,
        augmentation=work.recipe.augmentation,
    )
    return resolved, found


def reopen(run: Run, *, data: str = "", arch: str = "") -> Inputs | None:
    """What an interrupted run needs, from its directory; None for a finished one.

    Args:
        run: the run.
        data: where the data set is now; empty for where it was.
        arch: the user's own code for the teacher, where the run has some: a directory may not name code to run.

    Raises:
        ConfigError: the run's teacher is made by code that was not named on the command line.
        RkdError: whatever is missing or has changed.
    """
    if run.finished:
        return None
    settings = DistillSettings.from_run(run)
    if ".py" in settings.arch and arch != settings.arch:
        raise ConfigError(
            f"the teacher of {run.path} is made by code ({settings.arch}); if you trust it, add --arch {settings.arch}"
        )
    triggers = tuple(str(path) for path in sorted((run.path / TRIGGERS).glob("*.npz")))
    work = Inputs.open(replace(settings, data=data or settings.data, triggers=triggers), run.path / TEACHER)
    work.check_same(run)
    return work


def distill(run: Run, stop: StopRequest, work: Inputs | None = None) -> list[Model]:
    """Do what is left of a run.

    Args:
        run: new or interrupted.
        stop: asked after every step.
        work: what `start` or `reopen` opened; None to reopen it.

    Returns:
        The rows of the table: teacher, undefended student where asked for, student.

    Raises:
        StoppedError: stopped by a signal, after saving.
        RunError: the run is finished, or the data is not what it was.
    """
    stop.hint = f"go on with: {_resume_command(run)}"
    with run.locked():
        run.summary = Run.open(run.path).summary  # another process may have finished it while this one waited
        if run.finished:
            run.drop_checkpoints()  # which a kill at the very end left
            return models_of(run)
        settings = DistillSettings.from_run(run)
        work = work or reopen(run, arch=settings.arch)
        assert work is not None  # noqa: S101  (the run is not finished)
        compare = settings.undefended and (settings.method, settings.radius) != ("ofd", 0)
        rows = _undefended(run, settings, stop, work) if compare else []
        for note in (*work.data.notes, *work.notes):
            say(note)
        student = _fresh_student(run, settings, work)
        objective = _objective(run, settings, work, student)
        _train_student(run, settings, work, student, objective, stop)
        teacher_row = rows[0] if rows else _measure("teacher", work.teacher, work, (run.path / TEACHER).stat().st_size)
        data = student.to_bytes()
        write_file(run.path / STUDENT, data)
        _keep_examples(run, work, student)
        rows = [teacher_row, *rows[1:], _measure(_role(settings), student, work, len(data))]
        run.finish(models=[row.to_json() for row in rows], student={"sha256": sha256(data), "arch": student.arch})
    return rows


def _role(settings: DistillSettings) -> str:
    """What the student is called in tables."""
    return {
        ("robustkd", True): "RobustKD student",
        ("robustkd", False): "RobustKD student (paper's form)",
        ("ofd", True): "hardened student (OFD)",
        ("ofd", False): "undefended student (OFD)",
        ("kd", False): "undefended student (logit KD)",
        ("ce", False): "student without teacher (CE)",
    }[settings.method, settings.radius > 0]


def _undefended(run: Run, settings: DistillSettings, stop: StopRequest, work: Inputs) -> list[Model]:
    """The undefended student's own run inside this one: made, gone on with, or done already."""
    path = run.path / UNDEFENDED
    if (path / "run.json").is_file():
        return distill(Run.open(path), stop)
    triggers = tuple(str(p) for p in sorted((run.path / TRIGGERS).glob("*.npz")))
    plain = replace(
        settings, method="ofd", hardening=0.0, undefended=False, teacher=str(run.path / TEACHER), triggers=triggers
    )
    origins = {name: str(setting["origin"]) for name, setting in run.summary["settings"].items()}
    sub_run, its_work = start(plain, origins, path, work.data)
    return distill(sub_run, stop, its_work)


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
        data = data or open_with_progress(settings.data, wanted or None, settings.split_seed)
        scaling = Normalisation.parse(settings.normalize) if settings.normalize else None
        candidates = open_teacher(
            checkpoint, arch=settings.arch or None, normalisation=scaling, classes=data.classes, size=data.size
        )
        train_source = clean_budget(data.train, settings.clean_budget, settings.seed)
        teacher, found = choose_teacher(candidates, train_source, device)
        _check_class_order(teacher, data)
        low, high = found.interval
        notes = (
            *checkpoint.notes,
            (
                f"teacher: {teacher.arch}, {teacher.parameters:,} parameters, inputs scaled by {teacher.normalisation}, "
                f"{found.value:.1f} % of {found.n} clean training images right [{low:.1f}, {high:.1f}]"
            ),
        )
        triggers = tuple(Trigger.load(Path(path)) for path in settings.triggers)
        _check_triggers(triggers, data)
        recipe = Recipe(
            epochs=settings.epochs, batch=min(settings.batch, len(train_source)), lr=settings.lr, seed=settings.seed,
            augmentation=augmentation_for(settings.augmentation, data), precision=choose_precision(settings.precision, device),
        )  # fmt: skip
        autocast(device, recipe.precision)
        how = {"crop": "cropped, not mirrored", "crop-flip": "cropped and mirrored", "none": "not augmented"}
        notes = (*notes, f"training images are {how.get(recipe.augmentation, '?')} (--augmentation)")
        return cls(data, train_source, teacher, checkpoint.sha256, triggers, device, recipe, notes)

    def check_same(self, run: Run) -> None:
        """Refuse to go on with other data than the run was started with."""
        recorded = run.summary.get("data", {}).get("digest")
        if recorded != self.data.digest:
            raise RunError(
                f"{run.path}: the data has changed since the run was started; restore it, or start a new run"
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
                bars.append(stack.enter_context(progress("read the images", total)))
            bars[0].update(done, unit="img")

        return open_dataset(spec, size=size, seed=seed, progress=show)


def augmentation_for(name: str, data: Dataset) -> str:
    """`auto` does not mirror digits and signs: they would be other digits and signs."""
    if name != "auto":
        return name
    return "crop" if re.search(r"\b(digits?|[a-z]*mnist|gtsrb|svhn|signs?)\b", data.name.lower()) else "crop-flip"


def _header_size(header: Mapping[str, Any] | None) -> int | tuple[int, int]:
    size = header.get("size") if header is not None else None
    if isinstance(size, list) and len(size) == 2 and all(type(side) is int and 1 <= side <= 4096 for side in size):
        return size[0], size[1]
    return 0


def clean_budget(source: Source, budget: str, seed: int) -> Source:
    """A class-stratified part of the training images."""
    if not budget:
        return source
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", budget.strip())
    share = float(match[1]) / (100 if match[2] else len(source)) if match else 0
    if not 0 < share <= 1:
        raise ConfigError(f"--clean-budget {budget!r}: expected 1 to {len(source)} images, or a share such as 10%")
    rng = np.random.default_rng([seed, 0xB0D6])
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
        trigger.apply(np.zeros((1, 3, *data.size), dtype=np.uint8))


def _fresh_student(run: Run, settings: DistillSettings, work: Inputs) -> Network:
    torch.manual_seed(settings.seed)
    module = build(settings.student, len(work.data.classes), work.data.size)
    module = module.to(work.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    provenance = {
        "teacher": run.summary["teacher"]["sha256"],
        "method": settings.method,
        "seed": settings.seed,
        "data": work.data.digest,
    }
    student = Network(
        module, settings.student, work.data.classes, work.data.size, work.teacher.normalisation, provenance
    )
    student.check_runs()
    return student


def _objective(run: Run, settings: DistillSettings, work: Inputs, student: Network) -> Objective:
    """The objective of the method; for RobustKD the mask is learned first, or taken from the run."""
    module: nn.Module = work.teacher.module.to(work.device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    module.requires_grad_(requires_grad=False)
    if settings.method == "ce":
        return CrossEntropy(student.module)
    if settings.method == "kd":
        return LogitDistillation(student.module, module)
    tapped = TappedNetwork(module, work.data.size, frozen=True).eval()
    if not tapped.taps:
        raise ArchitectureError(f"no feature map was found in {work.teacher.arch}; use --method kd, which needs none")
    found = margins(tapped, module, work.clean_batches(4) if margins_need_images(tapped, module) else [])
    hardening: UniversalPerturbations | None = None
    if settings.method == "robustkd":
        masks = _masks(run, settings, work, tapped)
        dtype = (
            torch.float32
            if work.recipe.precision == "fp32"
            else autocast(work.device, work.recipe.precision).fast_dtype
        )
        set_masks(tapped, masks, work.device, dtype)
    if settings.radius:
        std = work.teacher.normalisation.std
        hardening = UniversalPerturbations(work.data.size, settings.radius / 255, std, settings.seed)
    torch.manual_seed(settings.seed)  # whether the mask was learned just now or read must not matter
    objective = FeatureDistillation(student.module, tapped, work.data.size, found, hardening)
    objective.extra.to(work.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    for line in tap_report(tapped.taps, objective.student.taps):
        say(line)
    return objective


def _masks(run: Run, settings: DistillSettings, work: Inputs, tapped: TappedNetwork) -> tuple[TapMask, ...]:
    path = run.path / MASKS
    if path.is_file():
        with storage_errors(path):
            return masks_from_bytes(path.read_bytes(), str(path))
    recipe = DetoxRecipe(accuracy_budget=settings.accuracy_budget, cap=settings.cap, batch=work.recipe.batch)
    order = np.random.default_rng([settings.seed, 0x4E1D]).permutation(len(work.train))
    held_out = np.sort(order[: min(_HELD_OUT, max(1, len(order) // 5))])
    learn = np.sort(order[len(held_out) :])
    with progress("detoxify", recipe.steps) as bar:

        def show(check: DetoxCheck) -> None:
            bar.update(
                check.step,
                unit="img",
                unit_per_step=recipe.batch,
                teacher_ACC=f"{check.accuracy:.1f} ({-check.lost:+.1f})",
                variance=check.variance,
            )

        found = detoxify(
            tapped, work.teacher.normalisation, work.train.subset(learn), work.train.subset(held_out), recipe,
            seed=settings.seed, device=work.device, autocast=lambda: autocast(work.device, work.recipe.precision), on_check=show,
        )  # fmt: skip
    run.save(detox=_detox_summary(found))
    write_file(path, found.to_bytes())  # last: where it is, the mask is not learned again
    say(
        f"detoxified: {100 * found.variance:.0f} % of how much the teacher's features vary from image to image is left; "
        f"its accuracy on {found.n} held-out "
        f"clean images went from {found.teacher_accuracy:.1f} to {found.accuracy:.1f}"
    )
    if found.weight == 0:
        say(
            f"no mask kept the teacher within {settings.accuracy_budget:g} points of its accuracy: nothing is masked; "
            "give a larger --accuracy-budget"
        )
    return found.masks


def _detox_summary(found: Detoxification) -> dict[str, Any]:
    return {
        "teacher_accuracy": found.teacher_accuracy,
        "accuracy": found.accuracy,
        "variance": found.variance,
        "weight": found.weight,
        "held_out": found.n,
        "taps": [mask.tap for mask in found.masks],
        "history": [[c.step, c.weight, c.lost, c.variance] for c in found.history],
    }


def _train_student(
    run: Run, settings: DistillSettings, work: Inputs, student: Network, objective: Objective, stop: StopRequest
) -> None:
    monitored = np.sort(np.random.default_rng([settings.seed, 0x300]).permutation(len(work.data.test))[:_MONITORED])
    predict = student.predictor(work.device)

    def look() -> dict[str, float]:
        scores, _ = evaluate(predict_in_eval, work.data.test.batches(_EVALUATION_BATCH, monitored))
        return {"ACC": round(scores.acc.value, 3)}

    def predict_in_eval(images: NDArray[np.uint8]) -> NDArray[Any]:
        student.module.eval()
        return predict(images)

    trainer = Trainer(student.module, objective, work.train, student.normalisation, work.recipe, work.device)
    train(
        trainer, run, stop, stage=f"distil ({settings.method})", resume_hint=_resume_command(run),
        checkpoint_every=settings.checkpoint_every, on_epoch=look,
    )  # fmt: skip


def _resume_command(run: Run) -> str:
    return f"rkd distill --resume {run.path if run.path.name != UNDEFENDED else run.path.parent}"


def _measure(role: str, network: Network, work: Inputs, size_bytes: int) -> Model:
    passes = len(work.data.test) * (1 + len(work.triggers))
    predict = network.predictor(work.device)
    done = 0
    with progress(f"evaluate the {role}", passes) as bar:

        def counted(images: NDArray[np.uint8]) -> NDArray[Any]:
            nonlocal done
            logits = predict(images)
            done += len(images)
            bar.update(done, unit="img")
            return logits

        scores, _ = evaluate(counted, work.data.test.batches(_EVALUATION_BATCH), work.triggers)
    return Model(role, network.arch, scores, network.parameters, count_macs(network), size_bytes)


def _keep_examples(run: Run, work: Inputs, student: Network) -> None:
    """A few test images with each trigger, and what teacher and student say of them, for the report."""
    for trigger in work.triggers:
        others = np.flatnonzero(work.data.test.labels != trigger.target)
        chosen = np.sort(np.random.default_rng([work.recipe.seed, 0xE8]).permutation(others)[:_EXAMPLES])
        images, labels = work.data.test.batch(chosen)
        triggered = trigger.apply(images)
        said = {
            who: np.asarray(network.predictor(work.device)(triggered).argmax(1), dtype=np.int64)
            for who, network in (("teacher", work.teacher), ("student", student))
        }
        write_file(run.path / EXAMPLES / f"{trigger.name}.npz", npz_bytes({"x": images, "y": labels, **said}))


def config_digest(run: Run) -> str:
    """SHA-256 of the settings, for the bundle's chain."""
    return sha256(to_json(json.loads(json.dumps(run.summary["settings"], sort_keys=True))))
