"""Turn run directories and bench results into pages and verdicts (torch only to read masks)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rkd.bench import result as bench_result
from rkd.bench.report import Curve, MaskPanel, ModelRow, RunReport, TriggerPanel, result_page, run_page
from rkd.bench.report.scores import difference
from rkd.checks import number
from rkd.errors import ConfigError, RkdError, RunError, TriggerError
from rkd.files import check_output, read_bytes, storage_errors, write_file
from rkd.metrics import Scores
from rkd.npz import read_npz
from rkd.run import DISTIL, EXAMPLES, MASKS, REPORT, SUMMARY, TRIGGERS, Model, Run, fooling_text, models_of
from rkd.triggers import Trigger

_EXAMPLES_LIMIT_BYTES = 2**28
_FAR_BELOW = 15.0  # points of ACC
_TRANSFERS = 30.0  # percent; a case transfers from 30 points of excess ASR on


def report_command(sources: Sequence[Path], out: Path | None, control: Sequence[Path] = ()) -> tuple[Path, list[Path]]:
    """`rkd report`: a page about runs, or about results of `rkd bench`.

    Args:
        sources: run directories or result.json files, not both; empty for ./result.json, else the newest run.
        out: the page; by default report.html, in the run where there is one.
        control: the runs of controls, to show excess ASR.

    Returns:
        Where the page is, and what it is about.

    Raises:
        ConfigError: runs and results together, one result twice, a control for results, or `out` is a source.
        RkdError: a source is not what it should be.
    """
    if not sources:
        newest = Path("result.json")
        sources = [newest] if newest.is_file() else [Run.newest(Path("runs")).path]
    runs = [path for path in sources if path.is_dir()]
    if runs and len(runs) < len(sources):
        raise ConfigError("give either run directories or result.json files: they make different pages")
    if not runs:
        if control:
            raise ConfigError("--control is for run directories: a result of rkd bench has no control; leave it out")
        _refuse_twice(sources)
        place = out or Path("report.html")
        check_output(place, sources)
        write_file(place, result_page([bench_result.read(path) for path in sources]).encode())
        return place, list(sources)
    opened = [Run.open(path) for path in runs]
    place = out or (opened[0].path / REPORT if len(opened) == 1 else Path("report.html"))
    controls = [Run.open(path) for path in control]
    everyone = [*controls, *opened]
    check_output(place, [file for run in everyone for file in run.path.rglob("*") if file.suffix != ".html"])
    names = _short_names([run.path for run in everyone])
    roles = {str(run.path): f"{_last(run).role} ({names[run.path]})" for run in everyone} if len(everyone) > 1 else {}
    compared = {roles[str(run.path)]: roles[str(_control_of(run, controls).path)] for run in opened if controls}
    write_run_report(everyone, place, roles=roles, controls=compared)
    return place, [run.path for run in opened]


def _refuse_twice(paths: Sequence[Path]) -> None:
    """See that no file is given twice.

    Raises:
        ConfigError: one is.
    """
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise ConfigError(f"{path} is given twice; name each result once")
        seen.add(path.resolve())


def _short_names(paths: Sequence[Path]) -> dict[Path, str]:
    """The folders' own names where they differ, else their whole paths."""
    names = {path: path.resolve().name for path in paths}
    return names if len(set(names.values())) == len(set(paths)) else {path: str(path) for path in paths}


def _control_of(run: Run, controls: Sequence[Run]) -> Run:
    """The control that was made as `run` was, but from another teacher.

    Raises:
        ConfigError: there is none: its ASR would not be comparable.
    """
    names = (
        "student", "method", "variant", "hardening", "harden_from", "harden_share", "perturbations", "cap", "mask", "variance", "replacement", "taps", "teacher_mode",
        "input_noise", "accuracy_budget", "purify", "purify_steps", "purify_lr", "labels", "epochs", "batch", "lr",
        "clean_budget", "seed",
    )  # fmt: skip
    differing: list[str] = []
    for control in controls:
        other = [name for name in names if _value(control, name) != _value(run, name)]
        other += ["data"] if control.summary["data"]["digest"] != run.summary["data"]["digest"] else []
        if not other:
            return control
        differing = other
    raise ConfigError(
        f"no control for {run.path}: a control has the same settings and another teacher, the one given differs in "
        f"{', '.join(differing)}"
    )


def _value(run: Run, name: str) -> object:
    """A setting; None where the run was made before there was such a setting."""
    return run.setting(name) if name in run.summary["settings"] else None


