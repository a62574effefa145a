"""Style sheets of the HTML pages: what all of them share, and what the page of results adds.

Colours tell series apart for colour-blind readers, too (after Okabe and Ito, darkened for text); marks and labels say
the same without colour. Series 0 is ours.
"""

from __future__ import annotations

BASE = """
:root { color-scheme: light dark; --ink: #1c1d21; --dim: #5d616b; --paper: #fdfdfc; --line: #d9dade; --box: #f3f3f1;
  --good: #17693a; --bad: #a81c1c; --ours: #2f5fb3; --theirs: #8b8f99; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e7e7ea; --dim: #a2a6b0; --paper: #17181b; --line: #35373d; --box: #202226;
    --good: #6fcf93; --bad: #ff8b85; --ours: #7aa5f0; --theirs: #858a95; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  padding: 1.5rem 1rem 4rem; max-width: 64rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
p { margin: .4rem 0; } .dim, dt, small { color: var(--dim); }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .2rem 1rem; margin: 0; }
dd { margin: 0; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { text-align: left; vertical-align: top; padding: .35rem .6rem .35rem 0; border-bottom: 1px solid var(--line); }
th { color: var(--dim); font-weight: 500; white-space: nowrap; }
code, pre { font: .85rem/1.45 ui-monospace, monospace; }
summary { cursor: pointer; } details ul { margin: .3rem 0; padding-left: 1.1rem; font-size: .85rem; }
"""

LIGHT = ("#2f5fb3", "#b9521c", "#1a7d6f", "#8d549f", "#857010", "#b63c60", "#777c87")
DARK = ("#7aa5f0", "#f09a5f", "#56c2ae", "#c79bdc", "#d2bc55", "#f08aa5", "#9ba0ab")
PAPER, INK, DIM, GRID = "#fdfdfc", "#1c1d21", "#5d616b", "#d9dade"  # of the light page, for drawings on their own


def _series(colours: tuple[str, ...]) -> str:
    return " ".join(f"--s{number}: {colour};" for number, colour in enumerate(colours))


DRAWING = """
svg text { font-size: 13px; fill: var(--ink); } svg .small, svg .on { font-size: 12px; }
svg .small { fill: var(--dim); } svg .label { fill: var(--ink); } svg .strong { font-weight: 600; }
svg .value { font-variant-numeric: tabular-nums; } svg .on { fill: var(--paper); pointer-events: none; }
svg .grid { stroke: var(--line); } svg .axis { stroke: var(--dim); }
svg .spread { stroke: var(--ink); stroke-width: 1.5; }
svg .limit { stroke: var(--ink); stroke-width: 2; } svg .hatch { fill: url(#hatch); pointer-events: none; }
svg .ceiling { stroke: var(--dim); fill: none; stroke-width: 1.5; stroke-dasharray: 5 4; }
""" + "".join(
    f"svg .f{n} {{ fill: var(--s{n}); }} svg .h{n} {{ fill: var(--paper); stroke: var(--s{n}); stroke-width: 2; }} "
    f"svg .o{n} {{ fill: var(--s{n}); fill-opacity: .32; stroke: var(--s{n}); }} "
    f"svg .l{n} {{ stroke: var(--s{n}); fill: none; stroke-width: 1.8; }} "
    f"svg .t{n} {{ fill: var(--s{n}); font-weight: 600; }}\n"
    for n in range(len(LIGHT))
)

PAGE = (
    BASE
    + f":root {{ {_series(LIGHT)} }}\n"
    + f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {_series(DARK)} }} }}\n"
    + DRAWING
    + """
h1 { font-size: 1.9rem; letter-spacing: -.015em; line-height: 1.2; } h2 { font-size: 1.35rem; letter-spacing: -.01em;
  margin: 3.2rem 0 .3rem; padding-top: .9rem; border-top: 1px solid var(--line); }
header p { max-width: 46rem; color: var(--dim); } section > p { max-width: 46rem; color: var(--dim); }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; margin: 1.2rem 0 0; font-size: .92rem; }
a { color: var(--ours); text-decoration: none; } a:hover { text-decoration: underline; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(12.5rem, 1fr)); gap: .8rem; margin: 1.4rem 0 0;
  padding: 0; list-style: none; }
.cards li { background: var(--box); border: 1px solid var(--line); border-radius: .6rem; padding: .8rem 1rem; }
.cards b { display: block; font-size: 1.65rem; font-weight: 650; letter-spacing: -.02em; line-height: 1.25;
  font-variant-numeric: tabular-nums; } .cards small { display: block; line-height: 1.4; }
figure { margin: 1.6rem 0 0; } figcaption { margin-bottom: .9rem; }
figcaption p { color: var(--dim); max-width: 46rem; }
figcaption b { font-size: 1.02rem; font-weight: 650; margin-right: .5rem; }
.rung { display: inline-block; font-size: .78rem; line-height: 1.35; padding: .1rem .55rem; border-radius: 1rem;
  border: 1px solid var(--line); background: var(--box); color: var(--dim); }
.rung.measured { color: var(--good); border-color: currentColor; }
svg { display: block; width: 100%; height: auto; overflow: visible; } svg.narrow { display: none; }
figure details, section > details { margin-top: .7rem; font-size: .92rem; } summary { color: var(--dim); }
.scroll { overflow-x: auto; margin-top: .4rem; overflow-wrap: normal; } .scroll table { font-size: .85rem; }
.scroll td { font-variant-numeric: tabular-nums; }
.number { text-align: right; padding-left: .6rem; white-space: nowrap; }
footer { margin-top: 3.5rem; padding-top: 1rem; border-top: 1px solid var(--line);
  color: var(--dim); font-size: .88rem; }
@media (max-width: 46rem) { svg.wide { display: none; } svg.narrow { display: block; max-width: 34rem; }
  h1 { font-size: 1.5rem; } .cards { grid-template-columns: 1fr 1fr; gap: .6rem; } .cards b { font-size: 1.3rem; }
  .cards li { padding: .6rem .75rem; } figcaption b { display: block; } }
@media print { :root { color-scheme: light; } body { max-width: none; padding: 0; } nav { display: none; }
  figure, .cards li { break-inside: avoid; } svg.wide { display: block; } svg.narrow { display: none; }
  h2 { break-after: avoid; } }
"""
)
