"""One distillation from settings to a finished run directory, resumable after any kill."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from rkd.data import Dataset, Source
from rkd.detox import DetoxCheck, Detoxification, DetoxRecipe, TapMask, detoxify, masks_from_bytes, set_masks
from rkd.distill.attention import AttentionTransfer
from rkd.distill.hardening import (
    COUNT,
    Hardened,
    UniversalPerturbations,
    check_differentiable,
    fooling_of_run,
    random_perturbations,
)
from rkd.distill.inputs import Inputs
from rkd.distill.labels import RelabelledSource, answers, check_labels
from rkd.distill.loop import Trainer, autocast
from rkd.distill.methods import PURIFIED as PURIFIED_NAMES
from rkd.distill.methods import Method
from rkd.distill.noise import InputNoise, Noisy
from rkd.distill.objectives import (
    CrossEntropy,
    FeatureDistillation,
    LogitDistillation,
    Objective,
    StudentObjective,
    margins,
    margins_need_images,
    tap_report,
)  # fmt: skip
from rkd.distill.settings import DistillSettings
from rkd.distill.training import monitor, train
from rkd.errors import ArchitectureError, RunError
from rkd.files import sha256, to_json, write_file
from rkd.measure import count_macs
from rkd.metrics import evaluate
from rkd.models import build
from rkd.network import Network, check_code
from rkd.npz import npz_bytes, read_npz
from rkd.progress import progress, say
from rkd.purify import Purification, purified
from rkd.run import (
    DISTIL,
    EXAMPLES,
    LABELS,
    MASKS,
    PURIFIED,
    STUDENT,
    TEACHER,
    TRIGGERS,
    Model,
    Run,
    Setting,
    check_free,
    models_of,
)
from rkd.signals import StopRequest
from rkd.taps import TappedNetwork, channel_writers

UNDEFENDED = "undefended"  # the sub-folder of the undefended student's own run
_EVALUATION_BATCH = 256
_EXAMPLES = 8
_HELD_OUT = 1000  # training images at most that the mask is not learned on, nor the teacher purified with
_LABELS_LIMIT_BYTES = 2**31


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
    check_free(path)
    with torch.device("meta"):  # a name that nothing has is refused before the images are read
        build(settings.student, 2, (224, 224))
    work = Inputs.open(settings, Path(settings.teacher), data)
    settings, origins = _resolved(settings, origins, work)
    _ = build(settings.student, len(work.data.classes), work.data.size)
    _check_teacher(settings, work)
    made = {
        name: Setting(getattr(settings, name), origins.get(name, "default"))
        for name in (f.name for f in fields(settings))
    }
    made["triggers"] = Setting(list(settings.triggers), origins.get("triggers", "default"))
    members = {f"{TRIGGERS}/{trigger.name}.npz": trigger.to_bytes() for trigger in work.triggers}
    teacher = work.teacher.to_bytes()
    run = Run.create(
        path, "distill", made, {**members, TEACHER: teacher}, made={name: sha256(data) for name, data in members.items()},
        data={"name": work.data.name, "digest": work.data.digest, "classes": list(work.data.classes), "notes": list(work.data.notes),
              "clean_images": len(work.train), "removed_as_in_test": work.data.removed},
        teacher={"sha256": work.teacher_sha256, "converted_sha256": sha256(teacher), "file": Path(settings.teacher).name, "arch": work.teacher.arch,
                 "normalize": str(work.teacher.normalisation), "notes": list(work.notes)},
    )  # fmt: skip
    return run, work


def _check_teacher(settings: DistillSettings, work: Inputs) -> None:
    """Refuse what this teacher's network does not have, before anything is written.

    Raises:
        ConfigError: fewer taps than were asked for.
        ArchitectureError: channels that cannot be pruned one by one, or no gradient.
    """
    if settings.chosen_taps is not None:
        TappedNetwork(work.teacher.module, work.data.size, only=settings.chosen_taps)
    if settings.purifier == "prune":
        channel_writers(work.teacher.module, work.data.size)
    if settings.perturbations == "teacher":
        _placed(work.teacher.module, work.device)
        check_differentiable(work.teacher, work.device)


def _placed(module: nn.Module, device: torch.device) -> nn.Module:
    """The teacher's module itself, frozen and in eval mode, where and as it is computed with."""
    placed: nn.Module = module.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    return placed.requires_grad_(requires_grad=False)


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
        purify_steps=settings.steps_to_purify(work.steps) if settings.purifier else None,
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
    check_code(settings.arch, arch, "arch", run.path)
    triggers = _kept_triggers(run)
    work = Inputs.open(replace(settings, data=data or settings.data, triggers=triggers), run.path / TEACHER)
    work.check_same(run)
    return work


