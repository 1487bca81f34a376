"""What a finished distillation has in its run.json."""

from __future__ import annotations

from typing import Any

from rkd.metrics import Proportion, Scores, TriggerScore
from rkd.run import Model

SCORES = Scores(Proportion(9, 10), (TriggerScore("t", 1, Proportion(1, 9), Proportion(8, 9)),))
MODEL = Model("student", "wrn-10-1", SCORES, 77_850, 12_000_000, 320_000)
FACTS: dict[str, Any] = {
    "data": {"name": "x", "digest": "d" * 64, "classes": ["a", "b"], "notes": []},
    "teacher": {"sha256": "0" * 64, "file": "t.pt", "arch": "wrn-10-2", "notes": []},
    "student": {"sha256": "1" * 64, "arch": "wrn-10-1"},
    "models": [MODEL.to_json(), MODEL.to_json()],
}
