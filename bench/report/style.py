"""The style sheet of both reports: one calm page in light, dark, on a phone and on paper."""

from __future__ import annotations

from typing import Final

# Text on its background is at least 4.5:1 in both schemes (a test computes it from these lines).
LIGHT: Final = {
    "paper": "#fdfcf9",
    "raised": "#f5f2ea",
    "ink": "#1d2226",
    "muted": "#5a6168",
    "rule": "#dcd7ca",
    "track": "#ebe7dc",
    "acc": "#2b5f8f",
    "asr": "#b0402f",
    "ra": "#33724f",
    "warn": "#8f3422",
    "warn-paper": "#fbeae4",
    "s0": "#2b5f8f",
    "s1": "#b0402f",
    "s2": "#33724f",
    "s3": "#8a5a00",
    "s4": "#74479c",
    "s5": "#4c555c",
}
DARK: Final = {
    "paper": "#15181b",
    "raised": "#1e2226",
    "ink": "#e8e6e1",
    "muted": "#a4abb1",
    "rule": "#363c42",
    "track": "#2a2f34",
    "acc": "#7fb2e0",
    "asr": "#ee8e79",
    "ra": "#7fc79c",
    "warn": "#ffae9c",
    "warn-paper": "#3a211c",
    "s0": "#7fb2e0",
    "s1": "#ee8e79",
    "s2": "#7fc79c",
    "s3": "#e3b45c",
    "s4": "#c4a2e8",
    "s5": "#b3bbc2",
}

