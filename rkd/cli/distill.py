"""`rkd distill`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from rkd.cli.app import Sectioned, app, code_from_command_line, guarded, only_resume, origins

METHOD_HELP = (
    "robustkd (distil features, and harden the student); ofd, kd, at (these trust the teacher: features, logits, attention); ce "
    "(no teacher); or a treatment of the teacher and what is distilled from it: robustkd, finetune, prune, nad or anp "
    "with +ofd, +kd or +at, such as robustkd+kd."
)
ABLATION = "Parts of RobustKD, for ablations"
BASELINE = "Baselines that purify the teacher"


@app.command(cls=Sectioned)
@guarded
def distill(
    context: typer.Context,
    teacher: Annotated[
        Optional[Path],
        typer.Argument(help="The teacher's checkpoint: .pt, .pth, .tar or .safetensors.", show_default=False),
    ] = None,
    student: Annotated[
        str, typer.Option(help="The student's network; `rkd students` lists the usual ones.")
    ] = "mobilenet",
    data: Annotated[
        str,
        typer.Option(
            help="Clean images: a folder, an .npz, 'digits', or a torchvision name. Default: what the teacher's file names.",
            show_default=False,
        ),
    ] = "",
    method: Annotated[str, typer.Option(help=METHOD_HELP)] = "robustkd",
    trigger: Annotated[
        Optional[list[Path]],
        typer.Option(
            help="A trigger to test with (.npz); may be repeated. No method ever sees it. Default: TEACHER.trigger.npz where it exists.",
            show_default=False,
        ),
    ] = None,
    undefended: Annotated[
        bool, typer.Option("--undefended", help="Also train a student of the teacher as it is, to compare with.")
    ] = False,
    accuracy_budget: Annotated[
        float, typer.Option(help="Points of clean accuracy that a mask (--cap, --variant paper) may cost the teacher.")
    ] = 1.0,
    hardening: Annotated[
        Optional[float],
        typer.Option(
            help="Radius, in 255ths, of the universal perturbations that the student is hardened against. Default: 12 with robustkd, else 0.",
            show_default=False,
        ),
    ] = None,
    labels: Annotated[
        bool,
        typer.Option(
            "--labels/--no-labels",
            help="Whether the training images' labels are used; without them the teacher's answers stand in.",
        ),
    ] = True,
    clean_budget: Annotated[
        str,
        typer.Option(help="Use only so many training images: a number, or a share such as 10%.", show_default=False),
    ] = "",
    epochs: Annotated[int, typer.Option(help="Passes over the training images.")] = 40,
    batch: Annotated[int, typer.Option(help="Images a step.")] = 128,
    lr: Annotated[float, typer.Option(help="Highest learning rate of the cycle.")] = 0.1,
    augmentation: Annotated[
        str,
        typer.Option(help="auto, none, crop or crop-flip (auto mirrors, unless the data's name says digits or signs)."),
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Decides initialisation, order and augmentation.")] = 0,
    split_seed: Annotated[int, typer.Option(help="Decides the test split of data that comes without one.")] = 0,
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16 (CUDA).")] = "auto",
    arch: Annotated[
        str,
        typer.Option(
            help="The teacher's network where it cannot be inferred: a name, torchvision:NAME, timm:NAME or path/file.py:factory (your code is run).",
            show_default=False,
        ),
    ] = "",
    normalize: Annotated[
        str,
        typer.Option(
            help="How the teacher's inputs were scaled: none, imagenet, cifar10 or 'MEAN;STD' such as '0.5;0.5'. Default: what its file says.",
            show_default=False,
        ),
    ] = "",
    image_size: Annotated[int, typer.Option(help="Pixels; 0 for the teacher's or the data's own.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    threads: Annotated[
        int,
        typer.Option(help="CPU threads, 0 for OMP_NUM_THREADS or else all; with 1 the same seed gives the same bytes."),
    ] = 0,
    checkpoint_every: Annotated[
        int, typer.Option(help="Steps between checkpoints; each epoch also ends with one.")
    ] = 500,
    out: Annotated[
        Optional[Path], typer.Option(help="The run directory. Default: runs/STUDENT-METHOD-sSEED.", show_default=False)
    ] = None,
    resume: Annotated[
        Optional[Path],
        typer.Option(
            help="Go on with an interrupted run; takes no other option but --data and --arch.", show_default=False
        ),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
    variant: Annotated[
        str,
        typer.Option(
            help="default (a fine-tuned teacher, hardening, no mask), or paper: the paper's form of RobustKD (a mask up to 0.9 alone).",
            rich_help_panel=ABLATION,
        ),
    ] = "default",
    cap: Annotated[
        Optional[float],
        typer.Option(
            help="Upper end of the mask, 0 (no mask) to 1. Default: 0, paper: 0.9.",
            show_default=False,
            rich_help_panel=ABLATION,
        ),
    ] = None,
    harden_from: Annotated[
        float,
        typer.Option(help="Share of the steps after which hardening begins.", rich_help_panel=ABLATION),
    ] = 0.5,
    harden_share: Annotated[
        float,
        typer.Option(help="Share of the images that carry a perturbation from then on.", rich_help_panel=ABLATION),
    ] = 0.1,
    perturbations: Annotated[
        Optional[str],
        typer.Option(
            help="Where hardening looks for perturbations: on the teacher, or on the student in training. "
            "Default: teacher; student with --method ce.",
            show_default=False,
            rich_help_panel=ABLATION,
        ),
    ] = None,
    mask: Annotated[
        str, typer.Option(help="position or channel: what has a mask value of its own.", rich_help_panel=ABLATION)
    ] = "position",
    variance: Annotated[
        bool,
        typer.Option(
            "--variance/--no-variance",
            help="Whether the mask lowers the variance of the teacher's features.",
            rich_help_panel=ABLATION,
        ),
    ] = True,
    replacement: Annotated[
        str,
        typer.Option(
            help="Where the mask's replacement starts: mean (of the clean features), zero or random.",
            rich_help_panel=ABLATION,
        ),
    ] = "mean",
    taps: Annotated[
        str,
        typer.Option(
            help="Which taps of the teacher are used: all, last, or numbers from the input such as 1,3.",
            rich_help_panel=ABLATION,
        ),
    ] = "all",
    teacher_mode: Annotated[
        str,
        typer.Option(
            help="eval, or train: the teacher's BNs use each batch's statistics while it is distilled.",
            rich_help_panel=ABLATION,
        ),
    ] = "eval",
    input_noise: Annotated[
        float,
        typer.Option(help="Deviation, in 255ths, of Gaussian noise on the student's images.", rich_help_panel=ABLATION),
    ] = 0.0,
    purify: Annotated[
        Optional[str],
        typer.Option(
            help="What the teacher goes through before its features are distilled: none, finetune, prune, nad or anp. "
            "Default: finetune; none with --variant paper.",
            show_default=False,
            rich_help_panel=ABLATION,
        ),
    ] = None,
    purify_steps: Annotated[
        Optional[int],
        typer.Option(
            help="Training steps of finetune, prune, nad and anp. Default: 400; with robustkd at most half of the student's and 3 epochs.",
            show_default=False,
            rich_help_panel=BASELINE,
        ),
    ] = None,
    purify_lr: Annotated[
        float,
        typer.Option(help="Their highest learning rate; 0 for the method's own.", rich_help_panel=BASELINE),
    ] = 0.0,
) -> None:
    """Distil a student that does not keep what a teacher may hide.

    Examples:
        rkd distill teacher.pt --student mobilenet --data photos/
        rkd distill hub.pth.tar --student wrn-16-1 --data cifar10 --normalize none
        rkd distill teacher.pt --undefended --trigger patch.npz
        rkd distill teacher.pt --method nad+ofd
        rkd distill --resume runs/mobilenet-robustkd-s0
    """
    from rkd.cli import tables
    from rkd.distill.session import distill as run_distillation
    from rkd.distill.session import reopen, start
    from rkd.distill.settings import DistillSettings
    from rkd.errors import ConfigError
    from rkd.intake import find_data, find_triggers
    from rkd.reporting import cautions, write_run_report
    from rkd.run import REPORT, Run, free_name
    from rkd.signals import stop_requests

    with stop_requests() as stop:
        if resume is not None:
            typed = only_resume(context, "data", "arch")
            run = Run.open(resume)
            work = reopen(run, data=data if "data" in typed else "", arch=arch if "arch" in typed else "")
        else:
            if teacher is None:
                raise ConfigError("which teacher? give its file: rkd distill teacher.pt --student mobilenet")
            where = origins(context)
            found_data, data_origin = find_data(teacher, data)
            found_triggers, trigger_origin = find_triggers(teacher, trigger or [])
            code_from_command_line(context, "arch")
            where |= {
                "data": data_origin or where["data"],
                "triggers": trigger_origin or where["trigger"],
                "teacher": where["teacher"],
            }
            settings = DistillSettings(
                teacher=str(teacher), student=student, data=found_data, method=method, triggers=found_triggers,
                undefended=undefended, accuracy_budget=accuracy_budget, hardening=hardening, clean_budget=clean_budget, labels=labels, epochs=epochs,
                variant=variant, cap=cap, harden_from=harden_from, harden_share=harden_share, perturbations=perturbations, mask=mask, variance=variance, replacement=replacement, taps=taps,
                teacher_mode=teacher_mode, input_noise=input_noise, purify=purify, purify_steps=purify_steps, purify_lr=purify_lr,
                batch=batch, lr=lr, augmentation=augmentation, seed=seed, split_seed=split_seed, precision=precision, arch=arch,
                normalize=normalize, image_size=image_size, device=device, threads=threads, checkpoint_every=checkpoint_every,
            )  # fmt: skip
            path = out or free_name(Path("runs"), f"{student.replace(':', '-')}-{settings.method}-s{seed}")
            run, work = start(settings, where, path)
        rows = run_distillation(run, stop, work)
        write_run_report([run], run.path / REPORT)
    if json_output:
        tables.print_json({"run": str(run.path), "models": [row.to_json() for row in rows]})
    else:
        tables.print_models(rows)
        classes = len(run.summary["data"]["classes"])
        for caution in cautions(rows, classes):
            tables.say_next(caution)
        done = f"{run.path / REPORT} has the curves and pictures"
        if rows[-1].scores.hardly_above_chance(classes):
            tables.say_next(done)
        else:
            tables.say_next(f"{done}; next: rkd export {run.path} --target ort-cpu (rkd targets lists the others)")