def write_run_report(
    runs: Sequence[Run],
    out: Path,
    *,
    roles: Mapping[str, str] | None = None,
    controls: Mapping[str, str] | None = None,
    verdict: str = "",
    title: str = "",
) -> None:
    """Write the page of one run, or of several side by side.

    Args:
        runs: finished.
        out: the page.
        roles: what to call each run's student, by the run's path; by default its own role.
        controls: the role of a row's control, by the row's role; to show excess ASR.
        verdict: one paragraph; by default made from the figures.
        title: by default from the run.
    """
    roles, controls = roles or {}, controls or {}
    rows: dict[str, ModelRow] = {}
    for run in runs:
        *others, student = models_of(run)
        several = len(runs) > 1
        named = [(_role_among(other, run, runs) if several else other.role, other) for other in others]
        for role, model in [*named, (_name(run, roles), student)]:
            rows[role] = ModelRow(
                role,
                model.arch,
                model.scores,
                model.parameters,
                model.macs,
                model.size_bytes,
                control=controls.get(role, ""),
            )
    ordered = sorted(rows.values(), key=lambda row: not row.role.startswith("teacher"))
    shown = runs[-1]
    masks, history = _masks(shown)
    report = RunReport(
        title=title or f"{shown.setting('student')} from {shown.summary['teacher']['file']}",
        verdict=verdict or " ".join([*cautions_of(shown), _verdict(models_of(shown))]),
        created=str(shown.summary.get("created", "")),
        command=_command(shown),
        models=ordered,
        curves=[curve for run in runs for curve in _curves(run, _name(run, roles))],
        triggers=_trigger_panels(shown),
        masks=masks,
        detox_history=history,
        settings=[(name, _plain(s["value"]), str(s["origin"])) for name, s in shown.summary["settings"].items()],
        provenance=_provenance(shown),
        notes=_cautions_of_all([run for run in runs if _name(run, roles) not in controls.values()], roles)
        + _fooling(shown)
        + shown.summary["data"]["notes"],
    )
    write_file(out, run_page(report).encode())


def _name(run: Run, roles: Mapping[str, str]) -> str:
    """What a run's student is called."""
    return roles.get(str(run.path), _last(run).role)


def _cautions_of_all(runs: Sequence[Run], roles: Mapping[str, str]) -> list[str]:
    """What every run's figures do not say; with its name where there are several."""
    return [
        f"{_name(run, roles)}: {caution}" if len(runs) > 1 else caution for run in runs for caution in cautions_of(run)
    ]


