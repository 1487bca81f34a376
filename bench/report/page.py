"""The shell around both reports, and the small parts that they share.

A page stands alone: it holds no script, asks for nothing from anywhere (its own policy forbids it) and can be mailed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rkd.bench.report.markup import Markup, join, raw, tag
from rkd.bench.report.style import STYLE

# default-src does not cover base and form; the empty icon keeps a browser from asking a server for one.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def shell(title: str, kicker: str, verdict: str, facts: Iterable[Markup], sections: Iterable[Markup]) -> str:
    """A whole document.

    Args:
        title: page title and main heading.
        kicker: what kind of page this is, in a few words above the title.
        verdict: one paragraph in plain words; empty leaves it out.
        facts: short lines below the verdict.
        sections: what `section` returned; empty ones are left out.
    """
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("link", rel="icon", href="data:,"),
        tag("title", title),
        tag("style", raw(STYLE)),
    )
    header = tag(
        "header",
        tag("p", kicker, class_="kicker"),
        tag("h1", title),
        tag("p", verdict, class_="verdict") if verdict else Markup(),
        *(tag("p", fact, class_="facts") for fact in facts),
    )
    footer = tag("footer", tag("p", "Written by rkd. This page holds no script and asks for nothing from the network."))
    body = tag("body", header, "\n", tag("main", *(join(part, "\n") for part in sections if part)), footer)
    return raw("<!DOCTYPE html>\n") + tag("html", head, "\n", body, lang="en") + "\n"


def section(heading: str, lead: str, *parts: Markup) -> Markup:
    """A titled part of a page; nothing at all where every part is empty."""
    if not any(parts):
        return Markup()
    return tag("section", tag("h2", heading), tag("p", lead, class_="lead") if lead else Markup(), *parts)


def panels(figures: Iterable[Markup], *, broad: bool = False) -> Markup:
    """Figures beside each other as the width allows; nothing where there is none."""
    shown = [figure for figure in figures if figure]
    return tag("div", *shown, class_="panels broad" if broad else "panels") if shown else Markup()


def figure(heading: str, caption: str, picture: Markup) -> Markup:
    """A picture below its heading and one line of explanation."""
    if not picture:
        return Markup()
    return tag("figure", tag("h3", heading), tag("figcaption", caption) if caption else Markup(), picture)


def scroller(label: str, table: Markup, *, wide: bool = False) -> Markup:
    """Keep a wide table from widening the page; the container scrolls and can be reached by keyboard.

    Args:
        label: what the table shows.
        table: it.
        wide: whether it is wider than a phone, which a line above it then says there.
    """
    box = tag("div", table, class_="scroll", role="region", aria_label=label, tabindex=0)
    return join(tag("p", "More columns: scroll sideways \N{RIGHTWARDS ARROW}", class_="sideways"), box) if wide else box


def plain_table(label: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Markup:
    """A small table of text whose first column names the row."""
    body = [
        tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows if len(row)
    ]
    if not body:
        return Markup()
    head = tag("thead", tag("tr", *(tag("th", text, scope="col") for text in heads)))
    return scroller(label, tag("table", head, tag("tbody", *body), class_="plain"))


def folded(summary: str, content: Markup) -> Markup:
    """Content behind a line that opens it; nothing where it is empty."""
    return tag("details", tag("summary", summary), content) if content else Markup()


def command(line: str) -> Markup:
    """A command line that breaks between its words, not inside an option; nothing where it is empty."""
    words = [join(tag("span", word), " ") for word in line.split()]
    return tag("code", *words, class_="command") if words else Markup()


def provenance(pairs: Iterable[tuple[str, str]]) -> Markup:
    """Digests, seeds and versions in small type; nothing where there is none."""
    items = [join(tag("dt", name), tag("dd", value)) for name, value in pairs]
    return tag("dl", *items, class_="provenance") if items else Markup()