def _kept_triggers(run: Run) -> tuple[str, ...]:
    """The paths of the triggers that the run was started with.

    Raises:
        RunError: there are others, or one has changed.
    """
    paths = sorted((run.path / TRIGGERS).glob("*.npz"))
    names = {f"{TRIGGERS}/{path.name}" for path in paths}
    if names != {name for name in run.summary.get("made", {}) if name.startswith(f"{TRIGGERS}/")}:
        raise RunError(f"{run.path / TRIGGERS} holds other triggers than the run was started with; start a new run")
    for name in sorted(names):
        run.kept(name)
    return tuple(map(str, paths))


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
        work = work or reopen(run)
        assert work is not None  # noqa: S101  (the run is not finished)
        compare = settings.undefended and (settings.method, settings.radius) != ("ofd", 0)
        rows = _undefended(run, settings, stop, work) if compare else []
        for note in (*work.data.notes, *work.notes):
            say(note)
        if settings.accuracy_budget != DistillSettings.accuracy_budget and not settings.masked:
            say(
                "--accuracy-budget bounds what a mask may cost; no mask is learned here (--cap 0.05, or --variant paper)"
            )
        work = work if settings.labels else _relabelled(run, work)
        trusted = _purified(run, settings, work, stop, settings.purifier) if settings.purifier else work.teacher
        student = _fresh_student(run, settings, work)
        # Before the teacher is tapped or masked.
        hardening = _hardening(run, settings, work) if settings.radius else None
        plain = _objective(run, settings, replace(work, teacher=trusted), student)
        objective = _perturbed(plain, settings, work, hardening)
        _train_student(run, settings, work, student, objective, stop)
        rows = rows or [_measure("teacher", work.teacher, work, (run.path / TEACHER).stat().st_size)]
        if settings.purifier:
            rows.append(
                _measure(PURIFIED_NAMES[settings.purifier], trusted, work, (run.path / PURIFIED).stat().st_size)
            )
        data = student.to_bytes()
        write_file(run.path / STUDENT, data)
        _keep_examples(run, work, student)
        role = Method.parse(settings.method).role(hardened=settings.radius > 0, labels=settings.labels)
        rows.append(_measure(role, student, work, len(data)))
        run.finish(models=[row.to_json() for row in rows], student={"sha256": sha256(data), "arch": student.arch})
    return rows


def _undefended(run: Run, settings: DistillSettings, stop: StopRequest, work: Inputs) -> list[Model]:
    """The undefended student's own run inside this one: made, gone on with, or done already."""
    path = run.path / UNDEFENDED
    say("first the undefended student, which trusts its teacher: the same network, images and steps, by ofd")
    if (path / "run.json").is_file():
        made = Run.open(path)
        if made.setting("arch") != settings.arch:  # which may be code that the user has allowed by name
            raise RunError(f"{path} is not this run's: its teacher is another network; start a new run")
        return distill(made, stop, reopen(made, arch=settings.arch))
    triggers = tuple(str(p) for p in sorted((run.path / TRIGGERS).glob("*.npz")))
    plain = settings.undefended_twin(str(run.path / TEACHER), triggers)
    origins = {name: str(setting["origin"]) for name, setting in run.summary["settings"].items()}
    sub_run, its_work = start(plain, origins, path, work.data)
    return distill(sub_run, stop, its_work)


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