def _plain(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _role_among(model: Model, run: Run, runs: Sequence[Run]) -> str:
    """What a network that is not the run's student is called on a page about several runs."""
    if model.role == "teacher":
        return f"teacher: {_teacher_name(run, runs)}"
    return f"{model.role} ({_short_names([r.path for r in runs])[run.path]})"


def _teacher_name(run: Run, runs: Sequence[Run]) -> str:
    """The teacher's file name; with the start of its digest where another teacher has the same name."""
    teacher = run.summary["teacher"]
    same = {other.summary["teacher"]["sha256"] for other in runs if other.summary["teacher"]["file"] == teacher["file"]}
    return str(teacher["file"]) if len(same) == 1 else f"{teacher['file']} {teacher['sha256'][:8]}"


def _last(run: Run) -> Model:
    return models_of(run)[-1]


def _verdict(models: Sequence[Model]) -> str:
    """What the figures say, without claiming what they do not."""
    teacher, student = models[0], models[-1]
    text = (
        f"The {student.role} ({student.arch}) classifies {student.scores.acc.value:.1f} % of {student.scores.acc.n} clean "
        f"test images correctly; its teacher {teacher.scores.acc.value:.1f} %."
    )
    undefended = next((m.scores for m in models[1:-1] if m.role.startswith("undefended")), None)
    for index, t in enumerate(student.scores.triggers):
        before = teacher.scores.triggers[index]
        text += (
            f" The trigger {t.trigger!r} moves {t.asr.value:.1f} % of {t.asr.n} images to class {t.target} in the student, "
            f"{before.asr.value:.1f} % in the teacher"
        )
        text += (
            f", {undefended.triggers[index].asr.value:.1f} % in a student that trusts the teacher."
            if undefended
            else "."
        )
    if not student.scores.triggers:
        return text + " No trigger was given, so nothing is said about a backdoor."
    return (
        text
        + " Whether what is left is a backdoor only a control tells: the same student from a clean twin of the teacher."
    )


def cautions(models: Sequence[Model], classes: int) -> list[str]:
    """What keeps a run's figures from saying what they seem to say.

    Args:
        models: of the run: the teacher first, the student last.
        classes: how many there are.
    """
    found = []
    teacher, student = models[0].scores, models[-1].scores
    if caution := teacher.guess_caution(classes):
        found.append(f"The teacher itself {caution}: check --normalize, --arch and the order of the class folders.")
    elif caution := student.guess_caution(classes):
        found.append(f"The student {caution}: train longer (--epochs) or on more data.")
    elif (lost := teacher.acc.value - student.acc.value) > _FAR_BELOW:
        found.append(
            f"The student is {lost:.1f} points of ACC below its teacher: train longer (--epochs), on more data, or take a "
            "larger student."
        )
    if models[-1].parameters > models[0].parameters:
        found.append(
            f"The student is larger than its teacher: {models[-1].parameters:,} parameters, the teacher has "
            f"{models[0].parameters:,}."
        )
    found += [
        f"The trigger {t.trigger!r} moves only {t.asr.value:.1f} % of the images in the teacher itself: unless the attack "
        "is meant to sleep there, a low ASR of the student is no merit of the method."
        for t in models[0].scores.asleep()
    ]
    found += [
        f"The trigger {t.trigger!r} moves {t.asr.value:.1f} % of the images in the {model.role}: it hardly survives plain "
        "distillation, so this run cannot show a defence against it at work."
        for model in models[1:-1]
        if model.role.startswith("undefended")
        for t in model.scores.triggers
        if t.asr.n and t.asr.value < _TRANSFERS and t.trigger not in {one.trigger for one in teacher.asleep()}
    ]
    return found


def cautions_of(run: Run) -> list[str]:
    """`cautions` of a finished run."""
    return cautions(models_of(run), len(run.summary["data"]["classes"]))


def _fooling(run: Run) -> list[str]:
    """What hardening has found on the teacher, as a note."""
    found = run.summary.get("fooling")
    if found is None:
        return []
    radius = run.setting("hardening")
    if (problem := number(radius)) is not None:
        raise RunError(f"{run.path / SUMMARY} is damaged: the setting hardening{problem}")
    text = fooling_text(found, float(radius))
    return [f"{text[:1].upper()}{text[1:]}; the student was hardened against them."]


def _command(run: Run) -> str:
    return " ".join(str(part) for part in run.summary.get("command", []))


def _curves(run: Run, name: str) -> list[Curve]:
    """Loss and accuracy over epochs, from the run's log."""
    lines = [line for line in run.metrics() if line["stage"].startswith(DISTIL)]
    epochs = [line for line in lines if line.get("ends_epoch")]
    per_epoch: dict[int, list[dict[str, Any]]] = {}
    for line in lines:
        if "loss" in line:
            per_epoch.setdefault(line["epoch"], []).append(line)
    x = [epoch + 1 for epoch in per_epoch]
    loss = [float(np.mean([line["loss"] for line in group])) for group in per_epoch.values()]
    tested = [line for line in epochs if "ACC" in line]
    return [
        Curve(name, "loss on the training images", x, loss),
        Curve(
            name,
            "accuracy on up to 1,000 test images (%)",
            [line["epoch"] + 1 for line in tested],
            [line["ACC"] for line in tested],
        ),
    ]


def _trigger_panels(run: Run) -> list[TriggerPanel]:
    classes = [str(name) for name in run.summary.get("data", {}).get("classes", [])]
    panels = []
    for path in sorted((run.path / TRIGGERS).glob("*.npz")):
        examples = run.path / EXAMPLES / path.name
        try:
            trigger = Trigger.load(path)
            with storage_errors(examples):
                arrays = read_npz(io.BytesIO(read_bytes(examples, _EXAMPLES_LIMIT_BYTES)), _EXAMPLES_LIMIT_BYTES)
            captions = [
                f"true: {classes[y]}; teacher says: {classes[t]}; student says: {classes[s]}"
                for y, t, s in zip(arrays["y"], arrays["teacher"], arrays["student"], strict=True)
            ]
            panels.append(TriggerPanel(trigger, arrays["x"], trigger.apply(arrays["x"]), captions))
        except (RkdError, ValueError, KeyError, IndexError) as error:
            raise TriggerError(f"{examples} is damaged: {error}") from error
    return panels


def _masks(run: Run) -> tuple[list[MaskPanel], list[tuple[int, float, float, float]]]:
    path = run.path / MASKS
    if not path.is_file():
        return [], []
    from rkd.detox import masks_from_bytes

    with storage_errors(path):
        masks = masks_from_bytes(read_bytes(path), str(path))
    panels = [
        MaskPanel(
            mask.tap, mask.mask, f"{100 * float(mask.mask.mean()):.0f} % of the feature map is replaced on average"
        )
        for mask in masks
    ]
    history = run.summary.get("detox", {}).get("history", [])
    return panels, [(int(s), float(w), float(lost), float(v)) for s, w, lost, v in history]


def _provenance(run: Run) -> list[tuple[str, str]]:
    summary = run.summary
    pairs = [
        ("teacher file", str(summary["teacher"]["file"])),
        ("teacher SHA-256", str(summary["teacher"]["sha256"])),
        *(("teacher at intake", str(note)) for note in summary["teacher"]["notes"]),
        ("data", str(summary["data"]["name"])),
        ("data SHA-256", str(summary["data"]["digest"])),
        ("student SHA-256", str(summary.get("student", {}).get("sha256", "-"))),
        ("seed", str(run.setting("seed"))),
    ]
    pairs += [(f"{stage}: time", f"{t['seconds']:.0f} s") for stage, t in summary.get("timings", {}).items()]
    return pairs + [(name, str(version)) for name, version in summary.get("versions", {}).items()]


def excess_asr(student: Scores, control: Scores) -> tuple[float, float, float]:
    """ASR minus the control's in points, of the first trigger, with Newcombe's 95 % interval."""
    return difference(student.triggers[0].asr, control.triggers[0].asr)
