"""What a trigger looks like on images, and what the detox mask looks like at each tap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rkd.bench.report.markup import Markup, decimal, join, significant, tag
from rkd.bench.report.page import panels
from rkd.bench.report.png import Pixels, data_uri, heat_pixels
from rkd.bench.report.svg import profile
from rkd.triggers import Trigger

_AMPLIFIED = 8  # times the difference, around grey
_PIXELATED_UP_TO = 128  # larger pictures are smoothed by the browser as photographs are
_MOST_EXAMPLES = 12


@dataclass(frozen=True, eq=False)
class TriggerPanel:
    """One trigger on a few images.

    Attributes:
        trigger: the trigger itself.
        originals: uint8 (k, 3, H, W), RGB.
        triggered: the same images with the trigger, uint8 (k, 3, H, W).
        captions: one an image, e.g. `true: cat; teacher says: airplane; student says: cat`.
    """

    trigger: Trigger
    originals: NDArray[np.uint8]
    triggered: NDArray[np.uint8]
    captions: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.originals.shape != self.triggered.shape or self.originals.ndim != 4 or self.originals.shape[1] != 3:
            raise ValueError(f"expected two of (k, 3, H, W), got {self.originals.shape} and {self.triggered.shape}")


@dataclass(frozen=True, eq=False)
class MaskPanel:
    """The depoisoning mask of one tap.

    Attributes:
        tap: its name.
        mask: m, float32 (C, H, W), from 0 (kept) to 1 (replaced).
        summary: one line about it.
    """

    tap: str
    mask: NDArray[np.float32]
    summary: str = ""

    def __post_init__(self) -> None:
        if self.mask.ndim != 3 or not self.mask.size:
            raise ValueError(f"expected a mask of (C, H, W), got {self.mask.shape}")


def trigger_panel(panel: TriggerPanel) -> Markup:
    """One trigger: what it is made of, and before, after and amplified difference on every image."""
    examples = [
        _example(panel, index, panel.captions[index] if index < len(panel.captions) else "")
        for index in range(min(len(panel.originals), _MOST_EXAMPLES))
    ]
    return tag(
        "article",
        tag("h3", f"{panel.trigger.name} \N{RIGHTWARDS ARROW} target class {panel.trigger.target}"),
        tag("p", trigger_facts(panel.trigger), class_="lede small"),
        tag("div", *_ingredients(panel.trigger), class_="shots"),
        tag("div", *examples, class_="examples") if examples else Markup(),
        class_="card",
    )


def trigger_facts(trigger: Trigger) -> str:
    """What a trigger does, in words and numbers."""
    facts = []
    share = float((trigger.mask > 0).any(axis=0).mean())
    if share:
        facts.append(
            f"blends a pattern into {100 * share:.1f} % of the pixels, with weights up to {trigger.mask.max():.2f}"
        )
    strongest = float(np.abs(trigger.additive).max())
    if strongest:
        facts.append(f"adds at most {255 * strongest:.1f}/255 to a pixel")
    if trigger.grid is not None:
        facts.append(f"moves pixels by up to {_shifts(trigger.grid).max():.1f} pixels")
    height, width = trigger.size
    return f"For {height}\N{MULTIPLICATION SIGN}{width} images: {'; '.join(facts) or 'changes nothing'}."


def mask_panels(masks: Sequence[MaskPanel]) -> Markup:
    """The masks of all taps on one common scale; nothing where there is none."""
    if not masks:
        return Markup()
    means = [np.nan_to_num(np.asarray(panel.mask, dtype=np.float64)) for panel in masks]
    high = max(float(np.maximum(mean.mean(axis=0).max(), mean.mean(axis=(1, 2)).max())) for mean in means)
    ramp = heat_pixels(np.linspace(0, 1, 128)[None, :], 1.0)
    scale = tag(
        "p",
        tag("span", "0 (kept)"),
        tag("img", src=data_uri(ramp), alt="colour scale, pale to dark", width=128, height=11),
        tag("span", f"{significant(high, 2)} (replaced most)"),
        class_="scale",
    )
    return join(scale, panels([_mask(panel, mean, high) for panel, mean in zip(masks, means, strict=True)], broad=True))


def _mask(panel: MaskPanel, mask: NDArray[np.float64], high: float) -> Markup:
    channels, height, width = mask.shape
    place, profile_values = mask.mean(axis=0), mask.mean(axis=(1, 2))
    size = f"{channels} channels \N{MIDDLE DOT} {height}\N{MULTIPLICATION SIGN}{width} positions"
    spoken = f"mask of {panel.tap}, mean over channels: {decimal(place.min(), 2)} to {decimal(place.max(), 2)}"
    chart = profile(
        f"mask of {panel.tap}, mean of each channel, sorted: {decimal(profile_values.max(), 2)} to "
        f"{decimal(profile_values.min(), 2)}",
        [float(value) for value in profile_values],
        high,
        f"{channels} channels, sorted",
    )
    return tag(
        "figure",
        tag("h3", panel.tap),
        tag("figcaption", size, *((tag("br"), panel.summary) if panel.summary else ())),
        tag("div", _image(heat_pixels(place, high), spoken, pixelated=True), chart, class_="heat"),
        class_="card",
    )


def _ingredients(trigger: Trigger) -> list[Markup]:
    """The trigger alone: on flat grey and amplified, its mask, and how far its warp moves pixels."""
    shown = []
    if trigger.mask.any() or trigger.additive.any():  # a warp alone does nothing to flat grey
        grey = np.full((1, *trigger.mask.shape), 128, dtype=np.uint8)
        change = _difference(grey[0], trigger.apply(grey)[0])
        shown.append((change, f"on plain grey, difference \N{MULTIPLICATION SIGN}{_AMPLIFIED}"))
    if trigger.mask.any():
        strength = np.rint(255 * trigger.mask.max(axis=0)).astype(np.uint8)[..., None]
        shown.append((strength, "mask m: black keeps the image, white replaces it"))
        shown.append((_hwc(np.rint(255 * trigger.pattern).astype(np.uint8)), "pattern p"))
    if trigger.grid is not None:
        shifts = _shifts(trigger.grid)
        furthest = float(shifts.max())
        shown.append((heat_pixels(shifts, furthest), f"warp: darkest moves {furthest:.1f} pixels"))
    return [
        tag("figure", _image(pixels, f"trigger {trigger.name}, {what}"), tag("figcaption", what))
        for pixels, what in shown
    ]


@dataclass(frozen=True, eq=False)
class Shot:
    """One image without and with a trigger, uint8 (3, H, W)."""

    before: NDArray[np.uint8]
    after: NDArray[np.uint8]


def example_strip(index: int, shot: Shot) -> Markup:
    """Before, after and amplified difference of example number `index`, beside each other."""
    before, after = shot.before, shot.after
    pictures = (
        (_hwc(before), "original"),
        (_hwc(after), "with the trigger"),
        (_difference(before, after), f"difference \N{MULTIPLICATION SIGN}{_AMPLIFIED}"),
    )
    strip = [
        tag("div", _image(pixels, f"example {index + 1}, {what}"), tag("small", what)) for pixels, what in pictures
    ]
    return tag("div", *strip, class_="strip")


def _example(panel: TriggerPanel, index: int, caption: str) -> Markup:
    strip = example_strip(index, Shot(panel.originals[index], panel.triggered[index]))
    caption_below = tag("figcaption", caption, class_="after") if caption else Markup()
    return tag("figure", strip, caption_below)


def _image(pixels: Pixels, alt: str, *, pixelated: bool = False) -> Markup:
    height, width = pixels.shape[:2]
    small = pixelated or max(height, width) <= _PIXELATED_UP_TO
    return tag(
        "img", src=data_uri(pixels), alt=alt, width=width, height=height, class_="shot pixels" if small else "shot"
    )


def _difference(before: NDArray[np.uint8], after: NDArray[np.uint8]) -> Pixels:
    """`_AMPLIFIED` times the change, around middle grey: (3, H, W) twice to (H, W, 3)."""
    change = after.astype(np.int32) - before.astype(np.int32)
    return _hwc(np.clip(128 + _AMPLIFIED * change, 0, 255).astype(np.uint8))


def _hwc(image: NDArray[np.uint8]) -> Pixels:
    return np.ascontiguousarray(image.transpose(1, 2, 0))


def _shifts(grid: NDArray[np.float32]) -> NDArray[np.float64]:
    """How many pixels away each output pixel is read from: (H, W, 2) to (H, W)."""
    height, width = grid.shape[:2]
    column = (grid[..., 0].astype(np.float64) + 1) * (width - 1) / 2 - np.arange(width)[None, :]
    row = (grid[..., 1].astype(np.float64) + 1) * (height - 1) / 2 - np.arange(height)[:, None]
    return np.asarray(np.hypot(column, row), dtype=np.float64)
