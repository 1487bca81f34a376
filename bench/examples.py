"""A few evaluation images without and with each trigger, small enough for result.json.

Reports read results and nothing else, so a result carries what they show: pixels, not files.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

from rkd.metrics import Images, Labels, Predictions
from rkd.triggers import Trigger

_MOST_TRIGGERS, _MOST_IMAGES = 4, 3
_MOST_SIDE = 96


class Examples:
    """Collects examples while images stream by.

    Args:
        triggers: those that are shown.
    """

    def __init__(self, triggers: Sequence[Trigger]) -> None:
        self._triggers = triggers[:_MOST_TRIGGERS]
        self._kept: dict[str, list[tuple[int, Images]]] = {trigger.name: [] for trigger in self._triggers}

    def add(self, start: int, images: Images, labels: Labels) -> None:
        """Look at one batch, whose first image is number `start`."""
        for trigger in self._triggers:
            kept = self._kept[trigger.name]
            for i in np.flatnonzero(labels != trigger.target)[: _MOST_IMAGES - len(kept)]:
                kept.append((start + int(i), images[i].copy()))

    def to_json(self, predictions: Predictions, classes: Sequence[str]) -> list[dict[str, Any]]:
        """As in result.json."""
        return [
            {
                "trigger": trigger.name,
                "target": trigger.target,
                "images": [
                    {
                        "before": pack(image),
                        "after": pack(trigger.apply(image[None])[0]),
                        "truth": _name(classes, predictions.labels[at]),
                        "clean": _name(classes, predictions.clean[at]),
                        "triggered": _name(classes, predictions.triggered[trigger.name][at]),
                    }
                    for at, image in self._kept[trigger.name]
                ],
            }
            for trigger in self._triggers
        ]


def pack(image: Images) -> dict[str, Any]:
    """An image (3, H, W) as `{height, width, rgb}`, its pixels in base64; large ones keep every n-th pixel."""
    step = -(-max(image.shape[1:]) // _MOST_SIDE)
    small = np.ascontiguousarray(image[:, ::step, ::step].transpose(1, 2, 0))
    return {"height": small.shape[0], "width": small.shape[1], "rgb": base64.b64encode(small.tobytes()).decode()}


def unpack(value: dict[str, Any]) -> Images:
    """Inverse of `pack` for small images: uint8 (3, H, W).

    Raises:
        ValueError: the pixels are not as many as the size says.
    """
    data = base64.b64decode(value["rgb"], validate=True)
    height, width = value["height"], value["width"]
    if len(data) != 3 * height * width:
        raise ValueError(f"{len(data)} bytes for {height} x {width} pixels")
    return np.ascontiguousarray(np.frombuffer(data, np.uint8).reshape(height, width, 3).transpose(2, 0, 1))


def _name(classes: Sequence[str], label: int) -> str:
    name = classes[label] if label < len(classes) else str(label)
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)[:80]