def _held_out(settings: DistillSettings, source: Source) -> tuple[Source, Source]:
    """The clean images to learn a mask on, or to purify with, and those held out."""
    order = np.random.default_rng([settings.seed, 0x4E1D]).permutation(len(source))
    held_out = np.sort(order[: min(_HELD_OUT, max(1, len(order) // 5))])
    return source.subset(np.sort(order[len(held_out) :])), source.subset(held_out)


def _relabelled(run: Run, work: Inputs) -> Inputs:
    """The teacher's answers in place of the labels: taken from the run, or asked for."""
    data = run.kept(LABELS)
    if data is None:
        found: list[NDArray[np.int64]] = []
        with progress("ask the teacher for labels", len(work.train)) as bar:
            for said in answers(work.teacher.predictor(work.device), work.train, _EVALUATION_BATCH):
                found.append(said)
                bar.update(sum(map(len, found)), unit="img")
        data = npz_bytes({"y": np.concatenate(found)})
        run.keep(LABELS, data)
    path = run.path / LABELS
    try:
        labels = read_npz(io.BytesIO(data), _LABELS_LIMIT_BYTES)["y"]
        check_labels(labels, len(work.train), len(work.data.classes))
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} does not hold labels: {error}") from error
    return replace(work, train=RelabelledSource(work.train, labels))


def _purified(run: Run, settings: DistillSettings, work: Inputs, stop: StopRequest, purifier: str) -> Network:
    """The purified teacher; errors are those of `purified`."""
    clean, held_out = _held_out(settings, work.train)
    stage = Purification(
        run=run, stop=stop, teacher=work.teacher, clean=clean, held_out=held_out, recipe=work.recipe,
        steps=settings.steps_to_purify(work.steps), lr=settings.purify_lr, device=work.device,
        checkpoint_every=settings.checkpoint_every, resume_hint=_resume_command(run),
    )  # fmt: skip
    return purified(purifier, stage)


def _objective(run: Run, settings: DistillSettings, work: Inputs, student: Network) -> StudentObjective:
    """The objective of the method; for RobustKD the mask is learned first, or taken from the run."""
    method = Method.parse(settings.method)
    module = _placed(work.teacher.module, work.device)
    if method.objective == "ce" or (method.objective == "kd" and method.treatment != "robustkd"):
        torch.manual_seed(settings.seed)
        return CrossEntropy(student.module) if method.objective == "ce" else LogitDistillation(student.module, module)
    in_train_mode = settings.teacher_mode == "train"
    if in_train_mode:
        module = copy.deepcopy(module)  # its BNs' statistics will move; the teacher of the table stays as it is
    tapped = TappedNetwork(module, work.data.size, frozen=not in_train_mode, only=settings.chosen_taps).eval()
    if not tapped.taps:
        raise ArchitectureError(f"no feature map was found in {work.teacher.arch}; use --method kd, which needs none")
    images = work.clean_batches(4) if method.objective == "ofd" and margins_need_images(tapped, module) else []
    found = margins(tapped, module, images) if method.objective == "ofd" else []
    if settings.masked:
        masks = _masks(run, settings, work, tapped)
        fp32 = work.recipe.precision == "fp32"
        dtype = torch.float32 if fp32 else autocast(work.device, work.recipe.precision).fast_dtype
        set_masks(tapped, masks, work.device, dtype)
    torch.manual_seed(settings.seed)  # whether the mask was learned just now or read must not matter
    objective: StudentObjective
    if method.objective == "ofd":
        objective = FeatureDistillation(student.module, tapped, work.data.size, found)
    elif method.objective == "at":
        objective = AttentionTransfer(student.module, tapped, work.data.size)
    else:
        objective = LogitDistillation(student.module, tapped)
    tapped.train(in_train_mode)
    if isinstance(objective, FeatureDistillation | AttentionTransfer):
        for line in tap_report(tapped.taps, objective.student.taps):
            say(line)
    return objective


def _hardening(run: Run, settings: DistillSettings, work: Inputs) -> UniversalPerturbations:
    """What some of the student's images carry: what fools the teacher as it came, or what will fool the student."""
    _placed(work.teacher.module, work.device)
    linf = settings.radius / 255
    fixed = settings.perturbations == "teacher"
    first = random_perturbations(COUNT, work.data.size, linf, settings.seed)
    if fixed:
        first = fooling_of_run(
            run, work.teacher, work.train, first, linf,
            seed=settings.seed, device=work.device, batch=work.recipe.batch,
        )  # fmt: skip
    start = int(settings.harden_from * work.steps)
    return UniversalPerturbations(
        first, linf, work.teacher.normalisation, fixed=fixed, share=settings.harden_share, start=start
    )


def _perturbed(
    objective: StudentObjective, settings: DistillSettings, work: Inputs, hardening: UniversalPerturbations | None
) -> Objective:
    """The objective with noise and hardening, where the settings have them, on the run's device."""
    if settings.input_noise:
        objective = Noisy(
            objective, InputNoise(settings.input_noise / 255, work.teacher.normalisation.std).to(work.device)
        )
    found = objective if hardening is None else Hardened(objective, hardening)
    found.extra.to(work.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return found


def _masks(run: Run, settings: DistillSettings, work: Inputs, tapped: TappedNetwork) -> tuple[TapMask, ...]:
    if (data := run.kept(MASKS)) is not None:
        return masks_from_bytes(data, str(run.path / MASKS), settings.mask_cap)
    recipe = DetoxRecipe(
        accuracy_budget=settings.accuracy_budget, cap=settings.mask_cap, batch=work.recipe.batch,
        shape=settings.mask, variance=settings.variance, start=settings.replacement,
    )  # fmt: skip
    learn, held_out = _held_out(settings, work.train)
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
            tapped, work.teacher.normalisation, learn, held_out, recipe,
            seed=settings.seed, device=work.device, autocast=lambda: autocast(work.device, work.recipe.precision), on_check=show,
        )  # fmt: skip
    run.keep(MASKS, found.to_bytes(), detox=_detox_summary(found))
    say(
        f"detoxified: {100 * found.variance:.0f} % of how much the teacher's features vary from image to image is left; "
        f"its accuracy on {found.n} held-out "
        f"clean images went from {found.teacher_accuracy:.1f} to {found.accuracy:.1f}"
    )
    if found.weight == 0 and settings.variance:
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
    trainer = Trainer(student.module, objective, work.train, student.normalisation, work.recipe, work.device)
    train(
        trainer, run, stop, stage=f"{DISTIL} ({settings.method})", resume_hint=_resume_command(run),
        checkpoint_every=settings.checkpoint_every,
        on_epoch=monitor(student, work.data.test, settings.seed, work.device),
    )  # fmt: skip


def _resume_command(run: Run) -> str:
    return f"rkd distill --resume {run.path if run.path.name != UNDEFENDED else run.path.parent}"


def _measure(role: str, network: Network, work: Inputs, size_bytes: int) -> Model:
    passes = len(work.data.test) * (1 + len(work.triggers))
    predict = network.predictor(work.device)
    done = 0
    with progress(f"evaluate the {role}{', clean and triggered' if work.triggers else ''}", passes) as bar:

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
