"""`rkd teacher`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Optional

import typer

from rkd.cli.app import app, code_from_command_line, guarded, only_resume, origins


@app.command()
@guarded
def teacher(
    context: typer.Context,
    data: Annotated[
        str, typer.Option(help="Training images: a folder, an .npz, 'digits', or a torchvision name.")
    ] = "digits",
    arch: Annotated[str, typer.Option(help="The network: wrn-D-K, resnet20, or a torchvision name.")] = "wrn-16-2",
    attack: Annotated[
        str,
        typer.Option(
            help="none; badnets, badnets-square, blended, sig, wanet, which distillation mostly loses; cheatkd, adba, "
            "backweak, backweak-graded, backweak-adaptive, backweak-decoy, made to survive it; oscar, asleep in the teacher."
        ),
    ] = "none",
    out: Annotated[
        Path,
        typer.Option(
            help="Where the teacher goes (.pt or .safetensors); NAME.trigger.npz and NAME.clean.pt beside it."
        ),
    ] = Path("teacher.pt"),
    clean: Annotated[
        str,
        typer.Option(
            help="A clean teacher, to start from and to compare with, whose network and scaling are then used; otherwise an attack trains one first.",
            show_default=False,
        ),
    ] = "",
    target: Annotated[int, typer.Option(help="The class index that the trigger leads to.")] = 0,
    poison_rate: Annotated[
        Optional[float],
        typer.Option(help="Share of poisoned training images (sig: of the target's).", show_default="the attack's own"),
    ] = None,
    linf: Annotated[
        Optional[float],
        typer.Option(help="A learned trigger's largest change of a pixel, in 255ths.", show_default="the attack's own"),
    ] = None,
    trigger_budget: Annotated[
        Optional[float],
        typer.Option(
            help="A learned trigger's highest ASR on the clean twin, in percent (adba: what is penalised).",
            show_default="the attack's own",
        ),
    ] = None,
    finetune_epochs: Annotated[
        Optional[int],
        typer.Option(
            help="Epochs in which the clean twin becomes the backdoored teacher; 0 trains that from scratch.",
            show_default="the attack's own",
        ),
    ] = None,
    finetune_lr: Annotated[
        Optional[float],
        typer.Option(help="Highest learning rate of these epochs.", show_default="the attack's own"),
    ] = None,
    shadow: Annotated[
        str, typer.Option(help="adba: the small network that stands in for the victim's student.")
    ] = "wrn-10-1",
    epochs: Annotated[int, typer.Option(help="Passes over the training images.")] = 20,
    batch: Annotated[int, typer.Option(help="Images a step.")] = 128,
    lr: Annotated[float, typer.Option(help="Highest learning rate of the cycle.")] = 0.1,
    augmentation: Annotated[str, typer.Option(help="auto, none, crop or crop-flip.")] = "auto",
    seed: Annotated[int, typer.Option(help="Decides initialisation, order, augmentation and poison.")] = 0,
    split_seed: Annotated[int, typer.Option(help="Decides the test split of data that comes without one.")] = 0,
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16 (CUDA).")] = "auto",
    normalize: Annotated[str, typer.Option(help="Input scaling: none, imagenet, cifar10 or 'MEAN;STD'.")] = "cifar10",
    image_size: Annotated[int, typer.Option(help="Pixels; 0 for the data's own.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    threads: Annotated[
        int,
        typer.Option(help="CPU threads, 0 for OMP_NUM_THREADS or else all; with 1 the same seed gives the same bytes."),
    ] = 0,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 500,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
    resume: Annotated[
        Optional[Path],
        typer.Option(
            help="Go on with an interrupted run; takes no other option but --data, --out, --overwrite, --arch and --shadow.",
            show_default=False,
        ),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Train a teacher, clean or backdoored, to test defences with.

    Examples:
        rkd teacher --data digits --arch wrn-10-2 --attack backweak --out teacher.pt
        rkd teacher --data photos/ --arch resnet18 --epochs 60 --out clean.pt
        rkd teacher --data photos/ --attack backweak --clean clean.pt --out bad.pt
    """
    from rkd.attacks.session import TeacherSettings, make_teacher, start_teacher
    from rkd.cli import tables
    from rkd.data import is_name
    from rkd.errors import RunError
    from rkd.intake import clean_twin_beside, trigger_beside
    from rkd.network import Network, check_code
    from rkd.run import CLEAN, Run, free_name
    from rkd.signals import stop_requests
    from rkd.teacher import save_teacher

    code_from_command_line(context, "arch", "shadow")
    resumed, typed = None, set[str]()
    if resume is not None:
        typed = only_resume(context, "data", "out", "overwrite", "arch", "shadow")
        resumed = Run.open(resume)
        for name, given in (("arch", arch), ("shadow", shadow)):
            check_code(str(resumed.setting(name)), given, name, resume)
        if "out" not in typed:
            out = Path(resumed.summary.get("out", out))
    written = [out, trigger_beside(out), clean_twin_beside(out)]
    attacked = (attack if resumed is None else resumed.setting("attack")) != "none"
    for path in written if attacked else written[:1]:
        if path.exists() and not overwrite:
            raise RunError(f"{path} exists; choose another --out, or give --overwrite")
    with stop_requests() as stop:
        if resumed is not None:
            run, opened = resumed, None
        else:
            settings = TeacherSettings(
                data=data, arch=arch, attack=attack, clean=clean, target=target, poison_rate=poison_rate, linf=linf,
                trigger_budget=trigger_budget, finetune_epochs=finetune_epochs, finetune_lr=finetune_lr, shadow=shadow,
                epochs=epochs, batch=batch, lr=lr, augmentation=augmentation, seed=seed, split_seed=split_seed, precision=precision,
                normalize=normalize, image_size=image_size, device=device, threads=threads, checkpoint_every=checkpoint_every,
            )  # fmt: skip
            place = free_name(Path("runs"), f"teacher-{out.stem}")
            run, opened = start_teacher(settings, origins(context), place, out)
        moved = data if "data" in typed else None
        network, trigger, scores, twin_scores = make_teacher(run, stop, opened, moved)
    if trigger is not None:
        trigger.save(trigger_beside(out))
    if (run.path / CLEAN).is_file():
        save_teacher(clean_twin_beside(out), Network.load(run.path / CLEAN, trusted=network.arch))
    save_teacher(out, network)  # last: where it is, the others are
    rows = [("teacher", scores), *([("clean twin, same trigger", twin_scores)] if twin_scores is not None else [])]
    if json_output:
        tables.print_json({"out": str(out), "run": str(run.path), "scores": {role: s.to_json() for role, s in rows}})
    else:
        tables.print_scores(rows)
        for t in scores.asleep():
            tables.say_next(
                f"The trigger moves only {t.asr.value:.1f} % of this teacher's images: unless the attack is meant to sleep in its "
                "teacher (oscar), it did not take; try more --epochs or --finetune-epochs, a higher --poison-rate or --linf."
            )
        used = moved or str(run.setting("data"))
        option = "" if is_name(used) else f" --data {shlex.quote(used)}"
        files = ", ".join(str(path) for path in written if path.exists())
        tables.say_next(f"wrote {files}; next: rkd distill {shlex.quote(str(out))}{option} --student mobilenet")
