"""What each trigger looks like on the evaluation images, and what each bundle saw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rkd.bench.examples import unpack
from rkd.bench.report.entries import Entry
from rkd.bench.report.markup import Markup, tag
from rkd.bench.report.page import section
from rkd.bench.report.panels import Shot, example_strip

_MOST_SAID = 8


def examples_section(entries: Sequence[Entry]) -> Markup:
    """One card a trigger; bundles that were shown the same images stand below them together."""
    cards = []
    for name in dict.fromkeys(example["trigger"] for entry in entries for example in entry.data["examples"]):
        shown = [
            (entry, e) for entry in entries for e in entry.data["examples"] if e["trigger"] == name and e["images"]
        ]
        if shown:
            cards.append(_card(name, shown))
    lead = "A few images of the evaluation set, without and with the trigger, and what each bundle predicted here."
    return section("Triggers", lead, *cards)


def _card(name: str, shown: Sequence[tuple[Entry, dict[str, Any]]]) -> Markup:
    groups: dict[tuple[str, str], list[tuple[Entry, dict[str, Any]]]] = {}
    for entry, example in shown:
        for image in example["images"]:
            groups.setdefault((image["before"]["rgb"], image["after"]["rgb"]), []).append((entry, image))
    figures = [_figure(index, group) for index, group in enumerate(groups.values())]
    target = shown[0][1]["target"]
    return tag(
        "article",
        tag("h3", f"{name} \N{RIGHTWARDS ARROW} target class {target}"),
        tag("div", *figures, class_="examples"),
        class_="card",
    )


def _figure(index: int, group: Sequence[tuple[Entry, dict[str, Any]]]) -> Markup:
    first = group[0][1]
    strip = example_strip(index, Shot(unpack(first["before"]), unpack(first["after"])))
    said = [
        tag("li", f"{entry.key}: {image['clean']} \N{RIGHTWARDS ARROW} {image['triggered']}") for entry, image in group
    ]
    more = [tag("li", f"and {len(said) - _MOST_SAID} more")] if len(said) > _MOST_SAID else []
    caption = tag("figcaption", f"true: {first['truth']}; clean \N{RIGHTWARDS ARROW} triggered", class_="after")
    return tag("figure", strip, caption, tag("ul", *said[:_MOST_SAID], *more, class_="said"))
