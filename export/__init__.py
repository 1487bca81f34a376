"""The student's way to a board: torch -> ONNX -> precision -> ledger -> bundle (workstation only).

evaluation = choose_evaluation(dataset.test, seed)
calibrate = lambda n: choose_calibration(dataset.train, evaluation[0], n, seed)     # for INT8
exporter = Exporter(network, evaluation, triggers, calibrate=calibrate)
for target in targets:
    report = exporter.write(target, name=run_name, chain=digests, folder=Path())
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rkd.errors import MissingExtraError

try:
    from rkd.export.calibration import Calibration, choose_calibration
    from rkd.export.evaluation import choose_evaluation
    from rkd.export.exporter import Exporter, ExportReport, bundle_name
except ImportError as error:
    raise MissingExtraError(error.name or "onnx", "train") from error

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from rkd.metrics import Images, Labels
    from rkd.network import Network
    from rkd.target import Target
    from rkd.triggers import Trigger


def export_bundle(
    network: Network,
    target: Target,
    *,
    name: str,
    evaluation: tuple[Images, Labels],
    triggers: Sequence[Trigger] = (),
    chain: Mapping[str, str],
    folder: Path,
    overwrite: bool = False,
    calibrate: Callable[[int], Calibration] | None = None,
    force: bool = False,
    key: Ed25519PrivateKey | None = None,
    on_stage: Callable[[str], None] = lambda _stage: None,
) -> ExportReport:
    """Write one bundle for one target; see `Exporter`, which shares the work among several.

    Raises:
        ExportError: the student cannot be written as the target asks, or the exported file decides differently.
        ArchitectureError: the network does not run.
        StorageError: the disk said no.
    """
    exporter = Exporter(network, evaluation, triggers, on_stage, calibrate)
    return exporter.write(target, name=name, chain=chain, folder=folder, overwrite=overwrite, force=force, key=key)


__all__ = [
    "Calibration",
    "ExportReport",
    "Exporter",
    "bundle_name",
    "choose_calibration",
    "choose_evaluation",
    "export_bundle",
]
