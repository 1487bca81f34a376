"""Reports that stand alone: one HTML file, no script, nothing fetched; for screens light and dark, phones and paper."""

from __future__ import annotations

from rkd.bench.report.result_page import result_page
from rkd.bench.report.run_page import Curve, MaskPanel, ModelRow, RunReport, TriggerPanel, run_page

__all__ = ["Curve", "MaskPanel", "ModelRow", "RunReport", "TriggerPanel", "result_page", "run_page"]
