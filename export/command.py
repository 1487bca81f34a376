"""What `rkd export` does: a run's student to bundles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rkd.data import Dataset, Source
from rkd.distill.inputs import clean_budget, open_with_progress
from rkd.distill.session import config_digest
from rkd.distill.settings import DistillSettings
from rkd.errors import ConfigError, DataError, RunError
from rkd.export import Calibration, Exporter, ExportReport, choose_calibration, choose_evaluation
from rkd.files import sha256, storage_errors
from rkd.metrics import Images
from rkd.network import Network, check_code
from rkd.progress import say
from rkd.reporting import cautions_of
from rkd.run import STUDENT, TEACHER, TRIGGERS, Run
from rkd.signing import read_private
from rkd.target import Target, load_target
from rkd.triggers import Trigger


def export_command(
    run_path: Path | None,
    target_names: Sequence[str],
    folder: Path,
    *,
    eval_images: int,
    data: str,
    teacher: bool = False,
    arch: str = "",
    sign: Path | None = None,
    force: bool = False,
    overwrite: bool,
) -> tuple[Run, list[ExportReport]]:
    """Write one bundle a target.

    Args:
        run_path: a finished run; None for the newest under runs/.
        target_names: names or TOML files.
        folder: where the bundles go.
        eval_images: how many test images travel at most.
        data: where the data set is now; empty for where it was.
        teacher: export the run's teacher instead of its student, to compare them on the board.
        arch: the user's own code for the teacher, where it is made by some.
        sign: a private key in PEM that signs the bundles.
        force: write bundles that fail the target's budgets, marked.
        overwrite: replace existing bundles.

    Returns:
        The run, and a report a target.

    Raises:
        RunError: no such run, or not finished, or its student or teacher was changed.
        ConfigError: two targets of one name, an option that cannot be, or the teacher is made by code that was not named.
        DataError: the data is not what the run was made with, or too little of it is there to calibrate INT8 with.
        SigningError: the key cannot be used.
        TargetError, ExportError, StorageError: see `Exporter.write`.
    """
    targets = [load_target(name) for name in target_names]
    _check_options(targets, folder, eval_images)
    key = read_private(sign) if sign is not None else None
    run = Run.open(run_path) if run_path is not None else Run.newest(Path("runs"))
    if not run.finished:
        raise RunError(f"{run.path} is not finished; go on with it by: rkd distill --resume {run.path}")
    if run.summary["kind"] != "distill":
        raise RunError(f"{run.path} made a teacher, not a student; distil it first")
    if run_path is None:
        say(f"exporting {run.path}, the newest finished run")
    for caution in [] if teacher else cautions_of(run):
        say(caution)
    network, digest = _teacher(run, arch) if teacher else _student(run)
    dataset = _data(run, data, network)
    evaluation = choose_evaluation(dataset.test, run.setting("seed"), limit_images=eval_images)
    triggers = [Trigger.load(path) for path in sorted((run.path / TRIGGERS).glob("*.npz"))]
    chain = {
        "teacher": str(run.summary["teacher"]["sha256"]),
        "config": config_digest(run),
        "student": digest,
    }
    calibrations = _calibrations(run, dataset.train, evaluation[0], targets)
    name = run.path.resolve().name + ("-teacher" if teacher else "")
    exporter = Exporter(
        network, evaluation, triggers, on_stage=lambda stage: say(f"{stage} ..."),
        calibrate=calibrations.__getitem__,
    )  # fmt: skip
    reports = [
        exporter.write(
            target,
            name=name,
            chain=chain,
            folder=folder,
            role="teacher" if teacher else "student",
            overwrite=overwrite,
            force=force,
            key=key,
        )
        for target in targets
    ]
    return run, reports


def _check_options(targets: Sequence[Target], folder: Path, eval_images: int) -> None:
    """Refuse what cannot be, before any work."""
    names = [target.name for target in targets]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(
            f"two targets are called {twice[0]!r}, and their bundles would have one file name; change `name` in one of "
            "them, or leave one out"
        )
    if eval_images < 1:
        raise ConfigError(f"--eval-images {eval_images}: expected 1 or more")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {folder} is a file, expected the folder that the bundles go to")


def _calibrations(run: Run, train: Source, evaluation: Images, targets: Sequence[Target]) -> dict[int, Calibration]:
    """The training images of each number that an INT8 target asks for: too few are known before a bundle is written."""
    budget, seed = run.setting("clean_budget"), run.setting("seed")
    advice = "give a data set with more training images"
    if budget:
        advice = f"the run has --clean-budget {budget}, distil with more"
    wanted = {target.quantisation.images for target in targets if target.quantisation is not None}
    part = clean_budget(train, budget, seed, by_class=run.setting("labels")) if wanted else train
    return {images: choose_calibration(part, evaluation, images, seed, advice) for images in sorted(wanted)}


def _student(run: Run) -> tuple[Network, str]:
    """The student and the digest of its file."""
    path = run.path / STUDENT
    with storage_errors(path):
        digest = sha256(path.read_bytes())
    if digest != run.summary["student"]["sha256"]:
        raise RunError(f"{path} is not the student that this run made: its digest differs from run.json")
    return Network.load(path), digest


def _teacher(run: Run, arch: str) -> tuple[Network, str]:
    """The teacher as it was taken in, and the digest of that file."""
    check_code(str(run.setting("arch")), arch, "arch", run.path)
    path = run.path / TEACHER
    with storage_errors(path):
        digest = sha256(path.read_bytes())
    if digest != run.summary["teacher"].get("converted_sha256", digest):
        raise RunError(f"{path} is not the teacher that this run took in: its digest differs from run.json")
    return Network.load(path, trusted=arch), digest


def _data(run: Run, data: str, network: Network) -> Dataset:
    settings = DistillSettings.from_run(run)
    dataset = open_with_progress(data or settings.data, network.size, settings.split_seed)
    if dataset.digest != run.summary["data"]["digest"]:
        raise DataError(
            f"{data or settings.data} is not the data that {run.path} was made with: its test images cannot stand for it"
        )
    return dataset