_RULES = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0;overflow-wrap:break-word;background:var(--paper);color:var(--ink);line-height:1.55;font-size:1rem;
font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","Liberation Sans",Arial,sans-serif}
main,header,footer{max-width:68rem;margin:0 auto;padding:0 clamp(1rem,4vw,3rem)}
header{padding-top:clamp(2rem,6vw,4.5rem)}
h1,h2,h3,.verdict{font-family:"Iowan Old Style",Charter,"Bitstream Charter","Source Serif 4",Cambria,Georgia,
"Liberation Serif",serif;font-weight:600;line-height:1.2;text-wrap:balance;overflow-wrap:anywhere}
h1{font-size:clamp(1.7rem,1.2rem + 2.2vw,2.6rem);margin:.2rem 0 0;letter-spacing:-.012em}
h2{font-size:1.45rem;margin:0 0 .35rem}
h3{font-size:1.06rem;margin:0 0 .15rem}
section{margin:3.4rem 0 0}
p{margin:.4rem 0 1rem}
.lead,.lede{color:var(--muted);max-width:44rem}
.kicker{color:var(--muted);font-size:.8rem;letter-spacing:.09em;text-transform:uppercase;margin:0}
.verdict{font-weight:400;font-size:clamp(1.16rem,1.05rem + .55vw,1.42rem);line-height:1.5;max-width:46rem;
margin:1.6rem 0 1.4rem;padding-left:1.1rem;border-left:3px solid var(--ink);text-wrap:pretty}
.facts{font-size:.86rem;color:var(--muted);margin:.2rem 0}
code,.code{font-family:ui-monospace,"SF Mono",Menlo,Consolas,"Liberation Mono",monospace;font-size:.9em;
overflow-wrap:anywhere}
.command span{display:inline-block;max-width:100%}
small,.small{font-size:.78rem;color:var(--muted)}
.scroll{overflow-x:auto;margin:1.2rem 0;border-top:1.5px solid var(--ink);border-bottom:1.5px solid var(--ink)}
.scroll:focus-visible{outline:2px solid var(--acc);outline-offset:3px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums lining-nums}
caption{text-align:left;padding:.7rem 0 .3rem;font-size:.86rem;color:var(--muted)}
th,td{padding:.62rem 1.1rem .62rem 0;text-align:left;vertical-align:top;border-top:1px solid var(--rule)}
th:last-child,td:last-child{padding-right:.3rem}
thead th{font-size:.8rem;font-weight:600;vertical-align:bottom;border-top:0;padding-bottom:.4rem;line-height:1.3}
thead th small{display:block;font-weight:400}
thead tr:last-child th,thead th[rowspan]{border-bottom:1px solid var(--ink)}
thead .over{border-bottom:1px solid var(--rule)}
.wide{min-width:46rem}
tbody tr:first-child>*{border-top:0}
tbody th{font-weight:600;min-width:9rem;max-width:17rem;overflow-wrap:anywhere}
tbody th small,td.n small{display:block;font-weight:400;line-height:1.4;overflow-wrap:anywhere}
td.n{white-space:nowrap}
td.n b{font-weight:600;font-size:1.06rem}
td.n .excess{color:var(--ink)}
.sideways{display:none;font-size:.8rem;color:var(--muted);margin:.9rem 0 -.8rem}
@media screen and (max-width:45.99rem){.sideways{display:block}}
@media(max-width:45.99rem){.pin tbody th{position:sticky;left:0;background:var(--paper);min-width:7.6rem;
max-width:7.6rem;font-size:.9rem;padding-right:.6rem;z-index:1}}
.glossary{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,17rem),1fr));gap:.9rem 2rem;
margin:1.2rem 0 0;font-size:.84rem;line-height:1.5}
.glossary dt{font-weight:600}
.glossary dd{margin:0;color:var(--muted)}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,18.5rem),1fr));gap:2.2rem 2.6rem;
margin:1.4rem 0 0}
.panels.broad{grid-template-columns:repeat(auto-fill,minmax(min(100%,25rem),1fr))}
figure{margin:0;min-width:0;break-inside:avoid}
figcaption{font-size:.84rem;color:var(--muted);line-height:1.45}
figcaption.after{margin-top:.45rem}
svg{display:block;width:100%;height:auto;margin-top:.5rem}
svg text{font-family:inherit;font-size:12px;fill:var(--ink);font-variant-numeric:tabular-nums}
svg .q{fill:var(--muted);font-size:11px}
svg .strong{font-weight:600}
.grid{stroke:var(--rule);stroke-width:1}
.lane{stroke:var(--track);stroke-width:1}
.axis{stroke:var(--muted);stroke-width:1}
.track{fill:var(--track)}
.halo{stroke:var(--paper);stroke-width:4}
.whisker{stroke:var(--ink);stroke-width:1.5}
.interval{stroke:var(--ink);stroke-width:1}
.leader{stroke:var(--muted);stroke-width:.7;fill:none}
.line{fill:none;stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}
.pixels{image-rendering:pixelated}
img{display:block;max-width:100%;height:auto}
.shot{width:6.5rem;height:auto;border:1px solid var(--rule)}
.shots{display:flex;flex-wrap:wrap;gap:.9rem 1.1rem;margin:.9rem 0 0}
.shots figure{width:6.5rem}
.shots figcaption{font-size:.76rem;line-height:1.35;margin-top:.3rem}
.examples{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,18.5rem),1fr));gap:1.5rem 1.8rem;
margin:1.3rem 0 0}
.strip{display:grid;grid-template-columns:repeat(3,1fr);gap:.4rem}
.strip .shot{width:100%}
.card{border-top:1px solid var(--rule);padding-top:1.1rem;margin-top:1.8rem}
.panels .card{margin-top:0}
.heat{display:grid;grid-template-columns:7rem minmax(0,1fr);gap:1rem;align-items:start;margin-top:.6rem}
.heat .shot{width:7rem}
.heat svg{margin-top:-.2rem}
.scale{display:grid;grid-template-columns:auto 8rem auto;gap:.5rem;align-items:center;font-size:.8rem;
color:var(--muted);justify-content:start;margin:.8rem 0 0}
.scale img{width:100%;height:.7rem}
.warning{border:1.5px solid var(--warn);background:var(--warn-paper);padding:.9rem 1.1rem;margin:1.2rem 0 0;
border-radius:3px}
.warning h2,.warning h3,.mark{color:var(--warn)}
.warning ul{margin:.3rem 0 0}
.mark{font-weight:600}
.note{border:1px solid var(--rule);background:var(--raised);padding:.9rem 1.1rem;margin:1.2rem 0 0;border-radius:3px}
.said{list-style:none;padding:0;margin:.2rem 0 0;font-size:.84rem}
.note h2{font-size:1.1rem}
.note ul{margin:.3rem 0 0}
ul{padding-left:1.15rem;margin:.4rem 0 1rem}
li{margin:.25rem 0;overflow-wrap:anywhere}
details{margin:1rem 0 0}
summary{cursor:pointer;font-size:.88rem;color:var(--muted);padding:.35rem 0}
summary:hover,summary:focus-visible{color:var(--ink)}
.plain th,.plain td{font-size:.84rem;padding-top:.35rem;padding-bottom:.35rem;overflow-wrap:break-word}
.plain td{min-width:5.5rem}
td.why{white-space:normal;min-width:7rem}
.plain tbody th{font-weight:400}
.provenance{display:grid;grid-template-columns:minmax(0,12rem) minmax(0,1fr);gap:.3rem 1.4rem;font-size:.78rem;
line-height:1.5;margin:.8rem 0 0}
.provenance dt{color:var(--muted);overflow-wrap:anywhere}
.provenance dd{margin:0;overflow-wrap:anywhere;font-family:ui-monospace,"SF Mono",Menlo,Consolas,
"Liberation Mono",monospace}
@media(max-width:34rem){.provenance{grid-template-columns:minmax(0,1fr);gap:0}.provenance dd{margin-bottom:.6rem}
section{margin-top:2.6rem}}
footer{margin-top:3.6rem;padding-bottom:3rem;font-size:.78rem;color:var(--muted)}
footer p{border-top:1px solid var(--rule);padding-top:.9rem}
@page{margin:16mm 14mm}
@media print{:root{--paper:#fff}body{font-size:9.5pt}header{padding-top:0}main,header,footer{max-width:none;padding:0}
section{margin-top:1.8rem}.scroll{overflow:visible}.wide{min-width:0}
h2,h3,summary{break-after:avoid}tr,.panels .card,.warning,.glossary div{break-inside:avoid}
img,.warning{print-color-adjust:exact;-webkit-print-color-adjust:exact}
details::details-content{content-visibility:visible;display:block;height:auto}
.panels{grid-template-columns:repeat(2,minmax(0,1fr))}}
"""


def _variables(colours: dict[str, str]) -> str:
    return ":root{" + ";".join(f"--{name}:{value}" for name, value in colours.items()) + "}"


STYLE: Final = (
    f":root{{color-scheme:light dark}}{_variables(LIGHT)}"
    f"@media screen and (prefers-color-scheme:dark){{{_variables(DARK)}}}" + _RULES
)
