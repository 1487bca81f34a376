"""The student's way to a board: torch -> ONNX -> precision -> parity -> bundle (workstation only).

exporter = Exporter(network, choose_evaluation(dataset.test, seed), triggers)
for target in targets:
    report = exporter.write(target, name=run_name, chain=digests, folder=Path())
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rkd.errors import MissingExtraError

try:
    from rkd.export.evaluation import choose_evaluation
    from rkd.export.exporter import Exporter, ExportReport, bundle_name
except ImportError as error:
    raise MissingExtraError(error.name or "onnx", "train") from error

if TYPE_CHECKING:
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
    on_stage: Callable[[str], None] = lambda _stage: None,
) -> ExportReport:
    """Write one bundle for one target; see `Exporter`, which shares the work among several.

    Raises:
        ExportError: the student cannot be written as the target asks, or the exported file decides differently.
        ArchitectureError: the network does not run.
        StorageError: the disk said no.
    """
    exporter = Exporter(network, evaluation, triggers, on_stage)
    return exporter.write(target, name=name, chain=chain, folder=folder, overwrite=overwrite)


__all__ = ["ExportReport", "Exporter", "bundle_name", "choose_evaluation", "export_bundle"]
